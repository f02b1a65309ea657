"""Of clients that train side by side each answers, and fails, as it would by itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alike, play_config, rounds_of, summary_of
from torch import nn

from fl_app.config import compose_config
from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import Classification
from fl_app.types import ClientExamples, Examples

NOISE = ("privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")
FOR_TESTS = "privacy.randomness=reproducible_for_tests"


@dataclass(frozen=True, kw_only=True)
class Made(Classification):
    """Records of four columns.

    Attributes:
        batch_norm: Whether the model mixes records.
        wrong: Client -> what is wrong with it.
    """

    model: None = None
    batch_norm: bool = False
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "made"

    def build_model(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)]
        if self.batch_norm:
            layers.insert(1, nn.BatchNorm1d(5))
        return nn.Sequential(*layers)

    def generate(self, client: str, seed: int) -> ClientExamples:
        n = 1 if client == "0" else 10 + 3 * int(client)
        train, test = self._records(n, client), self._records(4, client)
        wrong = self.wrong.get(client)
        if wrong == "generator":
            raise RuntimeError(f"the disk of client {client} is on fire")
        if wrong == "target":
            train.targets[n // 2] = 7
        if wrong == "columns":
            train = replace(train, inputs=train.inputs[:, :3])
        if wrong == "type":
            train = replace(train, inputs=train.inputs.double())
        if wrong == "nan":
            train.inputs[n // 2] = math.nan
        if wrong == "test target":
            test.targets[1] = 7
        if wrong == "test columns":
            test = replace(test, inputs=test.inputs[:, :3])
        return ClientExamples(train=train, test=test)

    def _records(self, n: int, client: str) -> Examples:
        generator = torch.Generator().manual_seed(int(client))
        inputs = torch.randn(n, 4, generator=generator)
        return Examples(inputs=inputs, targets=torch.arange(n) % 3)

    def held_out(self, seed: int) -> Examples:
        return self._records(20, "77")

    def load(self) -> PooledExamples:
        raise AssertionError("never pooled")


def made(folder: Path, *overrides: str, **task: Any) -> Path:
    """Play a run of seven such clients, all of them asked."""
    sys.modules.setdefault(__name__, sys.modules[Made.__module__])
    config = compose_config(
        [
            *("partition=generated", "partition.num_clients=7", "selection.fraction=1.0"),
            *("client.epochs=1", "rounds=2", "progress=none", "fairness_clients=0", *overrides),
        ]
    )
    config["task"] = {"_target_": f"{__name__}.Made", **task}
    return play_config({**config, "run_dir": str(folder)})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"2": "generator", "5": "nan"},
        {"2": "target", "3": "columns", "4": "type", "6": "nan"},
        {"2": "test target", "4": "test columns"},
    ],
    ids=["nothing", "alone", "in training", "in measuring"],
)
def test_what_is_wrong_with_a_client_costs_the_round_that_client_alone(wrong, tmp_path) -> None:
    together, alone = (
        made(tmp_path / vectorize, f"engine.vectorize={vectorize}", wrong=wrong)
        for vectorize in ("true", "false")
    )
    for entry in rounds_of(together):
        assert {failure["client"] for failure in entry["failures"]} == wrong.keys()
        assert entry["num_updates"] == 7 - len(wrong)
    assert alike(rounds_of(together), rounds_of(alone))
    assert summary_of(together)["training"] == "cohort"


def test_nor_does_it_cost_more_under_record_level_privacy(tmp_path) -> None:
    private = ("privacy=record", *NOISE, FOR_TESTS, "client.batch_size=1", "rounds=1")
    together, alone = (
        made(
            *(tmp_path / vectorize, f"engine.vectorize={vectorize}", *private),
            wrong={"3": "target", "6": "nan"},
        )
        for vectorize in ("true", "false")
    )
    assert alike(rounds_of(together), rounds_of(alone))
    (entry,) = rounds_of(together)
    # That a record is NaN does not show.
    assert {failure["client"] for failure in entry["failures"]} == {"3"}
    paid = [len((run / "ledger.jsonl").read_text().splitlines()) for run in (together, alone)]
    assert paid[0] == paid[1]


def test_one_record_of_the_first_client_does_not_pass_for_independent_ones(tmp_path) -> None:
    run = made(tmp_path / "run", "rounds=1", batch_norm=True)
    assert summary_of(run)["training"] == "one by one"
