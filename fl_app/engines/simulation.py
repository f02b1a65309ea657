"""``engine=simulation``: Flower's own simulation, on a SuperLink and a Ray that live for one run.

What ``flwr run .`` does with a SuperLink that stays, this does with one of its own, so that the
environment is the one that the run needs, several runs do not meet, and nothing is left behind.
ServerApp and ClientApp are the same, and so are the bits.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_app.components import build, check_stopping, settled
from fl_app.config import to_json
from fl_app.engines.flower_command import (
    FlowerCommand,
    flower_environment,
    judge,
    summarised,
    with_last_lines,
)
from fl_app.engines.guarded import guarded
from fl_app.federation import initial_model
from fl_app.run_config import local_path
from fl_app.types import ConfigError, FlAppError, InterruptedRunError

HOST = "127.0.0.1"
START_S = 60.0
"""Seconds a SuperLink may take to start: two on a quiet machine."""

_BASE_LENGTH = 20


class SimulationError(FlAppError):
    """Flower's simulation could not be started."""


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
            FlowerRunError: Flower did not complete the run.
            SimulationError: Flower's simulation did not start.
        """
        config = _with_absolute_paths(config)
        config = settled(config)
        components = build(to_json(config))  # before Flower starts: a mistake is answered at once
        check_stopping(components)
        initial_model(components, None if config["resume"] else config["initial_model"])
        clients = len(components.data.clients)
        try:
            with _super_link(self._environment(), self.port) as flwr:
                options = ("--federation-config", self._federation(clients))
                ended = flwr.play(config, launched_at=launched_at, options=options)
                outcome = judge(ended, "Flower's simulation")
                return summarised(Path(outcome["run_dir"]), ended)
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
        # An outer cluster is not ours to use: its processes have another environment.
        inherited = {k: v for k, v in flower_environment().items() if k != "RAY_ADDRESS"}
        warnings = [
            inherited.get("PYTHONWARNINGS", ""),
            "ignore::FutureWarning:ray._private.worker",
        ]
        return inherited | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
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


@contextmanager
def _super_link(environment: Mapping[str, str], port: int) -> Generator[FlowerCommand, None, None]:
    """Start a SuperLink; when the block ends, however it does, so does all that it started."""
    port = _claimed(port)
    # Ray keeps sockets below, and the path of one may have 107 characters.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _BASE_LENGTH else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="fl-app-", dir=base))
    environment = {
        **environment,
        **dict.fromkeys(("FLWR_HOME", "RAY_TMPDIR", "TMPDIR"), str(folder)),
    }
    command = [
        *("flower-superlink", "--insecure", "--simulation"),
        *("--isolation", "subprocess", "--host", HOST, "--port", str(port)),
    ]
    try:
        flwr = FlowerCommand(
            home=folder, address=f"{HOST}:{port}", insecure=True, environment=environment
        )
        printed = folder / "superlink.log"
        with (
            printed.open("wb") as output,
            guarded(command, folder=folder, environment=environment, output=output) as warden,
        ):
            _wait_until_up(warden, port, printed)
            yield flwr
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _wait_until_up(warden: subprocess.Popen[bytes], port: int, printed: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if warden.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1.0):
            return
        time.sleep(0.05)
    lines = printed.read_text(errors="replace").splitlines() if printed.exists() else []
    raise SimulationError(with_last_lines("Flower's SuperLink did not start", lines))
