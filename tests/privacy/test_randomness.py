"""Noise has its distribution and cannot be repeated; Poisson batches are Poisson batches."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import environment
from scipy import stats

from fl_app.privacy.randomness import (
    KeyedRandomness,
    PoissonSampling,
    reproducible_randomness_for_tests,
    secret_randomness,
)
from fl_app.types import ConfigError

MANY = 200_000


@pytest.mark.parametrize("std", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_gaussian_with_the_stated_deviation(std, dtype) -> None:
    """Kolmogorov-Smirnov: a fault of 1 % in the deviation is seen; chance fails 1 in 10^6."""
    noise = secret_randomness().normal(torch.zeros(MANY, dtype=dtype), std=std)
    assert noise.dtype == dtype
    assert stats.kstest(noise.double().numpy(), "norm", args=(0, std)).pvalue > 1e-6


def test_the_test_above_would_see_a_wrong_deviation() -> None:
    noise = secret_randomness().normal(torch.zeros(MANY), std=1.03).double().numpy()
    assert stats.kstest(noise, "norm").pvalue < 1e-6


def test_noise_of_different_entries_and_draws_is_uncorrelated() -> None:
    randomness = secret_randomness()
    first, second = (randomness.normal(torch.zeros(MANY), std=1.0) for _ in range(2))
    for a, b in ((first, second), (first[1:], first[:-1])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 5 / math.sqrt(MANY)


def test_secret_noise_never_repeats_whatever_seeds_others_know() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        drawn.append(secret_randomness().normal(torch.zeros(8), std=1.0))
    assert not torch.equal(*drawn)


def test_secret_noise_does_not_repeat_between_processes() -> None:
    program = (
        "import torch; from fl_app.privacy.randomness import secret_randomness as s;"
        "torch.manual_seed(1); print(s().normal(torch.zeros(4), std=1.0).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment(), "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 2


def test_all_128_bits_of_a_key_count() -> None:
    """A CPU generator of torch keeps 32 bits of its seed; the rest would be no secret at all."""
    drawn = {
        KeyedRandomness(key).normal(torch.zeros(4, dtype=torch.float64), std=1.0)[0].item()
        for key in [0, *(1 << bit for bit in range(128))]
    }
    assert len(drawn) == 129
    first, second = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=second))


def test_randomness_for_tests_repeats_and_differs_by_use() -> None:
    def draw(seed: int, use: str) -> torch.Tensor:
        return reproducible_randomness_for_tests(seed, use).normal(torch.zeros(4), std=1.0)

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))


def test_the_size_of_a_poisson_batch_is_binomial_and_each_record_as_likely() -> None:
    n, q, steps = 40, 0.1, 20_000
    batches = list(PoissonSampling(sample_rate=q, steps=steps).batches(n, secret_randomness()))
    sizes = np.bincount([len(batch) for batch in batches], minlength=n + 1)
    expected = steps * stats.binom(n, q).pmf(np.arange(n + 1))
    often = expected >= 5
    pooled = [*sizes[often], sizes[~often].sum()], [*expected[often], expected[~often].sum()]
    assert stats.chisquare(*pooled).pvalue > 1e-6
    each = np.bincount(torch.cat(batches).numpy(), minlength=n)
    assert stats.chisquare(each).pvalue > 1e-6 * 0.1
    assert any(len(batch) == 0 for batch in batches)
    assert all(batch.dtype == torch.int64 for batch in batches[:3])


def test_at_a_rate_of_one_a_batch_is_all_records() -> None:
    [batch] = PoissonSampling(sample_rate=1.0, steps=1).batches(5, secret_randomness())
    assert batch.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sample_rate", "steps"), [(0.0, 1), (1.1, 1), (float("nan"), 1), (0.5, 0)]
)
def test_a_sampling_that_cannot_be_is_refused(sample_rate, steps) -> None:
    with pytest.raises(ConfigError):
        PoissonSampling(sample_rate=sample_rate, steps=steps)
