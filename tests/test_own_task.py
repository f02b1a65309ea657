"""A task made of a function and a module: what either may be, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fl_app.tasks.base import PooledExamples, PooledTask
from fl_app.tasks.classification import hold_out
from fl_app.tasks.own import OwnTask
from fl_app.tasks.partition import Iid
from fl_app.types import ConfigError, Examples

INPUTS = torch.arange(20.0).reshape(10, 2)
CLASSES = torch.tensor([0, 1] * 5)


def task(records: Callable[[], Any], **fields: Any) -> OwnTask:
    return OwnTask(records=records, model=partial(nn.Linear, 2, 2), **fields)


@pytest.mark.parametrize(
    "loaded",
    [
        (INPUTS, CLASSES),
        [INPUTS.double().numpy(), CLASSES.numpy().astype(np.int32)],
        (INPUTS.int(), CLASSES[:, None]),
        TensorDataset(INPUTS, CLASSES),
    ],
    ids=["tensors", "arrays", "whole numbers, a column of classes", "Dataset"],
)
def test_records_of_any_kind_become_the_same_examples(loaded: Any) -> None:
    expected = hold_out(Examples(inputs=INPUTS, targets=CLASSES), 0.2)
    pooled = task(lambda: loaded).load()
    assert pooled.held_out is not None
    assert expected.held_out is not None
    for got, wanted in (
        (pooled.train, expected.train),
        (pooled.held_out, expected.held_out),
    ):
        assert (got.inputs.dtype, got.targets.dtype) == (torch.float32, torch.int64)
        assert torch.equal(got.inputs, wanted.inputs)
        assert torch.equal(got.targets, wanted.targets)


def test_a_split_of_ones_own_and_owners_are_taken_as_they_are() -> None:
    pooled = PooledExamples(train=Examples(inputs=INPUTS, targets=CLASSES), owners=["a"] * 10)
    assert task(lambda: pooled).load() is pooled


def test_what_the_function_draws_is_the_same_at_every_call_and_moves_no_other_generator() -> None:
    drawn = task(lambda: (torch.randn(10, 2), CLASSES))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = drawn.load().train.inputs
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(drawn.load().train.inputs, first)


def test_float_targets_make_a_regression() -> None:
    own = OwnTask(records=lambda: (INPUTS, INPUTS.sum(dim=1)), model=partial(nn.Linear, 2, 1))
    assert isinstance(own, PooledTask)
    pooled = own.load()
    assert pooled.held_out is not None
    assert (len(pooled.train), len(pooled.held_out)) == (8, 2)
    rows = torch.cat([pooled.train.inputs, pooled.held_out.inputs])
    assert sorted(rows[:, 0].tolist()) == INPUTS[:, 0].tolist()
    assert torch.equal(pooled.train.targets, pooled.train.inputs.sum(dim=1))
    assert len(Iid(num_clients=4)(own, seed=1).clients) == 4
    outputs, targets = torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 4.0])
    assert own.losses(outputs, targets).tolist() == [4.0, 1.0]
    assert own.losses(outputs[:, 0], targets).tolist() == [4.0, 1.0]
    assert own.metrics(outputs, targets) == {"mae": 1.5}
    with pytest.raises(ConfigError, match="one number a record"):
        own.losses(torch.zeros(2, 2), targets)


def test_a_loss_and_metrics_of_ones_own_are_used() -> None:
    def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - outputs[:, 0] * targets).clamp(min=0)

    def largest(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.max()

    own = task(lambda: (INPUTS, CLASSES), loss=hinge, extra_metrics={"largest": largest})
    outputs, targets = torch.tensor([[0.25, 3.0]]), torch.tensor([1.0])
    assert own.losses(outputs, targets).tolist() == [0.75]
    assert own.metrics(outputs, targets) == {"largest": 3.0}  # no error of a loss we do not know
    classes = own.metrics(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert (classes["accuracy"], classes["largest"]) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: task(INPUTS), r"task\.records is a Tensor .*_partial_"),
        (lambda: OwnTask(records=list, model=nn.Linear(1, 1)), r"task\.model is a Linear .*_part"),
        (lambda: task(list, test_fraction=1.0), r"task\.test_fraction=1\.0"),
        (lambda: task(lambda: (1, 2, 3)).load(), r"task\.records gave a tuple"),
        (lambda: task(lambda: None).load(), r"task\.records gave a NoneType"),
    ],
)
def test_what_is_no_recipe_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
