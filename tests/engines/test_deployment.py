"""``engine=deployment`` before anything is sent: what is refused, in which words, and clean-up.

Whole federations are in tests/e2e.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flower_process import free_port
from helpers import REPOSITORY, environment, fl_app

from fl_app.config import compose_config, resumed_config
from fl_app.deployment.authority import Authority
from fl_app.deployment.certificates import make
from fl_app.engines.deployment import DeploymentEngine
from fl_app.engines.superlink import check_superlink
from fl_app.types import ConfigError

RUN = ("run", "experiment=federation", "task/model=logistic")

# What needs no process -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"superlink": "https://there:8000"}, "engine.superlink=https://there:8000 must be HOST"),
        ({"superlink": "there"}, "must be HOST:PORT"),
        ({"superlink": "there:0"}, "must be HOST:PORT"),
        ({"superlink": "there:70000"}, "must be HOST:PORT"),
        ({"superlink": "::1:8000"}, "must be HOST:PORT"),
        ({"root_certificates": "ca.crt"}, "Name the SuperLink"),
        ({"superlink": "a:1", "insecure": True, "root_certificates": "c"}, "choose one"),
        ({"clients": 0}, "engine.clients=0 must be >= 1"),
        ({"port": 0}, "engine.port=0 must lie in"),
        ({"start_s": 0.0}, "engine.start_s=0.0 must be > 0"),
        ({"start_s": float("inf")}, "engine.start_s=inf must be > 0"),
        ({"gpu": True, "superlink": "a:1"}, "and engine.superlink=a:1 asks for others"),
        ({"gpu": True, "insecure": True}, "and engine.insecure=true asks for others"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DeploymentEngine(**fields)


def test_an_ipv6_address_stands_in_brackets() -> None:
    DeploymentEngine(superlink="[::1]:8000")


def test_the_population_is_that_of_the_engine_unless_it_is_given() -> None:
    assert compose_config(["engine=deployment"])["partition"]["num_clients"] == 3
    federation = compose_config(["experiment=federation", "engine.clients=5"])
    assert federation["partition"]["num_clients"] == 5
    assert federation["selection"]["min_clients"] == 5
    assert federation["selection"]["fraction"] == 1.0
    given = compose_config(["engine=deployment", "engine.clients=5", "partition.num_clients=7"])
    assert given["partition"]["num_clients"] == 7
    assert compose_config([])["partition"]["num_clients"] == 10
    assert compose_config(["engine=deployment"], population=4)["partition"]["num_clients"] == 4


@pytest.mark.slow
def test_a_run_that_was_not_deployed_cannot_be_resumed_on_a_server(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, ca):
        done = fl_app("run", "task/model=logistic", "rounds=1", "hydra.run.dir=run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        config = resumed_config(str(tmp_path / "run"), [])
        engine = DeploymentEngine(superlink=f"127.0.0.1:{port}", root_certificates=str(ca))
        with pytest.raises(ConfigError, match="was not deployed"):
            engine._play_there(None, config, 0.0)  # type: ignore[arg-type]


# A SuperLink that cannot be used ---------------------------------------------------------------


@contextmanager
def listening(
    folder: Path, *, status: int = 200, issued_days_ago: int = 0, tls: bool = True
) -> Generator[tuple[int, Path], None, None]:
    """Have something answer on a port of its own as a SuperLink's health does; give port and CA."""
    make(folder / "pki", 1, days=30)
    pki, ca = folder / "pki" / "superlink", folder / "pki" / "ca"
    if issued_days_ago:
        authority = Authority.load((ca / "ca.key").read_bytes(), (ca / "ca.crt").read_bytes())
        then = datetime.now(UTC) - timedelta(days=issued_days_ago)
        key = (pki / "tls.key").read_bytes()
        (pki / "tls.crt").write_bytes(authority.issue(key, ["127.0.0.1"], days=30, now=then))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "tls.crt", pki / "tls.key")
    with socket.create_server(("0.0.0.0", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with suppress(OSError), connection:
                        talk = context.wrap_socket(connection, server_side=True) if tls else None
                        with talk or connection as answered:
                            answered.recv(4096)
                            answered.sendall(f"HTTP/1.1 {status} X\r\n\r\n".encode())

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1], pki / "ca.crt"


def refusal(port: int, ca: Path | None, *, insecure: bool = False, host: str = "127.0.0.1") -> str:
    with pytest.raises(ConfigError) as caught:
        check_superlink(f"{host}:{port}", root_certificates=ca, insecure=insecure)
    return str(caught.value)


def test_a_superlink_that_is_well_and_vouched_for_is_taken(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, ca):
        check_superlink(f"localhost:{port}", root_certificates=ca, insecure=False)
    with listening(tmp_path / "plain", tls=False) as (port, _):
        check_superlink(f"localhost:{port}", root_certificates=None, insecure=True)


def test_nobody_there_is_said() -> None:
    assert "cannot be reached (Connection refused)" in refusal(free_port(), None)
    assert "cannot be reached" in refusal(1, None, host="nowhere.invalid")


def test_another_ca_is_said(tmp_path: Path) -> None:
    make(tmp_path / "other", 1)
    with listening(tmp_path) as (port, _):
        other = tmp_path / "other" / "public" / "ca.crt"
        assert f"is not signed by engine.root_certificates={other}" in refusal(port, other)
        assert "engine.root_certificates=null, those that the system" in refusal(port, None)


def test_another_host_is_said(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, ca):
        said = refusal(port, ca, host="127.0.0.2")
    assert "is not for 127.0.0.2" in said
    assert "fl-app certs make --host 127.0.0.2" in said


def test_an_expired_certificate_is_said(tmp_path: Path) -> None:
    with listening(tmp_path, issued_days_ago=60) as (port, ca):
        said = refusal(port, ca)
    assert "has expired" in said
    assert "fl-app certs rotate" in said


def test_tls_on_one_side_alone_is_said(tmp_path: Path) -> None:
    with listening(tmp_path) as (port, _):
        assert "set engine.insecure=false" in refusal(port, None, insecure=True)
    with listening(tmp_path / "plain", tls=False) as (port, ca):
        assert "set engine.insecure=true" in refusal(port, ca)


def test_what_is_not_well_is_said(tmp_path: Path) -> None:
    with listening(tmp_path, status=503) as (port, ca):
        assert "answers with status 503" in refusal(port, ca)


def test_a_file_that_is_no_certificate_is_said(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("rubbish")
    assert "ca.crt cannot be used" in refusal(1, tmp_path / "ca.crt")
    assert "nowhere.crt cannot be used" in refusal(1, tmp_path / "nowhere.crt")


@pytest.mark.slow
def test_the_command_says_it_in_one_message_and_leaves_no_folder(tmp_path: Path) -> None:
    port = free_port()
    done = fl_app(*RUN, f"engine.superlink=127.0.0.1:{port}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: engine.superlink=127.0.0.1:{port} cannot be reached")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("config.yaml")) == []


# Containers, with a stand-in for docker ---------------------------------------------------------

DOCKER = """#!{python}
import os, sys, time
said = " ".join(sys.argv[1:])
with open({calls!r}, "a") as calls:
    calls.write(said + "\\n")
if "version" in said:
    sys.exit(os.environ.get("NO_" + sys.argv[1].upper(), "") != "")
if " build" in said:
    print("building")
if " run " in said:
    print("fl-app-outcome {{}}" if "HANGS" not in os.environ else "pulling", flush=True)
    time.sleep(float(os.environ.get("RUN_S", "0")))
    outcome = os.environ.get("OUTCOME")
    if outcome:
        print("round 1")
        print("fl-app-outcome " + outcome)
    sys.exit(int(os.environ.get("RUN_CODE", "0")))
"""


def docker(folder: Path) -> tuple[dict[str, str], Path]:
    """Put a stand-in for docker first on the path; return the environment, and what it was told."""
    calls = folder / "calls.txt"
    (folder / "bin").mkdir()
    path = folder / "bin" / "docker"
    path.write_text(DOCKER.format(python=sys.executable, calls=str(calls)))
    path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}, calls


def composed(folder: Path, variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "fl_app", *RUN, f"engine.port={free_port()}"),
            *(f"engine.compose_file={REPOSITORY / 'docker-compose.yml'}", *arguments),
        ],
        cwd=folder,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_without_docker_the_ways_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    process = composed(tmp_path, {"PATH": str(tmp_path / "bin")})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "engine=deployment needs docker, and there is none" in said
    assert "engine.superlink=HOST:PORT" in said


@pytest.mark.slow
def test_without_an_engine_that_answers_it_is_said(tmp_path: Path) -> None:
    variables, _ = docker(tmp_path)
    process = composed(tmp_path, {**variables, "NO_VERSION": "1"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Docker's engine, which does not answer" in said


@pytest.mark.slow
def test_a_port_in_use_is_said_before_anything_is_started(tmp_path: Path) -> None:
    variables, calls = docker(tmp_path)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        process = composed(tmp_path, variables, f"engine.port={taken.getsockname()[1]}")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another program listens there" in said
    assert " run " not in calls.read_text()


@pytest.mark.slow
def test_an_output_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    variables, calls = docker(tmp_path)
    (tmp_path / "file").write_text("")
    process = composed(tmp_path, variables, f"resume={tmp_path}/file/run")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in said
    assert not calls.exists() or " run " not in calls.read_text()


@pytest.mark.slow
def test_a_run_is_played_by_its_service_and_the_federation_is_taken_down(tmp_path: Path) -> None:
    variables, calls = docker(tmp_path)
    outcome = '{"kind": "config", "error": "rounds=0 must be >= 1."}'
    process = composed(tmp_path, {**variables, "OUTCOME": outcome, "RUN_CODE": "2"})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.splitlines()[-1] == "Error: rounds=0 must be >= 1."
    assert "fl-app-outcome" not in said
    told = calls.read_text().splitlines()
    played = re.search(r" run --rm --name (fl-app-run-\w+) -T run$", told[-3])
    assert played
    assert told[-2] == f"rm --force {played[1]}"  # no `down` takes that one along
    assert told[-1].endswith(" down --timeout 10")
    assert not any("volumes" in call or " -v" in call for call in told)


@pytest.mark.slow
def test_a_service_that_says_it_went_well_must_have_left_a_summary(tmp_path: Path) -> None:
    variables, _ = docker(tmp_path)
    process = composed(tmp_path, {**variables, "OUTCOME": '{"run_dir": "outputs/x"}'})
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "holds no summary.json" in said


@pytest.mark.slow
def test_a_federation_that_does_not_come_up_in_time_is_taken_down(tmp_path: Path) -> None:
    variables, calls = docker(tmp_path)
    hangs = {**variables, "HANGS": "1", "RUN_S": "600"}
    process = composed(tmp_path, hangs, "engine.start_s=2")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not come up within engine.start_s=2 s" in said
    assert calls.read_text().splitlines()[-1].endswith(" down --timeout 10")


@pytest.mark.slow
def test_a_federation_that_is_to_stay_up_stays_up(tmp_path: Path) -> None:
    variables, calls = docker(tmp_path)
    composed(tmp_path, variables, "engine.keep_up=true").communicate(timeout=60)
    assert " down" not in calls.read_text()


@pytest.mark.slow
def test_a_run_that_is_interrupted_is_stopped_though_its_federation_stays_up(
    tmp_path: Path,
) -> None:
    variables, calls = docker(tmp_path)
    process = composed(tmp_path, {**variables, "RUN_S": "600"}, "engine.keep_up=true")
    wait_for_call(calls, " run ")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "goes on with: fl-app run resume=" in said
    told = calls.read_text().splitlines()
    assert [call.rpartition(" ")[0] for call in told[-2:]] == ["kill --signal INT", "wait"]
    assert " down" not in calls.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_has_the_federation_taken_down(
    number: int, tmp_path: Path
) -> None:
    variables, calls = docker(tmp_path)
    process = composed(tmp_path, {**variables, "RUN_S": "600"})
    wait_for_call(calls, " run ")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert "goes on with: fl-app run resume=" in said
        assert "Traceback" not in said
    wait_for_call(calls, " down ")
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and runs(pid, calls.parent)]


def wait_for_call(calls: Path, words: str) -> None:
    deadline = time.monotonic() + 60
    while not (calls.exists() and words in calls.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: str, folder: Path) -> bool:
    """Return whether a process is the stand-in for docker, playing a run."""
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return os.fsencode(folder / "bin" / "docker") in line and b"\0run\0" in line
    return False


def test_more_clients_than_the_compose_file_has_come_from_its_own_pattern() -> None:
    from fl_app.engines.compose import _more_sites

    compose = REPOSITORY / "docker-compose.yml"
    assert _more_sites(compose, 3, "test") == []
    [path] = _more_sites(compose, 5, "test")
    text = path.read_text()
    assert "supernode-5:" in text and "supernode-6:" not in text
    with pytest.raises(ConfigError, match=r"engine.clients=99 cannot be: .*sites=99 must lie in"):
        _more_sites(compose, 99, "test")
    with pytest.raises(ConfigError, match=r"engine.clients=4 is more than the 3 of"):
        _more_sites(Path("/elsewhere/docker-compose.yml"), 4, "test")
