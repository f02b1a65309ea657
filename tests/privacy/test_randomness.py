"""Noise has its distribution and cannot be repeated; Poisson batches are Poisson batches."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_app.privacy.randomness import (
    KeyedRandomness,
    PoissonSampling,
    _box_muller,
    _KeyStream,
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


def test_the_tails_are_as_heavy_as_they_should_be() -> None:
    """Of 2 * 10^7 normals about 1270 lie beyond 4, and 11 beyond 5. Chance fails 1 in 10^6."""
    randomness, draws, size = secret_randomness(), 20, 10**6
    beyond = {4: 0, 5: 0}
    for _ in range(draws):
        sizes = randomness.normals(size).abs_()
        for bound in beyond:
            beyond[bound] += int((sizes > bound).sum())
    for bound, found in beyond.items():
        share = 2 * stats.norm.sf(bound)
        assert stats.binomtest(found, draws * size, share).pvalue > 1e-6


@pytest.mark.parametrize("lag", [1, 2, 511, 512, 513, 1024, 1 << 17])
def test_noise_of_different_entries_and_draws_is_independent(lag) -> None:
    """512 apart lie the two of a pair, of one radius: their squares alone would tell."""
    randomness = secret_randomness()
    noise = torch.cat([randomness.normal(torch.zeros(MANY), std=1.0) for _ in range(2)])
    for values in (noise, noise**2, noise**3):
        both = torch.stack((values[lag:], values[:-lag]))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 6 / math.sqrt(2 * MANY - lag)


def test_the_test_above_would_see_a_radius_used_twice() -> None:
    """Pairs of radius and angle, where the angle is made of the radius's word."""
    words = torch.from_numpy(np.random.default_rng(1).integers(-(2**63), 2**63, (MANY, 1, 1)))
    normals = torch.empty(MANY, 2, 1, dtype=torch.float64)
    _box_muller(words.repeat(1, 2, 1), normals)
    assert abs(float(torch.corrcoef((normals**2).squeeze().T)[0, 1])) > 6 / math.sqrt(MANY)


def test_the_key_stream_is_aes_128_in_counter_mode() -> None:
    """The vectors of NIST SP 800-38A, F.5.1; in two steps, the first no whole block."""
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee"
    )
    stream = _KeyStream(
        0x2B7E151628AED2A6ABF7158809CF4F3C, first=0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    )
    first, second = np.empty(3, dtype=np.uint64), np.empty((5, 1), dtype=np.uint64)
    stream.fill(first)
    stream.fill(second)
    added = np.frombuffer(first.tobytes() + second.tobytes(), dtype=np.uint8)
    assert bytes(added ^ np.frombuffer(plain, dtype=np.uint8)) == cipher


def test_an_array_that_would_be_copied_instead_of_filled_is_refused() -> None:
    """Its own entries would stay as they were: noise that is none."""
    with pytest.raises(TypeError, match="contiguous"):
        _KeyStream(1, first=0).fill(np.zeros((4, 4)).T[:2])


def words_of(key: int, first: int, count: int) -> np.ndarray:
    """Return signed words of the stream, by one call of the library."""
    mode = modes.CTR(first.to_bytes(16, "big"))
    encryptor = Cipher(algorithms.AES128(key.to_bytes(16, "big")), mode).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * count)), dtype=np.int64)


def test_normals_are_box_mullers_of_the_key_stream_over_any_number_of_blocks() -> None:
    """In rows of 1024, 512 cosines and 512 sines; in the textbook's words, by numpy."""
    count = 3 * (1 << 17) + 1
    words = words_of(7, 0, count + 1023).reshape(-1, 2, 512).astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.abs(words[:, 0] + 0.5) / 2**63))
    angle = np.pi * words[:, 1] / 2**63
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).ravel()[:count]
    drawn = KeyedRandomness(7).normals(count)
    assert drawn.dtype == torch.float64
    assert drawn.shape == (count,)
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_ends_of_the_words_give_finite_normals_up_to_nine_deviations() -> None:
    low, high = -(2**63), 2**63 - 1
    words = torch.cartesian_prod(*[torch.tensor([low, -1, 0, 1, high])] * 2)[:, :, None]
    normals = torch.empty(25, 2, 1, dtype=torch.float64)
    _box_muller(words, normals)
    radius = dict(zip(words[:, 0, 0].tolist(), normals.norm(dim=1).ravel().tolist(), strict=True))
    assert radius[low] == radius[high] == 0.0
    assert radius[0] == radius[-1] == pytest.approx(math.sqrt(2 * 64 * math.log(2)))
    assert radius[0] > 9.4


cuts = st.lists(st.integers(0, 2500), max_size=8)


@given(key=st.integers(0, 2**128 - 1), counts=cuts, coins=st.integers(0, 50))
def test_draws_one_after_another_are_the_parts_of_one_draw(key, counts, coins) -> None:
    """To the bit; and coins between do not change normals, nor normals coins."""
    total, parts = KeyedRandomness(key), KeyedRandomness(key)
    normals, tosses = [torch.empty(0)], [np.empty(0, dtype=bool)]
    for count in counts:
        normals.append(parts.normals(count))
        tosses.append(parts.coins(coins, heads=0.5))
    assert [len(drawn) for drawn in normals[1:]] == counts
    assert torch.equal(torch.cat(normals).double(), total.normals(sum(counts)))
    assert np.array_equal(np.concatenate(tosses), total.coins(coins * len(counts), heads=0.5))


def test_large_draws_are_the_parts_of_one_draw_whatever_the_threads() -> None:
    counts = [5, (1 << 17) + 3, 0, 1019, 200_000]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = KeyedRandomness(5).normals(sum(counts))
        torch.set_num_threads(3)
        randomness = KeyedRandomness(5)
        assert torch.equal(torch.cat([randomness.normals(count) for count in counts]), one)
    finally:
        torch.set_num_threads(threads)


def test_noise_for_a_tensor_is_the_next_normals_in_its_shape_and_type() -> None:
    like = torch.zeros(3, 4, dtype=torch.float32).T
    randomness, normals = KeyedRandomness(9), KeyedRandomness(9).normals(13)
    assert torch.equal(randomness.normal(like, std=2.5), (normals[:12] * 2.5).view(4, 3).float())
    scalar = randomness.normal(torch.zeros((), dtype=torch.float64), std=1.0)
    assert scalar.shape == ()
    assert scalar == normals[12]


def test_what_is_drawn_does_not_carry_the_noise_to_come() -> None:
    """A view would: its storage goes along when it is pickled."""
    randomness = secret_randomness()
    for count in (3, 5, 1500):
        assert randomness.normals(count).untyped_storage().nbytes() == 8 * count


def test_the_same_key_repeats_and_another_differs() -> None:
    first, second, other = KeyedRandomness(1), KeyedRandomness(1), KeyedRandomness(2)
    assert torch.equal(drawn := first.normals(100), second.normals(100))
    assert not torch.isin(other.normals(100), drawn).any()
    assert np.array_equal(tosses := first.coins(100, heads=0.5), second.coins(100, heads=0.5))
    assert not np.array_equal(other.coins(100, heads=0.5), tosses)


def test_coins_are_the_upper_53_bits_of_words_that_normals_never_see() -> None:
    fractions = (words_of(3, 1 << 127, 20_000).view(np.uint64) >> 11) / 2**53
    for heads in (0.0, 1e-3, 0.5, float(fractions[7]), 1.0):
        assert np.array_equal(KeyedRandomness(3).coins(20_000, heads=heads), fractions < heads)
    assert KeyedRandomness(3).coins(20_000, heads=1.0).all()
    assert not np.isin(words_of(3, 0, 1000), words_of(3, 1 << 127, 1000)).any()


@pytest.mark.parametrize("heads", [0.001, 0.3, 0.999])
def test_coins_show_heads_as_often_as_they_should(heads) -> None:
    found = int(secret_randomness().coins(10**6, heads=heads).sum())
    assert stats.binomtest(found, 10**6, heads).pvalue > 1e-6


@pytest.mark.parametrize("heads", [0.01, 0.3, 0.9])
def test_gaps_between_positions_are_those_between_coins(heads) -> None:
    """Both geometric, so also each alike: chi square over the gaps; chance fails 1 in 10^6."""
    randomness, count = secret_randomness(), 10**6
    by_gaps = randomness.positions(count, heads=heads)
    by_coins = np.flatnonzero(randomness.coins(count, heads=heads))
    for positions in (by_gaps, by_coins):
        gaps = np.diff(positions)
        last = int(stats.geom(heads).ppf(1 - 100 / len(gaps)))
        found = np.bincount(np.minimum(gaps, last + 1), minlength=last + 2)[1:]
        law = stats.geom(heads)
        shares = [*law.pmf(np.arange(1, last + 1)), law.sf(last)]
        assert stats.chisquare(found, np.array(shares) * len(gaps)).pvalue > 1e-6


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
