"""A recorded step gives the bits of the step, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from side_by_side import cohort, plain, private, trainer_of
from torch import Tensor
from torch.nn import functional
from zoo import MAPPED, WITH_RULES

from fl_app.stacked import program
from fl_app.stacked.program import RECORDED_AFTER, Programs
from fl_app.training import LocalTraining


@pytest.fixture(autouse=True)
def recorded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have shapes recorded after so many steps, whatever time these took."""
    monkeypatch.setattr(program, "RECORDING_S", 0.0)


class Calls:
    """A step that counts how often its own code is run.

    Args:
        step: What it does.
    """

    def __init__(self, step: object) -> None:
        self.step, self.count = step, 0

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        self.count += 1
        return self.step(*tensors)  # type: ignore[operator]


def matrix(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def play(programs: Programs, times: int, *shape: int) -> list[list[Tensor]]:
    return [[t.clone() for t in programs(matrix(k, *shape))] for k in range(times)]


def test_a_step_that_recurs_is_recorded_for_each_of_its_shapes() -> None:
    calls = Calls(lambda x: (x.sin() @ x.T, x.sum(1)))
    programs = Programs(calls)
    for shape in ((3, 4), (2, 5)):
        calls.count = 0
        programs._recording_s = 0.0
        told = play(programs, RECORDED_AFTER + 10, *shape)
        # Recording runs it twice more: to be recorded, and to be compared with.
        assert calls.count == RECORDED_AFTER + 1 + 2
        for k, tensors in enumerate(told):
            expected = calls.step(matrix(k, *shape))
            assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


def test_recording_writes_to_the_tensors_no_more_often_than_the_step() -> None:
    programs = Programs(lambda weight, x: (weight.add_(x.mean()).sum(),))
    weight = torch.zeros(3)
    expected = 0.0
    for k in range(RECORDED_AFTER + 5):
        x = matrix(k, 4)
        programs(weight, x)
        expected += float(x.mean())
    torch.testing.assert_close(weight, torch.full((3,), expected))


def test_when_a_step_is_recorded_does_not_show_in_what_is_drawn() -> None:
    def drop(x: Tensor) -> Sequence[Tensor]:
        return (functional.dropout(x, 0.5),)

    programs = Programs(drop)
    torch.manual_seed(3)
    told = [programs(torch.ones(50))[0].clone() for _ in range(RECORDED_AFTER + 10)]
    torch.manual_seed(3)
    assert all(torch.equal(t, drop(torch.ones(50))[0]) for t in told)


def test_a_step_that_does_something_else_each_time_is_not_played_back() -> None:
    count = iter(range(10_000))
    programs = Programs(lambda x: (x + next(count),))
    told = [float(programs(torch.zeros(1))[0]) for _ in range(RECORDED_AFTER + 5)]
    assert told == sorted(set(told))


def test_a_step_that_cannot_be_recorded_goes_on_being_used() -> None:
    calls = Calls(lambda x: (x * float(x.sum()),))
    programs = Programs(calls)
    told = play(programs, RECORDED_AFTER + 5, 4)
    for k, (value,) in enumerate(told):
        assert torch.equal(value, matrix(k, 4) * float(matrix(k, 4).sum()))


@pytest.mark.parametrize("name", ["conv and pool", "embedding", "group norm", "linear"])
@pytest.mark.parametrize("is_private", [False, True])
def test_training_has_the_same_bits_before_and_after_it_is_recorded(
    name: str, is_private: bool
) -> None:
    task = WITH_RULES[name]
    training = LocalTraining(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=2, batch_size=4)
    sizes = [9, 6, 4]
    clients = (lambda: private(task, sizes)) if is_private else (lambda: plain(task, sizes))
    fresh = cohort(task, training, clients())
    trainer = trainer_of(task, training, private=is_private)
    steps = trainer.private_steps if is_private else trainer.plain_steps
    for _ in range(RECORDED_AFTER + 1):
        again = trainer.train(task.initial(), clients())
    assert all(programs._programs for programs in steps._programs.values())
    for one, other in zip(fresh, again, strict=True):
        assert all(torch.equal(one.delta[n], other.delta[n]) for n in one.delta)
        assert one.metrics == other.metrics


def test_a_recording_is_forgotten_with_what_clients_share() -> None:
    task = MAPPED["frozen parts and buffers"]
    training = LocalTraining(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=1, batch_size=4)
    trainer, clients = trainer_of(task, training), plain(task, [8, 8])
    for _ in range(RECORDED_AFTER + 1):
        trainer.train(task.initial(), clients)
    assert any(programs._programs for programs in trainer.plain_steps._programs.values())
    other = {name: tensor * 1.5 for name, tensor in task.initial().items()}
    expected = trainer_of(task, training).train(other, clients)
    for one, two in zip(trainer.train(other, clients), expected, strict=True):
        assert all(torch.equal(one.delta[n], two.delta[n]) for n in two.delta)
