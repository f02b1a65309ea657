"""Measuring a model on several clients' records at once is measuring it on each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import LINEAR, WITH_RULES, Zoo

from fl_app import training
from fl_app.params import write_params
from fl_app.training import evaluate_each, evaluate_quickly
from fl_app.types import Examples


@dataclass(frozen=True, kw_only=True)
class Regression(Zoo):
    """Squares of the first output's error."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    def examples(self, n: int, seed: int = 0) -> Examples:
        made = super().examples(n, seed)
        return Examples(inputs=made.inputs, targets=made.targets.to(self.dtype))


def alone(task: Zoo, parts: list[Examples]) -> list[dict[str, float]]:
    model = task.build_model()
    write_params(model, task.initial())
    return [dict(evaluate_quickly(model, task, part).metrics) for part in parts]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([4, 1024]))
@pytest.mark.parametrize(
    "task",
    [
        LINEAR,
        WITH_RULES["conv and pool"],
        WITH_RULES["embedding"],
        Regression(layers=LINEAR.layers),
    ],
    ids=["linear", "images", "words", "regression"],
)
def test_each_part_is_measured_as_by_itself(task: Zoo, sizes: list[int], batch: int) -> None:
    parts = [task.examples(size, seed=k) for k, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "EVALUATION_BATCH", batch)
        evaluations = evaluate_each(task.build_model(), task, parts, params=task.initial())
    assert [evaluation.num_examples for evaluation in evaluations] == sizes
    for evaluation, expected in zip(evaluations, alone(task, parts), strict=True):
        assert evaluation.metrics == pytest.approx(expected, rel=1e-12)
        assert ("accuracy" in evaluation.metrics) == (not isinstance(task, Regression))


def test_layers_are_in_evaluation_mode_and_what_the_model_held_has_no_influence() -> None:
    task = Zoo(layers=lambda: [nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)])
    parts = [task.examples(5, seed=1), task.examples(3, seed=2)]
    used = task.build_model()
    for tensor in used.state_dict().values():
        tensor.fill_(7)
    first = evaluate_each(used.train(), task, parts, params=task.initial())
    assert [e.metrics for e in first] == [pytest.approx(m, rel=1e-12) for m in alone(task, parts)]


def test_one_part_that_is_not_finite_changes_no_other() -> None:
    parts = [LINEAR.examples(5, seed=k) for k in range(3)]
    expected = evaluate_each(LINEAR.build_model(), LINEAR, parts, params=LINEAR.initial())
    parts[1].inputs[0] = torch.nan
    spoilt = evaluate_each(LINEAR.build_model(), LINEAR, parts, params=LINEAR.initial())
    assert spoilt[0] == expected[0]
    assert spoilt[2] == expected[2]
    assert spoilt[1].metrics["loss"] != spoilt[1].metrics["loss"]
