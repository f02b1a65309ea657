"""Faults of a deployed federation, with real processes on loopback: TLS, keys, gateway, workers.

Each run is judged by what whoever started it sees: the exit code of ``fl-app run``, the SuperLink's
word, and the run's own files; and each owner's ledger must hold whatever was trained.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_process import Federation, federation
from federation_run import Playing, charged, ledgers_hold_what_was_trained
from helpers import rounds_of, summary_of

from fl_app.config import compose_config
from fl_app.deployment.certificates import make, rotate
from fl_app.engines.flower_command import FlowerCommand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = (
    "experiment=federation",
    "privacy=record",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "task/model=logistic",
    "client.batch_size=16",
    "client.epochs=20",  # so that "in mid-training" lasts a second
    "fairness_clients=0",
    "checkpoint_every=1",
    "selection.round_timeout_s=15",
)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites that run, and the keys of a fourth."""
    with federation(tmp_path_factory.mktemp("faults"), more_keys=1, unit="record") as running:
        yield running


def play(parties: Federation, cwd: Path, *overrides: str) -> Playing:
    return Playing(parties, cwd, *SHORT, *parties.engine, *overrides, "hydra.run.dir=run")


def test_whoever_is_not_known_is_refused(parties: Federation, tmp_path: Path) -> None:
    make(tmp_path / "others", 1)
    others, before = tmp_path / "others", len(parties.nodes())
    site = parties.add_site(4, key=others / "site-1" / "node.key")
    unknown = site.supernode.start()
    assert unknown.exit_code(60) != 0
    parties.sites.pop(4).link.close()
    site = parties.add_site(4, ca=others / "public" / "ca.crt")
    assert site.supernode.start().exit_code(60) != 0
    assert "certificate" in site.supernode.log.lower()
    parties.sites.pop(4).link.close()
    site = parties.add_site(4)
    command = site.supernode.command
    keys = ("--root-certificates", "--auth-supernode-private-key")
    plain = [w for i, w in enumerate(command) if w not in keys and command[i - 1] not in keys]
    site.supernode.command = [*plain, "--insecure"]
    site.supernode.start().wait_for("retrying in", timeout_s=60)
    site.kill()
    assert "SuperNode ID" not in site.supernode.last_log
    parties.sites.pop(4).link.close()
    nodes = parties.nodes()
    assert len(nodes) == before
    assert sum(node["status"] == "online" for node in nodes) == 3


def test_a_reply_that_is_too_large_or_garbage_costs_its_sender_the_round(
    parties: Federation, tmp_path: Path
) -> None:
    flwr = FlowerCommand(
        home=tmp_path / "home", address=parties.address, root_certificates=parties.ca
    )
    (flwr.home / "app" / "entry_client.py").write_text(HOSTILE)
    overrides = [o for o in SHORT if "timeout" not in o and not o.startswith("privacy")]
    config = compose_config([*overrides, "rounds=1", "selection.round_timeout_s=60"])
    ended = flwr.play({**config, "run_dir": "outputs/hostile"}, launched_at=time.time())
    there = parties.serverapp.folder / "outputs" / "hostile"
    assert ended.status == "finished:completed", ended.lines
    (entry,) = rounds_of(there)
    assert entry["failures"], entry
    assert {failure["client"] for failure in entry["failures"]} >= {"0", "1"}
    assert (
        summary_of(there)["failures"]["clients"] + summary_of(there)["failures"]["rejected_updates"]
        >= 2
    )
    for site in parties.sites.values():
        assert site.supernode.running
    assert "413" in parties.gateway.log or "MiB" in parties.gateway.log


HOSTILE = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from fl_app import client_app
from fl_app.client_app import app as honest
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    return client_app._answer(message, context)


@app.train()
def train(message, context):
    position = context.node_config["partition-id"]
    if position == 0:
        large = ArrayRecord({"large": Array(np.random.default_rng(1).random(62_500_000))})
        return Message(RecordDict({"arrays": large}), reply_to=message)
    if position == 1:
        rubbish = Array(dtype="float32", shape=(10, 64), stype="numpy.ndarray", data=b"rubbish")
        return Message(RecordDict({"arrays": ArrayRecord({"weight": rubbish})}), reply_to=message)
    return client_app._answer(message, context)
"""


def test_a_pause_a_cut_link_and_a_dead_worker_cost_their_rounds_alone(
    parties: Federation, tmp_path: Path
) -> None:
    one, two, three = (parties.site(number) for number in (1, 2, 3))
    playing = play(parties, tmp_path, "rounds=6")
    playing.wait_for_round(1)
    one.supernode.pause()
    playing.wait_for_round(2)  # which its time ends
    one.supernode.go_on()
    two.link.cut()
    playing.wait_for_round(3)
    two.link.heal()
    playing.wait_for_charge(three, 4)
    three.worker.kill()
    playing.wait_for_round(4)
    three.worker.start()
    played = playing.end()
    summary = played.completed()
    assert summary["rounds"] == 6
    assert 2 not in played.replied("0")
    assert 3 not in played.replied("1")
    assert 4 not in played.replied("2")
    assert 4 in charged(three, played.there)
    for client in "012":
        assert 6 in played.replied(client)
    assert summary["failures"]["clients"] >= 3
    ledgers_hold_what_was_trained(parties, played)


def test_a_site_that_dies_is_missed_and_one_that_comes_back_takes_part(
    parties: Federation, tmp_path: Path
) -> None:
    one, two = parties.site(1), parties.site(2)
    playing = play(parties, tmp_path, "rounds=8")
    playing.wait_for_round(1)
    playing.wait_for_charge(one, 2)
    one.kill()  # all of it, in mid-training
    two.supernode.kill()
    two.supernode.come_back()
    played = playing.end()
    assert played.completed()["rounds"] == 8
    assert played.replied("0") == {1}
    assert charged(one, played.there) == {1, 2}
    assert 8 in played.replied("1")
    assert played.replied("2") == set(range(1, 9))
    ledgers_hold_what_was_trained(parties, played)
    one.start().ready()


def test_a_run_outlives_its_server_app_and_its_superlink(
    parties: Federation, tmp_path: Path
) -> None:
    playing = play(parties, tmp_path, "rounds=6")
    playing.wait_for_round(2)
    parties.serverapp.kill()
    failed = playing.end()
    assert failed.code == 1, failed.said
    assert f"it goes on with: fl-app run resume={failed.here}" in failed.said
    assert failed.status == "finished:failed"
    assert not (failed.here / "summary.json").exists()
    parties.serverapp.start()
    engine = [parameter for parameter in parties.engine if not parameter.startswith("engine=")]
    resumed = Playing(parties, tmp_path, f"resume={playing.here}", *engine)
    resumed.wait_for_round(4)
    parties.superlink.kill()
    time.sleep(2.0)
    parties.superlink.start()
    played = resumed.end()
    summary = played.completed()
    assert summary["rounds"] == 6
    assert summary["resumed_from_round"] >= 2
    assert [entry["round"] for entry in played.rounds] == list(range(1, 7))
    assert played.there == failed.there
    ledgers_hold_what_was_trained(parties, played)


def test_a_run_that_is_interrupted_is_stopped_and_goes_on_when_somebody_says_so(
    parties: Federation, tmp_path: Path
) -> None:
    playing = play(parties, tmp_path, "rounds=100")
    playing.wait_for_round(1)
    playing.process.send_signal(signal.SIGINT)
    stopped = playing.end()
    assert stopped.code == 1
    assert f"goes on with: fl-app run resume={playing.here}" in stopped.said
    assert "Traceback" not in stopped.said
    assert stopped.status == "finished:stopped"
    engine = [parameter for parameter in parties.engine if not parameter.startswith("engine=")]
    played = Playing(parties, tmp_path, f"resume={playing.here}", *engine, "rounds=2").end()
    assert played.completed()["rounds"] >= 2
    ledgers_hold_what_was_trained(parties, played)


def test_a_late_site_joins_a_revoked_one_is_out_and_a_rotated_key_is_in(
    parties: Federation, tmp_path: Path
) -> None:
    one, two = parties.site(1), parties.site(2)
    playing = play(parties, tmp_path, "rounds=8", "partition.num_clients=4")
    playing.wait_for_round(1)
    parties.add_site(4).start()
    revoked = one.supernode.log.rpartition("SuperNode ID: ")[2].split()[0]
    done = parties.flwr("supernode", "unregister", revoked, "fed", "--format", "json")
    assert json.loads(done.stdout)["success"], done.stdout
    one.supernode.exit_code(90)  # with 0, as if it had been asked to end
    two.supernode.stop()
    rotate(parties.pki, "site-2")
    parties.register(parties.pki / "site-2" / "node.pub")
    two.clientapp.stop()
    two.supernode.start()
    two.clientapp.start()
    two.ready()
    played = playing.end()
    assert played.completed()["rounds"] == 8
    assert 1 in played.replied("0")
    last = max(entry["round"] for entry in played.rounds)
    assert [client for client in "0123" if last in played.replied(client)] == ["1", "2", "3"]
    ledgers_hold_what_was_trained(parties, played)
