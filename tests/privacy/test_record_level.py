"""Runs with record-level privacy: what is paid, told, refused, and where they end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from helpers import play, play_config, rounds_of, summary_of
from torch import nn

from fl_app import codec
from fl_app.algorithm import ServerState
from fl_app.arrays import encode_params
from fl_app.components import build, settled
from fl_app.config import compose_config, resumed_config, to_json
from fl_app.engines.local import LocalEngine, adopt_identity
from fl_app.federation import initial_model
from fl_app.privacy.accounting import GaussianEvent, RdpAccountant
from fl_app.privacy.ledger_format import LedgerError
from fl_app.privacy.none import NoPrivacy
from fl_app.privacy.release import CLASSES, Release
from fl_app.private_preflight import FixedTask, check_ghost, check_privacy
from fl_app.selection import RoundRobin, Uniform, Without, planned_rounds
from fl_app.tasks.federated import ClientRange
from fl_app.types import ConfigError

NOISE = ("privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")
PRIVATE = ("privacy=record", *NOISE, "client.batch_size=32")
FOR_TESTS = "privacy.randomness=reproducible_for_tests"


def participations(run_dir: Path) -> Counter[str]:
    return Counter(client for entry in rounds_of(run_dir) for client in entry["cohort"])


def entries(run_dir: Path) -> list[dict[str, Any]]:
    """Return the ledger's entries, read without our code."""
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def sizes(*overrides: str) -> dict[str, int]:
    data = build(to_json(compose_config(list(overrides)))).data
    return {client: len(data.examples_of(client).train) for client in data.clients}


# What is paid -------------------------------------------------------------------------------------


def test_epsilon_is_that_of_all_rounds_a_client_took_part_in(tmp_path) -> None:
    overrides = (*PRIVATE, "selection.fraction=0.5", "rounds=4")
    run = play(tmp_path / "run", *overrides)
    times = participations(run)
    spent = {}
    for client, n in sizes("task/model=logistic", "partition.num_clients=6", *PRIVATE).items():
        if times[client]:
            steps = -(-n // 32) * times[client]
            event = GaussianEvent(noise_multiplier=1.0, sample_rate=32 / n, count=steps)
            spent[client] = RdpAccountant().epsilon([event], delta=1e-5)
    privacy = summary_of(run)["privacy"]
    assert privacy["unit"] == "record"
    assert privacy["epsilon_max"] == pytest.approx(max(spent.values()), rel=1e-9)
    assert privacy["epsilon_mean"] == pytest.approx(sum(spent.values()) / len(spent), rel=1e-9)
    assert privacy["noise_multiplier"] == 1.0
    assert rounds_of(run)[-1]["epsilon"] == pytest.approx(max(spent.values()), rel=1e-9)
    assert len(entries(run)) == sum(times.values())


@pytest.mark.slow
def test_workers_are_paid_for_once_and_give_the_same_bits(tmp_path) -> None:
    alone = (*PRIVATE, FOR_TESTS, "engine.vectorize=false")
    one = play(tmp_path / "one", *alone)
    two = play(tmp_path / "two", *alone, "engine.workers=2")
    assert summary_of(one)["model_hash"] == summary_of(two)["model_hash"]
    assert rounds_of(one) == rounds_of(two)
    assert len(entries(one)) == len(entries(two)) == sum(participations(one).values())


def test_secret_noise_makes_every_run_another(tmp_path) -> None:
    hashes = {summary_of(play(tmp_path / n, *PRIVATE))["model_hash"] for n in ("one", "two")}
    assert len(hashes) == 2


def test_a_resumed_run_has_spent_no_less_than_an_uninterrupted_one(tmp_path) -> None:
    straight = play(tmp_path / "straight", *PRIVATE, FOR_TESTS, "rounds=4")
    cut = play(tmp_path / "cut", *PRIVATE, FOR_TESTS, "rounds=3", "checkpoint_every=2")
    # Killed before the checkpoint of its third round: that is played, and paid for, again.
    (cut / "checkpoints" / "round_000003.safetensors").unlink()
    play_config(resumed_config(str(cut), ["rounds=4"]))
    assert summary_of(cut)["model_hash"] == summary_of(straight)["model_hash"]
    more, less = (rounds_of(run)[-1]["epsilon"] for run in (cut, straight))
    assert more > less
    assert summary_of(cut)["privacy"]["unit"] == "none"  # noise that repeats promises nothing
    assert len(entries(cut)) == len(entries(straight)) + len(rounds_of(cut)[2]["cohort"])


def test_a_shared_ledger_accounts_for_several_runs_together(tmp_path) -> None:
    ledger = f"privacy.ledger={tmp_path / 'shared.jsonl'}"
    first = play(tmp_path / "first", *PRIVATE, ledger)
    second = play(tmp_path / "second", *PRIVATE, ledger, "strategy=fedadam")
    spent = [summary_of(run)["privacy"]["epsilon_max"] for run in (first, second)]
    assert spent[1] > spent[0]
    assert not (first / "ledger.jsonl").exists()


def test_a_server_that_has_lost_its_ledger_does_not_start_the_account_again(tmp_path) -> None:
    asked = ("privacy=client", "strategy.aggregation.weighting=uniform", "rounds=2")
    run = play(tmp_path / "run", *asked)
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        (run / name).unlink()
    with pytest.raises(LedgerError, match="2 rounds have been played, and the ledger holds 0"):
        play_config(resumed_config(str(run), ["rounds=3"]))


# Budgets ------------------------------------------------------------------------------------------


def test_no_client_passes_its_budget_and_the_run_ends_when_too_few_are_left(tmp_path) -> None:
    run = play(tmp_path / "run", *PRIVATE, "privacy.epsilon_budget=9.0", "rounds=40")
    summary = summary_of(run)
    assert summary["stopped_by"] == "budget"
    assert 0 < summary["rounds"] < 40
    assert summary["privacy"]["epsilon_max"] <= 9.0
    paid = Counter(entry["client"] for entry in entries(run))
    n = sizes("task/model=logistic", "partition.num_clients=6", *PRIVATE)
    for client, times in paid.items():
        event = GaussianEvent(
            noise_multiplier=1.0, sample_rate=32 / n[client], count=-(-n[client] // 32)
        )
        assert RdpAccountant().epsilon([event.times(times)], delta=1e-5) <= 9.0
        # ... and it was not stopped early: one more round would not have fitted.
    assert rounds_of(run)[-1]["epsilon_budget"] == 9.0
    spent_out = max(paid, key=lambda client: paid[client])
    one_more = GaussianEvent(
        noise_multiplier=1.0, sample_rate=32 / n[spent_out], count=-(-n[spent_out] // 32)
    ).times(paid[spent_out] + 1)
    assert RdpAccountant().epsilon([one_more], delta=1e-5) > 9.0


def test_a_budget_too_small_for_a_single_round_trains_nothing(tmp_path) -> None:
    run = play(tmp_path / "run", *PRIVATE, "privacy.epsilon_budget=0.01", "rounds=9")
    summary = summary_of(run)
    components = build(to_json(compose_config(["task/model=logistic"])))
    assert summary["stopped_by"] == "budget"
    assert all(f["kind"] == "refused" for entry in rounds_of(run) for f in entry["failures"])
    assert not (run / "ledger.jsonl").exists() or entries(run) == []
    final = summary["model_hash"]
    from fl_app.params import model_hash

    assert final == model_hash(initial_model(components, None)[0])


def test_a_target_is_met_by_the_client_that_is_asked_most_and_nobody_declines(tmp_path) -> None:
    run = play(
        tmp_path / "run",
        *("privacy=record", "privacy.target_epsilon=3.0"),
        *("client.batch_size=32", "selection.fraction=0.5", "rounds=6"),
    )
    summary = summary_of(run)
    assert 2.9 < summary["privacy"]["epsilon_max"] <= 3.0
    assert summary["privacy"]["noise_multiplier"] is None
    assert summary["rounds"] == 6
    assert summary["failures"]["clients"] == 0
    saved = (run / "config.yaml").read_text()
    assert f"planned_rounds: {max(participations(run).values())}" in saved


def test_a_run_resumed_for_more_rounds_keeps_its_noise_and_clients_decline(tmp_path) -> None:
    target = ("privacy.noise_multiplier=null", "privacy.target_epsilon=3.0")
    run = play(tmp_path / "run", *PRIVATE, *target, "rounds=3")
    noise = {entry["client"]: entry for entry in entries(run)}
    play_config(resumed_config(str(run), ["rounds=30"]))
    assert summary_of(run)["stopped_by"] == "budget"
    assert summary_of(run)["privacy"]["epsilon_max"] <= 3.0
    for entry in entries(run):
        if entry["client"] in noise:
            key = "noise_multiplier"
            first, later = noise[entry["client"]], entry
            assert first.get(key, first.get("event", {}).get(key)) == later.get(
                key, later.get("event", {}).get(key)
            )


@pytest.mark.parametrize(("selector", "expected"), [(RoundRobin(fraction=0.5), 3)])
def test_the_schedule_says_how_often_a_client_is_asked(selector, expected) -> None:
    assert planned_rounds(selector, ClientRange(4), rounds=6, seed=1) == expected
    drawn = planned_rounds(Uniform(fraction=0.5), ClientRange(10), rounds=20, seed=1)
    assert 10 <= drawn <= 20
    bound = planned_rounds(Uniform(count=1000), ClientRange(10**6), rounds=1000, seed=1)
    assert 1 < bound < 30


def test_clients_without_budget_are_left_out_of_the_population_lazily() -> None:
    left = Without(ClientRange(10**6), {"0", "5", "999999", "nobody"})
    assert len(left) == 10**6 - 3
    assert (left[0], left[3], left[4], left[-1]) == ("1", "4", "6", "999998")
    assert left[2:5] == ["3", "4", "6"]
    assert list(Without(ClientRange(4), {"1", "2"})) == ["0", "3"]
    with pytest.raises(IndexError):
        _ = left[10**6]


def test_what_the_server_knows_of_budgets_survives_a_checkpoint() -> None:
    from fl_app.types import Budget

    budget = Budget(epsilon_spent=1.5, epsilon=None, delta=1e-5, rounds_left=3)
    state = ServerState(round=2, params={}, budgets={"a": budget}, spent=frozenset({"b"}))
    assert ServerState.from_tree(json.loads(json.dumps(state.to_tree()))) == state


# What is told -------------------------------------------------------------------------------------


def reply(*overrides: str, folder: Path) -> Message:
    """Return what a client really sends in answer to a training instruction."""
    config = settled(
        compose_config(
            ["task/model=logistic", "partition.num_clients=6", "client.epochs=1", *overrides]
        )
    )
    adopt_identity()
    clients = build(to_json(config)).data.clients
    params, _ = initial_model(build(to_json(config)), None)
    with LocalEngine().grid(clients, {"config-json": to_json(config)}) as grid:
        content = codec.instruction(
            encode_params(params),
            codec.instruction_config("run", {}, run_dir=str(folder)),
            round=1,
        )
        [answer] = grid.send_and_receive(
            codec.train_messages({1: content}, round=1, ttl=600.0), timeout=None
        )
    assert not answer.has_error(), answer.error.reason
    return answer


def told(answer: Message) -> dict[str, Any]:
    """Return every field of a reply, by its name in `CLASSES`."""
    fields: dict[str, Any] = {}
    for key, record in answer.content.items():
        for name, value in record.items():
            if key == "arrays":
                fields["delta"] = value
            elif key == "privacy":
                fields["epsilon"] = value
            elif name == "num-examples":
                fields["num_examples"] = value
            elif name == "train-clipped":
                fields["clipped"] = value
            elif name.startswith("train-"):
                fields["metrics"] = value
            elif name.startswith("test-"):
                fields["evaluation"] = value
            else:
                fields[name] = value
    return fields


KINDS = {
    "record": PRIVATE,
    "client": ("privacy=client", "strategy.aggregation.weighting=uniform"),
    "adaptive": (
        *("privacy=client", "strategy.aggregation.weighting=uniform"),
        *("privacy.target_quantile=0.5", "privacy.bit_noise=2.0"),
    ),
    "local": ("privacy=local",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_under_privacy_a_reply_holds_what_is_charged_or_public_and_nothing_else(
    kind, tmp_path
) -> None:
    fields = told(reply(*KINDS[kind], folder=tmp_path))
    assert set(fields) <= set(CLASSES)
    assert fields.pop("num_examples") == 1  # a weight that says nothing
    assert {CLASSES[name] for name in fields} <= {Release.CHARGED, Release.PUBLIC}
    assert ("clipped" in fields) is (kind == "adaptive")
    assert ("epsilon" in fields) is (kind in ("record", "local"))


def test_what_is_declared_public_is_told(tmp_path) -> None:
    fields = told(reply(*PRIVATE, "privacy.public=[num_examples,evaluation]", folder=tmp_path))
    assert fields["num_examples"] > 1
    assert "evaluation" in fields
    assert "metrics" not in fields


def test_without_privacy_all_of_it_is_told(tmp_path) -> None:
    fields = told(reply("privacy=none", folder=tmp_path))
    assert fields["num_examples"] > 1
    assert {"delta", "metrics", "evaluation"} <= set(fields)
    assert "epsilon" not in fields


def test_a_private_run_leaves_no_figure_of_single_clients(tmp_path) -> None:
    run = play(tmp_path / "run", *PRIVATE)
    for entry in rounds_of(run):
        assert entry["client_metrics"] == entry["client_accuracy"] == {}
    assert json.loads((run / "clients.json").read_text()) == {}
    assert summary_of(run)["fairness"]["clients"] == 0
    partition = json.loads((run / "partition.json").read_text())
    assert "num_examples" not in json.dumps(partition.get("described", partition))


# What is refused ----------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, *, tie: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.last = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(inputs.flatten(1))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(inputs.flatten(1)).relu()))


def model_of(name: str, tmp_path: Path) -> str:
    return f"task.model={{_target_:{__name__}.{name}}}"


REFUSED: Mapping[str, tuple[list[str], str]] = {
    "noise 0": (["privacy.noise_multiplier=0"], "privacy.noise_multiplier=0.0 must be > 0"),
    "noise < 0": (["privacy.noise_multiplier=-1"], "privacy.noise_multiplier=-1.0 must be > 0"),
    "tiny noise": (["privacy.noise_multiplier=1e-200"], "too small to account"),
    "both": (["privacy.target_epsilon=1"], "give one of them and set the other to null"),
    "neither": (["privacy.noise_multiplier=null"], "give one of them"),
    "budget 0": (["privacy.epsilon_budget=0"], "privacy.epsilon_budget=0.0 must be > 0"),
    "epsilon < 0": (
        ["privacy.noise_multiplier=null", "privacy.target_epsilon=-1"],
        "privacy.target_epsilon=-1.0 must be > 0",
    ),
    "delta 0": (["privacy.delta=0"], r"privacy.delta=0.0 must lie in \(0, 1\)"),
    "delta 1": (["privacy.delta=1"], "privacy.delta=1.0 must lie in"),
    "delta >= 1/n": (["privacy.delta=0.02"], "privacy.delta=0.02 is not below 1/n"),
    "accountant": (["privacy.accountant=moments"], "accountant=moments is not known"),
    "batch > n": (["client.batch_size=5000"], "client.batch_size=5000 exceeds"),
    "public": (["privacy.public=[delta]"], "privacy.public=delta cannot be declared public"),
    "randomness": (["privacy.randomness=mine"], "privacy.randomness=mine is not known"),
    "early stopping": (
        ["client.early_stopping_patience=2", "partition.validation_fraction=0.1"],
        "client.early_stopping_patience=2 chooses an epoch",
    ),
    "attack": (["client/attack=sign_flip"], "client.attack=Scaled simulates clients"),
    "mistyped": (
        ["+privacy.deltas=1"],
        "privacy.deltas is not a key of RecordLevel; did you mean delta",
    ),
    "impossible target": (
        ["privacy.noise_multiplier=null", "privacy.target_epsilon=1e-9"],
        "no noise up to 1000",
    ),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_void_the_guarantee_is_refused_before_the_run(overrides, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build(to_json(compose_config(["privacy=record", *NOISE, *overrides])))


def test_layers_that_mix_records_and_tied_weights_are_refused_by_name(tmp_path) -> None:
    components = build(to_json(compose_config(["privacy=record"])))
    check = (components.data, components.training)
    with pytest.raises(ConfigError, match=r"task\.model=Normed has layers .*BatchNorm.*fix=true"):
        check_privacy(components.privacy, Normed(), *check)
    with pytest.raises(ConfigError, match=r"ties the weights first\.weight and second\.weight"):
        check_privacy(components.privacy, Tied(), *check)
    check_privacy(NoPrivacy(), Normed(), *check)


class Buffered(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()
        self.last = nn.Linear(64, 10)
        if layer is None:
            self.register_buffer("seen", torch.zeros(64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(inputs.flatten(1)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Buffered(nn.BatchNorm1d(64, affine=False)), "layer: BatchNorm1d"),
        (Buffered(), "has the buffer seen"),
    ],
)
def test_what_would_leave_without_noise_is_refused_also_without_parameters(model, words) -> None:
    components = build(to_json(compose_config(["privacy=record"])))
    with pytest.raises(ConfigError, match=words):
        check_privacy(components.privacy, model, components.data, components.training)


class Past(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.first(inputs.flatten(1))
        return self.last(nn.functional.linear(x, self.first.weight))


def test_ghost_clipping_is_refused_for_weights_that_are_used_past_their_layer() -> None:
    components = build(to_json(compose_config(["privacy=record", "privacy.gradients=ghost"])))
    assert components.data.held_out is not None
    probe = (components.task.losses, components.data.held_out)
    check_ghost(components.task.build_model(), *probe)
    with pytest.raises(ConfigError, match="privacy.gradients=ghost cannot bound"):
        check_ghost(Past(), *probe)


def test_fix_replaces_such_layers_and_says_which() -> None:
    components = build(to_json(compose_config(["privacy=record"])))

    class Unfit:
        name = "unfit"

        def build_model(self) -> nn.Module:
            return Normed()

        losses = staticmethod(components.task.losses)
        metrics = staticmethod(components.task.metrics)

    fixed = FixedTask(task=Unfit())
    assert fixed.changes() == ["norm: BatchNorm1d becomes GroupNorm"]
    check_privacy(components.privacy, fixed.build_model(), components.data, components.training)


@pytest.mark.slow
def test_a_client_of_five_records_and_one_of_hundreds_take_part_alike(tmp_path) -> None:
    run = play(
        tmp_path / "run",
        *("privacy=record", "client.batch_size=4", "privacy.delta=1e-4", "selection.fraction=1.0"),
        *("partition=dirichlet", "partition.alpha=0.3", "partition.min_partition_size=7"),
        "rounds=2",
    )
    assert all(entry["num_updates"] == 6 for entry in rounds_of(run))
