"""The short cut for plain SGD has torch's bits; everything else is torch's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fl_app.components import build
from fl_app.config import compose_config, to_json
from fl_app.local_optimizer import (
    ELEMENTWISE,
    PlainSgd,
    StackedOptimizer,
    make_local_optimizer,
    steps_elementwise,
)


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (3,), ()]]


def gradients(seed: int, of: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@given(st.floats(1e-6, 10), st.sampled_from([0.0, 1e-4, 0.3]), st.integers(0, 2**31), st.booleans())
def test_plain_sgd_has_the_bits_of_torchs(lr, weight_decay, seed, unused) -> None:
    factory = partial(torch.optim.SGD, lr=lr, weight_decay=weight_decay, momentum=0.0)
    ours, theirs = parameters(seed), parameters(seed)
    fast, torchs = make_local_optimizer(factory, ours), factory(theirs)
    assert isinstance(fast, PlainSgd)
    for step in range(3):
        gradients(step, ours)
        gradients(step, theirs)
        if unused:
            ours[1].grad = theirs[1].grad = None
        fast.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, lr=0.1, maximize=True),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1),
    ],
    ids=repr,
)
def test_every_other_optimizer_is_torchs_own(factory) -> None:
    assert isinstance(make_local_optimizer(factory, parameters(1)), torch.optim.Optimizer)


def test_torchs_default_learning_rate_is_ours() -> None:
    ours, theirs = parameters(3), parameters(3)
    gradients(1, ours)
    gradients(1, theirs)
    make_local_optimizer(partial(torch.optim.SGD), ours).step()
    torch.optim.SGD(theirs).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_remembered_state_is_continued_and_left_as_it_was() -> None:
    factory = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    first = parameters(1)
    optimizer = make_local_optimizer(factory, first)
    gradients(1, first)
    optimizer.step()
    state = optimizer.state_dict()
    before = [entry["momentum_buffer"].clone() for entry in state["state"].values()]
    second = parameters(2)
    continued = make_local_optimizer(factory, second, state)
    gradients(2, second)
    continued.step()
    after = [entry["momentum_buffer"] for entry in state["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_default_configuration_takes_the_short_cut() -> None:
    training = build(to_json(compose_config([]))).training
    assert isinstance(make_local_optimizer(training.optimizer, parameters(1)), PlainSgd)


# Many clients at once -----------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(4, 3), (3,), ()]


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rounds", [1, 2])
def test_stacked_clients_are_stepped_and_remembered_as_by_their_own(kind, rounds) -> None:
    """With steps left for fewer and fewer; also of a weight that is a single number."""
    options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    factory, steps = partial(kind, lr=0.1, **options), [5, 3, 3, 1]
    states: list[Any] = [None] * 4
    for round in range(rounds):
        generator = torch.Generator().manual_seed(round)
        weights = [torch.randn(4, *shape, generator=generator) for shape in SHAPES]
        alone = [[weight[k].clone().requires_grad_() for weight in weights] for k in range(4)]
        own = [make_local_optimizer(factory, alone[k], states[k]) for k in range(4)]
        counts = steps if round == 0 else [2, 2, 2, 2]  # of clients that came equally far
        if round:
            states, alone, own, weights = (
                states[1:3],
                alone[1:3],
                own[1:3],
                [w[1:3] for w in weights],
            )
        stack = StackedOptimizer(factory, weights, states)
        for step in range(max(counts)):
            active = stack.active(sum(count > step for count in counts[: len(own)]))
            for position, weight in enumerate(active):
                drawn = torch.randn(weight.shape, generator=generator)
                weight.grad = drawn if position != 1 else None  # the loss does not reach it
                for k in range(len(weight)):
                    alone[k][position].grad = drawn[k] if position != 1 else None
            stack.step()
            for k in range(len(active[0])):
                own[k].step()
        for k, optimizer in enumerate(own):
            for weight, tensor in zip(weights, alone[k], strict=True):
                torch.testing.assert_close(weight[k], tensor.detach(), rtol=1e-6, atol=1e-7)
            expected, remembered = optimizer.state_dict()["state"], stack.state_of(k)["state"]
            assert remembered.keys() == expected.keys()
            for number, entries in expected.items():
                assert remembered[number].keys() == entries.keys()
                for name, value in entries.items():
                    torch.testing.assert_close(
                        remembered[number][name], value, rtol=1e-6, atol=1e-7
                    )
        states = [dict(stack.state_of(k)) for k in range(len(own))]


def test_clients_are_of_an_age_if_their_optimizers_took_as_many_steps() -> None:
    factory = partial(torch.optim.Adam, lr=0.1)

    def state(steps: int, seed: int) -> Any:
        own = parameters(seed)
        optimizer = factory(own)
        for step in range(steps):
            gradients(seed + step, own)
            optimizer.step()
        return optimizer.state_dict()

    age = StackedOptimizer.age
    assert age(state(2, 1)) == age(state(2, 9))
    assert age(state(2, 1)) != age(state(3, 1))
    assert age(state(1, 1)) != age(None)
    assert age(None) == age({}) == age(state(0, 1))


def test_only_optimizers_of_torch_that_step_weights_by_themselves_are_known_to() -> None:
    assert all(steps_elementwise(partial(kind, lr=0.1)) for kind in ELEMENTWISE)
    for other in (torch.optim.LBFGS, torch.optim.Muon, type("Mine", (torch.optim.SGD,), {})):
        assert not steps_elementwise(partial(other, lr=0.1))
    assert not steps_elementwise(lambda weights: torch.optim.SGD(weights, lr=0.1))
