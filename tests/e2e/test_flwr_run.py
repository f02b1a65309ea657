"""Plain ``flwr run .`` in this clone, with real SuperLink and Ray."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from flower_process import Flower, flower, free_port
from helpers import fl_app, play, rounds_of, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHORT = "task/model=logistic client.epochs=1 rounds=2 checkpoint_every=1"


@pytest.fixture(scope="module")
def flwr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """One SuperLink for all runs of this module, as a user has it."""
    cwd = tmp_path_factory.mktemp("flwr")
    own = cwd / "own"
    own.mkdir()
    (own / "own_objective.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Breaks:\n"
        "    def add_gradient(self, local, received):\n"
        "        raise RuntimeError('patient 4711')\n"
    )
    repository = Path(__file__).resolve().parents[2]
    with flower(cwd, PYTHONPATH=f"{repository}:{own}") as at_home:
        yield at_home


def test_the_connected_nodes_are_the_population_and_the_bits_those_of_engine_local(
    flwr: Flower, tmp_path: Path
) -> None:
    played = flwr.run(overrides=f"{SHORT} strategy=fedadam", supernodes=7)
    assert played.status == "finished:completed", played.log
    assert "nodes are connected" not in played.plain
    run_dir = flwr.run_dirs()[-1]
    summary = summary_of(run_dir)
    assert (summary["clients"], summary["cohort_size"], summary["strategy"]) == (7, 4, "fedadam")
    assert "num_clients: 7" in (run_dir / "config.yaml").read_text()
    # The engine of conf/config.yaml is local: a default is nobody's wish.
    assert summary["engine"] == "simulation"
    assert played.client_seconds > 0
    local = play(
        tmp_path / "local",
        *SHORT.split(),
        "strategy=fedadam",
        *("partition.num_clients=7", "engine.vectorize=false"),
        tiny=False,
    )
    assert rounds_of(run_dir) == rounds_of(local)
    assert summary["model_hash"] == summary_of(local)["model_hash"]


@pytest.mark.parametrize("workers", [1, 2])
def test_with_engine_local_no_node_is_sent_a_message_and_the_run_is_that_of_fl_app_run(
    workers: int, flwr: Flower, tmp_path: Path
) -> None:
    overrides = f"{SHORT} engine=local engine.workers={workers}"
    played = flwr.run(overrides=overrides, supernodes=3)
    assert played.status == "finished:completed", played.log
    assert played.client_seconds == 0
    run_dir = flwr.run_dirs()[-1]
    summary = summary_of(run_dir)
    assert (summary["engine"], summary["clients"]) == ("local", 10)  # not the three nodes
    done = fl_app("run", *overrides.split(), f"output_url={tmp_path}", "--json", cwd=tmp_path)
    expected = json.loads(done.stdout)
    for key in ("model_hash", "config_hash", "engine", "metrics", "fairness", "communication"):
        assert summary[key] == expected[key], key


def test_more_nodes_than_clients_are_said_in_one_line_and_the_run_goes_on(flwr: Flower) -> None:
    played = flwr.run(overrides=f"{SHORT} partition.num_clients=2", supernodes=3)
    assert played.status == "finished:completed", played.log
    assert "3 nodes are connected, but the population (partition.num_clients) is 2" in played.plain
    assert "num-supernodes=2" in played.plain
    assert "partition-id=2 of this node must lie in [0, 2)" in played.plain
    assert "Traceback" not in played.log
    assert summary_of(flwr.run_dirs()[-1])["clients"] == 2


def test_one_supernode_is_a_federation_of_one_that_outlives_a_client_that_raises(
    flwr: Flower,
) -> None:
    played = flwr.run(
        overrides=f"{SHORT} rounds=1 strategy.objective._target_=own_objective.Breaks", supernodes=1
    )
    assert played.status == "finished:completed", played.log
    entry = rounds_of(flwr.run_dirs()[-1])[0]
    assert (entry["cohort"], entry["applied"]) == (["0"], False)
    assert "RuntimeError" in entry["failures"][0]["reason"]
    assert "4711" not in entry["failures"][0]["reason"]


def test_no_supernode_is_refused_in_one_message(flwr: Flower) -> None:
    played = flwr.run(overrides=SHORT, supernodes=0)
    assert played.status != "finished:completed"
    assert "no SuperNode is connected" in played.plain, played.log
    assert "--federation-config 'num-supernodes=10'" in played.plain


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('overrides="rounds=5 =="', ["Error parsing override"]),
        ('overrides="task._target_=nowhere.Task"', ["nowhere.Task", "PYTHONPATH"]),
    ],
)
def test_a_mistake_in_the_overrides_fails_the_run_with_a_message(
    flwr: Flower, given: str, words: list[str]
) -> None:
    played = flwr.run(run_config=given, supernodes=2)
    assert played.status == "finished:failed", played.log
    for word in words:
        assert word in played.plain


def test_an_undeclared_key_is_refused_before_anything_runs(flwr: Flower) -> None:
    before = len(flwr.run_dirs())
    played = flwr.run(run_config="rounds=5", supernodes=2)
    assert played.status != "finished:completed"
    # All that Flower says; README, "Flower", says what it means.
    assert "Invalid run configuration" in played.plain, played.log
    assert len(flwr.run_dirs()) == before


def test_a_port_in_use_is_one_message_of_flowers(tmp_path: Path) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with flower(tmp_path, FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(port)) as flwr:
            played = flwr.run(overrides="rounds=1", supernodes=2)
    assert played.code != 0
    assert "Failed to start local SuperLink" in played.plain
    assert "superlink.log" in played.plain
