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
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fl_app.types import ConfigError

_Doubles = np.ndarray[tuple[int], np.dtype[np.float64]]

_KEY_BITS = 128

# Where the counter starts for each kind of draw: 2^127 blocks apart they never meet, so that coins
# and noise of one key share nothing, and how many coins are tossed changes no noise.
_FIRST_OF_NORMALS = 0
_FIRST_OF_COINS = 1 << 127

# Normals are made in rows, half of them cosines and half sines. A row costs little more than one
# number: what a draw leaves of it waits for the next.
_ROW = 1 << 10

# Rows made at once: few enough that what lies between two steps stays in the cache, enough for
# torch to share them out to its threads.
_ROWS = 1 << 7

_ZEROS = memoryview(bytes(1 << 16))


class PrivacyRandomness(Protocol):
    """Where the draws of one use - one client's round, one step of the server - come from."""

    def normals(self, count: int) -> Tensor:
        """Return the next ``count`` of independent standard normals, float64, ``(count,)``."""
        ...

    def normal(self, like: Tensor, *, std: float) -> Tensor:
        """Return Gaussian noise of mean 0: shape, type and device of ``like``."""
        ...

    def coins(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return ``count`` independent coins, each True with probability ``heads``."""
        ...

    def positions(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where heads lie among ``count`` such coins, ascending; for ``heads`` in (0, 1]."""
        ...


class _KeyStream:
    """AES-128 in counter mode (NIST SP 800-38A, Section 6.5): what it adds to a plain text.

    Args:
        key: 128 bits.
        first: The first counter block, 128 bits; it counts up by one for every 16 bytes.
    """

    def __init__(self, key: int, *, first: int) -> None:
        aes = algorithms.AES128(key.to_bytes(_KEY_BITS // 8, "big"))
        self._encryptor = Cipher(aes, modes.CTR(first.to_bytes(16, "big"))).encryptor()

    def fill(self, words: np.ndarray[Any, Any]) -> None:
        """Overwrite an array of any shape with the next bytes.

        Raises:
            TypeError: It is not contiguous.
        """
        if not words.size:
            return  # which cannot be cast
        left = words.data.cast("B")
        while left:
            left = left[self._encryptor.update_into(_ZEROS[: len(left)], left) :]


def _box_muller(words: Tensor, normals: Tensor) -> None:
    """Make two normals of two words, as `KeyedRandomness.normals` says.

    Args:
        words: Uniform int64, ``(n, 2, m)``: radii at 0, angles at 1 of the second axis.
        normals: Overwritten: float64, ``(n, 2, m)``, cosines at 0, sines at 1.
    """
    radius, angle = normals.copy_(words).unbind(1)
    # U = |word + 1/2| / 2^63 in (0, 1], the least 2^-64. What is squared needs neither the absolute
    # value nor the 2 of -2 log U.
    radius.add_(0.5).mul_(2.0**-63)
    radius.mul_(radius).log_().neg_().sqrt_()
    angle.mul_(math.pi * 2.0**-63)
    cos = torch.cos(angle)
    angle.sin_().mul_(radius)
    radius.mul_(cos)


class KeyedRandomness:
    """The two sequences under one key, one of normals and one of coins.

    A draw takes the next numbers of its sequence: draws one after another are, to the bit, the
    parts of one draw of as many. (Bits of normals rest on the machine's log, sine and cosine.)

    Args:
        key: 128 bits; None to have them drawn by the operating system with the first draw.
    """

    def __init__(self, key: int | None = None) -> None:
        self._given = key
        self._waiting: _Doubles = np.empty(0)

    @cached_property
    def _key(self) -> int:
        return secrets.randbits(_KEY_BITS) if self._given is None else self._given

    @cached_property
    def _for_normals(self) -> _KeyStream:
        return _KeyStream(self._key, first=_FIRST_OF_NORMALS)

    @cached_property
    def _for_coins(self) -> _KeyStream:
        return _KeyStream(self._key, first=_FIRST_OF_COINS)

    def normals(self, count: int) -> Tensor:
        """Return the next ``count`` of independent standard normals, float64, ``(count,)``.

        Pairs by the transform of Box & Muller (1958, doi:10.1214/aoms/1177706645), each from two
        words of 64 bits, one for its radius and one for its angle. So the radius ends at 9.4, and
        of true pairs 2^-64 lie beyond. From 32 bits it would end at 6.7 and miss 2^-32 of them.
        Where the noise ends, a value can be within reach of one of two neighbours alone: what is
        missed comes on top of delta for each pair of each step, and there are millions of both.
        """
        normals = np.empty(count)
        done = min(count, len(self._waiting))
        normals[:done], self._waiting = self._waiting[:done], self._waiting[done:]
        whole = (count - done) // _ROW * _ROW
        if whole:
            self._make(normals[done : done + whole])
            done += whole
        if done < count:
            row = np.empty(_ROW)
            self._make(row)
            # Copied, as above: a view would carry noise to come wherever it is sent.
            normals[done:], self._waiting = row[: count - done], row[count - done :]
        return torch.from_numpy(normals)

    def _make(self, normals: _Doubles) -> None:
        """Overwrite entries, a multiple of `_ROW`, with the next rows that nobody has drawn."""
        rows = normals.reshape(-1, 2, _ROW // 2)
        words = np.empty_like(rows[:_ROWS], dtype=np.int64)
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            fresh = words[: len(part)]
            self._for_normals.fill(fresh)
            _box_muller(torch.from_numpy(fresh), torch.from_numpy(part))

    def normal(self, like: Tensor, *, std: float) -> Tensor:
        """Return Gaussian noise of mean 0: shape, type and device of ``like``.

        The next of `normals` times ``std`` in double precision, then rounded.
        """
        return self.normals(like.numel()).mul_(std).reshape(like.shape).to(like)

    def _fractions(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return the next ``count`` of independent uniform numbers of [0, 1), in units of 2^-53."""
        words = np.empty(count, dtype=np.uint64)
        self._for_coins.fill(words)
        words >>= 64 - 53
        return words

    def coins(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return ``count`` independent coins, each True with probability ``heads``."""
        return self._fractions(count) < math.ceil(heads * 2**53)

    def positions(self, count: int, *, heads: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where heads lie among ``count`` coins, ascending; for ``heads`` in (0, 1].

        The gaps between heads of independent coins are geometric, so time and memory grow with the
        heads and not with the coins. They are drawn by inversion (Devroye 1986, Section X.2):
        but for rounding, a gap is 1 where `coins` would show heads.
        """
        if heads == 1:
            return np.arange(count)
        tails = math.log1p(-heads)
        expected = count * heads
        block = int(expected + 4 * math.sqrt(expected)) + 16
        found: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        last = -1
        while last < count:
            # Cut, because gaps at tiny probabilities, and sums of them, would overflow.
            far = np.maximum(np.log1p(self._fractions(block) * -(2.0**-53)), count * tails)
            reached = last + np.cumsum((far / tails).astype(np.int64) + 1)
            found.append(reached[reached < count])
            last = int(reached[-1])
        return np.concatenate(found)


def secret_randomness() -> PrivacyRandomness:
    """Return randomness that nobody can repeat: its key is drawn by itself and told to nobody."""
    return KeyedRandomness()


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
