"""A whole deployed federation in tests: each party a process of its own, all on loopback.

with federation(tmp_path, sites=3) as parties:
    parties.site(2).supernode.kill()

TLS, node authentication and process isolation are on, as in `docker-compose.yml`; every party has
a FLWR_HOME and a port of its own. Between a SuperNode and the server lies a link that can be cut.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_process import end, free_port
from helpers import environment
from link import Link

from fl_app.deployment.certificates import make

START_S = 90.0
NOBODY = 65534

_SETTINGS = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(kw_only=True)
class Party:
    """One process, and what it starts; started again, it is the same one.

    Attributes:
        name: Its log's.
        command: What it runs.
        folder: Its working directory; it and its log lie there.
        variables: Its environment.
    """

    name: str
    command: list[str]
    folder: Path
    variables: Mapping[str, str]
    _process: subprocess.Popen[bytes] | None = None
    _said_before: int = 0

    @property
    def log(self) -> str:
        """What it has printed so far, in all its lives."""
        return self._printed(0)

    @property
    def last_log(self) -> str:
        """What it has printed since it was started last."""
        return self._printed(self._said_before)

    def _printed(self, start: int) -> str:
        return re.sub(r"\x1b\[\d*m", "", self._log.read_bytes()[start:].decode(errors="replace"))

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Party:
        """Start it; a session of its own is what ends with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._said_before = log.tell()
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=dict(self.variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def kill(self) -> None:
        """Kill it, and what it started, as a power cut would."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if self.running:
            assert self._process is not None
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self.kill()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def exit_code(self, timeout_s: float) -> int:
        """Return the code with which it ends by itself."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def wait_for(self, words: str, *, timeout_s: float = START_S) -> None:
        """Wait until it has printed some words since its start, or fail if it ends or does not."""
        deadline = time.monotonic() + timeout_s
        while words not in self.last_log:
            assert self.running, f"{self.name} ended:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} never said {words!r}:\n{self.log}"
            time.sleep(0.05)

    def come_back(self, *, timeout_s: float = 150.0) -> None:
        """Start a SuperNode as a restart policy does: until the SuperLink gives up its old self."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.start()
            while self.running:
                if "SuperNode ID" in self.last_log:
                    return
                time.sleep(0.1)
            time.sleep(1.0)
        raise AssertionError(self.log)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What runs where one owner's data is.

    Attributes:
        number: 1 for ``site-1``, which is client ``0``.
        folder: Holds its policy, its ledger and what it remembers.
        worker: Its own, which has the data.
        supernode: Talks to the server.
        clientapp: Runs the code that the server sends.
        link: Between the SuperNode and the server.
    """

    number: int
    folder: Path
    worker: Party
    supernode: Party
    clientapp: Party
    link: Link

    @property
    def client(self) -> str:
        """The name by which a run knows it."""
        return str(self.number - 1)

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def parties(self) -> list[Party]:
        return [self.worker, self.supernode, self.clientapp]

    def start(self) -> Site:
        for party in self.parties():
            party.start()
        return self

    def ready(self) -> None:
        """Wait until the server knows it."""
        self.supernode.wait_for("SuperNode ID")

    def kill(self) -> None:
        """As when its machine loses power."""
        for party in self.parties():
            party.kill()


@dataclass(kw_only=True)
class Federation:
    """All parties, and the way to the SuperLink for an operator.

    Attributes:
        folder: Everything lies below; the name marks all of its processes.
        port: Of the SuperLink.
        superlink: Carries the messages and remembers the runs.
        serverapp: Runs the server's side of runs; its working directory is its own.
        gateway: All that sites can reach.
        gateway_port: Where they do.
        unit: Whose privacy the sites' owners insist on: ``none`` or ``record``.
        confined: Whether what the server sends runs without the rights of root.
        sites: By number.
    """

    folder: Path
    port: int
    superlink: Party
    serverapp: Party
    gateway: Party
    gateway_port: int
    unit: str
    confined: bool = False
    sites: dict[int, Site] = field(default_factory=dict)

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def ca(self) -> Path:
        return self.pki / "public" / "ca.crt"

    @property
    def address(self) -> str:
        """Where an operator submits runs."""
        return f"127.0.0.1:{self.port}"

    @property
    def engine(self) -> list[str]:
        """What ``fl-app run`` is told to play a run here."""
        return [
            "engine=deployment",
            f"engine.superlink={self.address}",
            f"engine.root_certificates={self.ca}",
        ]

    @property
    def outputs(self) -> Path:
        """Where the ServerApp writes."""
        return self.serverapp.folder / "outputs"

    def site(self, number: int) -> Site:
        return self.sites[number]

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Return what an operator's ``flwr`` command does."""
        home = self.folder / "operator"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "fed"\n\n'
            f'[superlink.fed]\naddress = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        )
        return subprocess.run(
            ["flwr", *arguments],
            cwd=home,
            env={**_environment(self.folder, "operator")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def register(self, public_key: Path) -> None:
        done = self.flwr("supernode", "register", str(public_key), "fed", "--format", "json")
        assert json.loads(done.stdout)["success"], done.stdout + done.stderr

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the SuperLink knows of its nodes."""
        listed = json.loads(self.flwr("supernode", "ls", "fed", "--format", "json").stdout)
        found: list[dict[str, Any]] = listed["nodes"]
        return found

    def runs(self) -> list[dict[str, Any]]:
        """Return what the SuperLink says of its runs, the newest first."""
        listed = json.loads(self.flwr("ls", "fed", "--format", "json").stdout)
        found: list[dict[str, Any]] = listed["runs"]
        return found

    def add_site(self, number: int, *, key: Path | None = None, ca: Path | None = None) -> Site:
        """Return a further site, not started; as good as the others unless told otherwise.

        Args:
            number: Its own; certificates and keys of that number are there.
            key: Private key of its node.
            ca: Root certificate it knows.
        """
        pki, folder = self.pki / f"site-{number}", self.folder / f"site-{number}"
        (folder / "state").mkdir(parents=True, exist_ok=True)
        app, door = self.folder / f"app-{number}", self.folder / f"door-{number}"
        door.mkdir(exist_ok=True)
        runtime, link = free_port(), Link(self.gateway_port)
        policy, path = folder / "policy.yaml", door / "site.sock"
        bundles = _superexec(runtime, self.pki / f"site-{number}-app")
        if self.confined:
            bundles = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *bundles]
            _give_away(folder)
        policy.write_text(_POLICY[self.unit])
        policy.chmod(0o600)
        worker = Party(
            name="worker",
            folder=folder,
            variables=_environment(self.folder, f"worker-{number}"),
            command=[
                *(sys.executable, "-m", "fl_app", "site", "--policy", str(policy)),
                *("--socket", str(path), "--state", str(folder / "state")),
                *("--name", str(number - 1)),
            ],
        )
        supernode = Party(
            name="supernode",
            folder=folder,
            variables=_environment(self.folder, f"supernode-{number}"),
            command=[
                *("flower-supernode", "--superlink", f"127.0.0.1:{link.port}"),
                *("--root-certificates", str(ca or pki / "ca.crt")),
                *("--auth-supernode-private-key", str(key or pki / "node.key")),
                *("--isolation", "process", "--host", "127.0.0.1", "--port", str(runtime)),
                *("--ssl-certfile", str(pki / "runtime.crt")),
                *("--ssl-keyfile", str(pki / "runtime.key")),
                *("--ssl-ca-certfile", str(pki / "ca.crt")),
                *("--superexec-auth-secret-file", str(pki / "superexec.secret")),
                *("--node-config", f"partition-id={number - 1} num-partitions=3"),
            ],
        )
        clientapp = Party(
            name="clientapp",
            folder=app,
            variables={
                **_environment(self.folder, f"clientapp-{number}"),
                "FL_APP_SITE_SOCKET": str(path),
            },
            command=bundles,
        )
        site = Site(
            number=number,
            folder=folder,
            worker=worker,
            supernode=supernode,
            clientapp=clientapp,
            link=link,
        )
        self.sites[number] = site
        return site

    def healthy(self) -> None:
        """Wait until the SuperLink answers, through the gateway if that runs."""
        port = self.gateway_port if self.gateway.running else self.port
        context = ssl.create_default_context(cafile=str(self.ca))
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                urllib.request.urlopen(
                    f"https://127.0.0.1:{port}/health", timeout=2, context=context
                ).close()
                return
            assert self.superlink.running, self.superlink.log
            assert time.monotonic() < deadline, self.superlink.log + self.gateway.log
            time.sleep(0.1)


_POLICY = {
    "none": "version: 1\ndata_set: test\nunit: none\n",
    "record": (
        "version: 1\ndata_set: test\nunit: record\nepsilon: 10000.0\ndelta: 1.0e-5\n"
        "ledger: ledger.jsonl\nshare_budget: true\n"
    ),
}


@contextmanager
def federation(
    folder: Path,
    *,
    sites: int = 3,
    more_keys: int = 0,
    unit: str = "none",
    confined: bool = False,
) -> Generator[Federation, None, None]:
    """Start a federation and end all of it afterwards.

    Args:
        folder: For what is left to look at.
        sites: Sites that are registered and started.
        more_keys: Further sites that have keys, and are registered, but not started.
        unit: Whose privacy the sites' owners insist on: ``none`` or ``record``.
        confined: Whether what the server sends runs without the rights of root; takes root.
    """
    home = Path(tempfile.mkdtemp(prefix="fed-", dir="/tmp"))
    parties = _parties(home, unit)
    parties.confined = confined
    make(parties.pki, sites + more_keys)
    if confined:
        for party in parties.pki.iterdir():
            if not party.name.endswith("-app") and party.name != "public":
                _give_away(party)
    try:
        parties.superlink.start()
        parties.healthy()
        parties.gateway.start()
        parties.serverapp.start()
        for number in range(1, sites + 1):
            parties.add_site(number).worker.start()
        for number in range(1, sites + more_keys + 1):
            parties.register(parties.pki / "public" / f"site-{number}.pub")
        parties.healthy()
        for site in parties.sites.values():
            site.supernode.start()
            site.clientapp.start()
        for site in parties.sites.values():
            site.ready()
        yield parties
    finally:
        for site in parties.sites.values():
            site.kill()
            site.link.close()
        for party in (parties.serverapp, parties.gateway, parties.superlink):
            party.kill()
        end(home)
        for party in home.glob("*/*.log"):
            kept = folder / "federation" / party.relative_to(home)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(party, kept)
        shutil.rmtree(home, ignore_errors=True)


def _give_away(folder: Path) -> None:
    """Make a folder another user's: whoever is root without its rights cannot enter it."""
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o700)


def _parties(home: Path, unit: str) -> Federation:
    port, gateway_port, pki = free_port(), free_port(), home / "pki"
    superlink = Party(
        name="superlink",
        folder=home / "superlink",
        variables=_environment(home, "superlink"),
        command=[
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
            *("--isolation", "process", "--database", str(home / "superlink" / "state.db")),
            *("--enable-supernode-auth", "--ssl-certfile", str(pki / "superlink" / "tls.crt")),
            *("--ssl-keyfile", str(pki / "superlink" / "tls.key")),
            *("--ssl-ca-certfile", str(pki / "superlink" / "ca.crt")),
            *("--superexec-auth-secret-file", str(pki / "superlink" / "superexec.secret")),
        ],
    )
    gateway = Party(
        name="gateway",
        folder=home / "gateway",
        variables=_environment(home, "gateway"),
        command=[
            *(sys.executable, "-m", "fl_app", "gateway", "--superlink", f"127.0.0.1:{port}"),
            *("--root-certificates", str(pki / "gateway" / "ca.crt")),
            *("--certificate", str(pki / "gateway" / "tls.crt")),
            *("--key", str(pki / "gateway" / "tls.key")),
            *("--host", "127.0.0.1", "--port", str(gateway_port)),
            *("--max-reply-mib", "64"),
        ],
    )
    serverapp = Party(
        name="serverapp",
        folder=home / "serverapp",
        variables=_environment(home, "serverapp"),
        command=_superexec(port, pki / "serverapp"),
    )
    return Federation(
        folder=home,
        port=port,
        superlink=superlink,
        serverapp=serverapp,
        gateway=gateway,
        gateway_port=gateway_port,
        unit=unit,
    )


def _superexec(port: int, pki: Path) -> list[str]:
    return [
        *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--root-certificates", str(pki / "ca.crt")),
        *("--superexec-auth-secret-file", str(pki / "superexec.secret")),
    ]


def _environment(home: Path, party: str) -> dict[str, str]:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    flwr_home = home / "homes" / party
    flwr_home.mkdir(parents=True, exist_ok=True)
    own = {"PATH": path, "FLWR_HOME": str(home / "operator" if party == "operator" else flwr_home)}
    return {**environment(), **_SETTINGS, **own}
