"""The draws that a privacy guarantee rests on: noise, and the coins of Poisson sampling.

They come from AES-128 in counter mode under a key from the operating system, made anew for every
use and kept by the side that draws. Not from torch's generator, which keeps 32 bits of its seed on
a CPU, and not from any seed of the configuration, which the other side knows: whoever can repeat
the noise can subtract it.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from randomgen import AESCounter
from torch import Tensor

from fl_app.types import ConfigError

_KEY_BITS = 128


class PrivacyRandomness(Protocol):
    """Where the draws of one use - one client's round, one step of the server - come from."""

    def normal(self, like: Tensor, *, std: float) -> Tensor:
        """Return Gaussian noise of mean 0: shape, type and device of ``like``."""
        ...

    def coins(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return ``count`` independent coins, each True with probability ``heads``."""
        ...

    def positions(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where heads lie among ``count`` such coins, ascending; for ``heads`` in (0, 1]."""
        ...


class KeyedRandomness:
    """The stream under one key.

    Args:
        key: 128 bits.
    """

    def __init__(self, key: int) -> None:
        self._generator = np.random.Generator(AESCounter(key=key))

    def normal(self, like: Tensor, *, std: float) -> Tensor:
        """Return Gaussian noise of mean 0: shape, type and device of ``like``.

        Drawn in double precision by the ziggurat method (Marsaglia & Tsang 2000), then rounded.
        """
        noise = torch.from_numpy(self._generator.standard_normal(tuple(like.shape)))
        return (noise * std).to(like)

    def coins(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return ``count`` independent coins, each True with probability ``heads``."""
        return self._generator.random(count) < heads

    def positions(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where heads lie among ``count`` coins, ascending; for ``heads`` in (0, 1].

        The gaps between heads of independent coins are geometric, so time and memory grow with the
        heads and not with the coins.
        """
        expected = count * heads
        block = int(expected + 4 * math.sqrt(expected)) + 16
        found: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        last = -1
        while last < count:
            # Cut, because sums of gaps at tiny probabilities would overflow.
            gaps = np.minimum(self._generator.geometric(heads, block), count + 1)
            reached = last + np.cumsum(gaps)
            found.append(reached[reached < count])
            last = int(reached[-1])
        return np.concatenate(found)


def secret_randomness() -> PrivacyRandomness:
    """Return randomness that nobody can repeat: its key is drawn here and told to nobody."""
    return KeyedRandomness(secrets.randbits(_KEY_BITS))


def reproducible_randomness_for_tests(seed: int, use: str) -> PrivacyRandomness:
    """Return randomness that anybody can repeat, and so no privacy whatever.

    Args:
        seed: Any number.
        use: What it is for, such as a round and a client; other uses get other draws.
    """
    digest = hashlib.sha256(f"no privacy/{seed}/{use}".encode()).digest()
    return KeyedRandomness(int.from_bytes(digest[: _KEY_BITS // 8], "big"))


class Source(StrEnum):
    """Where a configuration takes its private draws from; anything but SECRET hides nothing."""

    SECRET = "secret"
    REPRODUCIBLE_FOR_TESTS = "reproducible_for_tests"


def check_source(key: str, source: str) -> None:
    """Refuse a source that there is not.

    Raises:
        ConfigError: It is not one of `Source`.
    """
    if source not in list(Source):
        raise ConfigError(
            f"{key}={source} is not known: choose {Source.SECRET}. "
            f"({Source.REPRODUCIBLE_FOR_TESTS} promises no privacy.)"
        )


def randomness_from(source: str, *, seed: int, use: str) -> PrivacyRandomness:
    """Return randomness from one of `Source`; seed and use have a say for tests' alone."""
    if source == Source.REPRODUCIBLE_FOR_TESTS:
        return reproducible_randomness_for_tests(seed, use)
    return secret_randomness()


@dataclass(frozen=True, kw_only=True)
class PoissonSampling:
    """Batches in which each record lies with the same probability, independently of all others.

    The sampling that the accountants assume (Abadi et al. 2016, arXiv:1607.00133, Section 3.1):
    batches differ in size and may be empty.

    Attributes:
        sample_rate: Probability q of each record to be in a batch, in (0, 1].
        steps: Batches, >= 1.
    """

    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"a sample rate of {self.sample_rate} must lie in (0, 1].")
        if self.steps < 1:
            raise ConfigError(f"{self.steps} steps must be >= 1.")

    def batches(self, num_examples: int, randomness: PrivacyRandomness) -> Iterator[Tensor]:
        """Yield the positions of each batch's records, int64, ascending; maybe none."""
        for _ in range(self.steps):
            coins = randomness.coins(num_examples, heads=self.sample_rate)
            yield torch.from_numpy(np.flatnonzero(coins))
