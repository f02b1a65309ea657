"""Flower's own strategies, named by `_target_`: their numbers, with everything of ours around."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from helpers import fl_app, play, play_config, rounds_of, summary_of

from fl_app.algorithm import ServerState
from fl_app.components import build
from fl_app.config import compose_config, resumed_config, to_json
from fl_app.engines.local import adopt_identity
from fl_app.flower_strategy import FlowerAlgorithm, StrategyError
from fl_app.objective import OwnLoss, Proximal
from fl_app.storage import tree_from_bytes, tree_to_bytes
from fl_app.types import ClientUpdate, ConfigError, Params, TooFewUpdatesError

ROUNDS = 4
NAMES = ("0", "1", "2", "3", "4", "5", "6")
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdam": {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99},
    "FedAdagrad": {"eta": 0.05},
    "FedYogi": {"eta": 0.05},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.2},
}
EVERY = pytest.mark.parametrize("name", STRATEGIES)


@pytest.fixture(autouse=True)
def flower_knows_its_task() -> None:
    adopt_identity()


def made(name: str) -> flower.Strategy:
    return getattr(flower, name)(**STRATEGIES[name])


def model(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(4, generator=generator),
    }


def updates(round: int) -> list[ClientUpdate]:
    """Return the updates of seven clients, other ones in each round."""
    return [
        ClientUpdate(
            client=name,
            round=round,
            delta={k: 0.1 * v for k, v in model(100 * round + number).items()},
            num_examples=5 + number,
            metrics={"loss": 0.5 + 0.1 * number},
        )
        for number, name in enumerate(NAMES)
    ]


def play_rounds(algorithm: FlowerAlgorithm, state: ServerState, last: int) -> ServerState:
    """Return the state after round ``last``."""
    for round in range(state.round + 1, last + 1):
        contents = algorithm.instruct(
            state, NAMES, ArrayRecord(dict(state.params)), ConfigRecord(), round=round
        )
        assert list(contents) == list(NAMES)
        step = algorithm.step(state, updates(round), round=round, trainable=frozenset(state.params))
        state = ServerState(round=round, params=step.params, memory=step.memory)
    return state


class _Nodes:
    def get_node_ids(self) -> list[int]:
        return list(range(1, len(NAMES) + 1))


def by_flower_alone(strategy: Any) -> Params:
    """Return the model after ``ROUNDS`` rounds that a strategy of Flower's is driven through."""
    params = model(0)
    for round in range(1, ROUNDS + 1):
        sent = ArrayRecord(dict(params))
        list(strategy.configure_train(round, sent, ConfigRecord(), _Nodes()))
        replies = []
        for node, update in enumerate(updates(round), start=1):
            local = {name: params[name] + update.delta[name] for name in params}
            metrics = {"num-examples": update.num_examples, "train_loss": update.metrics["loss"]}
            content = RecordDict({"arrays": ArrayRecord(local), "metrics": MetricRecord(metrics)})
            asked = Message(RecordDict(), node, MessageType.TRAIN)
            replies.append(Message(content, reply_to=asked))
        arrays, _ = strategy.aggregate_train(round, replies)
        params = {name: tensor.float() for name, tensor in arrays.to_torch_state_dict().items()}
    return params


# The same numbers ---------------------------------------------------------------------------------


@EVERY
def test_the_model_is_the_one_that_flower_computes_by_itself(name) -> None:
    ours = play_rounds(FlowerAlgorithm(strategy=made(name)), start(), ROUNDS).params
    gc.freeze()  # QFedAvg and Bulyan run the collector once a reply, over all that tests import
    theirs = by_flower_alone(made(name))
    gc.unfreeze()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert not torch.equal(ours["weight"], start().params["weight"])


def start() -> ServerState:
    return ServerState(round=0, params=model(0))


@EVERY
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_strategy_resumed_from_a_checkpoint_goes_on_to_the_same_bits(name, cut) -> None:
    straight = play_rounds(FlowerAlgorithm(strategy=made(name)), start(), ROUNDS)
    state = play_rounds(FlowerAlgorithm(strategy=made(name)), start(), cut)
    restored = ServerState.from_tree(tree_from_bytes(tree_to_bytes(state.to_tree())))
    resumed = play_rounds(FlowerAlgorithm(strategy=made(name)), restored, ROUNDS)
    for key in straight.params:
        assert torch.equal(resumed.params[key], straight.params[key]), key


@EVERY
def test_one_strategy_object_serves_run_after_run(name) -> None:
    """A process builds each configuration once; nothing of one run may reach the next."""
    algorithm = FlowerAlgorithm(strategy=made(name))
    first = play_rounds(algorithm, start(), ROUNDS)
    second = play_rounds(algorithm, start(), ROUNDS)
    for key in first.params:
        assert torch.equal(first.params[key], second.params[key]), key


def test_without_its_memory_an_adaptive_strategy_goes_elsewhere() -> None:
    """So the test above can fail: the memory is what makes the difference."""
    straight = play_rounds(FlowerAlgorithm(strategy=made("FedAdam")), start(), ROUNDS)
    state = play_rounds(FlowerAlgorithm(strategy=made("FedAdam")), start(), 2)
    amnesic = ServerState(round=2, params=state.params)
    forgot = play_rounds(FlowerAlgorithm(strategy=made("FedAdam")), amnesic, ROUNDS)
    assert not torch.equal(forgot.params["weight"], straight.params["weight"])


def test_flowers_fedprox_gives_clients_its_term_and_others_give_none() -> None:
    assert FlowerAlgorithm(strategy=made("FedProx")).objective == Proximal(mu=0.1)
    assert FlowerAlgorithm(strategy=made("FedAdam")).objective == OwnLoss()
    given = FlowerAlgorithm(strategy=made("FedAdam"), objective=Proximal(mu=0.5), name="mine")
    assert (given.objective, given.name) == (Proximal(mu=0.5), "mine")


def test_a_cohort_of_one_is_asked_and_aggregated() -> None:
    algorithm = FlowerAlgorithm(strategy=made("FedAvg"))
    arrays = ArrayRecord(dict(model(0)))
    contents = algorithm.instruct(start(), ["7"], arrays, ConfigRecord({"run": "x"}), round=1)
    assert list(contents) == ["7"]
    assert contents["7"]["config"]["run"] == "x"
    assert contents["7"]["config"]["server-round"] == 1
    [update, *_] = updates(1)
    step = algorithm.step(start(), [update], round=1, trainable=frozenset())
    for key, tensor in model(0).items():
        assert torch.equal(step.params[key], tensor + update.delta[key])


def test_too_few_updates_for_the_strategy_keep_the_old_model() -> None:
    algorithm = FlowerAlgorithm(strategy=made("Bulyan"))
    algorithm.instruct(start(), NAMES, ArrayRecord(dict(model(0))), ConfigRecord(), round=1)
    with pytest.raises(TooFewUpdatesError, match="flower-Bulyan makes no model of 2 updates"):
        algorithm.step(start(), updates(1)[:2], round=1, trainable=frozenset())


# Strategies of users ------------------------------------------------------------------------------


class Own(flower.FedAvg):
    """Has memory of every kind, draws at random, and adds a figure of its own."""

    def __init__(self, fail_in: str = "", returned: Any = None, wait: bool = False) -> None:
        super().__init__()
        self.fail_in, self.returned, self.wait = fail_in, returned, wait
        self.seen: dict[str, Any] = {"rounds": [], "mean": None, "nodes": ()}

    def configure_train(self, server_round, arrays, config, grid) -> Iterable[Message]:
        if self.fail_in == "configure_train":
            raise ZeroDivisionError("no zero")
        if self.wait:
            self.min_available_nodes = 10**6
        config["lr"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies) -> tuple[Any, Any]:
        if self.fail_in == "aggregate_train":
            raise ZeroDivisionError("no zero")
        arrays, _ = super().aggregate_train(server_round, replies)
        self.seen["rounds"].append(server_round)
        self.seen["mean"] = np.float64(arrays["bias"].numpy().mean())
        self.seen["nodes"] = tuple(reply.metadata.src_node_id for reply in replies)
        self.latest = {"weight": arrays["weight"].numpy()}
        noisy = {name: array.numpy() + np.random.normal() for name, array in arrays.items()}
        arrays = ArrayRecord({k: torch.from_numpy(v) for k, v in noisy.items()})
        return self.returned or arrays, MetricRecord({"my-figure": 4.5, "train-loss": -1.0})


def test_all_that_a_strategy_of_ones_own_remembers_survives_a_checkpoint() -> None:
    state = play_rounds(FlowerAlgorithm(strategy=Own()), start(), 2)
    strategy = Own()
    restored = ServerState.from_tree(tree_from_bytes(tree_to_bytes(state.to_tree())))
    algorithm = FlowerAlgorithm(strategy=strategy)
    play_rounds(algorithm, restored, 3)
    assert strategy.seen["rounds"] == [1, 2, 3]
    assert isinstance(strategy.seen["mean"], float)
    assert len(set(strategy.seen["nodes"])) == len(NAMES)
    assert strategy.latest["weight"].shape == (3, 4)


def test_a_strategy_sees_a_client_under_the_same_node_in_every_round() -> None:
    strategy = Own()
    algorithm = FlowerAlgorithm(strategy=strategy)
    play_rounds(algorithm, start(), 1)
    first = strategy.seen["nodes"]
    algorithm.step(start(), updates(2)[2:4], round=2, trainable=frozenset())
    assert strategy.seen["nodes"] == first[2:4]


def test_each_way_to_fail_is_one_clear_message() -> None:
    def stepped(**how: Any) -> None:
        play_rounds(FlowerAlgorithm(strategy=Own(**how)), start(), 1)

    for method in ("configure_train", "aggregate_train"):
        message = f"strategy Own failed in {method}: ZeroDivisionError: no zero"
        with pytest.raises(StrategyError, match=message):
            stepped(fail_in=method)
    other = ArrayRecord({"weight": torch.zeros(3, 4)})
    with pytest.raises(StrategyError, match="what it returned does not fit the model: .*bias"):
        stepped(returned=other)
    with pytest.raises(StrategyError, match="what it returned does not fit the model"):
        stepped(returned=["no record"])
    wrong = ArrayRecord({k: v * float("nan") for k, v in model(0).items()})
    with pytest.raises(StrategyError, match="NaN or infinite"):
        stepped(returned=wrong)


def test_a_strategy_that_waits_for_more_clients_is_told_that_none_will_come(monkeypatch) -> None:
    monkeypatch.setattr(flower.strategy_utils, "sleep", lambda _: None)
    with pytest.raises(StrategyError, match="waits for more clients than the 7 of this round"):
        play_rounds(FlowerAlgorithm(strategy=Own(wait=True)), start(), 1)


def test_what_no_checkpoint_can_hold_is_refused_by_name() -> None:
    class Keeper(Own):
        def aggregate_train(self, server_round, replies) -> tuple[Any, Any]:
            self.log_file = object()
            return super().aggregate_train(server_round, replies)

    with pytest.raises(StrategyError, match="Keeper keeps in its attribute log_file"):
        play_rounds(FlowerAlgorithm(strategy=Keeper()), start(), 1)


# Named in a configuration -------------------------------------------------------------------------


def named(name: str, *more: str) -> list[str]:
    keys = [f"+strategy.{key}={value}" for key, value in STRATEGIES.get(name, {}).items()]
    target = f"strategy._target_=flwr.serverapp.strategy.{name}"
    return ["strategy=flower", target, *keys, *more]


@EVERY
def test_every_strategy_of_flowers_plays_and_resumes_to_the_same_bits(name, tmp_path) -> None:
    overrides = named(name, "selection.fraction=0.9", "partition.num_clients=8")
    straight = play(tmp_path / "straight", *overrides)
    cut = play(tmp_path / "cut", *overrides, "rounds=1")
    play_config(resumed_config(str(cut), ["rounds=3"]))
    assert rounds_of(cut) == rounds_of(straight)
    assert summary_of(cut)["model_hash"] == summary_of(straight)["model_hash"]
    assert summary_of(straight)["strategy"] == f"flower-{name}"
    assert all(entry["applied"] for entry in rounds_of(straight))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["strategy=fedavg"], named("FedAvg")),
        (["strategy=fedprox", "strategy.objective.mu=0.1"], named("FedProx")),
        (["strategy=fedadagrad", "strategy.server_optimizer.lr=0.05"], named("FedAdagrad")),
    ],
    ids=["fedavg", "fedprox", "fedadagrad"],
)
def test_where_both_exist_ours_and_flowers_end_at_the_same_model(ours, theirs, tmp_path) -> None:
    first = play(tmp_path / "ours", *ours)
    second = play(tmp_path / "theirs", *theirs)
    for mine, yours in zip(rounds_of(first), rounds_of(second), strict=True):
        assert mine["cohort"] == yours["cohort"]
        assert mine["metrics"]["loss"] == pytest.approx(yours["metrics"]["loss"], rel=1e-4)


def test_validation_stands_before_a_strategy_of_flowers(tmp_path) -> None:
    run = play(tmp_path / "run", *named("FedAvg"), "checks.max_norm=1e-9")
    assert all(not entry["applied"] for entry in rounds_of(run))
    assert summary_of(run)["failures"]["rejected_updates"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (named("FedAvg", "+strategy.fraction_train=0.5"), "strategy.fraction_train has no say"),
        (named("FedAvg", "+strategy.min_available_nodes=2"), "decided by selection"),
        (named("FedAvg", "+strategy.arrayrecord_key=x"), "the names of records"),
        (named("FedAdam", "+strategy.etta=2"), "strategy.etta is not a key of FedAdam; did you"),
        (named("FedAvgM", "strategy.server_momentum=much"), "must be of type"),
        (["strategy=flower", "strategy._target_=flwr.serverapp.strategy.QFedAvg"], "is missing"),
        (["strategy=flower", "strategy._target_=flwr.serverapp.strategy.FedAvgg"], "imported"),
        (["strategy=flower", "strategy._target_=flwr.serverapp.strategy.FedXgbBagging"], "XGBoost"),
        (
            [
                "strategy=flower",
                "strategy._target_=flwr.serverapp.strategy."
                "DifferentialPrivacyServerSideFixedClipping",
                "+strategy.strategy={_target_:flwr.serverapp.strategy.FedAvg}",
                "+strategy.noise_multiplier=1.0",
                "+strategy.clipping_norm=1.0",
                "+strategy.num_sampled_clients=5",
            ],
            "charged to no ledger",
        ),
    ],
)
def test_bad_input_is_one_message(overrides, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build(to_json(compose_config(overrides)))


@pytest.mark.slow
def test_a_strategy_of_ones_own_with_its_objective_named_on_the_command_line(tmp_path) -> None:
    (tmp_path / "my_rules.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n\n\n"
        "class Half(FedAvg):\n"
        "    def __init__(self, share: float = 0.5) -> None:\n"
        "        super().__init__()\n"
        "        self.share = share\n"
    )
    folder = tmp_path / "conf" / "strategy"
    folder.mkdir(parents=True)
    (folder / "half.yaml").write_text(
        "_target_: fl_app.flower_strategy.FlowerAlgorithm\n"
        "name: half\n"
        "strategy:\n  _target_: my_rules.Half\n  share: 0.25\n"
        "objective:\n  _target_: fl_app.objective.Proximal\n  mu: 0.2\n"
    )
    done = fl_app(
        *("run", "--json", "--config-dir", "conf", "strategy=half", "rounds=1"),
        "task/model=logistic",
        cwd=tmp_path,
        path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["strategy"] == "half"
