"""The short cut for plain SGD has torch's bits; everything else is torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fl_app.components import build
from fl_app.config import compose_config, to_json
from fl_app.local_optimizer import PlainSgd, make_local_optimizer


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
