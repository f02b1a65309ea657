"""Clipping bounds what one client moves, whatever it sends; noise has the stated deviation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from fl_app.params import l2_norm
from fl_app.privacy.noisy_sum import clipped_sum, rounded_like, with_noise
from fl_app.privacy.randomness import secret_randomness
from fl_app.types import Params

LIKE: Params = {"w": torch.zeros(2, 2), "b": torch.zeros(3)}
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
VALUES = st.lists(ANY, min_size=7, max_size=7)
BOUNDS = st.floats(1e-6, 1e6)


def update(values: list[float]) -> Params:
    flat = torch.tensor(values)
    return {"w": flat[:4].reshape(2, 2), "b": flat[4:]}


def flat(params: Params) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in params.values()])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=7, max_size=7), BOUNDS)
def test_clipping_bounds_the_norm_over_all_names_and_keeps_the_direction(values, max_norm) -> None:
    before = flat(update(values))
    after = flat(clipped_sum([update(values)], like=LIKE, max_norm=max_norm))
    assert after.norm() <= max_norm * (1 + 1e-12)
    if before.norm() > max_norm:
        torch.testing.assert_close(after, before * (max_norm / before.norm()), rtol=1e-12, atol=0)
    else:
        assert torch.equal(after, before)


@given(st.lists(VALUES, max_size=4), VALUES, st.integers(0, 4), BOUNDS)
@example([], [math.nan] * 7, 0, 1.0)
@example([[3e38] * 7], [-3e38] * 7, 0, 1e-6)
@example([[1.0] * 7], [math.inf] + [0.0] * 6, 1, 1.0)
def test_one_client_moves_the_sum_by_no_more_than_the_bound(
    others, hostile, position, max_norm
) -> None:
    """Whatever it sends: huge, NaN, infinite, or of another scale than the rest."""
    without = [update(values) for values in others]
    with_it = [*without[:position], update(hostile), *without[position:]]
    difference = flat(clipped_sum(with_it, like=LIKE, max_norm=max_norm)) - flat(
        clipped_sum(without, like=LIKE, max_norm=max_norm)
    )
    assert difference.norm() <= max_norm * (1 + 1e-9)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_contributes_nothing(broken) -> None:
    good = update([1.0] * 7)
    with_it = clipped_sum([good, update([broken, *[1.0] * 6])], like=LIKE, max_norm=10.0)
    assert torch.equal(flat(with_it), flat(good))


def test_numbers_whose_squares_overflow_contribute_nothing() -> None:
    huge = {"w": torch.full((2,), 1e200, dtype=torch.float64)}
    assert flat(clipped_sum([huge], like=huge, max_norm=1.0)).tolist() == [0.0, 0.0]


def test_a_zero_update_stays_zero_and_no_update_gives_zeros() -> None:
    for deltas in ([], [update([0.0] * 7)]):
        total = clipped_sum(deltas, like=LIKE, max_norm=1.0)
        assert l2_norm(total) == 0.0
        assert list(total) == list(LIKE)
        assert {name: t.shape for name, t in total.items()} == {n: t.shape for n, t in LIKE.items()}


def test_half_precision_is_summed_in_double() -> None:
    half = {"w": torch.tensor([2048.0], dtype=torch.float16)}
    one = {"w": torch.tensor([1.0], dtype=torch.float16)}
    total = clipped_sum([half, one, one], like=half, max_norm=1e6)
    assert total["w"].item() == 2050.0
    assert rounded_like(total, half)["w"].dtype == torch.float16


def test_noise_on_every_name_has_the_stated_deviation() -> None:
    """Kolmogorov-Smirnov; chance fails it once in 10^6."""
    total = {name: torch.full((50_000,), 3.0, dtype=torch.float64) for name in ("w", "b")}
    noisy = with_noise(total, std=0.7, randomness=secret_randomness())
    for tensor in noisy.values():
        assert stats.kstest(tensor.numpy(), "norm", args=(3.0, 0.7)).pvalue > 1e-6
    assert not torch.equal(noisy["w"], noisy["b"])
