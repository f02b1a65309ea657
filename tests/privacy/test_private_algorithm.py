"""Rounds under client-level privacy: paid first, always stepped, and silent about who answered."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg
from rich.console import Console

from fl_app import codec
from fl_app.aggregation import WeightedMean
from fl_app.algorithm import Algorithm, Composition, ServerState
from fl_app.engines.local import adopt_identity
from fl_app.engines.local_grid import LocalDirectory
from fl_app.flower_strategy import FlowerAlgorithm
from fl_app.objective import OwnLoss
from fl_app.privacy.accounting import RdpAccountant
from fl_app.privacy.base import BudgetExhaustedError
from fl_app.privacy.client_level import CLIPPED, ClientLevel, ClientLevelPlan
from fl_app.privacy.spending import InMemoryPayments, Payments
from fl_app.private_algorithm import ClientLevelAlgorithm, check_client_level, plan_client_level
from fl_app.robust_aggregation import ClippedNorm, Krum, Median
from fl_app.selection import Poisson, RoundRobin, Selector, Uniform
from fl_app.storage import read_tree, write_tree
from fl_app.strategy import FederatedStrategy
from fl_app.tasks.federated import ClientRange
from fl_app.tracking.console import ConsoleProgress
from fl_app.tracking.rounds_file import RoundsFile, report_from_json
from fl_app.tracking.summary import totals_of
from fl_app.tracking.wandb_tracker import _figures
from fl_app.types import (
    ClientUpdate,
    ConfigError,
    Evaluation,
    Params,
    PrivacyUnit,
    TrainInstruction,
)
from fl_app.validation import UpdateChecks

MODEL: Params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
HUGE = 1e30
POISSON = Poisson(fraction=0.5, randomness="reproducible_for_tests")


@pytest.fixture(autouse=True)
def flower_knows_its_task() -> None:
    adopt_identity()


def composition(rule: Any = None, optimizer: Any = None) -> Composition:
    return Composition(
        aggregation=rule or WeightedMean(weighting="uniform"),
        server_optimizer=optimizer or partial(torch.optim.SGD, lr=1.0),
        objective=OwnLoss(),
        name="test",
    )


def private(
    selector: Selector,
    population: int,
    *,
    payments: Payments | None = None,
    optimizer: Any = None,
    noise: float | None = None,
    rounds: int = 5,
    **fields: Any,
) -> ClientLevelAlgorithm:
    """Return the algorithm of a run; with noise of its own only for noise=0, as tests alone may."""
    privacy = ClientLevel(**{"randomness": "reproducible_for_tests", **fields})
    if noise is None:
        plan = plan_client_level(privacy, selector, ClientRange(population), rounds=rounds, seed=1)
    else:
        cohort = float(selector.wanted(population))
        plan = ClientLevelPlan(
            privacy=privacy, noise_multiplier=noise, sample_rate=None, expected_cohort=cohort
        )
    record = InMemoryPayments() if payments is None else payments
    return ClientLevelAlgorithm(
        inner=composition(optimizer=optimizer), plan=plan, payments=record, seed=1
    )


def strategy(algorithm: Algorithm, selector: Selector, population: int) -> FederatedStrategy:
    return FederatedStrategy(
        algorithm=algorithm,
        selector=selector,
        checks=UpdateChecks(),
        directory=LocalDirectory(ClientRange(population)),
        initial=MODEL,
        trainable=frozenset(MODEL),
        seed=1,
    )


def asked(played: FederatedStrategy, round: int) -> list[Message]:
    return played.configure_train(round, played.current_arrays(), ConfigRecord(), None)


def reply(instruction: Message, value: float, **metrics: float) -> Message:
    update = ClientUpdate(
        client="any",
        round=1,
        delta={name: torch.full_like(tensor, value) for name, tensor in MODEL.items()},
        num_examples=7,
        metrics={"loss": value, **metrics},
        evaluation=Evaluation(num_examples=2, metrics={"accuracy": 0.5}),
    )
    return Message(codec.encode_update(update), reply_to=instruction)


def told(message: Message) -> TrainInstruction:
    return codec.decode_instruction(message.content, deadline_s=None)


def play(
    played: FederatedStrategy, rounds: Iterable[int], values: Sequence[float] = (1.0, -0.5, 0.25)
) -> None:
    for round in rounds:
        messages = asked(played, round)
        replies = [reply(m, values[n % len(values)] / round) for n, m in enumerate(messages)]
        played.aggregate_train(round, replies)


def equal(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.Adam, lr=0.01)])
def test_without_noise_and_bound_rounds_are_those_of_the_uniform_mean(optimizer) -> None:
    selector = RoundRobin(count=4)
    algorithm = private(selector, 8, noise=0.0, max_norm=HUGE, optimizer=optimizer)
    hidden = strategy(algorithm, selector, 8)
    plain = strategy(composition(optimizer=optimizer), selector, 8)
    for played in (hidden, plain):
        play(played, (1, 2, 4), values=(1.0, -0.5, 0.25, 3.0))
    assert equal(hidden.state.params, plain.state.params)
    for changed in ({"noise": 0.01}, {"max_norm": 0.1}):
        other = private(selector, 8, **{"noise": 0.0, "max_norm": HUGE, **changed})
        noisy = strategy(other, selector, 8)
        play(noisy, (1, 2, 4), values=(1.0, -0.5, 0.25, 3.0))
        assert not equal(noisy.state.params, plain.state.params)


def test_a_client_that_ignores_the_bound_is_clipped_and_a_broken_one_is_nothing() -> None:
    selector = RoundRobin(fraction=1.0)
    played = strategy(private(selector, 3, noise=0.0, max_norm=3.0), selector, 3)
    messages = asked(played, 1)
    played.aggregate_train(
        1, [reply(m, v) for m, v in zip(messages, (1000.0, math.nan, 0.5), strict=True)]
    )
    moved = played.state.params["b"].item() - 0.5
    assert moved == pytest.approx((3.0 / math.sqrt(3) + 0.5) / 3, rel=1e-6)


def test_any_subset_of_replies_is_divided_by_the_expected_cohort() -> None:
    selector = RoundRobin(count=4)
    played = strategy(private(selector, 8, noise=0.0, max_norm=HUGE), selector, 8)
    played.aggregate_train(1, [reply(asked(played, 1)[0], 1.0)])
    assert played.state.params["b"].item() == 0.75


@pytest.mark.parametrize("selector", [Uniform(count=2), Poisson(fraction=1e-9)])
def test_a_round_without_any_reply_takes_a_step_of_noise_alone(selector) -> None:
    played = strategy(private(selector, 4), selector, 4)
    asked(played, 1)
    arrays, metrics = played.aggregate_train(1, [])
    assert arrays is not None
    assert not equal(played.state.params, MODEL)
    assert played.last_report().applied
    assert dict(metrics) == {"max_norm": 1.0}


def test_no_reply_is_kept_out_by_others_that_came_before() -> None:
    """Of a Poisson cohort larger than the mean, all are waited for."""
    selector = Poisson(fraction=0.5, randomness="reproducible_for_tests")
    played = strategy(private(selector, 40), selector, 40)
    sizes = []
    for round in range(1, 9):
        messages = asked(played, round)
        taken = 0

        def counted(messages: list[Message] = messages) -> Iterable[Message]:
            nonlocal taken
            for message in messages:
                taken += 1
                yield reply(message, 0.1)

        played.aggregate_train(round, counted())
        assert taken == len(messages)
        sizes.append(taken)
    assert max(sizes) > 20 > min(sizes)


def test_secret_noise_differs_between_runs_of_a_seed() -> None:
    selector, models = RoundRobin(count=2), []
    for _ in range(2):
        played = strategy(private(selector, 4, randomness="secret"), selector, 4)
        play(played, (1,))
        models.append(played.state.params)
    assert not equal(*models)


# The bound ----------------------------------------------------------------------------------------


def test_the_bound_travels_to_the_clients_and_follows_their_bits() -> None:
    selector = RoundRobin(count=4)
    algorithm = private(selector, 4, noise=0.0, max_norm=2.0, target_quantile=0.5)
    played = strategy(algorithm, selector, 4)
    messages = asked(played, 1)
    assert {told(m).max_norm for m in messages} == {2.0}
    bits = [1.0, 0.0, 0.0, 0.0]
    replies = [reply(m, 0.1, **{CLIPPED: b}) for m, b in zip(messages, bits, strict=True)]
    played.aggregate_train(1, replies)
    expected = 2.0 * math.exp(-0.2 * (0.75 - 0.5))
    assert codec.decode_instruction(
        asked(played, 2)[0].content, deadline_s=None
    ).max_norm == pytest.approx(expected)
    assert played.last_report().client_metrics == {"max_norm": 2.0}


def test_without_privacy_no_bound_travels_and_nonsense_is_none() -> None:
    selector = RoundRobin(count=2)
    (message, _) = asked(strategy(composition(), selector, 2), 1)
    assert told(message).max_norm is None
    for nonsense in (-1.0, 0.0, math.nan, math.inf, "1"):
        message.content["config"]["max-norm"] = nonsense
        assert told(message).max_norm is None


@pytest.mark.parametrize("selector", [RoundRobin(count=3), POISSON], ids=["seeded", "poisson"])
def test_a_resumed_run_goes_on_with_the_same_bound_to_the_same_bits(selector, tmp_path) -> None:
    fields: dict[str, Any] = {
        "target_quantile": 0.5,
        "bit_noise": 3.0,
        "optimizer": partial(torch.optim.Adam, lr=0.01),
    }
    whole, first = (strategy(private(selector, 6, **fields), selector, 6) for _ in range(2))
    play(whole, (1, 2, 3, 4, 5))
    play(first, (1, 2, 3))
    write_tree(tmp_path / "checkpoint", first.state.to_tree())
    record = first.algorithm._payments
    resumed = strategy(private(selector, 6, payments=record, **fields), selector, 6)
    resumed.resume(ServerState.from_tree(read_tree(tmp_path / "checkpoint")))
    assert resumed.state.memory["max_norm"] == first.state.memory["max_norm"] != 1.0
    play(resumed, (4, 5))
    assert equal(whole.state.params, resumed.state.params)
    assert whole.last_report() == resumed.last_report()


# Payment ------------------------------------------------------------------------------------------


def test_a_round_is_paid_for_before_anybody_is_asked() -> None:
    class FullDisk(InMemoryPayments):
        def pay(self, payment) -> None:
            raise OSError("no space left")

    selector = RoundRobin(count=2)
    played = strategy(private(selector, 4, payments=FullDisk()), selector, 4)
    with pytest.raises(OSError, match="no space"):
        asked(played, 1)


def test_a_payment_buys_one_step() -> None:
    selector = RoundRobin(count=2)
    algorithm = private(selector, 4)
    played = strategy(algorithm, selector, 4)
    names = frozenset(MODEL)
    with pytest.raises(RuntimeError, match="Round 1 is not paid for"):
        algorithm.step(played.state, [], round=1, trainable=names)
    asked(played, 1)
    algorithm.step(played.state, [], round=1, trainable=names)
    with pytest.raises(RuntimeError, match="Round 1 is not paid for"):
        algorithm.step(played.state, [], round=1, trainable=names)


def test_of_seeded_cohorts_those_asked_pay_unamplified_and_the_most_asked_is_reported() -> None:
    selector, payments = RoundRobin(count=3), InMemoryPayments()
    algorithm = private(selector, 4, payments=payments, noise_multiplier=2.0)
    played = strategy(algorithm, selector, 4)
    play(played, (1, 2, 3))
    assert [p.clients for p in payments.paid()] == [
        ("0", "1", "2"),
        ("3", "0", "1"),
        ("2", "3", "0"),
    ]
    assert {(p.event.noise_multiplier, p.event.sample_rate) for p in payments.paid()} == {
        (2.0, 1.0)
    }
    (event,) = {p.event for p in payments.paid()}
    cost = [RdpAccountant().epsilon([event.times(n)], delta=1e-5) for n in (2, 3)]
    assert played.last_report().epsilon == cost[1]
    spent = algorithm.spent(4)
    assert spent.unit is PrivacyUnit.CLIENT
    assert (spent.delta, spent.accountant, spent.noise_multiplier) == (1e-5, "rdp", 2.0)
    assert spent.epsilon_max == cost[1]
    assert spent.epsilon_mean == pytest.approx((cost[1] + 3 * cost[0]) / 4)


def test_of_secret_cohorts_everybody_pays_the_amplified_price_known_beforehand() -> None:
    payments = InMemoryPayments()
    algorithm = private(POISSON, 6, payments=payments, rounds=4)
    played = strategy(algorithm, POISSON, 6)
    play(played, (1, 2, 3, 4))
    assert {p.clients for p in payments.paid()} == {None}
    assert {p.event.sample_rate for p in payments.paid()} == {0.5}
    assert played.last_report().epsilon == algorithm.plan.planned_epsilon
    spent = algorithm.spent(6)
    assert spent.epsilon_mean == pytest.approx(spent.epsilon_max)


def test_a_resumed_run_reports_at_least_what_an_uninterrupted_one_does() -> None:
    payments = InMemoryPayments()
    whole, first = (strategy(private(POISSON, 6, payments=p), POISSON, 6) for p in (None, payments))
    play(whole, (1, 2, 3, 4))
    play(first, (1, 2))
    checkpoint = first.state
    play(first, (3,))  # lost in the crash, after it was released
    resumed = strategy(private(POISSON, 6, payments=payments), POISSON, 6)
    resumed.resume(checkpoint)
    play(resumed, (3, 4))
    assert equal(whole.state.params, resumed.state.params)
    assert resumed.last_report().epsilon > whole.last_report().epsilon
    assert [p.round for p in payments.paid()] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "selector", [Poisson(fraction=0.1), Uniform(count=3)], ids=["poisson", "uniform"]
)
def test_the_planned_rounds_fit_the_target_and_no_round_passes_it(selector) -> None:
    algorithm = private(selector, 6, rounds=8, noise_multiplier=None, target_epsilon=2.0)
    played = strategy(algorithm, selector, 6)
    play(played, range(1, 9))
    assert 1.9 < played.last_report().epsilon <= 2.0
    with pytest.raises(BudgetExhaustedError, match=r"above privacy.target_epsilon=2"):
        play(played, range(9, 30))  # of the seeded ones, some still ask those who were asked less
    assert played.last_report().epsilon <= 2.0


def test_without_noise_epsilon_is_not_finite() -> None:
    selector = RoundRobin(count=2)
    algorithm = private(selector, 4, noise=0.0)
    played = strategy(algorithm, selector, 4)
    play(played, (1,))
    assert played.last_report().epsilon == algorithm.spent(4).epsilon_mean == math.inf


# What is withheld ---------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [RoundRobin(count=3), POISSON], ids=["seeded", "poisson"])
def test_nothing_that_is_written_tells_who_answered_or_how(selector, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    written, round = {}, 2 if selector is not POISSON else 1
    for silent in (False, True):
        played = strategy(private(selector, 6), selector, 6)
        messages = asked(played, round)
        assert len(messages) >= 2
        replies = [reply(m, 0.1) for m in messages]
        _, metrics = played.aggregate_train(
            round, [reply(messages[0], math.nan), *([] if silent else replies[1:]), replies[0]]
        )
        record = RoundsFile(tmp_path / f"{silent}.jsonl")
        record.append(played.last_report())
        record.close()
        written[silent] = json.loads(record.path.read_text())
        assert dict(metrics) == {"max_norm": 1.0}
    assert written[True] == written[False]
    entry = written[True]
    assert entry["cohort"] == ([] if selector is POISSON else ["3", "4", "5"])
    assert (entry["num_updates"], entry["failures"], entry["client_accuracy"]) == (None, [], {})
    assert entry["client_metrics"] == {"max_norm": 1.0}
    assert entry["uplink_bytes"] == entry["downlink_bytes"] == 3 * 12
    assert entry["epsilon"] > 0
    assert caplog.text == ""

    report = report_from_json(entry)
    assert report.num_updates is None
    totals = totals_of([report])
    assert (totals.failures.clients, totals.failures.rejected_updates) == (None, None)
    figures = _figures(report)
    for kept_out in ("cohort_size", "num_updates", "failures/rejected"):
        assert kept_out not in figures
    console = Console(file=io.StringIO(), width=200)
    progress = ConsoleProgress(console=console)
    progress.start({"rounds": 1}, tmp_path)
    progress.on_round(report)
    line = console.file.getvalue()
    assert "replies" not in line
    assert "failed" not in line
    assert "ε" in line


def test_without_privacy_a_poisson_cohort_is_reported_as_any_other() -> None:
    played = strategy(composition(), POISSON, 6)
    play(played, (2,))
    report = played.last_report()
    assert report.num_updates == len(report.cohort) > 0


# Refusals -----------------------------------------------------------------------------------------

GOOD = RoundRobin(count=2)


@pytest.mark.parametrize(
    ("algorithm", "selector", "trainable", "words"),
    [
        (
            composition(WeightedMean()),
            GOOD,
            MODEL,
            "strategy.aggregation.weighting=examples cannot be used with privacy=client",
        ),
        (composition(Median()), GOOD, MODEL, "strategy.aggregation=Median()"),
        (composition(Krum(num_malicious=1)), GOOD, MODEL, "strategy.aggregation=Krum("),
        (
            composition(ClippedNorm(rule=WeightedMean(weighting="uniform"), max_norm=1.0)),
            GOOD,
            MODEL,
            "strategy.aggregation=ClippedNorm(",
        ),
        (FlowerAlgorithm(strategy=FedAvg()), GOOD, MODEL, "strategy=flower-FedAvg"),
        (composition(), GOOD, {"w"}, "task: b of the model cannot be trained"),
        (
            composition(),
            RoundRobin(count=2, over_selection=0.5),
            MODEL,
            "selection.over_selection=0.5 cannot be used",
        ),
        (
            composition(),
            RoundRobin(count=2, min_replies=2),
            MODEL,
            "selection.min_replies=2 cannot be used",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_the_guarantee_is_refused(algorithm, selector, trainable, words) -> None:
    with pytest.raises(ConfigError) as caught:
        check_client_level(algorithm, selector, params=MODEL, trainable=frozenset(trainable))
    assert words in str(caught.value)


def test_what_keeps_it_passes() -> None:
    for selector in (GOOD, POISSON):
        chosen = composition()
        passed = check_client_level(chosen, selector, params=MODEL, trainable=frozenset(MODEL))
        assert passed is chosen


def test_a_delta_that_lets_one_client_go_is_refused() -> None:
    with pytest.raises(ConfigError, match="privacy.delta=0.1 is not below 1/10"):
        plan_client_level(ClientLevel(delta=0.1), GOOD, ClientRange(10), rounds=1, seed=1)


def test_a_plan_counts_what_the_most_asked_client_is_asked() -> None:
    """Round robin over 7 clients, 3 a round, 5 rounds: the first is asked 3 times."""
    privacy = ClientLevel(noise_multiplier=None, target_epsilon=1.0)
    selector = RoundRobin(count=3)
    plan = plan_client_level(privacy, selector, ClientRange(7), rounds=5, seed=1)
    assert plan.event is not None
    assert plan.planned_epsilon == RdpAccountant().epsilon([plan.event.times(3)], delta=1e-5)
    assert plan.expected_cohort == 3
    poisson = plan_client_level(ClientLevel(), POISSON, ClientRange(7), rounds=5, seed=1)
    assert poisson.expected_cohort == 3.5
    assert poisson.sample_rate == 0.5
