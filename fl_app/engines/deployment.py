"""``engine=deployment``: a federation of real clients, in containers here or wherever they are.

With ``engine.superlink=null`` the federation of ``docker-compose.yml`` is brought up for the run
and taken down after it; otherwise the run is submitted to a SuperLink that is there. Either way
the run is followed to its end, and what it leaves lies in the run's folder on this machine.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_app.components import build, check_stopping, settled
from fl_app.config import to_json, to_yaml
from fl_app.engines.compose import ComposeFederation
from fl_app.engines.flower_command import FlowerCommand, SuperLinkError, judge, summarised
from fl_app.engines.superlink import check_superlink, host_and_port, wait_for_supernodes
from fl_app.federation import run_folder
from fl_app.files import write_atomically
from fl_app.types import ConfigError, InterruptedRunError

log = logging.getLogger(__name__)

LOST_S = 600.0
"""Seconds that a SuperLink may be away in the middle of a run: it is started again, or upgraded."""

PLACE = ".deployed"
"""File in a run's folder here that says which folder is the run's on the server's machine."""


@dataclass(frozen=True, kw_only=True)
class DeploymentEngine:
    """Runs a federation of real clients.

    Attributes:
        superlink: ``host:port`` of a SuperLink's Control API; None for containers on this machine.
        root_certificates: The CA that vouches for it; None for those that the system trusts.
        insecure: Whether it speaks no TLS.
        clients: How many there are: the population, unless ``partition.num_clients`` says so.
        gpu: Whether the containers of the clients get this machine's GPU.
        compose_file: Describes the federation.
        project: Its name for compose: containers and volumes of another one are others.
        keep_up: Whether the containers stay up after the run.
        shared_outputs: Whether the ServerApp writes to the same paths as this machine.
        port: Of this machine, where clients from elsewhere reach the containers' gateway.
        start_s: Seconds within which the federation must be up and a client be there, > 0.
    """

    superlink: str | None = None
    root_certificates: str | None = None
    insecure: bool = False
    clients: int = 3
    gpu: bool = False
    compose_file: str = "docker-compose.yml"
    project: str = "fl-app"
    keep_up: bool = False
    shared_outputs: bool = False
    port: int = 8443
    start_s: float = 120.0

    def __post_init__(self) -> None:
        if self.superlink is not None:
            host_and_port(self.superlink)
        elif self.root_certificates:
            raise ConfigError(
                f"engine.root_certificates={self.root_certificates} is of a SuperLink that is "
                "there, and engine.superlink=null starts one, with certificates of its own. Name "
                "the SuperLink, or leave the certificates out."
            )
        if self.insecure and self.root_certificates:
            raise ConfigError(
                f"engine.insecure=true means no TLS, and engine.root_certificates="
                f"{self.root_certificates} is for TLS: choose one."
            )
        if self.gpu and (self.insecure or self.superlink is not None):
            other = (
                "engine.insecure=true" if self.insecure else f"engine.superlink={self.superlink}"
            )
            raise ConfigError(
                f"engine.gpu=true is for the clients of docker-compose.yml with TLS, and "
                f"{other} asks for others: leave one out."
            )
        if self.clients < 1:
            raise ConfigError(f"engine.clients={self.clients} must be >= 1.")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"engine.port={self.port} must lie in [1, 65535].")
        if not 0 < self.start_s < math.inf:
            raise ConfigError(f"engine.start_s={self.start_s} must be > 0 and finite.")

    def run(self, config: Mapping[str, Any], *, launched_at: float) -> Path:
        """Play a run, or the rest of one; return its folder.

        Raises:
            ConfigError: The configuration cannot be run, or the federation cannot be used as it
                is described.
            InterruptedRunError: Ctrl-C was pressed.
            FlowerRunError: The run failed.
            SuperLinkError: The SuperLink was lost.
        """
        config = settled(config)
        check_stopping(build(to_json(config)))  # a mistake is answered before anything is started
        if self.superlink is None:
            federation = ComposeFederation(
                file=self.compose_file,
                project=self.project,
                port=self.port,
                clients=self.clients,
                profile="gpu" if self.gpu else "insecure" if self.insecure else None,
                keep_up=self.keep_up,
                start_s=self.start_s,
            )
            return federation.play(config, launched_at=launched_at)
        certificates = Path(self.root_certificates).absolute() if self.root_certificates else None
        check_superlink(self.superlink, root_certificates=certificates, insecure=self.insecure)
        home = Path(tempfile.mkdtemp(prefix="fl-app-"))
        try:
            flwr = FlowerCommand(
                home=home,
                address=self.superlink,
                root_certificates=certificates,
                insecure=self.insecure,
                patience_s=LOST_S,
            )
            wait_for_supernodes(flwr, patience_s=self.start_s)
            if self.shared_outputs:
                return self._play_here(flwr, config, launched_at)
            return self._play_there(flwr, config, launched_at)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _play_here(
        self, flwr: FlowerCommand, config: Mapping[str, Any], launched_at: float
    ) -> Path:
        """Play a run whose folder the ServerApp sees under the same name."""
        folder = config["resume"] or config["run_dir"] or config["output_url"]
        with _stopped_with(flwr, folder):
            ended = flwr.play(config, launched_at=launched_at)
        outcome = judge(ended, "the run", folder=folder)
        return summarised(Path(outcome["run_dir"]), ended)

    def _play_there(
        self, flwr: FlowerCommand, config: Mapping[str, Any], launched_at: float
    ) -> Path:
        """Play a run in a folder of the server's machine, and bring here what it leaves."""
        here = run_folder(config)
        there = _place_of(here) if config["resume"] else _place_for(here)

        def submitted() -> None:
            """Leave here, from the first moment, what it takes to go on with the run."""
            if not config["resume"]:
                saved = to_yaml({**config, "run_dir": str(here)})
                write_atomically(here / "config.yaml", saved.encode())
                write_atomically(here / PLACE, json.dumps({"run_dir": there}).encode())

        sent = {
            **config,
            "run_dir": there,
            "resume": there if config["resume"] else None,
            "output_url": "outputs",
        }
        try:
            with _stopped_with(flwr, here):
                ended = flwr.play(sent, launched_at=launched_at, collect=True, submitted=submitted)
            judge(ended, "the run", folder=here)
        except BaseException:
            _forget_if_it_never_began(here)
            raise
        ended.heard.unpack(here)
        return summarised(here, ended)


def _place_for(here: Path) -> str:
    """Return a folder for a run on the server's machine, below where its ServerApps work."""
    return f"outputs/{here.parent.name}/{here.name}_{secrets.token_hex(4)}"


def _place_of(here: Path) -> str:
    """Return the folder on the server's machine of a run that has a folder here.

    Raises:
        ConfigError: It was no such run.
    """
    try:
        return str(json.loads((here / PLACE).read_text())["run_dir"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"resume={here} was not deployed with engine.shared_outputs=false ({PLACE} in it "
            "cannot be read), so its checkpoints are not on the server's machine: resume it with "
            "the engine that it was started with."
        ) from error


def _forget_if_it_never_began(here: Path) -> None:
    """Remove the folder of a run that no SuperLink has taken."""
    marker = here / "config.yaml"
    if marker.is_file() and not marker.stat().st_size:
        marker.unlink()
        with suppress(OSError):
            here.rmdir()


@contextmanager
def _stopped_with(flwr: FlowerCommand, folder: object) -> Generator[None, None, None]:
    """Have the run stopped if Ctrl-C is pressed: it goes on only when somebody says so."""
    try:
        yield
    except KeyboardInterrupt:
        if flwr.run_id is None:
            raise InterruptedRunError("interrupted before the run began.") from None
        log.warning("Stopping run %s.", flwr.run_id)
        goes_on = f"the run goes on with: fl-app run resume={folder}"
        try:
            flwr.stop()
        except SuperLinkError as error:
            raise InterruptedRunError(
                f"interrupted, but run {flwr.run_id} was not stopped at {flwr.address} ({error}): "
                f"it may still be going on. Once it has ended, {goes_on}"
            ) from error
        raise InterruptedRunError(f"interrupted; {goes_on}") from None
