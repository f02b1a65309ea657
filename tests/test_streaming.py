"""A cohort of more clients than are trained at once: its mean is kept, its updates are not."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from helpers import alike, play, rounds_of, summary_of

from fl_app import vectorizing
from fl_app.aggregation import Aggregation, WeightedMean
from fl_app.algorithm import Composition
from fl_app.answers import Answers
from fl_app.engines.local_grid import LocalDirectory
from fl_app.objective import OwnLoss
from fl_app.params import StackedParams
from fl_app.robust_aggregation import Median
from fl_app.selection import RoundRobin, Uniform
from fl_app.strategy import FederatedStrategy
from fl_app.tasks.federated import ClientRange
from fl_app.types import (
    ClientId,
    ClientUpdate,
    Evaluation,
    Failure,
    FailureKind,
    Params,
    RoundReport,
)
from fl_app.validation import UpdateChecks

MODEL: Params = {"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(0.5)}
CLIENTS = 11


class Answering:
    """Client k sends k everywhere, as a row of its part's stack; what is wrong with some is said.

    Attributes:
        parts: How many were asked together, each time.
        alive: Stacks that somebody still holds, each time that others are made.
    """

    def __init__(
        self,
        clients: Sequence[ClientId],
        wrong: dict[ClientId, str],
        *,
        at_once: int,
        side_by_side: bool = True,
    ) -> None:
        self.at_once, self.side_by_side = at_once, side_by_side
        self.parts: list[int] = []
        self.alive: list[int] = []
        self.forgotten = 0
        self._waiting = list(clients)
        self._wrong = wrong
        self._stacks: list[weakref.ref[StackedParams]] = []

    def train(self, count: int) -> Sequence[tuple[ClientId, ClientUpdate | Failure]]:
        gc.collect()
        self.alive.append(sum(stack() is not None for stack in self._stacks))
        self.parts.append(count)
        asked, self._waiting = self._waiting[:count], self._waiting[count:]
        values = torch.tensor([float(client) for client in asked])
        for row, client in enumerate(asked):
            values[row] = {"nan": math.nan, "long": 1e6}.get(
                self._wrong.get(client, ""), values[row]
            )
        stack = StackedParams(
            {
                name: values.view(-1, *[1] * t.dim()).expand(-1, *t.shape).clone()
                for name, t in MODEL.items()
            }
        )
        self._stacks.append(weakref.ref(stack))
        return [(client, self._answer(client, stack, row)) for row, client in enumerate(asked)]

    def forget(self) -> None:
        self.forgotten += 1

    def _answer(self, client: ClientId, stack: StackedParams, row: int) -> ClientUpdate | Failure:
        if self._wrong.get(client) == "fails":
            return Failure(client=client, kind=FailureKind.ERROR, reason="on strike")
        count = 0 if self._wrong.get(client) == "empty" else 1 + int(client) % 4
        return ClientUpdate(
            client=client,
            round=1,
            delta=stack.row(row),
            num_examples=count,
            metrics={"loss": float(client)},
            evaluation=Evaluation(num_examples=2, metrics={"accuracy": int(client) / 100}),
            num_bytes=16,
        )


def played(
    wrong: dict[ClientId, str],
    *,
    rule: Aggregation | None = None,
    hides_clients: bool = False,
    over_selection: float = 0.0,
    **cohort: Any,
) -> tuple[FederatedStrategy, Answering]:
    """Play one round with everybody, or with half of them and more in reserve."""

    class Hiding(Composition):
        pass

    Hiding.hides_clients = hides_clients  # type: ignore[attr-defined]
    strategy = FederatedStrategy(
        algorithm=Hiding(
            aggregation=rule or WeightedMean(),
            server_optimizer=partial(torch.optim.SGD, lr=1.0),
            objective=OwnLoss(),
            name="test",
        ),
        selector=Uniform(fraction=0.5, over_selection=over_selection)
        if over_selection
        else RoundRobin(fraction=1.0),
        checks=UpdateChecks(max_norm=100.0),
        directory=LocalDirectory(ClientRange(CLIENTS)),
        initial=MODEL,
        trainable=frozenset(MODEL),
        seed=1,
    )
    strategy.ask(1, strategy.current_arrays(), ConfigRecord())
    asked = Answering(list(strategy._asked.values()), wrong, **cohort)
    strategy.aggregate_cohort(1, asked)
    return strategy, asked


def equal_reports(first: RoundReport, second: RoundReport) -> bool:
    return replace(first, seconds=0.0) == replace(second, seconds=0.0)


WRONG = {"0": "nan", "4": "fails", "5": "long", "9": "empty", "8": "nan"}


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("wrong", [{}, WRONG], ids=["all good", "some wrong"])
def test_a_round_in_parts_is_that_of_all_at_once(wrong: dict[str, str], at_once: int) -> None:
    whole, all_at_once = played(wrong, at_once=CLIENTS)
    parts, asked = played(wrong, at_once=at_once)
    assert all_at_once.parts == [CLIENTS]
    assert sum(asked.parts) == CLIENTS
    assert max(asked.parts) == at_once
    good = [k for k in range(CLIENTS) if str(k) not in wrong]
    weights = [1 + k % 4 for k in good]
    mean = sum(w * k for w, k in zip(weights, good, strict=True)) / sum(weights)
    for name, tensor in MODEL.items():
        torch.testing.assert_close(parts.state.params[name], tensor + mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(parts.state.params[name], whole.state.params[name])
    assert equal_reports(parts.last_report(), whole.last_report())
    assert {failure.client for failure in parts.last_report().failures} == wrong.keys()


def test_of_the_updates_of_a_round_no_more_are_held_than_are_trained_at_once() -> None:
    _, asked = played(WRONG, at_once=2)
    assert asked.alive == [0] * 6
    assert asked.forgotten == 6
    _, asked = played({}, at_once=2, rule=Median(), over_selection=0.5)
    assert asked.forgotten == 0


@pytest.mark.parametrize(
    "options",
    [
        {"rule": Median()},
        {"hides_clients": True},
        {"side_by_side": False},
    ],
    ids=["a rule that wants all of them", "hidden clients", "trained one by one"],
)
def test_other_rounds_are_aggregated_whole(options: dict[str, Any]) -> None:
    _, asked = played({}, at_once=2, **options)
    assert asked.parts == [CLIENTS]
    assert asked.forgotten == 0


def test_no_more_of_an_over_selected_cohort_are_trained_than_are_needed() -> None:
    # Of 11, 5 or 6 updates are wanted, and half as many more clients are asked.
    strategy, asked = played({}, at_once=2, over_selection=0.5)
    wanted = strategy.last_report().num_updates
    assert asked.parts == [2] * (wanted // 2) + [1] * (wanted % 2)
    failing = {client: "nan" for client in strategy.last_report().cohort[:2]}
    strategy, asked = played(failing, at_once=2, over_selection=0.5)
    assert strategy.last_report().num_updates == wanted
    # As many as failed are made up for; whoever was not needed has not been trained.
    assert sum(asked.parts) == wanted + len(strategy.last_report().failures)


def test_with_no_good_update_at_all_the_model_stays() -> None:
    strategy, _ = played({str(k): "nan" for k in range(CLIENTS)}, at_once=3)
    assert not strategy.last_report().applied
    assert all(torch.equal(strategy.state.params[name], MODEL[name]) for name in MODEL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_whose_rounds_come_in_parts_is_that_of_rounds_at_once(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[bool] = []
    take = Answers.take_cohort

    def noting(answers: Answers, *arguments: Any) -> bool:
        parts.append(take(answers, *arguments))
        return parts[-1]

    monkeypatch.setattr(Answers, "take_cohort", noting)
    asked = ("partition.num_clients=13", "selection.fraction=1.0", "client.failure_fraction=0.2")
    whole = play(tmp_path / "whole", *asked)
    monkeypatch.setattr(vectorizing, "CHUNK_BYTES", 1 << 16)
    in_parts = play(tmp_path / "parts", *asked, f"engine.workers={workers}")
    assert parts == [False] * 3 + [True] * 3
    assert summary_of(in_parts)["training"] == "cohort"
    assert alike(rounds_of(in_parts), rounds_of(whole))
    assert sum(len(entry["failures"]) for entry in rounds_of(in_parts)) > 0
