"""``engine=simulation``: Flower's own simulation, on a SuperLink and a Ray that live for one run.

What ``flwr run .`` does with a SuperLink that stays, this does with one of its own, so that the
environment is the one that the run needs, several runs do not meet, and nothing is left behind.
ServerApp and ClientApp are the same, and so are the bits.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fl_app.components import build, check_stopping, settled
from fl_app.config import to_json
from fl_app.federation import initial_model
from fl_app.run_config import local_path
from fl_app.server_app import OUTCOME
from fl_app.types import ConfigError, FlAppError, InterruptedRunError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
CONNECTION = "simulation"
"""Name of our SuperLink among the connections of the `flwr` command."""

START_S = 60.0
"""Seconds a SuperLink may take to start: two on a quiet machine."""

_LAST_LINES = 15
_BASE_LENGTH = 20

# What Flower says of its own doings; the rest of a run's log is worth a person's time.
_CHATTER = re.compile(
    r"(\x1b\[\d+m)?(INFO|DEBUG)\b|.*default simulated SuperNodes changed|Using SuperLink|"
    r"Successfully (started|installed)|.*Manually terminating ClientAppActor|\s*$"
)

_APP = {
    # Whatever is installed or on sys.path here is what runs: nothing of it is copied.
    "pyproject.toml": """
        [project]
        name = "fl-app"
        version = "0"
        description = "What this installation of fl-app has to run."
        license = "Apache-2.0"
        [tool.flwr.app]
        publisher = "fl-app"
        fab-include = ["entry.py"]
        [tool.flwr.app.components]
        serverapp = "entry:server"
        clientapp = "entry:client"
        [tool.flwr.app.config]
        config-json = ""
        launched-at = 0.0
    """,
    "entry.py": "from fl_app import client_app, server_app\n\n"
    "server = server_app.app\nclient = client_app.app\n",
}


class SimulationError(FlAppError):
    """Flower's simulation did not complete the run."""


@dataclass(frozen=True, kw_only=True)
class SimulationEngine:
    """Runs a whole federation on this machine, on Flower's simulation.

    Attributes:
        client_cpus: CPU cores that a client claims, >= 1: as many train at a time as fit.
        client_gpus: Share of a GPU that a client claims, >= 0.
        cpus: Cores to share out, >= ``client_cpus``; None for all of this machine, but no more
            than the population can use.
        threads: Torch's intra-op threads in each process, >= 1. Another number gives other bits,
            and for small models more than one is slower.
        port: Of the SuperLink, reached from this machine alone; 0 for a free one.
    """

    client_cpus: int = 1
    client_gpus: float = 0.0
    cpus: int | None = None
    threads: int = 1
    port: int = 0

    def __post_init__(self) -> None:
        for key, value in (("client_cpus", self.client_cpus), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"engine.{key}={value} must be >= 1.")
        if not self.client_gpus >= 0:
            raise ConfigError(
                f"engine.client_gpus={self.client_gpus} must be >= 0: 0.5 lets two clients share "
                "a GPU."
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"engine.port={self.port} must lie in [0, 65535]; 0: a free one.")
        cores = self.cpus if self.cpus is not None else _cores()
        if self.client_cpus > cores:
            raise ConfigError(
                f"engine.client_cpus={self.client_cpus} exceeds the {cores} cores there are to "
                "share out (engine.cpus): no client could ever train. Lower it."
            )
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "engine=simulation needs Ray, which is not installed: "
                'pip install "fl-app[simulation]", or choose engine=local, which plays the same '
                "run without it."
            )

    def run(self, config: Mapping[str, Any], *, launched_at: float) -> Path:
        """Play a run, or the rest of one; return its folder.

        Raises:
            ConfigError: The configuration cannot be run, or a port is in use.
            InterruptedRunError: Ctrl-C was pressed.
            SimulationError: Flower did not complete the run.
        """
        config = _with_absolute_paths(config)
        config = settled(config)
        components = build(to_json(config))  # before Flower starts: a mistake is answered at once
        check_stopping(components)
        initial_model(components, None if config["resume"] else config["initial_model"])
        clients = len(components.data.clients)
        try:
            with _super_link(self._environment(), self.port) as home:
                return _play(home, config, self._federation(clients), launched_at=launched_at)
        except KeyboardInterrupt:
            folder = config["resume"] or config["run_dir"] or config["output_url"]
            raise InterruptedRunError(
                f"interrupted; a run that has begun goes on with: fl-app run resume={folder}"
            ) from None

    def _federation(self, clients: int) -> str:
        """Return what ``--federation-config`` says of a population of that size."""
        cpus = self.cpus if self.cpus is not None else min(_cores(), clients * self.client_cpus)
        settings = {
            "num-supernodes": clients,
            "client-resources-num-cpus": self.client_cpus,
            "client-resources-num-gpus": float(self.client_gpus),
            "init-args-num-cpus": max(cpus, self.client_cpus),
        }
        return " ".join(f"{key}={value}" for key, value in settings.items())

    def _environment(self) -> dict[str, str]:
        """Return the environment of Flower's and Ray's processes."""
        scripts = sysconfig.get_path("scripts")
        # An outer cluster is not ours to use: its processes have another environment.
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        warnings = [
            inherited.get("PYTHONWARNINGS", ""),
            "ignore::FutureWarning:ray._private.worker",
        ]
        return inherited | {
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "PATH": os.pathsep.join([scripts, inherited.get("PATH", os.defpath)]),
            # What can be imported here can be imported there.
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "PYTHONUNBUFFERED": "1",  # the log is followed as it is written
            "PYTHONWARNINGS": ",".join(filter(None, warnings)),
        }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with paths that hold in any working directory."""
    absolute = {
        key: os.path.abspath(config[key])
        for key in ("run_dir", "resume", "initial_model")
        if config[key]
    }
    privacy = dict(config["privacy"])
    if privacy.get("ledger"):
        privacy["ledger"] = os.path.abspath(privacy["ledger"])
    output_url = os.path.abspath(local_path(config["output_url"]))
    return {**config, **absolute, "privacy": privacy, "output_url": output_url}


@dataclass(frozen=True, kw_only=True)
class _Home:
    """A folder for one SuperLink and all that belongs to it, and the way to reach it."""

    folder: Path
    environment: Mapping[str, str]

    @property
    def outcome(self) -> Path:
        """Where the ServerApp says what came of the run."""
        return self.folder / "outcome.json"

    @property
    def log(self) -> Path:
        """What the SuperLink, and all it starts, print."""
        return self.folder / "superlink.log"

    def flwr(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the ``flwr`` command; Ctrl-C does not reach it."""
        return subprocess.Popen(
            ["flwr", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )


@contextmanager
def _super_link(environment: Mapping[str, str], port: int) -> Generator[_Home, None, None]:
    """Start a SuperLink; when the block ends, however it does, so does all that it started."""
    port = _claimed(port)
    # Ray keeps sockets below, and the path of one may have 107 characters.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _BASE_LENGTH else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="fl-app-", dir=base))
    paths = {"FLWR_HOME": str(folder), "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}
    home = _Home(
        folder=folder,
        environment={**environment, **paths, OUTCOME: str(folder / "outcome.json")},
    )
    warden: subprocess.Popen[bytes] | None = None
    try:
        _write_app(folder / "app")
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{HOST}:{port}"\ninsecure = true\n'
        )
        with home.log.open("wb") as output:
            warden = subprocess.Popen(
                [
                    *(sys.executable, "-m", "fl_app.engines.warden", str(folder)),
                    *("flower-superlink", "--insecure", "--simulation"),
                    *("--isolation", "subprocess", "--host", HOST, "--port", str(port)),
                ],
                env=home.environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )
        _wait_until_up(warden, port, home)
        yield home
    finally:
        _end(warden)
        shutil.rmtree(folder, ignore_errors=True)


def _end(warden: subprocess.Popen[bytes] | None) -> None:
    """Close a warden's stdin and wait until it has ended everything, whatever interrupts."""
    if warden is None or warden.stdin is None:
        return
    warden.stdin.close()
    while warden.poll() is None:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C must not leave half of it running
            warden.wait()


def _claimed(port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ConfigError: Somebody listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"engine.port={port} cannot be used ({error.strerror}): another program listens "
                "there. Choose another, or engine.port=0 for a free one."
            ) from error
        return int(probe.getsockname()[1])


def _write_app(folder: Path) -> None:
    """Write a Flower app that has what is installed here run."""
    folder.mkdir()
    for name, content in _APP.items():
        (folder / name).write_text("\n".join(line.strip() for line in content.splitlines()) + "\n")


def _wait_until_up(warden: subprocess.Popen[bytes], port: int, home: _Home) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if warden.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1.0):
            return
        time.sleep(0.05)
    text = home.log.read_text(errors="replace") if home.log.exists() else ""
    raise SimulationError(_with_last_lines("Flower's SuperLink did not start", text.splitlines()))


def _play(home: _Home, config: Mapping[str, Any], federation: str, *, launched_at: float) -> Path:
    """Submit the run, follow it to its end, and return its folder.

    Flower's word on the run and the run's own summary must agree: a run whose clients never
    answered counts as completed there, and `flwr run` exits with 0 for one that failed.
    """
    run_config = home.folder / "run.toml"  # a file, so that no shell and no parser eats quotes
    run_config.write_text(
        # A JSON string is a TOML string.
        f"config-json = {json.dumps(to_json(config))}\nlaunched-at = {float(launched_at)!r}\n",
        encoding="utf-8",
    )
    submit = ["run", str(home.folder / "app"), CONNECTION, "--run-config", str(run_config)]
    stream = home.flwr(*submit, "--federation-config", federation, "--stream")
    lines = _shown(stream)
    status = _status(home)
    outcome = json.loads(home.outcome.read_text()) if home.outcome.exists() else {}
    _raise_for(outcome, lines)
    run_dir = Path(outcome.get("run_dir", ""))
    if status != "finished:completed" or not (run_dir / "summary.json").is_file():
        raise SimulationError(_with_last_lines(f"Flower's simulation ended as {status}", lines))
    return run_dir


def _raise_for(outcome: Mapping[str, str], lines: list[str]) -> None:
    """Raise what the ServerApp raised, if it did, in words for the person at the terminal."""
    kind, error = outcome.get("kind"), outcome.get("error", "")
    if kind == "config":
        raise ConfigError(error)
    if kind == "known":
        raise SimulationError(error)
    if kind is not None:
        raise SimulationError(_with_last_lines(f"the run failed with {kind}: {error}", lines))


def _shown(stream: subprocess.Popen[str]) -> list[str]:
    """Show a run's log until it ends, if logs are shown; return its last lines; chatter aside."""
    quiet = not log.isEnabledFor(logging.INFO)
    kept: deque[str] = deque(maxlen=200)
    with stream:
        lines: Iterator[str] = stream.stdout if stream.stdout is not None else iter(())
        try:
            for line in lines:
                if not _CHATTER.match(line):
                    kept.append(line.rstrip())
                    if not quiet:
                        typer.echo(line.rstrip(), err=True)
        finally:
            stream.kill()
    return list(kept)


def _status(home: _Home) -> str:
    """Return Flower's word on our only run, such as ``finished:completed``."""
    printed, _ = home.flwr("ls", CONNECTION, "--format", "json").communicate()
    try:
        return str(json.loads(printed)["runs"][0]["status"])
    except (ValueError, LookupError, TypeError):
        return "no run at all"


def _with_last_lines(message: str, lines: list[str]) -> str:
    last = [line for line in lines if line.strip()][-_LAST_LINES:]
    return "\n".join([f"{message}; the last lines of its log:", *last]) if last else f"{message}."
