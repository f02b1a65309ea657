"""Rows of stacked parameters are parameters like any others, and their mean is the mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_app.aggregation import WeightedMean, Weighting
from fl_app.params import StackedParams, describe_misfit, l2_norm, model_hash, num_bytes
from fl_app.robust_aggregation import Median
from fl_app.types import ClientUpdate, Params
from fl_app.validation import UpdateChecks

SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (3,), "gain": (), "none": (0, 2)}


def stack(clients: int = 4, seed: int = 0) -> StackedParams:
    generator = torch.Generator().manual_seed(seed)
    return StackedParams(
        {name: torch.randn(clients, *shape, generator=generator) for name, shape in SHAPES.items()}
    )


def plain(stacked: StackedParams, number: int) -> Params:
    return {name: tensor[number].clone() for name, tensor in stacked.tensors.items()}


def updates(deltas: list[Params], counts: list[int] | None = None) -> list[ClientUpdate]:
    counts = counts or [k + 1 for k in range(len(deltas))]
    return [
        ClientUpdate(client=str(k), round=1, delta=delta, num_examples=count)
        for k, (delta, count) in enumerate(zip(deltas, counts, strict=True))
    ]


def test_rows_are_what_was_stacked() -> None:
    stacked = stack()
    assert len(stacked) == 4
    for number in range(4):
        row, expected = stacked.row(number), plain(stacked, number)
        assert list(row) == list(expected)
        assert len(row) == len(SHAPES)
        assert all(torch.equal(row[name], expected[name]) for name in expected)
        assert row.keys() == expected.keys()
        assert model_hash(row) == model_hash(expected)
        assert num_bytes(row) == num_bytes(expected)


def test_norms_of_rows_are_those_of_parameters_by_themselves() -> None:
    stacked = stack()
    stacked.tensors["b"][1, 2] = math.nan
    stacked.tensors["gain"][2] = math.inf
    norms = [l2_norm(stacked.row(number)) for number in range(4)]
    for number in (0, 3):
        assert norms[number] == pytest.approx(l2_norm(plain(stacked, number)), rel=1e-12)
    assert math.isnan(norms[1])
    assert math.isinf(norms[2])
    # Where squares of single precision would overflow, and would vanish.
    assert l2_norm(StackedParams({"w": torch.full((1, 4), 1e30)}).row(0)) == pytest.approx(2e30)
    assert l2_norm(StackedParams({"w": torch.full((1, 4), 1e-30)}).row(0)) == pytest.approx(2e-30)


@pytest.mark.parametrize(
    "like",
    [
        plain(stack(), 0),
        {name: t for name, t in plain(stack(), 0).items() if name != "b"},
        {**plain(stack(), 0), "more": torch.zeros(1)},
        {**plain(stack(), 0), "w": torch.zeros(3, 2)},
        {**plain(stack(), 0), "gain": torch.zeros(4)},
    ],
    ids=["same", "too many", "too few", "turned", "as many as clients"],
)
def test_a_misfit_is_described_as_that_of_parameters_by_themselves(like: Params) -> None:
    stacked = stack()
    for number in (0, 3):
        expected = describe_misfit(plain(stacked, number), like)
        assert describe_misfit(stacked.row(number), like) == expected
        # Of another model it is described anew.
        assert describe_misfit(stacked.row(number), plain(stacked, 0)) is None


def test_checks_object_to_a_row_as_to_parameters_by_themselves() -> None:
    stacked = stack()
    stacked.tensors["w"][1, 0, 0] = math.nan
    stacked.tensors["w"][2] *= 1e6
    model, checks = plain(stack(), 0), UpdateChecks(max_norm=1e4)
    told = [
        [checks.objection(update, model) for update in updates(deltas)]
        for deltas in (
            [stacked.row(number) for number in range(4)],
            [plain(stacked, number) for number in range(4)],
        )
    ]
    assert told[0] == told[1]
    assert [objection is None for objection in told[0]] == [True, False, False, True]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=9, unique=True),
    st.sampled_from(list(Weighting)),
    st.integers(1, 99),
)
def test_the_mean_of_rows_of_several_stacks_is_that_of_dicts(chosen, weighting, many) -> None:
    """Some rows are left out, and hold NaN."""
    stacks = [stack(seed=seed) for seed in range(3)]
    for number, stacked in enumerate(stacks):
        for row in range(4):
            if (number, row) not in chosen:
                for tensor in stacked.tensors.values():
                    tensor[row] = math.nan
    counts = [1 + (many * k) % 17 for k in range(len(chosen))]
    rule = WeightedMean(weighting=weighting)
    mean = rule(updates([stacks[k].row(row) for k, row in chosen], counts))
    expected = rule(updates([plain(stacks[k], row) for k, row in chosen], counts))
    assert list(mean) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(mean[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_mean_of_rows_beside_dicts_is_the_mean_and_leaves_them_as_they_were() -> None:
    stacked, other = stack(), stack(seed=3)
    mixed = [stacked.row(0), plain(other, 1), stacked.row(2)]
    dicts = [plain(stacked, 0), plain(other, 1), plain(stacked, 2)]
    for rule in (WeightedMean(), Median()):
        mean, expected = rule(updates(mixed)), rule(updates(dicts))
        for name in expected:
            torch.testing.assert_close(mean[name], expected[name], rtol=1e-6, atol=1e-7)
    WeightedMean()(updates([stacked.row(0)]))["w"].zero_()
    assert torch.equal(stacked.row(0)["w"], stack().row(0)["w"])
