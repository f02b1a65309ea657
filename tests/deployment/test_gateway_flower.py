"""The gateway before a real SuperLink, with a real SuperNode behind it: TLS and known keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from flower_process import end, free_port
from flwr.common.constant import ErrorCode
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from helpers import environment

from fl_app.deployment.certificates import make, rotate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "sized"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "sized:server"
clientapp = "sized:client"
"""

APP = """
import json
import time
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@client.train()
def train(message, context):
    config = message.content["config"]
    values = np.random.default_rng().integers(1, 256, config["mib"] * 2**20, dtype=np.uint8)
    arrays = ArrayRecord([values * config["times"]])
    return Message(RecordDict({"arrays": arrays}), reply_to=message)

@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    for mib, times in ((20, 1), (20, 0), (6, 1), (6, 0)):
        began = time.time()
        content = RecordDict({"config": ConfigRecord({"mib": mib, "times": times})})
        asked = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
        replies = list(grid.send_and_receive(asked, timeout=120))
        errors = [reply.error.code if reply.has_error() else None for reply in replies]
        told = {"turn": [mib, times], "seconds": time.time() - began, "errors": errors}
        print("TOLD " + json.dumps(told) + " END", flush=True)
"""


@dataclass(kw_only=True)
class Federation:
    """A SuperLink, a gateway and a SuperNode, each a process of its own."""

    home: Path
    pki: Path
    superlink_port: int
    port: int
    runtime_port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        still = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "NO_COLOR": "1"}
        quick = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "COLUMNS": "400"}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"FLWR_HOME": str(self.home), "PATH": path}
        return {**environment(), **quiet, **still, **quick, **own}

    def start(self, name: str, *arguments: object) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(argument) for argument in arguments],
                env=self.variables,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def start_superlink(self) -> None:
        own = self.pki / "superlink"
        self.start(
            "superlink",
            *("flower-superlink", "--isolation", "process", "--host", "127.0.0.1"),
            *("--port", self.superlink_port, "--database", self.home / "superlink.db"),
            *("--enable-supernode-auth", "--ssl-ca-certfile", own / "ca.crt"),
            *("--ssl-certfile", own / "tls.crt", "--ssl-keyfile", own / "tls.key"),
            *("--superexec-auth-secret-file", own / "superexec.secret"),
        )

    def start_gateway(self) -> None:
        own = self.pki / "gateway"
        self.start(
            "gateway",
            *(sys.executable, "-m", "fl_app", "gateway", "--max-reply-mib", 8),
            *("--superlink", f"localhost:{self.superlink_port}"),
            *("--host", "127.0.0.1", "--port", self.port),
            *("--root-certificates", own / "ca.crt"),
            *("--certificate", own / "tls.crt", "--key", own / "tls.key"),
        )

    def start_supernode(self, name: str, runtime_port: int, **files: Path) -> None:
        own = self.pki / "site-1"
        self.start(
            name,
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", files.get("ca", own / "ca.crt")),
            *("--auth-supernode-private-key", files.get("key", own / "node.key")),
            *("--isolation", "process", "--host", "127.0.0.1", "--port", runtime_port),
            *("--ssl-ca-certfile", own / "ca.crt", "--ssl-certfile", own / "runtime.crt"),
            *("--ssl-keyfile", own / "runtime.key"),
            *("--superexec-auth-secret-file", own / "superexec.secret"),
        )

    def flwr(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["flwr", *(str(argument) for argument in arguments)],
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def listed(self) -> list[dict[str, str]]:
        told = self.flwr("supernode", "list", "direct", "--format", "json").stdout
        found: list[dict[str, str]] = json.loads(told)["nodes"]
        return found

    def nodes(self) -> list[str]:
        return [node["status"] for node in self.listed()]

    def health(self) -> int:
        context = ssl.create_default_context(cafile=str(self.pki / "public/ca.crt"))
        try:
            url = f"https://127.0.0.1:{self.port}/health"
            return httpx.get(url, verify=context).status_code
        except httpx.TransportError:
            return 0

    def served_certificate(self) -> str:
        context = ssl.create_default_context(cafile=str(self.pki / "public/ca.crt"))
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="gateway") as connection,
        ):
            return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")


def until(condition: Any, *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def federation() -> Generator[Federation, None, None]:
    home = Path(tempfile.mkdtemp(prefix="gateway-", dir="/tmp"))
    make(home / "pki", sites=2)
    ports = {name: free_port() for name in ("superlink_port", "port", "runtime_port")}
    made = Federation(home=home, pki=home / "pki", **ports)
    ca = made.pki / "public/ca.crt"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "direct"\n'
        f'[superlink.direct]\naddress = "127.0.0.1:{made.superlink_port}"\n'
        f'root-certificates = "{ca}"\n'
        f'[superlink.gate]\naddress = "127.0.0.1:{made.port}"\nroot-certificates = "{ca}"\n'
    )
    try:
        made.start_superlink()
        made.start_gateway()
        until(lambda: made.health() == 200)
        registered = made.flwr("supernode", "register", made.pki / "public/site-1.pub", "direct")
        assert registered.returncode == 0, registered.stdout + registered.stderr
        made.start_supernode("supernode", made.runtime_port)
        until(lambda: made.nodes() == ["online"])
        yield made
    finally:
        end(home)
        for process in made.running.values():
            process.wait(timeout=10)
        subprocess.run(["rm", "-rf", str(home)], check=False)


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("run", "{app}"), ("stop", "1"), ("supernode", "list"), ("log", "1")],
    ids=lambda arguments: arguments[0],
)
def test_nobody_drives_the_superlink_through_the_gateway(
    federation: Federation, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    app = write_app(tmp_path)
    done = federation.flwr(*(word.format(app=app) for word in arguments), "gate")
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "403 Forbidden" in told, told


def test_every_other_path_of_the_superlink_is_refused(federation: Federation) -> None:
    context = ssl.create_default_context(cafile=str(federation.pki / "public/ca.crt"))
    base = f"https://127.0.0.1:{federation.port}"
    others = [path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/")]
    kind = {"content-type": "application/protobuf"}
    with httpx.Client(base_url=base, verify=context) as client:
        for path in [*others, "/v1/fleet/../control/list-runs", "/docs", "/openapi.json", "/"]:
            assert client.post(path, content=b"", headers=kind).status_code == 403, path
            assert client.get(path).status_code == 403, path


def test_a_supernode_whose_key_or_authority_is_another_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    make(tmp_path / "other", sites=1)
    federation.start_supernode("unknown", free_port(), key=federation.pki / "site-2/node.key")
    federation.start_supernode("misled", free_port(), ca=tmp_path / "other/public/ca.crt")
    for name in ("unknown", "misled"):
        assert federation.running[name].wait(timeout=30) != 0, federation.log(name)
    assert "SSL/TLS handshake error" in federation.log("misled")
    assert federation.nodes() == ["online"]


def test_a_new_certificate_is_taken_up_without_a_restart(federation: Federation) -> None:
    old = federation.served_certificate()
    rotate(federation.pki, "gateway")
    new = (federation.pki / "gateway/tls.crt").read_text()
    until(lambda: federation.served_certificate() == new, timeout_s=15)
    assert new != old
    assert "took up the new certificate" in federation.log("gateway")
    assert federation.running["supernode"].poll() is None
    assert federation.nodes() == ["online"]


def test_a_supernode_outlives_a_restart_of_the_superlink_and_of_the_gateway(
    federation: Federation,
) -> None:
    superlink, gateway = (federation.running[name] for name in ("superlink", "gateway"))
    superlink.kill()
    superlink.wait(timeout=10)
    until(lambda: federation.health() == 503, timeout_s=10)
    tries = federation.log("supernode").count("retrying in")
    until(lambda: federation.log("supernode").count("retrying in") > tries, timeout_s=10)
    gateway.send_signal(signal.SIGTERM)
    assert gateway.wait(timeout=20) == -signal.SIGTERM
    federation.start_superlink()
    federation.start_gateway()
    until(lambda: federation.health() == 200)
    tries = federation.log("supernode").count("Connection successful")
    until(lambda: federation.log("supernode").count("Connection successful") > tries)
    assert federation.running["supernode"].poll() is None
    assert federation.nodes() == ["online"]


def test_a_reply_beyond_the_limit_fails_at_once_and_the_run_goes_on(
    federation: Federation, tmp_path: Path
) -> None:
    """Without taking it back, the ServerApp waits 180 s for it, whatever its timeout."""
    for name, party, port in (
        ("serverapp", "serverapp", federation.superlink_port),
        ("clientapp", "site-1-app", federation.runtime_port),
    ):
        own = federation.pki / party
        federation.start(
            name,
            *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{port}"),
            *("--root-certificates", own / "ca.crt"),
            *("--superexec-auth-secret-file", own / "superexec.secret"),
        )
    done = federation.flwr("run", write_app(tmp_path), "direct", "--stream")
    told = [
        json.loads(line.partition("TOLD ")[2].partition(" END")[0])
        for line in done.stdout.splitlines()
        if "TOLD " in line
    ]
    too_large, fine = [ErrorCode.MESSAGE_UNAVAILABLE], [None]
    # Zeros are equal chunks, of which Flower sends one.
    answers = [([20, 1], too_large), ([20, 0], too_large), ([6, 1], fine), ([6, 0], fine)]
    assert [(turn["turn"], turn["errors"]) for turn in told] == answers, done.stdout
    assert all(turn["seconds"] < 60 for turn in told), told
    assert "taken back" in federation.log("gateway")
    assert "413" in federation.log("supernode")


def test_a_site_gets_a_new_key_and_is_shut_out_with_the_old_one(federation: Federation) -> None:
    (old,) = federation.listed()
    process = federation.running["supernode"]
    rotate(federation.pki, "site-1")
    public = federation.pki / "public/site-1.pub"
    assert federation.flwr("supernode", "register", public, "direct").returncode == 0
    assert process.poll() is None
    revoked = federation.flwr("supernode", "unregister", old["node-id"], "direct")
    assert revoked.returncode == 0, revoked.stdout + revoked.stderr
    process.wait(timeout=60)
    federation.start_supernode("supernode", federation.runtime_port)
    until(lambda: sorted(federation.nodes()) == ["online", "unregistered"])


def write_app(folder: Path) -> Path:
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "sized.py").write_text(APP)
    return app
