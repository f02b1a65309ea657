"""The proximal term is the gradient of mu/2 times the squared distance, and nothing at mu = 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fl_app.objective import OwnLoss, Proximal
from fl_app.types import ConfigError

MU = st.floats(0, 10)
SEED = st.integers(0, 2**31)
SHAPES = [(2, 3), (3,), ()]


def model(seed: int) -> tuple[list[nn.Parameter], list[torch.Tensor], list[torch.Tensor]]:
    """Return local parameters with gradients, the received ones, and a copy of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    local = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    received = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for parameter in local:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return local, received, [p.grad.clone() for p in local]


@given(MU, SEED)
def test_the_proximal_gradient_is_autograds_of_half_mu_times_the_squared_norm(mu, seed) -> None:
    local, received, before = model(seed)
    term = mu / 2 * sum((w - w_t).square().sum() for w, w_t in zip(local, received, strict=True))
    by_autograd = torch.autograd.grad(term, local)
    Proximal(mu=mu).add_gradient(local, received)
    for parameter, own, extra in zip(local, before, by_autograd, strict=True):
        torch.testing.assert_close(parameter.grad, own + extra)


def test_three_four_away_the_pull_is_mu_times_three_four() -> None:
    local = [nn.Parameter(torch.tensor([3.0, 4.0]))]
    local[0].grad = torch.zeros(2)
    Proximal(mu=0.5).add_gradient(local, [torch.zeros(2)])
    assert local[0].grad.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("objective", [Proximal(mu=0.0), OwnLoss()], ids=repr)
def test_without_a_term_gradients_are_left_as_they_are_to_the_bit(objective) -> None:
    local, received, before = model(1)
    objective.add_gradient(local, [tensor * math.inf for tensor in received])
    assert all(torch.equal(p.grad, own) for p, own in zip(local, before, strict=True))


def test_at_the_received_model_there_is_no_pull() -> None:
    local, _, before = model(2)
    Proximal(mu=5.0).add_gradient(local, [p.detach().clone() for p in local])
    assert all(torch.equal(p.grad, own) for p, own in zip(local, before, strict=True))


def test_a_parameter_that_the_loss_does_not_use_is_passed_over() -> None:
    local, received, before = model(3)
    local[0].grad = None
    Proximal(mu=1.0).add_gradient(local, received)
    assert local[0].grad is None
    torch.testing.assert_close(local[1].grad, before[1] + local[1].detach() - received[1])


def test_parameters_and_received_model_are_left_as_they_are() -> None:
    local, received, _ = model(4)
    copies = [t.detach().clone() for t in (*local, *received)]
    Proximal(mu=1.0).add_gradient(local, received)
    assert all(torch.equal(a, b) for a, b in zip((*local, *received), copies, strict=True))


@pytest.mark.parametrize("mu", [-0.01, -math.inf, math.inf, math.nan])
def test_a_mu_that_is_no_pull_is_refused_by_key_and_value(mu) -> None:
    with pytest.raises(ConfigError, match=f"strategy.objective.mu={mu} "):
        Proximal(mu=mu)
