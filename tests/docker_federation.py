"""The federation of docker-compose.yml in tests: a project of its own, removed by its name.

with federation(image, tmp_path) as containers:
    played = containers.run("rounds=2")
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

UP_S = 300
ENGINE_S = 1500
UID = 1000
"""Who writes the run's folder: somebody that the image knows nothing of, and not root."""

SITE_UID = 10002
"""Who alone may read a site's records and policy, in the image."""


@dataclass(frozen=True, kw_only=True)
class DockerEngine:
    """What it takes to start containers.

    Attributes:
        image: Built of this clone.
        composes: Compose commands that are here; the first is used where one will do.
    """

    image: str
    composes: tuple[tuple[str, ...], ...]


def docker_engine(image: str = "fl-app:test") -> DockerEngine:
    """Return what `e2e/docker_engine.sh` made ready; skip or fail the test if it cannot."""
    done = subprocess.run(
        ["bash", "tests/e2e/docker_engine.sh", image],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=ENGINE_S,
    )
    told = done.stdout.split("\n")
    if done.returncode == 77 and os.environ.get("FED_REQUIRE_DOCKER") != "1":
        pytest.skip(f"no containers here: {told[0]}")
    assert done.returncode == 0, f"no containers here: {done.stdout}"
    commands = [("docker", "compose"), *((path,) for path in told[1:] if path), ("docker-compose",)]
    composes = tuple(c for c in commands if answers(*c, "version"))
    assert composes, "no compose command answers"
    return DockerEngine(image=image, composes=composes)


def answers(*command: str) -> bool:
    """Return whether a command is there and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Containers:
    """A federation under a name of its own.

    Attributes:
        engine: That it runs on.
        project: Its name.
        outputs: Where its runs leave their folders.
        port: Of this machine, where its gateway is published.
    """

    engine: DockerEngine
    project: str
    outputs: Path
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "FL_APP_IMAGE": self.engine.image,
            "FL_APP_OUTPUTS": str(self.outputs),
            "FL_APP_PORT": str(self.port),
            "FL_APP_UID": str(UID),
            "FL_APP_GID": str(UID),
        }

    @property
    def command(self) -> list[str]:
        return [*self.engine.composes[0], "-p", self.project]

    def compose(self, *arguments: str, timeout_s: float = UP_S, **environment: str) -> str:
        """Return what a compose command prints; it must succeed."""
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=REPOSITORY,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def start_run(self, overrides: str, *, service: str = "run") -> subprocess.Popen[str]:
        """Start the run service, and with it all parties that are not up."""
        profile = ["--profile", service.removeprefix("run-")] if service != "run" else []
        return subprocess.Popen(
            [*self.command, *profile, "run", "--rm", "-T", service],
            cwd=REPOSITORY,
            env={**self.environment, "OVERRIDES": overrides},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, overrides: str, *, service: str = "run") -> tuple[int, str]:
        """Return the exit code of the run service, and what it showed."""
        with self.start_run(overrides, service=service) as process:
            try:
                shown, _ = process.communicate(timeout=UP_S)
            finally:
                process.kill()
        return process.returncode, shown

    def id_of(self, service: str) -> str:
        return self.compose("ps", "-q", service).strip()

    def inspected(self, service: str) -> dict[str, Any]:
        return dict(json.loads(docker("inspect", self.id_of(service)))[0])

    def address(self, service: str, network: str) -> str:
        """Return a container's IP address in a network of the federation."""
        networks = self.inspected(service)["NetworkSettings"]["Networks"]
        return str(networks[f"{self.project}_{network}"]["IPAddress"])

    def bridge(self, network: str) -> str:
        """Return this machine's own address in a network of the federation."""
        found = json.loads(docker("network", "inspect", f"{self.project}_{network}"))[0]
        return str(found["IPAM"]["Config"][0]["Gateway"])

    def probe_in(self, service: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `e2e/probe.py` finds in a container of the federation."""
        return _probed(["docker", "exec", "-i", self.id_of(service)], asked)

    def probe_on(self, network: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `e2e/probe.py` finds in a new container that is in one network alone."""
        new = ["docker", "run", "--rm", "-i", "--network", f"{self.project}_{network}"]
        pki = ["--volume", f"{self.project}_pki-public:/pki:ro"]
        return _probed([*new, *pki, self.engine.image], asked)

    @property
    def newest_run(self) -> Path:
        return max(self.outputs.glob("*/*"), key=lambda folder: folder.stat().st_mtime)


def _probed(container: list[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    program = (REPOSITORY / "tests/e2e/probe.py").read_text()
    done = subprocess.run(
        [*container, "python", "-", json.dumps(asked)],
        input=program,
        capture_output=True,
        text=True,
        check=False,
        timeout=UP_S,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def docker(*arguments: str) -> str:
    """Return what a docker command prints; it must succeed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def federation(engine: DockerEngine, outputs: Path, *, port: int) -> Generator[Containers]:
    """A federation that is gone, volumes and all, when the block ends."""
    project = f"fl-app-test-{secrets.token_hex(4)}"
    containers = Containers(engine=engine, project=project, outputs=outputs, port=port)
    profiles = ["--profile", "gpu", "--profile", "insecure"]
    down = ["down", "--volumes", "--remove-orphans", "--timeout", "3"]
    # Also if the tests are killed: closing its stdin is what starts it.
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "fl_app.engines.afterwards"),
            *(*containers.command, *profiles, *down),
        ],
        cwd=REPOSITORY,
        env=containers.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield containers
