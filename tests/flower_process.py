"""Plain ``flwr run`` in tests: a FLWR_HOME and ports of its own, and nothing left running.

with flower(tmp_path) as flwr:
    played = flwr.run(overrides="rounds=1", supernodes=3)
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import REPOSITORY, environment

from fl_app.engines.warden import descendants

TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came of one ``flwr run``.

    Attributes:
        code: Exit code of the command.
        log: What it printed, with the run's own log.
        status: The SuperLink's word on the run, such as ``finished:completed``; empty without one.
        client_seconds: What Flower's nodes spent on messages, by the SuperLink's own account; 0
            exactly if none was sent one.
    """

    code: int
    log: str
    status: str
    client_seconds: float

    @property
    def plain(self) -> str:
        """The log in one line, without the frames and wraps that Flower draws errors in."""
        return " ".join(re.sub(r"\x1b\[\d*m|[│╭╮╰╯─]", " ", self.log).split())


@dataclass(frozen=True, kw_only=True)
class Flower:
    """Flower's command line, at home in a folder of its own.

    Attributes:
        home: Its FLWR_HOME, where Ray's files go as well; the name marks all of its processes.
        cwd: Where it is called; runs put their folders below.
        variables: Its environment.
    """

    home: Path
    cwd: Path
    variables: Mapping[str, str]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Return what a ``flwr`` command does."""
        return subprocess.run(
            ["flwr", *arguments],
            cwd=self.cwd,
            env=dict(self.variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )

    def run(
        self, *, overrides: str = "", supernodes: int | None = None, run_config: str | None = None
    ) -> Played:
        """Play a run of this app to its end."""
        given = run_config if run_config is not None else f"overrides={json.dumps(overrides)}"
        options = ["--run-config", given]
        if supernodes is not None:
            federation = f"num-supernodes={supernodes} client-resources-num-cpus=1"
            options += ["--federation-config", federation]
        done = self.call("run", str(REPOSITORY), "--stream", *options)
        found = re.search(r"Successfully started run (\d+)", done.stdout)
        listed = self.listed(found[1]) if found else {"status": "", "compute-time": {}}
        return Played(
            code=done.returncode,
            log=done.stdout,
            status=listed["status"],
            client_seconds=listed["compute-time"].get("clientapp-seconds", 0.0),
        )

    def listed(self, run_id: str) -> dict[str, Any]:
        """Return what the SuperLink says of a run."""
        listed = json.loads(self.call("ls", "--run-id", run_id, "--format", "json").stdout)
        run: dict[str, Any] = listed["runs"][0]
        return run

    def run_dirs(self) -> list[Path]:
        """Return the folders of the runs so far, oldest first."""
        return sorted(path.parent for path in self.cwd.rglob("config.yaml"))


@contextmanager
def flower(cwd: Path, **variables: str) -> Generator[Flower, None, None]:
    """Give ``flwr`` a home and ports of its own, and end all that it started afterwards."""
    # Ray's sockets lie below, and the path of one may have 107 characters.
    home = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    settings = {
        "PATH": path,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    try:
        yield Flower(home=home, cwd=cwd, variables={**environment(), **settings, **variables})
    finally:
        end(home)
        subprocess.run(["rm", "-rf", str(home)], check=False)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(home: Path | str) -> dict[int, str]:
    """Return what runs with a home in its environment or arguments: process -> command line."""
    marker, found = str(home).encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (folder / "cmdline").read_bytes()
            if int(folder.name) != os.getpid() and (
                marker in arguments or marker in (folder / "environ").read_bytes()
            ):
                found[int(folder.name)] = arguments.replace(b"\0", b" ").decode(errors="replace")
    return found


def end(home: Path) -> None:
    """End everything that has a home in its environment or arguments, and what is below it."""
    deadline = time.monotonic() + 20
    while (marked := processes_of(home)) and time.monotonic() < deadline:
        for process in {*marked, *(below for root in marked for below in descendants(root))}:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    assert not marked, f"still running: {marked}"
