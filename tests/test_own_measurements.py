"""Clients that measure a model together tell what each of them would tell in a message."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn

from fl_app import client_cohort
from fl_app.components import build
from fl_app.config import compose_config, to_json
from fl_app.engines.local import LocalEngine, adopt_identity
from fl_app.engines.local_grid import LocalGrid
from fl_app.federation import initial_model
from fl_app.strategy import FederatedStrategy
from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import Classification
from fl_app.types import ClientExamples, ClientId, Evaluation, Examples

SIZES = [1, 40, 0, 7, 23, 3, 60, 2, 12]
"""Records that the clients hold back; client 2 none."""


@dataclass(frozen=True, kw_only=True)
class Measured(Classification):
    """Records of four columns.

    Attributes:
        wrong: Client -> what is wrong with it.
    """

    model: None = None
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "measured"

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))

    def generate(self, client: str, seed: int) -> ClientExamples:
        wrong, size = self.wrong.get(client), SIZES[int(client)]
        if wrong == "generator":
            raise RuntimeError(f"the disk of client {client} is on fire")
        train, test = self._records(6, client), self._records(max(size, 1), client)
        if wrong == "target":
            test.targets[0] = 7
        if wrong == "columns":
            test = replace(test, inputs=test.inputs[:, :3])
        if wrong == "nan":
            test.inputs[0] = math.nan
        return ClientExamples(train=train, test=test if size else None)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        told = {"share-of-2": float((targets == 2).double().mean()), "f@1": 1.0}
        told |= {"undefined": math.nan} if len(targets) == 3 else {}
        if len(targets) == 12 and self.wrong.get("8") == "figure":
            told["accuracy_of"] = "no number"  # type: ignore[assignment]
        return {**super().metrics(outputs, targets), **told}

    def _records(self, n: int, client: str) -> Examples:
        generator = torch.Generator().manual_seed(int(client))
        inputs = torch.randn(n, 4, generator=generator)
        return Examples(inputs=inputs, targets=torch.arange(n) % 3)

    def held_out(self, seed: int) -> Examples:
        return self._records(20, "77")

    def load(self) -> PooledExamples:
        raise AssertionError("never pooled")


@contextmanager
def federation(
    *overrides: str, vectorize: str = "true", wrong: Mapping[str, str] | None = None
) -> Iterator[tuple[FederatedStrategy, LocalGrid]]:
    """Yield a strategy before its first round, and the Grid that its clients are on."""
    sys.modules.setdefault(__name__, sys.modules[Measured.__module__])
    population = ("partition=generated", f"partition.num_clients={len(SIZES)}")
    config = compose_config([*population, "selection.fraction=1.0", *overrides])
    config["task"] = {"_target_": f"{__name__}.Measured", "wrong": dict(wrong or {})}
    components = build(to_json(config))
    params, trainable = initial_model(components, None)
    adopt_identity()
    engine = LocalEngine(vectorize=vectorize)
    run_config = {**components.client_app.run_config, "config-json": to_json(config)}
    with engine.grid(components.data.clients, run_config) as grid:
        strategy = FederatedStrategy(
            algorithm=components.algorithm,
            selector=components.selector,
            checks=components.checks,
            directory=grid.directory,
            initial=params,
            trainable=trainable,
            seed=components.seed,
            replies=components.client_app.reader(),
        )
        yield strategy, grid


def measured(*overrides: str, **options: Any) -> dict[ClientId, Evaluation]:
    with federation(*overrides, **options) as (strategy, grid):
        return strategy.evaluate_clients(grid, strategy.clients())


def refuse_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise AssertionError("a message was sent")

    monkeypatch.setattr(LocalGrid, "push_messages", refuse)


@pytest.mark.parametrize("at_once", [1, 30, 1024])
@pytest.mark.parametrize(
    "wrong",
    [{}, {"1": "generator", "3": "nan", "4": "target", "6": "columns", "8": "figure"}],
    ids=["nothing wrong", "some wrong"],
)
def test_clients_tell_together_what_each_tells_in_a_message(wrong, at_once, monkeypatch) -> None:
    expected = measured(vectorize="false", wrong=wrong)
    monkeypatch.setattr(client_cohort, "EVALUATION_BATCH", at_once)
    refuse_messages(monkeypatch)
    together = measured(wrong=wrong)
    missing = {"2", *(client for client in wrong if wrong[client] != "nan")}
    assert list(together) == list(expected) == [c for c in map(str, range(9)) if c not in missing]
    for client, evaluation in expected.items():
        assert together[client].num_examples == evaluation.num_examples == SIZES[int(client)]
        assert list(together[client].metrics) == list(evaluation.metrics)
        figures, loss = dict(together[client].metrics), evaluation.metrics.get("loss")
        if loss is not None:
            assert figures.pop("loss") == pytest.approx(loss, rel=1e-6)
        # Shares of the very same predictions, not figures that are close to them.
        assert figures == {k: v for k, v in evaluation.metrics.items() if k != "loss"}
    assert "share_of_2" in together["0"].metrics
    assert {"accuracy", "precision", "recall", "f1"} < together["0"].metrics.keys()
    assert wrong or "auroc" in together["1"].metrics


def test_records_are_not_held_for_more_clients_than_are_measured_at_once(monkeypatch) -> None:
    records: list[int] = []
    one_pass = client_cohort._measured_together

    def counting(runtime: Any, parts: Mapping[ClientId, Examples], params: Any) -> Any:
        records.append(sum(map(len, parts.values())))
        return one_pass(runtime, parts, params)

    monkeypatch.setattr(client_cohort, "_measured_together", counting)
    monkeypatch.setattr(client_cohort, "EVALUATION_BATCH", 30)
    measured()
    assert records == [41, 30, 63, 14]


def test_what_a_policy_withholds_is_withheld_together(monkeypatch) -> None:
    noise = ("privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")
    private = ("privacy=record", *noise, "client.batch_size=2")
    public = "privacy.public=[evaluation,num_examples]"
    told = measured(*private, public)
    assert told.keys() == measured(*private, public, vectorize="false").keys() != set()
    refuse_messages(monkeypatch)
    assert measured(*private) == {}


def test_who_is_not_reached_in_time_is_left_out() -> None:
    with federation("selection.round_timeout_s=1e-9") as (strategy, grid):
        assert strategy.evaluate_clients(grid, strategy.clients()) == {}
    with federation("selection.round_timeout_s=60") as (strategy, grid):
        assert len(strategy.evaluate_clients(grid, strategy.clients())) == len(SIZES) - 1


@pytest.mark.parametrize(
    ("overrides", "vectorize"), [((), "false"), (("client_app.replies=model",), "true")]
)
def test_others_are_sent_messages(
    overrides: Sequence[str], vectorize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Message] = []
    push = LocalGrid.push_messages

    def counting(grid: LocalGrid, messages: Any) -> list[str]:
        sent.extend(messages := list(messages))
        return push(grid, messages)

    monkeypatch.setattr(LocalGrid, "push_messages", counting)
    measured(*overrides, vectorize=vectorize)
    assert len(sent) == len(SIZES)


def test_unknown_clients_are_left_out_and_the_others_in_canonical_order() -> None:
    with federation() as (strategy, grid):
        assert list(strategy.evaluate_clients(grid, ["8", "77", "0"])) == ["0", "8"]
        assert strategy.evaluate_clients(grid, []) == {}
