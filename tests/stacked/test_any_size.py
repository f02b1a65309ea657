"""One recording plays a step for any number of clients and records, or is not used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from side_by_side import SGD, cohort, plain, private, trainer_of
from torch import Tensor
from torch.nn import functional
from zoo import MAPPED, WITH_RULES

from fl_app.stacked import program
from fl_app.stacked.any_size import of_any_size
from fl_app.stacked.program import ADOPTED_AFTER, MANY_SHAPES, Programs
from fl_app.training import LocalTraining

SHAPES = [(1, 1), (1, 6), (2, 3), (3, 5), (5, 2), (6, 1), (4, 4), (10, 10)]
"""Clients, and records of each."""


@pytest.fixture(autouse=True)
def recorded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a recording of all sizes made as soon as there are many shapes."""
    monkeypatch.setattr(program, "RECORDING_S", 0.0)
    monkeypatch.setattr(program, "RECORDED_AFTER", 10**9)


def given(seed: int, clients: int, records: int) -> list[Tensor]:
    """Return records ``(n, 3)`` and weights ``(clients, 3, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(clients * records, 3, generator=generator),
        torch.randn(clients, 3, 2, generator=generator),
    ]


def step(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """Descend on the clients' mean squares, in place."""
    local = weight.detach().requires_grad_()
    rows = x.reshape(weight.shape[0], -1, 3)
    outputs = torch.bmm(rows, local).reshape(x.shape[0] * 2)
    (gradient,) = torch.autograd.grad(outputs.square().sum() / rows.shape[1], local)
    weight.sub_(gradient, alpha=0.1)
    numbered = torch.arange(0, 2 * weight.shape[0], 2).repeat_interleave(rows.shape[1])
    return outputs.detach(), numbered


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recording_gives_the_bits_of_the_step_at_sizes_it_was_not_made_of(shape) -> None:
    recorded = of_any_size(step, given(0, 2, 2), 1)
    assert recorded is not None
    played_on, expected_on = given(1, *shape), given(1, *shape)
    assert same(recorded(*played_on), step(*expected_on))
    assert same(played_on, expected_on)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: (x.new_zeros(x.shape[0] + 1),),
        lambda x, w: (x.new_zeros(w.shape[0] * w.shape[0]),),
        lambda x, w: (x * float(x.shape[0]),),
        lambda x, w: (x.sin() if x.shape[0] > 20 else x.cos(),),
        lambda x, w: (x * float(x.sum()),),
        lambda x, w: (x + torch.arange(float(x.shape[0]))[:, None].tolist()[0][0],),
    ],
    ids=["one more", "a square", "a factor", "a branch", "a value", "a list"],
)
def test_what_is_no_multiple_of_a_size_makes_no_recording_that_is_used(wrong) -> None:
    programs = Programs(wrong, by_record=1)
    for seed, shape in itertools.product(range(ADOPTED_AFTER + 3), SHAPES):
        tensors = given(seed, *shape)
        assert same(programs(*tensors), wrong(*tensors))


def test_it_is_made_once_shapes_are_many_and_used_for_those_it_is_right_for() -> None:
    def odd(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        counted.append(x.shape)
        return (x.sin() if weight.shape[0] == 5 else x.cos(),)

    counted: list[torch.Size] = []
    programs = Programs(odd, by_record=1)
    for shape in SHAPES[: MANY_SHAPES - 1] * (2 * ADOPTED_AFTER):
        programs(*given(0, *shape))
    assert programs._of_any_size is None
    for seed, shape in itertools.product(range(3 * ADOPTED_AFTER), SHAPES):
        tensors = given(seed, *shape)
        (expected,) = odd(*tensors)
        assert torch.equal(programs(*tensors)[0], expected)
    counted.clear()
    for shape in SHAPES:
        programs(*given(0, *shape))
    assert counted == [torch.Size([10, 3])]  # of five clients: there it would be wrong


def test_that_one_shape_is_common_makes_no_recording_of_all_sizes() -> None:
    programs = Programs(step, by_record=1)
    for seed in range(100):
        programs(*given(seed, 3, 5))
    assert programs._of_any_size is None


def test_what_is_drawn_is_what_the_step_draws() -> None:
    def drop(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return (functional.dropout(x, 0.5),)

    tensors = [given(seed, *shape) for seed in range(3 * ADOPTED_AFTER) for shape in SHAPES]
    programs = Programs(drop, by_record=1)
    torch.manual_seed(3)
    told = [programs(*each)[0] for each in tensors]
    assert programs._of_any_size is not None
    torch.manual_seed(3)
    assert same(told, [drop(*each)[0] for each in tensors])


@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize(
    "task", [*WITH_RULES.values(), *MAPPED.values()], ids=[*WITH_RULES, *MAPPED]
)
def test_ragged_training_has_the_same_bits_before_and_after(task, is_private: bool) -> None:
    training = LocalTraining(optimizer=SGD, epochs=2, batch_size=4)
    sizes = [17, 14, 11, 6, 3, 1]
    clients = partial(private, task, sizes) if is_private else partial(plain, task, sizes)
    fresh = cohort(task, training, clients())
    trainer = trainer_of(task, training, private=is_private)
    for _ in range(3 * ADOPTED_AFTER):
        again = trainer.train(task.initial(), clients())
    for one, other in zip(fresh, again, strict=True):
        assert all(torch.equal(one.delta[n], other.delta[n]) for n in one.delta)
        assert one.metrics == other.metrics
    steps = trainer.private_steps if is_private else trainer.plain_steps
    assert all(programs._sizes_tried for programs in steps._programs.values())


@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("name", ["linear", "conv and pool", "group norm", "embedding"])
def test_the_layers_with_rules_are_recorded_for_all_sizes(name: str, is_private: bool) -> None:
    task = WITH_RULES[name]
    clients = partial(private, task) if is_private else partial(plain, task)
    trainer = trainer_of(
        task, LocalTraining(optimizer=SGD, epochs=1, batch_size=4), private=is_private
    )
    for _ in range(3 * ADOPTED_AFTER):
        trainer.train(task.initial(), clients([17, 14, 11, 6, 3, 1]))
    steps = trainer.private_steps if is_private else trainer.plain_steps
    [programs] = steps._programs.values()
    assert programs._of_any_size is not None
    # All shapes are played by it alone.
    assert set(map(id, programs._programs.values())) == {id(programs._of_any_size)}
    assert len(programs._programs) >= MANY_SHAPES
