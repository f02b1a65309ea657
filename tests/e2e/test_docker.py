"""The federation of docker-compose.yml, for real: what it plays, and who reaches what in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docker_federation import (
    SITE_UID,
    UID,
    Containers,
    DockerEngine,
    docker,
    docker_engine,
    federation,
)
from flower_process import free_port
from helpers import REPOSITORY, fl_app, rounds_of, summary_of

from fl_app.deployment.certificates import make_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHORT = "task/model=logistic client.epochs=1 privacy=none"
MOST_IMAGE_BYTES = 1_800_000_000
FLEET = "/v1/fleet/pull-messages"
NOT_FLEET = [
    ["POST", "/v1/control/list-runs"],
    ["POST", "/v1/control/start-run"],
    ["POST", "/v1/control/stop-run"],
    ["POST", "/v1/control/register-node"],
    ["POST", "/v1/runtime/acquire-task"],
    ["POST", "/v1/runtime/push-messages"],
    ["POST", "/v1/fleet/../control/list-runs"],
    ["POST", "/v1/fleet/%2e%2e/control/list-runs"],
    ["POST", "//v1/control/list-runs"],
    ["POST", "/v1//control/list-runs"],
    ["GET", "/docs"],
    ["GET", "/openapi.json"],
]
POLICY = """
version: 1
data_set: ward-{site}
unit: record
epsilon: 3.0
delta: 1e-5
ledger: /srv/ledger/ledger.jsonl
data: /srv/data/records.csv
tasks: [table]
task: {{target: target, inputs: 2, classes: 2}}
"""
LEDGER = ("cat", "/ledger/ledger.jsonl")
COMMANDS = (["ls"], ["run"], ["stop", "1"])


@pytest.fixture(scope="module")
def engine() -> DockerEngine:
    return docker_engine()


@pytest.fixture(scope="module")
def played(
    engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Containers, int, str]]:
    """A federation that has played one run, from nothing, and is still up."""
    # As where dockerd makes the folder that a volume names: root's, and there before any run.
    outputs = tmp_path_factory.mktemp("outputs")
    with federation(engine, outputs, port=free_port()) as containers:
        code, shown = containers.run(f"rounds=2 {SHORT}")
        yield containers, code, shown


@pytest.fixture(scope="module")
def containers(played: tuple[Containers, int, str]) -> Containers:
    return played[0]


def test_one_command_makes_keys_starts_all_parties_and_leaves_a_completed_run(
    played: tuple[Containers, int, str],
) -> None:
    containers, code, shown = played
    assert code == 0, shown
    run = containers.newest_run
    assert summary_of(run)["rounds"] == 2 and summary_of(run)["clients"] == 3, shown
    assert [len(row["cohort"]) for row in rounds_of(run)] == [3, 3]
    assert summary_of(run)["failures"] == {"clients": 0, "rejected_updates": 0}
    assert (run / "model.safetensors").stat().st_uid == UID
    assert {"config.yaml", "report.html", "checkpoints"} <= {path.name for path in run.iterdir()}


def test_both_kinds_of_compose_accept_the_file_and_that_of_more_sites(
    engine: DockerEngine, tmp_path: Path
) -> None:
    more = tmp_path / "more.yml"
    made = ["python", str(REPOSITORY / "docker/sites.py"), "5"]
    more.write_text(subprocess.run(made, capture_output=True, text=True, check=True).stdout)
    assert len(engine.composes) > 1 or os.environ.get("FED_REQUIRE_DOCKER") != "1"
    for compose in engine.composes:
        config = [*compose, "-f", str(REPOSITORY / "docker-compose.yml"), "-f", str(more), "config"]
        done = subprocess.run(
            config, env={**os.environ, "CLIENTS": "5"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        services = yaml.safe_load(done.stdout)["services"]
        assert {"supernode-5", "clientapp-5", "site-5"} <= services.keys()
        assert {"site-1", "site-5", "ops", "edge"} <= set(services["gateway"]["networks"])
        # Site 5 is what site 3 is, but for its number.
        assert json.dumps(services["site-5"]) == json.dumps(services["site-3"]).replace("-3", "-5")


def test_no_container_but_those_that_serve_a_port_is_published_and_none_has_privileges(
    containers: Containers,
) -> None:
    published = {}
    for container in containers.compose("ps", "-q").split():
        found = json.loads(docker("inspect", container))[0]
        service = found["Config"]["Labels"]["com.docker.compose.service"]
        published[service] = found["HostConfig"]["PortBindings"]
        assert found["HostConfig"]["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in found["HostConfig"]["SecurityOpt"], service
        assert found["HostConfig"]["Memory"] > 0, service
        assert found["Config"]["User"] not in ("", "0", "root"), service
    assert published["gateway"] == {
        "8443/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(containers.port)}]
    }
    assert not any(ports for service, ports in published.items() if service != "gateway")
    assert containers.inspected("site-1")["HostConfig"]["NetworkMode"] == "none"


@pytest.mark.parametrize("place", ["the site's network", "the clientapp"])
def test_flwr_ls_run_and_stop_are_refused_at_a_site(containers: Containers, place: str) -> None:
    names = [["gateway:8443", *command] for command in COMMANDS]
    names += [["superlink:8000", *command] for command in COMMANDS]
    if place == "the clientapp":
        names += [["supernode-1:9094", *command] for command in COMMANDS]
        found = containers.probe_in("clientapp-1", {"flwr": names})
    else:
        found = containers.probe_on("site-1", {"flwr": names})
    # Its exit status is 0 whatever happened.
    assert len(found["flwr"]) == len(names)
    assert not any('"success": true' in said for said in found["flwr"]), found["flwr"]


def test_a_sites_network_reaches_the_fleet_api_and_nothing_else(containers: Containers) -> None:
    asked = [["gateway", 8443, *request] for request in NOT_FLEET]
    found = containers.probe_on(
        "site-1",
        {
            "http": [["gateway", 8443, "POST", FLEET], *asked],
            "tcp": [
                ["gateway", 8443],
                [containers.address("superlink", "ops"), 8000],
                [containers.address("gateway", "site-2"), 8443],
                [containers.address("gateway", "ops"), 8443],
                [containers.address("supernode-2", "site-2"), 9094],
                [containers.bridge("site-1"), 8000],
                [containers.bridge("site-1"), containers.port],
                [containers.bridge("ops"), 8000],
                [containers.bridge("edge"), containers.port],
            ],
        },
    )
    fleet, *others = found["http"]
    # Let through to the SuperLink, which knows no such node.
    assert fleet == 401, found
    assert others == [403] * len(others), found
    assert found["tcp"][0] == "open" and "open" not in found["tcp"][1:], found


def test_the_published_port_lets_the_fleet_api_through_and_nothing_else(
    containers: Containers,
) -> None:
    here = ["127.0.0.1", containers.port]
    asked = {"http": [[*here, *request] for request in (["POST", FLEET], *NOT_FLEET)]}
    done = subprocess.run(
        ["python", str(REPOSITORY / "tests/e2e/probe.py"), json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    fleet, *others = json.loads(done.stdout)["http"]
    assert fleet == 401
    assert others == [403] * len(others)


def test_what_the_server_sends_reaches_its_supernode_and_no_other_party(
    containers: Containers,
) -> None:
    found = containers.probe_in(
        "clientapp-1",
        {
            "tcp": [
                ["supernode-1", 9094],
                ["gateway", 8443],
                [containers.address("gateway", "site-1"), 8443],
                [containers.address("gateway", "edge"), 8443],
                [containers.address("superlink", "ops"), 8000],
                [containers.address("supernode-2", "app-2"), 9094],
                [containers.address("clientapp-2", "app-2"), 9094],
                [containers.bridge("app-1"), containers.port],
                [containers.bridge("app-1"), 8000],
                [containers.bridge("edge"), containers.port],
            ]
        },
    )
    assert found["tcp"][0] == "open" and "open" not in found["tcp"][1:], found


def test_what_the_server_sends_finds_no_data_no_ledger_no_policy_and_no_key_of_a_node(
    containers: Containers,
) -> None:
    mounted = {mount["Name"] for mount in containers.inspected("clientapp-1")["Mounts"]}
    assert mounted == {f"{containers.project}_{name}" for name in ("pki-site-1-app", "socket-1")}
    # Marks in the site's volumes show that the search would find them.
    mark = "for d in ledger state; do echo secret > /srv/$d/mark; done; ls /srv/policy"
    site = containers.id_of("site-1")
    assert docker("exec", site, "sh", "-c", mark).split() == ["policy.yaml"]
    secrets = ["data", "ledger", "state", "policy", "node.key", "ca.key", "tls.key", "runtime.key"]
    looked_for = {"files": ["mark", *secrets]}
    assert containers.probe_in("site-1", looked_for)["files"]
    files = containers.probe_in("clientapp-1", looked_for)["files"]
    assert not [path for path in files if not path.startswith("/app/")], files
    writes = "touch /run/site/x || touch /srv/x || touch /app/x || rm -f /run/site/site.sock"
    spoilt = ["docker", "exec", containers.id_of("clientapp-1"), "sh", "-c", writes]
    assert subprocess.run(spoilt, capture_output=True, check=False).returncode != 0


def test_each_party_has_its_own_keys_alone_and_nobody_else_can_read_them(
    containers: Containers,
) -> None:
    listing = "cd /pki && stat -c '%a %U %n' *"
    expected = {
        "superlink": {"ca.crt", "tls.crt", "tls.key", "superexec.secret"},
        "gateway": {"ca.crt", "tls.crt", "tls.key"},
        "serverapp": {"ca.crt", "superexec.secret"},
        "supernode-2": {
            *("ca.crt", "node.key", "node.pub", "runtime.crt", "runtime.key", "superexec.secret"),
        },
        "clientapp-2": {"ca.crt", "superexec.secret"},
    }
    for service, names in expected.items():
        listed = docker("exec", containers.id_of(service), "sh", "-c", listing)
        rows = [line.split() for line in listed.splitlines()]
        assert {name for _, _, name in rows} == names, service
        for mode, _, name in rows:
            assert mode == ("600" if name.endswith((".key", ".secret")) else "644"), (service, name)
    assert not containers.inspected("site-1")["Mounts"] or all(
        "pki" not in mount["Name"] for mount in containers.inspected("site-1")["Mounts"]
    )


def test_the_image_has_no_compiler_no_installer_and_another_user_than_root(
    engine: DockerEngine,
) -> None:
    looks = (
        "id -u; for tool in gcc cc g++ make ld pip pip3; do command -v $tool; done;"
        " find / -xdev \\( -name '*.whl' -o -path '*/.cache/pip' \\) -not -path '/usr/share/*';"
        " echo $FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION $FLWR_TELEMETRY_ENABLED"
        " $FLWR_DISABLE_UPDATE_CHECK; python -c 'import torch; print(torch.version.cuda)'"
    )
    shown = docker("run", "--rm", "--network", "none", engine.image, "sh", "-c", looks)
    assert shown.split("\n") == ["10001", "1 0 1", "None", ""]
    size = int(docker("image", "inspect", "--format", "{{.Size}}", engine.image))
    assert size < MOST_IMAGE_BYTES


def test_a_site_is_registered_listed_and_revoked_for_good(
    containers: Containers, tmp_path: Path
) -> None:
    make_node("ward-7", tmp_path)
    operator = ["run", "--rm", "-T", "-v", f"{tmp_path / 'node.pub'}:/k.pub:ro", "register", "sh"]
    there = ["superlink:8000", "/pki/ca.crt"]

    def register() -> str:
        return containers.compose(*operator, "/app/docker/register.sh", *there, "/k.pub")

    def nodes(what: str, *more: str) -> str:
        return containers.compose(*operator, "/app/docker/nodes.sh", what, *there, *more)

    registered = re.search(r"registered /k\.pub as node (\d+)", register())
    assert registered
    assert f"{registered[1]} registered" in nodes("list")
    assert nodes("revoke", registered[1]).strip() == f"revoked {registered[1]}"
    # Every `up` registers all keys anew.
    assert "registered before: /k.pub" in register()
    assert f"{registered[1]} unregistered" in nodes("list")
    with pytest.raises(AssertionError, match="was not revoked"):
        nodes("revoke", registered[1])
    there[0] = "superlink:1"
    with pytest.raises(AssertionError, match="did not say"):
        nodes("list")


def test_one_command_in_an_empty_folder_trains_on_files_that_three_owners_have(
    engine: DockerEngine, tmp_path: Path
) -> None:
    clone, here = tmp_path / "clone", tmp_path / "here"
    (here / "shared").mkdir(parents=True)
    clone.mkdir()
    shutil.copy(REPOSITORY / "docker-compose.yml", clone)
    _table(here / "shared" / "public_sample.csv", 100)
    settings = [f"FL_APP_SHARED={here / 'shared'}", "TZ=Pacific/Kiritimati"]
    for site in ("1", "2", "3"):
        for folder in ("policy", "data"):
            (tmp_path / site / folder).mkdir(parents=True)
            settings.append(f"SITE_{site}_{folder.upper()}={tmp_path / site / folder}")
        _table(tmp_path / site / "data" / "records.csv", 200)
        policy = tmp_path / site / "policy" / "policy.yaml"
        policy.write_text(POLICY.format(site=site))
        policy.chmod(0o600)
    (clone / ".env").write_text("\n".join(settings))
    sites = [f"/here/{site}" for site in ("1", "2", "3")]
    root = ["run", "--rm", "--user", "0:0", "--volume", f"{tmp_path}:/here", engine.image]
    docker(*root, "chown", "-R", f"{SITE_UID}:{SITE_UID}", *sites)
    with federation(engine, tmp_path / "none", port=free_port()) as containers:
        began = time.monotonic()
        done = fl_app(
            *("run", "experiment=federation", "task=table", "task.path=shared/public_sample.csv"),
            *("task.inputs=2", "privacy=record", "privacy.target_epsilon=2", "rounds=2"),
            *(f"engine.compose_file={clone / 'docker-compose.yml'}",),
            *(f"engine.project={containers.project}", f"engine.port={containers.port}"),
            cwd=here,
            extra={"FL_APP_IMAGE": engine.image},
        )
        assert done.returncode == 0, done.stderr
        print(f"{time.monotonic() - began:.1f} s")
        run = Path(done.stdout.split()[-1])
        assert run.is_relative_to(here / "outputs")
        assert {"summary.json", "report.html", "model.safetensors"} <= {
            path.name for path in run.iterdir()
        }
        assert [len(row["cohort"]) for row in rounds_of(run)] == [3, 3]
        assert summary_of(run)["failures"]["clients"] == 0, done.stderr
        left = docker("ps", "-aq", "--filter", f"name={containers.project}")
        assert not left, left
        for site in ("1", "2", "3"):
            ledger = ["--volume", f"{containers.project}_ledger-{site}:/ledger:ro"]
            shown = docker("run", "--rm", *ledger, "--user", "0:0", engine.image, *LEDGER)
            assert f"ward-{site}" in shown


def _table(path: Path, records: int) -> None:
    rows = [f"{n % 7 - 3},{n % 5 - 2},{n % 2}" for n in range(records)]
    path.write_text("\n".join(["dose,marker,target", *rows]))


def test_without_tls_and_keys_the_same_sites_play_on_one_trusted_machine(
    containers: Containers,
) -> None:
    before = set(containers.outputs.glob("*/*"))
    code, shown = containers.run(f"rounds=1 {SHORT}", service="run-insecure")
    assert code == 0, shown
    (run,) = set(containers.outputs.glob("*/*")) - before
    assert [len(row["cohort"]) for row in rounds_of(run)] == [3]


def test_a_supernode_killed_in_mid_run_costs_its_replies_and_the_run_ends_right(
    containers: Containers,
) -> None:
    before = set(containers.outputs.glob("*/*"))
    with containers.start_run(f"rounds=4 selection.min_clients=2 {SHORT}") as process:
        deadline = time.monotonic() + 200
        while True:
            run = next(iter(set(containers.outputs.glob("*/*")) - before), None)
            if run and (run / "rounds.jsonl").exists() and rounds_of(run):
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        docker("kill", containers.id_of("supernode-3"))
        shown, _ = process.communicate(timeout=300)
    containers.compose("start", "supernode-3")
    assert process.returncode == 0, shown
    rows = rounds_of(run)
    assert [row["round"] for row in rows] == [1, 2, 3, 4], shown
    assert {failure["client"] for row in rows for failure in row["failures"]} <= {"2"}, shown
    assert summary_of(run)["failures"]["clients"] >= 1, shown
