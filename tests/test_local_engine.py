"""``engine=local``: any number of processes, the same bits; a client that fails costs itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from helpers import TINY, environment, fl_app, play, play_config, rounds_of, summary_of
from torch import nn

from fl_app.client_state import MemoryClientState
from fl_app.codec import decode_description, query_messages
from fl_app.components import build
from fl_app.config import compose_config, to_json
from fl_app.directory import QueryDirectory, describe
from fl_app.engines.local import LocalEngine, adopt_identity
from fl_app.engines.local_grid import InProcess, LocalDirectory, LocalGrid
from fl_app.federation import initial_model
from fl_app.params import model_hash
from fl_app.strategy import FederatedStrategy
from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import Classification
from fl_app.tasks.digits import Digits
from fl_app.tasks.federated import ClientRange
from fl_app.tasks.models import Logistic
from fl_app.types import ClientExamples, Examples

STATEFUL = (
    "client.keep_optimizer_state=true",
    "client.optimizer.momentum=0.9",
    "selection.fraction=0.5",
    "client.failure_fraction=0.2",
    "task/model=mlp",
    "task.model.dropout=0.2",
)


@dataclass(frozen=True, kw_only=True)
class Moody(Digits):
    """Digits with a model that does something nasty to the client it trains on, now and then."""

    mood: str = "fine"

    def build_model(self) -> nn.Module:
        return Nasty(super().build_model(), self.mood)


class Nasty(nn.Module):
    def __init__(self, model: nn.Module, mood: str) -> None:
        super().__init__()
        self.model = model
        self.mood = mood

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # Only in training: the server's own measurements and the preflight check go on as usual.
        # Sums of pixels are sixteenths; this picks one client of round 1 and two of round 2.
        if self.training and int(float(inputs.sum()) * 16) % 69 == 0:
            if self.mood == "raises":
                raise RuntimeError("disk of client on fire")
            if self.mood == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mood == "hangs":
                time.sleep(3600)
            if self.mood == "nan":
                return self.model(inputs) * float("nan")
        return self.model(inputs)


def moody(mood: str, *overrides: str) -> dict[str, object]:
    config = compose_config(
        [
            "task/model=logistic",
            "partition.num_clients=10",
            "selection.fraction=1.0",
            "client.epochs=1",
            "rounds=2",
            "progress=none",
            *overrides,
        ]
    )
    config["task"] |= {"_target_": f"{Moody.__module__}.Moody", "mood": mood}
    return config


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker process import this module by its name."""
    monkeypatch.setitem(sys.modules, Moody.__module__, sys.modules[__name__])
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        play(tmp_path / name, f"seed={seed}", *STATEFUL)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert summary_of(first)["model_hash"] == summary_of(again)["model_hash"]
    assert rounds_of(first) == rounds_of(again)
    assert summary_of(first)["model_hash"] != summary_of(other)["model_hash"]


def test_two_workers_give_the_bits_of_one(tmp_path: Path) -> None:
    one, two = (
        play(
            tmp_path / f"{n}",
            *("engine.vectorize=false", f"engine.workers={n}", "selection.over_selection=0.5"),
            *STATEFUL,
        )
        for n in (1, 2)
    )
    assert summary_of(one)["model_hash"] == summary_of(two)["model_hash"]
    assert rounds_of(one) == rounds_of(two)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_abandoned_clients_with_large_models_and_memories_block_nobody(tmp_path: Path) -> None:
    # Replies and memories far beyond a pipe's buffer; two in five clients are abandoned.
    large = (
        "task/model=mlp",
        "task.model.hidden=[2000]",
        "selection.count=5",
        "selection.over_selection=0.6",
        "partition.num_clients=10",
        "client.keep_optimizer_state=true",
        "client.optimizer.momentum=0.9",
    )
    one, two = (
        play(tmp_path / f"{n}", f"engine.workers={n}", "engine.vectorize=false", *large)
        for n in (1, 2)
    )
    assert summary_of(one)["model_hash"] == summary_of(two)["model_hash"]
    assert rounds_of(one) == rounds_of(two)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_client_that_raises_costs_the_round_only_itself(
    workers: int, tmp_path: Path, importable: None
) -> None:
    config = moody("raises", f"engine.workers={workers}")
    run_dir = play_config({**config, "run_dir": str(tmp_path / "run")})
    failures = [failure for entry in rounds_of(run_dir) for failure in entry["failures"]]
    assert failures
    assert all("disk of client on fire" in f["reason"] for f in failures)
    assert {f["kind"] for f in failures} == {"error"}
    assert all(entry["applied"] and entry["num_updates"] >= 5 for entry in rounds_of(run_dir))
    assert summary_of(run_dir)["failures"] == {"clients": len(failures), "rejected_updates": 0}


def test_a_client_that_kills_its_worker_costs_the_round_only_itself(
    tmp_path: Path, importable: None
) -> None:
    config = moody("dies", "engine.workers=2", "rounds=1")
    run_dir = play_config({**config, "run_dir": str(tmp_path / "run")})
    (entry,) = rounds_of(run_dir)
    raising = moody("raises", "rounds=1")
    (expected,) = rounds_of(play_config({**raising, "run_dir": str(tmp_path / "raising")}))
    assert [f["client"] for f in entry["failures"]] == [f["client"] for f in expected["failures"]]
    assert "died" in entry["failures"][0]["reason"]
    assert entry["num_updates"] == 10 - len(entry["failures"])


@pytest.mark.slow
def test_a_client_that_hangs_is_ended_at_the_deadline(tmp_path: Path, importable: None) -> None:
    config = moody("hangs", "engine.workers=2", "rounds=1", "selection.round_timeout_s=3")
    began = time.monotonic()
    run_dir = play_config({**config, "run_dir": str(tmp_path / "run")})
    assert time.monotonic() - began < 60
    (entry,) = rounds_of(run_dir)
    assert {f["kind"] for f in entry["failures"]} == {"timeout"}
    assert entry["applied"]


def test_a_nan_update_is_rejected_and_the_round_goes_on(tmp_path: Path, importable: None) -> None:
    run_dir = play_config({**moody("nan"), "run_dir": str(tmp_path / "run")})
    failures = [failure for entry in rounds_of(run_dir) for failure in entry["failures"]]
    assert failures
    assert {f["kind"] for f in failures} == {"rejected"}
    assert "NaN" in failures[0]["reason"]
    assert summary_of(run_dir)["failures"]["rejected_updates"] == len(failures)
    assert summary_of(run_dir)["metrics"]["loss"] > 0


def test_when_every_client_fails_the_model_stays_and_the_run_goes_on(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "client.failure_fraction=0.999999")
    assert [entry["applied"] for entry in rounds_of(run_dir)] == [False] * 3
    untrained = play(tmp_path / "untrained", "client.optimizer.lr=0.0")
    assert summary_of(run_dir)["model_hash"] == summary_of(untrained)["model_hash"]


def test_a_round_timeout_that_nobody_can_meet_loses_only_the_round(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "selection.round_timeout_s=0.000001", "rounds=1")
    (entry,) = rounds_of(run_dir)
    assert {f["kind"] for f in entry["failures"]} == {"timeout"}
    assert not entry["applied"]


def test_over_selection_fills_the_cohort_when_clients_fail(tmp_path: Path) -> None:
    run_dir = play(
        tmp_path / "run",
        "partition.num_clients=20",
        "selection.count=5",
        "selection.over_selection=2.0",
        "client.failure_fraction=0.4",
    )
    assert [entry["num_updates"] for entry in rounds_of(run_dir)] == [5] * 3
    assert all(len(entry["cohort"]) == 15 for entry in rounds_of(run_dir))


def test_ray_is_not_imported_and_neither_is_what_a_run_does_not_need(tmp_path: Path) -> None:
    script = (
        "import sys, runpy; sys.argv = ['fl-app', 'run', 'rounds=1', 'progress=none']\n"
        "try:\n    runpy.run_module('fl_app', run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "assert not {'ray', 'wandb', 'opacus', 'flwr_datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert fl_app("--help", cwd=tmp_path).returncode == 0


def test_a_population_of_a_million_is_lazy_and_any_of_its_clients_is_found_at_once() -> None:
    directory = LocalDirectory(ClientRange(1_000_000))
    assert directory.node_of("0") == 1
    assert directory.node_of("999999") == 1_000_000
    assert directory.node_of("1000000") is None
    assert directory.node_of("x") is None
    assert directory.node_config(43)["client-id"] == "42"


def test_clients_are_built_when_first_used(tmp_path: Path) -> None:
    config = compose_config(["partition=generated", "partition.num_clients=1000000"])
    config["task"] = {"_target_": f"{__name__}.Counting", "model": {"_target_": LOGISTIC}}
    sys.modules.setdefault(__name__, sys.modules[Counting.__module__])
    Counting.made.clear()
    config |= {"rounds": 2, "progress": "none", "fairness_clients": 0}
    config["selection"] |= {"count": 5}
    play_config({**config, "run_dir": str(tmp_path / "run")})
    asked = {client for entry in rounds_of(tmp_path / "run") for client in entry["cohort"]}
    assert len(asked) == 10
    # The first client too: the model is tried on its records before the run.
    assert set(Counting.made) == asked | {"0"}


LOGISTIC = "fl_app.tasks.models.Logistic"


@dataclass(frozen=True, kw_only=True)
class Counting(Classification):
    """Makes a client's records on demand, and remembers for whom it did."""

    model: object = Logistic()
    made = []  # noqa: RUF012

    @property
    def name(self) -> str:
        return "counting"

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def generate(self, client: str, seed: int) -> object:
        self.made.append(client)
        inputs = torch.full((6, 4), float(client) / 1e6)
        train = Examples(inputs=inputs, targets=torch.arange(6) % 3)
        return ClientExamples(train=train)

    def held_out(self, seed: int) -> None:
        return None

    def load(self) -> PooledExamples:
        raise AssertionError("never pooled")


def test_flowers_own_loop_drives_our_pair_to_the_same_model(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "engine.vectorize=false")
    config = compose_config(
        ["task/model=logistic", "partition.num_clients=6", "client.epochs=1", "rounds=3"]
    )
    components = build(to_json(config))
    params, trainable = initial_model(components, None)
    adopt_identity()
    engine = LocalEngine()
    with engine.grid(components.data.clients, {"config-json": to_json(config)}) as grid:
        strategy = FederatedStrategy(
            algorithm=components.algorithm,
            selector=components.selector,
            checks=components.checks,
            directory=grid.directory,
            initial=params,
            trainable=trainable,
            seed=components.seed,
        )
        strategy.start(grid, strategy.current_arrays(), num_rounds=3)
    assert model_hash(strategy.state.params) == summary_of(run_dir)["model_hash"]


def test_an_unmodified_flower_strategy_and_client_app_run_on_our_grid() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        (weight,) = message.content["arrays"].to_numpy_ndarrays()
        trained = ArrayRecord([weight + message.metadata.dst_node_id])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    adopt_identity()
    executor = InProcess(app, {})
    grid = LocalGrid(ClientRange(3), executor, MemoryClientState())
    result = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3).start(
        grid, ArrayRecord([torch.zeros(2).numpy()]), num_rounds=2, train_config=ConfigRecord()
    )
    # Nodes 1, 2, 3 each add their own number: the mean grows by 2 a round.
    assert result.arrays.to_numpy_ndarrays()[0].tolist() == [4.0, 4.0]


def test_clients_answer_a_query_with_what_they_are_willing_to_tell() -> None:
    for share in (False, True):
        config = compose_config([f"client.share_label_counts={str(share).lower()}", *TINY])
        components = build(to_json(config))
        adopt_identity()
        with LocalEngine().grid(components.data.clients, {"config-json": to_json(config)}) as grid:
            replies = grid.send_and_receive(query_messages(grid.get_node_ids(), ttl=60.0))
        told = [decode_description(reply) for reply in replies]
        assert [description.client for description in told] == list(components.data.clients)
        for description in told:
            targets = components.data.examples_of(description.client).train.targets
            assert description.num_examples == len(targets)
            counts = tuple(torch.bincount(targets).tolist()) if share else None
            assert description.label_counts == counts


def test_a_grid_that_does_not_know_its_clients_has_them_asked() -> None:
    config = compose_config(TINY)
    components = build(to_json(config))
    adopt_identity()
    with LocalEngine().grid(components.data.clients, {"config-json": to_json(config)}) as grid:
        directory = QueryDirectory(grid)
        assert list(directory.clients()) == list(components.data.clients)
        assert [directory.node_of(c) for c in directory.clients()] == list(grid.get_node_ids())
        # Who they are, and what they have, they are asked but once.
        clients = list(components.data.clients)
        expected = describe(grid, grid.directory, clients, timeout_s=60.0)
        assert len(expected) == len(clients)
        silent = LocalGrid([], InProcess(lambda message, context: message, {}), MemoryClientState())
        assert describe(silent, directory, clients, timeout_s=60.0) == expected
