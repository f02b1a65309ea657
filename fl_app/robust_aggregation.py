"""Aggregation rules that a minority of hostile clients cannot steer at will.

Each is used like the mean: named by ``_target_`` under ``strategy.aggregation``. All weigh
clients alike, as their papers do: a count of examples is a claim that nobody can verify. They
read single updates, so they cannot be had together with secure aggregation. They bound what a
hostile update does; they do not remove it, and on clients that honestly differ they are biased.
NaN and infinite values are not their business: `fl_app.validation` rejects such updates before.

Below, n is the number of updates of the round and f the ``num_malicious`` among them. Sums run in
float64; results have the dtypes of the updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fl_app.aggregation import Aggregation, min_updates
from fl_app.params import l2_norm
from fl_app.types import ClientUpdate, ConfigError, Params, TooFewUpdatesError


@dataclass(frozen=True, kw_only=True)
class Median:
    """Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498, Definition 1).

    Of an even number of values, the mean of the middle two. While less than half of the updates
    are hostile, each coordinate lies between the good updates' smallest and largest.
    """

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the median of each coordinate."""
        cut = (len(updates) - 1) // 2
        return _per_tensor(updates, lambda stacked: _trimmed_mean(stacked, cut))


@dataclass(frozen=True, kw_only=True)
class TrimmedMean:
    """Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498, Definition 2).

    Cuts the ``floor(trim_fraction n)`` smallest and as many largest values of each coordinate and
    returns the mean of the rest. While at most that many updates are hostile, each coordinate
    lies between the good updates' smallest and largest.

    Attributes:
        trim_fraction: Share cut from each end, in [0, 0.5); 0 is the uniform mean.
    """

    trim_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.trim_fraction < 0.5:
            raise ConfigError(
                f"strategy.aggregation.trim_fraction={self.trim_fraction} must lie in [0, 0.5): "
                "at 0.5 no client is left to average; strategy=median goes that far."
            )

    @property
    def min_updates(self) -> int:
        """Fewest updates of which the fraction cuts one."""
        return math.ceil(1 / self._share) if self._share else 1

    @property
    def _share(self) -> Fraction:
        # The number as it is written: in binary, 0.29 * 100 is less than 29.
        return Fraction(str(self.trim_fraction))

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the mean of what is left of each coordinate.

        Raises:
            TooFewUpdatesError: The fraction is above 0, yet of so few updates it cuts none.
        """
        cut = int(self._share * len(updates))
        if len(updates) < self.min_updates:
            raise TooFewUpdatesError(
                f"strategy.aggregation.trim_fraction={self.trim_fraction} cuts nobody from "
                f"{_count(updates)}, which leaves the plain mean; it needs {self.min_updates}: "
                "let more clients take part, or raise it; 0 asks for the mean."
            )
        return _per_tensor(updates, lambda stacked: _trimmed_mean(stacked, cut))


@dataclass(frozen=True, kw_only=True)
class Krum:
    """The one update that is closest to its neighbours (Blanchard et al. 2017, arXiv:1703.02757).

    An update's score is the sum of its squared L2 distances to its n - f - 2 nearest others
    (Section 4); the update with the lowest is returned as it is. Of equal scores, the one with
    the smaller sum of all distances wins, then the first in client order. Buffers count in the
    distance like weights.

    Attributes:
        num_malicious: Hostile clients to withstand (f), >= 0. Needs n >= 2f + 3 (Proposition 1).
    """

    num_malicious: int

    def __post_init__(self) -> None:
        _check_count("num_malicious", self.num_malicious, at_least=0)

    @property
    def min_updates(self) -> int:
        """2f + 3."""
        return 2 * self.num_malicious + 3

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the chosen update.

        Raises:
            TooFewUpdatesError: n < 2f + 3.
        """
        _require(updates, self.min_updates, f"num_malicious={self.num_malicious}")
        chosen = _ranking(_squared_distances(updates), self.num_malicious)[0]
        return dict(updates[chosen].delta)


@dataclass(frozen=True, kw_only=True)
class MultiKrum:
    """Uniform mean of the m updates with the lowest Krum scores (Blanchard et al. 2017, Section 5).

    With m = 1 this is `Krum`; with f = 0 and m = n, the uniform mean. Proven to be resilient for
    m <= n - f - 2 (arXiv:1905.04374); more than n - f would take in hostile updates for certain.

    Attributes:
        num_malicious: Hostile clients to withstand (f), >= 0. Needs n >= 2f + 3.
        num_selected: Updates to average (m), >= 1. Needs n >= m + f.
    """

    num_malicious: int
    num_selected: int

    def __post_init__(self) -> None:
        _check_count("num_malicious", self.num_malicious, at_least=0)
        _check_count("num_selected", self.num_selected, at_least=1)

    @property
    def min_updates(self) -> int:
        """2f + 3, and as many as m of the n - f honest ones need."""
        f, m = self.num_malicious, self.num_selected
        return max(2 * f + 3, m + f)

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the mean of the chosen updates.

        Raises:
            TooFewUpdatesError: n < 2f + 3 or n < m + f.
        """
        f, m = self.num_malicious, self.num_selected
        _require(updates, self.min_updates, f"num_malicious={f} with num_selected={m}")
        chosen = sorted(_ranking(_squared_distances(updates), f)[:m])
        return _per_tensor([updates[i] for i in chosen], lambda stacked: _trimmed_mean(stacked, 0))


@dataclass(frozen=True, kw_only=True)
class Bulyan:
    """Bulyan over Krum (El Mhamdi et al. 2018, arXiv:1802.07927, Section 4).

    First theta = n - 2f updates are drawn one by one, each by Krum among those not yet drawn;
    then each coordinate is the mean of the beta = theta - 2f drawn values closest to their
    median. While at most f updates are hostile, a coordinate leaves the range of the good ones by
    no more than that range's width. With f = 0 it is the uniform mean.

    The last draws leave fewer than Krum's 2f + 3 updates; they score by one neighbour at least.

    Attributes:
        num_malicious: Hostile clients to withstand (f), >= 0. Needs n >= 4f + 3.
    """

    num_malicious: int

    def __post_init__(self) -> None:
        _check_count("num_malicious", self.num_malicious, at_least=0)

    @property
    def min_updates(self) -> int:
        """4f + 3."""
        return 4 * self.num_malicious + 3

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the mean of the central values of each coordinate.

        Raises:
            TooFewUpdatesError: n < 4f + 3.
        """
        _require(updates, self.min_updates, f"num_malicious={self.num_malicious}")
        theta = len(updates) - 2 * self.num_malicious
        beta = theta - 2 * self.num_malicious
        distances = _squared_distances(updates)
        left: list[int] = list(range(len(updates)))
        drawn: list[int] = []
        while len(drawn) < theta:
            best = _ranking(distances[left][:, left], self.num_malicious)[0]
            drawn.append(left.pop(best))
        chosen = [updates[i] for i in sorted(drawn)]
        return _per_tensor(chosen, lambda stacked: _mean_around_median(stacked, beta))


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """Point with the least sum of L2 distances to the updates (RFA, arXiv:1912.13445).

    Pillutla et al. 2019, Algorithm 2 (smoothed Weiszfeld), with uniform weights. It starts at the
    coordinate-wise median, since the mean may be anywhere, and after ``max_iterations`` returns
    what it has; the paper itself stops after a few. Withstands any f < n / 2: its distance to the
    good updates' centre is at most ``2 (n - f) / (n - 2f)`` times their largest distance to it.

    Attributes:
        max_iterations: Largest number of Weiszfeld steps, >= 1.
        tolerance: Stop once the mean of the unit vectors towards the updates is shorter than
            this, in [0, 1); at the geometric median it is 0. Free of any scale.
    """

    max_iterations: int
    tolerance: float

    def __post_init__(self) -> None:
        _check_count("max_iterations", self.max_iterations, at_least=1)
        if not 0 <= self.tolerance < 1:
            raise ConfigError(
                f"strategy.aggregation.tolerance={self.tolerance} must lie in [0, 1): it bounds "
                "the length of a mean of unit vectors; 0 uses all of max_iterations."
            )

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the geometric median of the updates, up to the tolerance."""
        points = torch.stack([_flat(u.delta) for u in updates])  # (clients, numel)
        centre = _flat(Median()(updates))
        for _ in range(self.max_iterations):
            offsets = points - centre
            weights = 1 / offsets.norm(dim=1).clamp(min=SMOOTHING)  # (clients,)
            pull = weights @ offsets
            if pull.norm() <= self.tolerance * len(updates):
                break
            centre = centre + pull / weights.sum()
        return _unflat(centre, updates[0].delta)


SMOOTHING = 1e-6
"""Distance below which the geometric median counts an update as reached (the paper's nu)."""


@dataclass(frozen=True, kw_only=True)
class ClippedNorm:
    """Another rule over updates that are first clipped to an L2 norm.

    ``delta min(1, max_norm / ||delta||)``, the norm running over all tensors as if concatenated.
    A zero update stays zero. This bounds what one client adds to a mean; it is no differential
    privacy, for which noise is missing.

    Attributes:
        rule: Rule that gets the clipped updates.
        max_norm: L2 bound > 0, in units of parameter change; ``.inf`` clips nothing.
    """

    rule: Aggregation
    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ConfigError(
                f"strategy.aggregation.max_norm={self.max_norm} must be > 0: at 0 no client has "
                "any say; .inf clips nothing."
            )

    @property
    def min_updates(self) -> int:
        """As many as the rule inside needs."""
        return min_updates(self.rule)

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return what the rule makes of the clipped updates."""
        return self.rule([self._clipped(update) for update in updates])

    def _clipped(self, update: ClientUpdate) -> ClientUpdate:
        norm = l2_norm(update.delta)
        if norm <= self.max_norm:
            return update
        scale = self.max_norm / norm
        return replace(update, delta={name: t * scale for name, t in update.delta.items()})


# Ranges -------------------------------------------------------------------------------------------


def _check_count(key: str, value: int, *, at_least: int) -> None:
    if value < at_least:
        raise ConfigError(
            f"strategy.aggregation.{key}={value} must be >= {at_least}: set it to a number of "
            f"{'Weiszfeld steps' if key == 'max_iterations' else 'clients'}."
        )


def _require(updates: Sequence[ClientUpdate], needed: int, keys: str) -> None:
    if len(updates) < needed:
        raise TooFewUpdatesError(
            f"strategy.aggregation.{keys} needs {needed} updates and got {_count(updates)}: let "
            "more clients take part, or lower it."
        )


def _count(updates: Sequence[ClientUpdate]) -> str:
    return f"{len(updates)} update{'' if len(updates) == 1 else 's'}"


# Arithmetic ---------------------------------------------------------------------------------------


def _per_tensor(
    updates: Sequence[ClientUpdate], reduce: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return each tensor's ``reduce(stacked)``, which maps (clients, *shape) to shape."""
    return {
        name: reduce(torch.stack([u.delta[name] for u in updates])).to(like.dtype)
        for name, like in updates[0].delta.items()
    }


def _trimmed_mean(stacked: Tensor, cut: int) -> Tensor:
    """Return the mean over clients without the ``cut`` smallest and largest, as float64."""
    if cut:
        stacked = stacked.sort(dim=0).values[cut : len(stacked) - cut]
    return stacked.mean(dim=0, dtype=torch.float64)


def _mean_around_median(stacked: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` values closest to the median over clients, as float64."""
    values = stacked.sort(dim=0).values.double()
    median = _trimmed_mean(values, (len(values) - 1) // 2)
    # Sorted and stable: of two values equally far, the smaller, whoever sent it.
    closest = (values - median).abs().argsort(dim=0, stable=True)[:count]
    return values.gather(0, closest).mean(dim=0)


def _squared_distances(updates: Sequence[ClientUpdate]) -> Tensor:
    """Return the updates' pairwise squared L2 distances, float64, (clients, clients).

    From differences: ``|x|^2 + |y|^2 - 2xy`` loses what is small beside the norms.
    """
    n = len(updates)
    pairs = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
    for name in updates[0].delta:
        points = torch.stack([u.delta[name].reshape(-1) for u in updates])  # (clients, numel)
        pairs += torch.pdist(points.double()).square()
    upper = torch.zeros(n, n, dtype=torch.float64)
    upper[tuple(torch.triu_indices(n, n, offset=1))] = pairs
    return upper + upper.T


def _ranking(distances: Tensor, num_malicious: int) -> list[int]:
    """Return the indices of the updates, lowest Krum score first.

    Args:
        distances: Squared distances, (clients, clients).
        num_malicious: Leaves ``clients - num_malicious - 2`` neighbours to score by, at least 1.
    """
    others = distances.sort(dim=1).values[:, 1:]  # the first is the distance 0 to itself
    nearest = max(1, len(distances) - num_malicious - 2)
    scores = others[:, :nearest].sum(dim=1).tolist()
    # Two that are each other's only neighbour tie: the rest of their distances decides.
    totals = others.sum(dim=1).tolist()
    return sorted(range(len(distances)), key=lambda i: (scores[i], totals[i]))


def _flat(params: Params) -> Tensor:
    """Return all entries in one float64 vector, (numel,)."""
    return torch.cat([tensor.reshape(-1).double() for tensor in params.values()])


def _unflat(flat: Tensor, like: Params) -> Params:
    """Return a vector's entries as tensors of the names, shapes and dtypes of ``like``."""
    pieces = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {
        name: piece.reshape(tensor.shape).to(tensor.dtype)
        for (name, tensor), piece in zip(like.items(), pieces, strict=True)
    }
