"""A federation of containers for one run: brought up, played on, taken down whatever happens.

``docker compose`` or docker-compose 1.29, whichever is there. Volumes are never removed: the
clients' ledgers lie in them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from fl_app.config import to_json
from fl_app.engines.flower_command import Ended, raise_for, summarised, with_last_lines
from fl_app.engines.guarded import end, guarded
from fl_app.federation import run_folder
from fl_app.files import write_atomically
from fl_app.run_config import local_path
from fl_app.run_log import Heard
from fl_app.types import ConfigError, FlAppError, InterruptedRunError

log = logging.getLogger(__name__)

GATEWAY_SERVICE = "gateway"
IMAGE = "fl-app:dev"
SITES = 3
"""Clients that ``docker-compose.yml`` has by itself."""

OUTPUTS = "outputs"
"""Where the run's folder is mounted, below the working directory of the containers."""

_QUICK_S = 30.0


class ComposeError(FlAppError):
    """The federation of containers did not come up, or what it played failed."""


@dataclass(frozen=True, kw_only=True)
class ComposeFederation:
    """The federation that a compose file describes.

    Attributes:
        file: The compose file; looked up in the working directory, then beside this package.
        project: Its name.
        port: Where the gateway is published on this machine.
        clients: How many clients it has.
        profile: Of the compose file, such as ``gpu``, if any.
        keep_up: Whether it stays up in the end.
        start_s: Seconds within which it must be up, its image being there.
    """

    file: str
    project: str
    port: int
    clients: int
    profile: str | None
    keep_up: bool
    start_s: float

    def play(self, config: Mapping[str, Any], *, launched_at: float) -> Path:
        """Bring the federation up, play a run on it, take it down; return the run's folder.

        Raises:
            ConfigError: It cannot be started, or the run cannot be played.
            ComposeError: It did not start, or the run failed.
            InterruptedRunError: Ctrl-C was pressed.
        """
        compose = _Compose(
            command=[*_compose_command(), *self._options()], environment=dict(os.environ)
        )
        if not compose.quietly("ps", "-q", GATEWAY_SERVICE).strip():
            _check_port(self.port)
        root, here = _folders(config)
        _check_writable(root)
        there = f"{OUTPUTS}/{here.relative_to(root)}"
        sent = {
            **config,
            "run_dir": there,
            "resume": there if config["resume"] else None,
            "output_url": OUTPUTS,
        }
        compose = replace(compose, environment=self._environment(root, sent, launched_at))
        name = f"{self.project}-run-{secrets.token_hex(4)}"
        begun = False
        try:
            with self._up(compose, name):
                begun = True
                return self._played(compose, here, name)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted; a run that has begun goes on with: fl-app run resume={here}"
                if begun
                else "interrupted before the run began."
            ) from None

    def _options(self) -> list[str]:
        profile = [] if self.profile is None else ["--profile", self.profile]
        files = [self._found(), *_more_sites(self._found(), self.clients, self.project)]
        return ["-p", self.project, *(o for f in files for o in ("-f", str(f))), *profile]

    def _found(self) -> Path:
        places = [Path.cwd() / self.file, Path(__file__).resolve().parents[2] / self.file]
        for place in places:
            if place.is_file():
                return place
        looked = " and ".join(dict.fromkeys(str(place.parent) for place in places))
        raise ConfigError(
            f"engine.compose_file={self.file} does not exist (looked in {looked}): name it, or "
            "call fl-app in a clone of the repository, which has one."
        )

    def _environment(
        self, root: Path, sent: Mapping[str, Any], launched_at: float
    ) -> dict[str, str]:
        """Return what the compose file is filled in with."""
        return {
            **os.environ,
            "FL_APP_UID": str(os.getuid()),
            "FL_APP_GID": str(os.getgid()),
            "FL_APP_OUTPUTS": str(root),
            "FL_APP_PORT": str(self.port),
            "CLIENTS": str(self.clients),
            "CONFIG_JSON": to_json(sent),
            "LAUNCHED_AT": repr(float(launched_at)),
        }

    @contextmanager
    def _up(self, compose: _Compose, name: str) -> Generator[None, None, None]:
        """Have the federation up in the block; down after it, even if this process is killed.

        Compose takes down no container that one of its ``run`` commands has started, and leaves
        it behind when that is killed; so it has a name. Where the federation stays up, it is told
        to stop its run, if it is still there.
        """
        if self.keep_up:
            last = ['docker kill --signal INT "$0" && docker wait "$0"', name]
        else:
            down = [*compose.command, "down", "--timeout", "10"]
            last = ['docker rm --force "$0"; exec "$@"', name, *down]
        taker = _done_at_the_end(["sh", "-c", *last], compose.environment)
        try:
            yield
        finally:
            if not self.keep_up:
                log.info("Taking the federation down.")
            end(taker)

    def _played(self, compose: _Compose, here: Path, name: str) -> Path:
        """Have the ``run`` service bring up whatever it depends on, and play the run."""
        image = os.environ.get("FL_APP_IMAGE") or IMAGE
        if _called(["docker", "image", "inspect", image]).returncode:
            log.info("Building the image, which is done once.")
            built, code = compose.shown("build")
            if code:
                raise ComposeError(with_last_lines(f"{image} could not be built", built))
        log.info("Bringing the federation up.")
        service = f"run-{self.profile}" if self.profile else "run"
        heard = Heard()
        lines, code = compose.shown(
            *("run", "--rm", "--name", name, "-T", service), heard=heard, patience_s=self.start_s
        )
        if code is None:
            raise ComposeError(
                with_last_lines(
                    f"the federation did not come up within engine.start_s={self.start_s:.0f} s "
                    "(engine.keep_up=true leaves it there to look at)",
                    lines,
                )
            )
        raise_for(heard.outcome, lines)
        if code:
            raise ComposeError(with_last_lines(f"the run ended with exit code {code}", lines))
        return summarised(here, Ended(status="completed", heard=heard, lines=lines))


def _more_sites(file: Path, clients: int, project: str) -> list[Path]:
    """Return the file that gives a federation more clients than its own compose file, if need be.

    It lies where it can still be found when the federation is taken down.
    """
    if clients <= SITES:
        return []
    maker = file.parent / "docker" / "sites.py"
    if not maker.is_file():
        raise ConfigError(
            f"engine.clients={clients} is more than the {SITES} of {file}, and {maker}, which adds "
            "some, is not there: take the compose file of a clone, or lower it."
        )
    made = _called([sys.executable, str(maker), str(clients)])
    if made.returncode:
        raise ConfigError(f"engine.clients={clients} cannot be: {made.stderr.strip()}")
    path = Path(tempfile.gettempdir()) / f"fl-app-{os.getuid()}-{project}-{clients}.yml"
    write_atomically(path, made.stdout.encode())
    return [path]


def _folders(config: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the folder that the containers see, and the run's folder below it."""
    output_url = Path(local_path(config["output_url"])).absolute()
    if config["resume"]:
        here = Path(config["resume"]).absolute()
    elif config["run_dir"]:
        here = Path(config["run_dir"]).absolute()
    else:
        here = run_folder(config).absolute()
        (here / "config.yaml").unlink()  # the ServerApp makes it, to call the folder its own
    root = output_url if here.is_relative_to(output_url) and here != output_url else here.parent
    return root, here


@dataclass(frozen=True, kw_only=True)
class _Compose:
    """The compose command for one project."""

    command: Sequence[str]
    environment: Mapping[str, str]

    def quietly(self, *arguments: str) -> str:
        """Return what a quick command prints.

        Raises:
            ConfigError: It fails: the file is not valid, or the engine does not answer.
        """
        done = _called([*self.command, *arguments], environment=self.environment)
        if done.returncode:
            raise ConfigError(
                f"engine.compose_file cannot be used: {' '.join(self.command)} {arguments[0]} "
                f"says: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def shown(
        self, *arguments: str, heard: Heard | None = None, patience_s: float | None = None
    ) -> tuple[list[str], int | None]:
        """Run a command, and show what it prints if logs are shown.

        It is ended with this process: containers that it was about to start do not start later.

        Args:
            arguments: Of the command.
            heard: Is told what is meant for a launcher.
            patience_s: Seconds within which something must have been heard, or None.

        Returns:
            The last lines that it printed, and its exit code; None if its time was up.
        """
        kept: deque[str] = deque(maxlen=200)
        late = threading.Event()
        with guarded(
            [*self.command, *arguments],
            folder=Path(tempfile.mkdtemp(prefix="fl-app-")),
            environment=self.environment,
            output=subprocess.PIPE,
        ) as process:

            def give_up() -> None:
                late.set()
                if process.stdin is not None:
                    process.stdin.close()

            timer = threading.Timer(patience_s or 0.0, give_up)
            if patience_s:
                timer.start()
            try:
                for line in _text(process):
                    if heard is not None and heard.take(line):
                        timer.cancel()
                        continue
                    kept.append(line.rstrip())
                    if log.isEnabledFor(logging.INFO):
                        typer.echo(line.rstrip(), err=True)
                code = process.wait()
            finally:
                timer.cancel()
        return list(kept), None if late.is_set() else code


def _text(process: subprocess.Popen[bytes]) -> Iterator[str]:
    for line in process.stdout or ():
        yield line.decode(errors="replace")


def _called(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_QUICK_S,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {_QUICK_S:.0f} s")


def _compose_command() -> list[str]:
    """Return the compose command that is installed, with an engine that answers.

    Raises:
        ConfigError: There is none.
    """
    way_out = (
        "install Docker with its compose plugin, or name a SuperLink that is there: "
        "engine.superlink=HOST:PORT."
    )
    docker = shutil.which("docker")
    if docker is None:
        raise ConfigError(f"engine=deployment needs docker, and there is none: {way_out}")
    engine = _called([docker, "version", "--format", "{{.Server.Version}}"])
    if engine.returncode:
        raise ConfigError(
            f"engine=deployment needs Docker's engine, which does not answer "
            f"({engine.stderr.strip() or engine.stdout.strip()}): start it, or join the group that "
            "may use it."
        )
    if not _called([docker, "compose", "version"]).returncode:
        return [docker, "compose"]
    if alone := shutil.which("docker-compose"):
        return [alone]
    raise ConfigError(f"engine=deployment needs docker compose, and there is none: {way_out}")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            raise ConfigError(
                f"engine.port={port} cannot be used ({error.strerror}): another program listens "
                "there. Choose another."
            ) from error


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_url: {root} cannot be written ({error.strerror}), and the run's files go "
            "there: choose a folder that can, with output_url=PATH."
        ) from error


def _done_at_the_end(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start what runs a command once its stdin is closed, which the end of this process does."""
    return subprocess.Popen(
        [sys.executable, "-m", "fl_app.engines.afterwards", *command],
        env={**environment, "CONFIG_JSON": json.dumps({})},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
