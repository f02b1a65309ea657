"""Each rule of a layer is torch's layer, client by client; gradients of records are autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_app.stacked.layer import NotStackableError
from fl_app.stacked.layers import StackedConv, StackedEmbedding, StackedLinear, StackedScale
from fl_app.stacked.model import StackedModel
from fl_app.stacked.vmapped import VmappedLayer

CLIENTS, RECORDS = 3, 4
N = CLIENTS * RECORDS


def agrees(make: Callable[[], nn.Module], inputs: Tensor, rule: type[nn.Module]) -> bool:
    """Check outputs, all gradients, and norms and sums of gradients of records."""
    torch.manual_seed(1)
    alone = make().double()
    stacked = StackedModel(alone)
    assert type(stacked.root) is rule
    names = [name for name, _ in alone.named_parameters()]
    assert list(stacked.names) == names
    weights = [
        torch.randn(CLIENTS, *p.shape, dtype=torch.float64).requires_grad_()
        for p in alone.parameters()
    ]
    floats = inputs.is_floating_point()
    x = inputs.clone().requires_grad_(floats)
    stacked.bind(weights, N)
    outputs = stacked(x)
    d, factors = torch.randn_like(outputs), torch.rand(N, dtype=torch.float64)
    gradients = torch.autograd.grad(outputs, [*weights, *([x] if floats else [])], d)
    with stacked.taping() as tape:
        torch.autograd.grad(stacked(x), weights, d, allow_unused=True)
    (entry,) = tape
    squared, reduce = entry.per_record()
    sums = reduce(factors)

    for k in range(N):
        client, own = divmod(k, RECORDS)
        record = inputs[k : k + 1].clone().requires_grad_(floats)
        local = {name: w[client].detach().requires_grad_() for name, w in zip(names, weights)}  # noqa: B905
        output = torch.func.functional_call(alone, local, (record,))
        torch.testing.assert_close(outputs[k : k + 1], output)
        wanted = [*local.values(), *([record] if floats else [])]
        made = torch.autograd.grad(output, wanted, d[k : k + 1])
        total = sum(g.square().sum() for g in made[: len(names)])
        torch.testing.assert_close(squared[k], total)
        if floats:
            torch.testing.assert_close(gradients[-1][k : k + 1], made[-1])
        if own == 0:
            expected = [torch.zeros_like(g) for g in made[: len(names)]]
            weighted = [torch.zeros_like(g) for g in made[: len(names)]]
        for position, g in enumerate(made[: len(names)]):
            expected[position] += g
            weighted[position] += factors[k] * g
        if own == RECORDS - 1:
            for position in range(len(names)):
                torch.testing.assert_close(gradients[position][client], expected[position])
                torch.testing.assert_close(sums[position][client], weighted[position])
    return True


def randn(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


PAIR = st.integers(1, 3)


@settings(max_examples=30)
@given(
    dims=st.integers(1, 3),
    kernel=st.lists(PAIR, min_size=3, max_size=3),
    stride=st.lists(PAIR, min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    padding=st.one_of(
        st.lists(st.integers(0, 2), min_size=3, max_size=3), st.sampled_from(["valid", "same"])
    ),
    sizes=st.lists(st.integers(2, 6), min_size=3, max_size=3),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
)
def test_convolutions_of_any_geometry_are_torchs(
    dims, kernel, stride, dilation, padding, sizes, groups, channels, bias
) -> None:
    if padding == "same":
        stride = [1, 1, 1]
    pad = padding if isinstance(padding, str) else tuple(padding[:dims])
    for size, k, step in zip(sizes[:dims], kernel, dilation, strict=False):
        assume(size + 2 * (0 if pad == "valid" else 1) > step * (k - 1) + 2)
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    assert agrees(
        lambda: make(
            *(channels[0] * groups, channels[1] * groups, tuple(kernel[:dims])),
            stride=tuple(stride[:dims]),
            padding=pad,
            dilation=tuple(dilation[:dims]),
            groups=groups,
            bias=bias,
        ),
        randn(channels[0] * groups, *sizes[:dims]),
        StackedConv,
    )


# Positions of which two Gram matrices are less than the gradient itself, and more; and one.
@pytest.mark.parametrize("positions", [(), (1,), (2,), (9,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_layers_are_torchs_on_any_positions(positions: tuple[int, ...], bias: bool) -> None:
    assert agrees(lambda: nn.Linear(5, 4, bias=bias), randn(*positions, 5), StackedLinear)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LayerNorm(5), (5,)),
        (lambda: nn.LayerNorm(5), (3, 5)),
        (lambda: nn.LayerNorm([3, 5], eps=0.1), (2, 3, 5)),
        (lambda: nn.LayerNorm(5, bias=False), (3, 5)),
        (lambda: nn.GroupNorm(2, 6), (6,)),
        (lambda: nn.GroupNorm(3, 6, eps=0.1), (6, 4)),
        (lambda: nn.GroupNorm(6, 6), (6, 2, 3)),
    ],
)
def test_norms_are_torchs(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert agrees(make, randn(*shape), StackedScale)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("padding", [None, 0, 2, -1])
def test_embeddings_are_torchs_with_repeated_words(shape: tuple[int, ...], padding) -> None:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 4, (N, *shape), generator=generator)
    assert agrees(lambda: nn.Embedding(4, 3, padding_idx=padding), words, StackedEmbedding)
    assert agrees(lambda: nn.Embedding(4, 3), words.int(), StackedEmbedding)


@pytest.mark.parametrize("word", [4, -1])
def test_a_word_out_of_range_is_no_other_clients_word(word: int) -> None:
    stacked = StackedModel(nn.Embedding(4, 3))
    stacked.bind([torch.zeros(2, 4, 3)], 2)
    with pytest.raises(IndexError):
        stacked(torch.tensor([[0], [word]]))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.PReLU(), (5,)),
        (lambda: nn.Bilinear(5, 5, 3), (5,)),
        (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5)),
        (lambda: nn.Embedding(4, 3, max_norm=1.0), (5,)),
        (lambda: nn.RMSNorm(5), (5,)),
        (lambda: Derived(5, 3), (5,)),
    ],
)
def test_layers_that_no_rule_fits_are_mapped(make: Callable[[], nn.Module], shape) -> None:
    assert type(StackedModel(make()).root) is VmappedLayer


class Derived(nn.Linear):
    """May compute anything."""


def test_inputs_whose_first_dimension_is_not_records_are_refused() -> None:
    stacked = StackedModel(nn.Linear(5, 3))
    stacked.bind([torch.zeros(2, 3, 5), torch.zeros(2, 3)], 6)
    with pytest.raises(NotStackableError, match=r"Linear got inputs of shape \(4, 5\)"):
        stacked(torch.zeros(4, 5))
    with pytest.raises(NotStackableError, match="convolution got inputs of shape"):
        StackedModel(nn.Conv1d(2, 3, 2))(torch.zeros(2, 5))
