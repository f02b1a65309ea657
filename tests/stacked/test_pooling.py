"""The faster max pooling has torch's bits, of values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fl_app.stacked.pooling import MaxPool2x2, replaces


def pools(x: Tensor, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return values and gradients, ours and torch's."""
    results = []
    for pool in (MaxPool2x2(), nn.MaxPool2d(2)):
        inputs = x.clone().requires_grad_()
        outputs = pool(inputs)
        d = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad(outputs, inputs, d.to(outputs))
        results.append((outputs.detach(), gradient))
    return results[0], results[1]


@given(
    shape=st.tuples(*(st.integers(1, 3) for _ in range(2)), *(st.integers(2, 7) for _ in range(2))),
    levels=st.sampled_from([1, 2, 3, 1000]),
    infinite=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_torchs_to_the_bit_with_ties_and_odd_sizes(
    shape, levels, infinite, dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels, shape, generator=generator).to(dtype)
    if infinite:
        x = x.masked_fill(x == -1, -float("inf"))
    ours, theirs = pools(x, seed)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_positive_infinity_is_a_maximum_too() -> None:
    x = torch.randn(2, 1, 4, 4)
    x[0, 0, 1, 2] = float("inf")
    ours, theirs = pools(x)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_nan_gives_nan() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 1] = float("nan")
    ours, theirs = pools(x)
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert torch.equal(ours[0].nan_to_num(), theirs[0].nan_to_num())
    # And not outside of its own square.
    assert int(ours[1].isnan().sum()) <= 4


@pytest.mark.parametrize("layout", ["channels last", "turned", "sliced"])
def test_records_in_any_memory_layout_are_pooled(layout: str) -> None:
    x = torch.randn(2, 3, 6, 8)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "turned":
        x = x.transpose(2, 3)
    else:
        x = x[:, ::2, 1:]
    inputs = x.detach().requires_grad_()
    outputs = MaxPool2x2()(inputs)
    expected = functional.max_pool2d(x, 2)
    assert torch.equal(outputs, expected)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
    twin = x.detach().requires_grad_()
    (theirs,) = torch.autograd.grad(functional.max_pool2d(twin, 2).square().sum(), twin)
    assert torch.equal(gradient, theirs)


def test_a_record_without_its_dimension_is_pooled_as_torch_does() -> None:
    x = torch.randn(3, 4, 5)
    assert torch.equal(MaxPool2x2()(x), nn.MaxPool2d(2)(x))


class Mine(nn.MaxPool2d):
    pass


@pytest.mark.parametrize(
    ("layer", "same"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d((2, 2), stride=2), True),
        (nn.MaxPool2d(2, stride=(2, 2), padding=0, dilation=1), True),
        (nn.MaxPool2d(3), False),
        (nn.MaxPool2d((2, 1)), False),
        (nn.MaxPool2d(2, stride=1), False),
        (nn.MaxPool2d(2, padding=1), False),
        (nn.MaxPool2d(2, dilation=2), False),
        (nn.MaxPool2d(2, return_indices=True), False),
        (nn.MaxPool2d(2, ceil_mode=True), False),
        (nn.MaxPool1d(2), False),
        (nn.AvgPool2d(2), False),
        (Mine(2), False),
    ],
    ids=str,
)
def test_only_what_it_computes_is_replaced(layer: nn.Module, same: bool) -> None:
    assert replaces(layer) == same
