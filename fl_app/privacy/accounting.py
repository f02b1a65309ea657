"""What mechanisms cost: from what was released to epsilon at a delta.

One kind of event describes all that is charged here: a Gaussian mechanism on a Poisson sample,
some number of times. It is the event of DP-SGD (records sampled), of client-level DP (clients
sampled) and, at a sample rate of 1, of plain Gaussian noise. Guarantees hold for neighbours that
differ by one unit, record or client, that is added or removed.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np

from fl_app.types import ConfigError, FlAppError

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 128, 256, 512)
"""Renyi orders: Opacus' own, and large ones for those who spend little."""

MOST_ROUNDS = 1_000_000
"""What counts as "as many rounds as you like"."""


_Divergences: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]


class UnaccountableError(FlAppError):
    """An accountant has no finite answer for these mechanisms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianEvent:
    """A Gaussian mechanism on Poisson samples, applied ``count`` times.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity (sigma, z), > 0.
        sample_rate: Probability q of each unit to be in a sample, in (0, 1]; 1 is no sampling.
        count: Applications, >= 1.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier={self.noise_multiplier} must be > 0 and finite.")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate={self.sample_rate} must lie in (0, 1].")
        if self.count < 1:
            raise ConfigError(f"count={self.count} must be >= 1.")

    def times(self, count: int) -> GaussianEvent:
        """Return the event repeated ``count`` >= 1 times."""
        return replace(self, count=self.count * count)


class Accountant(Protocol):
    """Composes events into a guarantee. A value: what it answered may be remembered."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """As in ``privacy.accountant``."""
        ...

    def epsilon(self, events: Iterable[GaussianEvent], *, delta: float) -> float:
        """Return an upper bound on epsilon at ``delta`` for all events together; 0 for none.

        Raises:
            UnaccountableError: There is no finite bound to be had.
        """
        ...


@dataclass(frozen=True)
class RdpAccountant:
    """Renyi DP (Mironov 2017, arXiv:1702.07476; Mironov et al. 2019, arXiv:1908.10530), by Opacus.

    The only one that also bounds mechanisms of which later ones were chosen in view of what earlier
    ones released, as when a data owner joins one study after another: hence the default. At one
    order fixed beforehand divergences then add up too (Feldman & Zrnic 2021, arXiv:2008.11193);
    for the best of several orders each is a case of its own: see `adaptive_delta`.
    """

    name: str = "rdp"

    def epsilon(self, events: Iterable[GaussianEvent], *, delta: float) -> float:
        """Return an upper bound on epsilon at ``delta`` for all events together."""
        total = np.zeros(len(ORDERS))
        for (noise_multiplier, sample_rate), count in _grouped(events).items():
            total = total + count * rdp_of(noise_multiplier, sample_rate)
        if not total.any():
            return 0.0
        [bound] = _converted(total[None], np.array([[delta]]))
        return _finite(float(bound))


@lru_cache(maxsize=4096)
def rdp_of(
    noise_multiplier: float, sample_rate: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the Renyi divergence of one application at each of `ORDERS`."""
    from opacus.accountants.analysis import rdp as opacus_rdp  # takes a second to import

    with _answer_or_error():
        divergences = opacus_rdp.compute_rdp(
            q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS
        )
    # Rounding may take a divergence of nearly nothing below zero.
    return np.maximum(np.asarray(divergences, dtype=np.float64), 0.0)


@dataclass(frozen=True)
class PldAccountant:
    """Privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049), by dp-accounting."""

    name: str = "pld"

    def epsilon(self, events: Iterable[GaussianEvent], *, delta: float) -> float:
        """Return an upper bound on epsilon at ``delta`` for all events together."""
        import dp_accounting
        from dp_accounting.pld import PLDAccountant

        grouped = _grouped(events)
        if not grouped:
            return 0.0
        with _answer_or_error():
            accountant = PLDAccountant()
            # Gaussian mechanisms without sampling are one of the summed precision, exactly; to
            # convolve many of them takes seconds.
            precision = 0.0
            for (noise_multiplier, sample_rate), count in grouped.items():
                if sample_rate == 1:
                    precision += count / noise_multiplier**2
                    continue
                event = dp_accounting.GaussianDpEvent(noise_multiplier)
                accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, event), count)
            if precision:
                accountant.compose(dp_accounting.GaussianDpEvent(1 / math.sqrt(precision)))
            return _finite(float(accountant.get_epsilon(delta)))


@dataclass(frozen=True)
class PrvAccountant:
    """Numerical composition (Gopi et al. 2021, arXiv:2106.02848), by Opacus; its upper bound."""

    name: str = "prv"

    def epsilon(self, events: Iterable[GaussianEvent], *, delta: float) -> float:
        """Return an upper bound on epsilon at ``delta`` for all events together."""
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [
            (noise_multiplier, sample_rate, count)
            for (noise_multiplier, sample_rate), count in _grouped(events).items()
        ]
        if not accountant.history:
            return 0.0
        with _answer_or_error():
            return _finite(float(accountant.get_epsilon(delta)))


_ACCOUNTANTS: dict[str, Callable[[], Accountant]] = {
    "rdp": RdpAccountant,
    "pld": PldAccountant,
    "prv": PrvAccountant,
}


def accountant_named(name: str) -> Accountant:
    """Return an accountant by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in _ACCOUNTANTS:
        raise ConfigError(
            f"accountant={name} is not known: choose one of {', '.join(_ACCOUNTANTS)}."
        )
    return _ACCOUNTANTS[name]()


def adaptive_delta(events: Iterable[GaussianEvent], delta: float) -> float:
    """Return the delta at which Renyi DP is to be converted for what an account holds.

    With several mechanisms, which may have been chosen in view of one another, each of the orders
    gets an equal part of delta, so that all their bounds hold at once (a union bound), and with
    them the one that is best in the end. One and the same mechanism is all of delta's.
    """
    return delta / len(ORDERS) if len(_grouped(events)) > 1 else delta


def composes_adaptively(accountant: Accountant) -> bool:
    """Return whether its bound holds for mechanisms chosen in view of what others released.

    Of the accountants here Renyi DP's only; the others compose what was fixed beforehand. How
    often one and the same mechanism is applied may be decided on the way for all of them, up to a
    number that was fixed: stopping early is post-processing of never stopping.
    """
    return isinstance(accountant, RdpAccountant)


def epsilons(
    accountant: Accountant, histories: Sequence[Sequence[GaussianEvent]], *, delta: float
) -> list[float]:
    """Return what each account has spent, inf where there is no finite answer.

    `Accountant.epsilon` at `adaptive_delta`, for all accounts together.

    By Renyi DP all are converted at once; the other accountants take 0.05 to 0.5 s for each
    history that they have not seen lately.
    """
    if not composes_adaptively(accountant):
        return [_remembered(accountant, tuple(history), delta) for history in histories]
    totals = np.zeros((len(histories), len(ORDERS)))
    for total, history in zip(totals, histories, strict=True):
        for (noise_multiplier, sample_rate), count in _grouped(history).items():
            try:
                total += count * rdp_of(noise_multiplier, sample_rate)
            except UnaccountableError:
                total += math.inf
    deltas = np.array([adaptive_delta(h, delta) for h in histories]).reshape(-1, 1)
    best = _converted(totals, deltas)
    return [float(x) if total.any() else 0.0 for x, total in zip(best, totals, strict=True)]


def _converted(
    totals: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    deltas: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the smallest epsilon over the orders; inf where there is none.

    Balle et al. 2020, arXiv:1905.09982, Theorem 21, as Opacus converts.

    Args:
        totals: Renyi divergences, shape ``(histories, orders)``.
        deltas: Shape ``(histories, 1)``.
    """
    orders = np.asarray(ORDERS)
    with np.errstate(invalid="ignore"):
        bounds = totals - (np.log(deltas) + np.log(orders)) / (orders - 1)
        bounds += np.log((orders - 1) / orders)
    best = np.fmin.reduce(bounds, axis=1)  # leaves NaN out where there is another bound
    return np.where(np.isnan(best), math.inf, np.maximum(best, 0.0))


@lru_cache(maxsize=4096)
def _remembered(accountant: Accountant, events: tuple[GaussianEvent, ...], delta: float) -> float:
    try:
        return accountant.epsilon(events, delta=delta)
    except UnaccountableError:
        return math.inf


def rounds_allowed(
    accountant: Accountant,
    history: Sequence[GaussianEvent],
    event: GaussianEvent,
    *,
    epsilon: float,
    delta: float,
    at_most: int = MOST_ROUNDS,
) -> int:
    """Return how many more times ``event`` may follow ``history`` within (epsilon, delta).

    Found once by doubling and bisection; who counts down from it needs no further accounting.
    """

    def fits(rounds: int) -> bool:
        events = [*history, event.times(rounds)] if rounds else history
        return accountant.epsilon(events, delta=delta) <= epsilon

    if not fits(0) or not fits(1):
        return 0
    low, high = 1, 2
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def solve_noise(
    accountant: Accountant,
    event_of: Callable[[float], GaussianEvent],
    *,
    epsilon: float,
    delta: float,
    least: float = 0.1,
    most: float = 1000.0,
) -> float:
    """Return the smallest noise multiplier, to 0.1 %, with which an event costs at most epsilon.

    Args:
        accountant: Computes the cost.
        event_of: Noise multiplier -> all that is to be paid for.
        epsilon: What it may cost, > 0.
        delta: At this delta, in (0, 1).
        least: Noise below which nobody should go.
        most: Noise above which nothing is learnt.

    Raises:
        ConfigError: Even ``most`` costs more.
    """

    def fits(noise_multiplier: float) -> bool:
        try:
            cost = accountant.epsilon([event_of(noise_multiplier)], delta=delta)
        except UnaccountableError:
            return False
        return cost <= epsilon

    if not isinstance(accountant, RdpAccountant):
        # The others are tighter by less than half, and a thousand times as slow.
        most = solve_noise(RdpAccountant(), event_of, epsilon=epsilon, delta=delta, most=most)
        least = max(least, most / 2)
    if fits(least):
        return least
    if not fits(most):
        raise ConfigError(
            f"no noise up to {most:g} keeps these rounds within epsilon={epsilon:g} at "
            f"delta={delta:g}: allow more, or plan fewer rounds or steps."
        )
    low, high = least, most
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _grouped(events: Iterable[GaussianEvent]) -> Counter[tuple[float, float]]:
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[event.noise_multiplier, event.sample_rate] += event.count
    return counts


@contextmanager
def _answer_or_error() -> Iterator[None]:
    """Turn whatever the libraries raise, or warn of, on the way to no answer into one error."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except UnaccountableError:
        raise
    except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        raise UnaccountableError(f"there is no finite epsilon to be had: {error}") from error


def _finite(epsilon: float) -> float:
    if not math.isfinite(epsilon):
        raise UnaccountableError("there is no finite epsilon: the noise is too small to account.")
    return max(epsilon, 0.0)
