"""Which clients take part in a round, how many are asked, and how long they are waited for.

A selector is a frozen dataclass named by ``_target_`` under ``selection``. It draws from an
ordered, possibly lazy sequence of client ids, with a generator of ``(seed, round)``, in time
proportional to the cohort: a population of a million costs what a thousand does. `Poisson` alone
tosses coins that nobody can repeat.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from fl_app.privacy.randomness import Source, check_source, randomness_from
from fl_app.types import ClientId, ConfigError, Role, client_order, stream_seed

_MOST_DRAWS = 200_000  # of a schedule of cohorts, to learn whom it asks most often


class Without(Sequence[ClientId]):
    """A sequence of clients without some of them; lazy, so of any length.

    Args:
        clients: In canonical order; may be lazy.
        removed: Who is left out.
    """

    def __init__(self, clients: Sequence[ClientId], removed: Collection[ClientId]) -> None:
        self._clients = clients
        positions = (
            bisect_left(clients, client_order(client), key=client_order) for client in removed
        )
        gaps = sorted(p for p in positions if p < len(clients) and clients[p] in removed)
        # How many are left before each gap: the k-th that is left lies behind as many gaps.
        self._left_before = [gap - number for number, gap in enumerate(gaps)]

    def __len__(self) -> int:
        return len(self._clients) - len(self._left_before)

    @overload
    def __getitem__(self, index: int) -> ClientId: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ClientId]: ...
    def __getitem__(self, index: int | slice) -> ClientId | Sequence[ClientId]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        return self._clients[position + bisect_right(self._left_before, position)]


class Selector(Protocol):
    """Draws the cohort of a round."""

    @property
    def min_replies(self) -> int:
        """Updates a round needs; with fewer it keeps the old model."""
        ...

    @property
    def round_timeout_s(self) -> float | None:
        """Seconds a round waits for replies, or None for as long as it takes."""
        ...

    @property
    def min_clients(self) -> int:
        """Clients that must be known before a run starts."""
        ...

    def wanted(self, population: int) -> int:
        """Return how many updates a round of ``population`` clients aggregates at most."""
        ...

    def select(self, clients: Sequence[ClientId], *, round: int, seed: int) -> list[ClientId]:
        """Return the clients to ask, in the order in which their replies are preferred."""
        ...


def secret_sample_rate(selector: Selector) -> float | None:
    """Return the probability with which each client is drawn by coins of the server's own.

    A selector says so by a ``secret_sample_rate`` of its own: every client, in every round and
    independently of all others, with this probability, from randomness that is told to nobody.
    None for the others, whose cohorts anybody who has the seed can draw again.
    """
    rate: float | None = getattr(selector, "secret_sample_rate", None)
    return rate


def expected_cohort(selector: Selector, population: int) -> float:
    """Return how many clients a round asks in the mean: a public constant, > 0."""
    rate = secret_sample_rate(selector)
    return float(selector.wanted(population)) if rate is None else rate * population


def most_participations(
    selector: Selector, clients: Sequence[ClientId], *, rounds: int, seed: int
) -> int:
    """Return in how many of the first rounds the client that is asked most often is asked.

    For selectors whose cohorts follow from the seed: all of them are drawn.
    """
    asked: Counter[ClientId] = Counter()
    for round in range(1, rounds + 1):
        asked.update(selector.select(clients, round=round, seed=seed))
    return max(asked.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class CohortSelector:
    """Base of selectors: size and patience of a cohort; the subclass says who is in it.

    Attributes:
        fraction: Share of the population that each round aggregates, in (0, 1].
        count: Number of clients that each round aggregates; overrides ``fraction``.
        over_selection: Extra share of clients asked, >= 0 (Bonawitz et al. 2019,
            arXiv:1902.01046, Section 4.2): a round asks ``(1 + over_selection) * count`` clients
            and closes once ``count`` good updates are in.
        min_replies: Updates a round needs, >= 1; with fewer it keeps the old model.
        round_timeout_s: Seconds a round waits for replies, > 0, or None for no limit.
        min_clients: Clients that must be known before a run starts, >= 1.
    """

    fraction: float = 0.5
    count: int | None = None
    over_selection: float = 0.0
    min_replies: int = 1
    round_timeout_s: float | None = None
    min_clients: int = 1

    def __post_init__(self) -> None:
        _check_fraction_and_patience(self)
        if self.count is not None and self.count < 1:
            raise ConfigError(
                f"selection.count={self.count} must be >= 1, or null to use selection.fraction."
            )
        if not 0 <= self.over_selection < math.inf:
            raise ConfigError(
                f"selection.over_selection={self.over_selection} must be >= 0: 0.3 asks 30 % more "
                "clients than the round needs."
            )

    def wanted(self, population: int) -> int:
        """Return how many updates a round aggregates at most.

        Raises:
            ConfigError: More clients are wanted than there are, or than ``min_replies`` allows.
        """
        if self.count is not None and self.count > population:
            raise ConfigError(
                f"selection.count={self.count} exceeds the population of {population} clients: "
                "lower it or raise partition.num_clients."
            )
        size = self.count if self.count is not None else max(1, round(self.fraction * population))
        if self.min_replies > size:
            raise ConfigError(
                f"selection.min_replies={self.min_replies} exceeds the cohort of {size} clients: "
                "every round would keep the old model. Lower it or enlarge the cohort."
            )
        return size

    def select(self, clients: Sequence[ClientId], *, round: int, seed: int) -> list[ClientId]:
        """Return the clients to ask, in the order in which their replies are preferred."""
        population = len(clients)
        asked = math.ceil(self.wanted(population) * (1 + self.over_selection) - 1e-9)
        positions = self.positions(population, min(asked, population), round=round, seed=seed)
        return [clients[position] for position in positions]

    @abstractmethod
    def positions(self, population: int, size: int, *, round: int, seed: int) -> list[int]:
        """Return ``size`` different positions in ``range(population)``.

        A function of the arguments alone: a resumed run draws each cohort again.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform(CohortSelector):
    """Uniform sampling without replacement within a round (McMahan et al. 2017, Algorithm 1)."""

    def positions(self, population: int, size: int, *, round: int, seed: int) -> list[int]:
        """Return a sample without replacement."""
        generator = random.Random(stream_seed(seed, Role.COHORT, round=round))
        return generator.sample(range(population), size)


@dataclass(frozen=True, kw_only=True)
class RoundRobin(CohortSelector):
    """Every client in turn, in canonical order: ``ceil(N / count)`` rounds ask all of them.

    Over-selected clients do not advance the turn: they are the first of the next round too.
    """

    def positions(self, population: int, size: int, *, round: int, seed: int) -> list[int]:
        """Return the next ones after those of the round before."""
        start = (round - 1) * self.wanted(population)
        return [(start + offset) % population for offset in range(size)]


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Every client with the same probability, independently, by coins that are told to nobody.

    The sampling whose amplification client-level accounting claims (McMahan et al. 2018,
    arXiv:1710.06963, Algorithm 1). Cohorts differ in size and may be empty. They do not follow
    from the run's seed, so a resumed run draws others.

    Attributes:
        fraction: Probability q of each client to be in a round, in (0, 1].
        min_replies: Updates a round needs, >= 1; with fewer it keeps the old model. Has no say
            under client-level privacy, where every round takes a step.
        round_timeout_s: Seconds a round waits for replies, > 0, or None for no limit.
        min_clients: Clients that must be known before a run starts, >= 1.
        randomness: "secret"; or "reproducible_for_tests", from the run's seed, which amplifies
            nothing.
    """

    fraction: float = 0.1
    min_replies: int = 1
    round_timeout_s: float | None = None
    min_clients: int = 1
    randomness: str = Source.SECRET

    def __post_init__(self) -> None:
        _check_fraction_and_patience(self)
        check_source("selection.randomness", self.randomness)

    @property
    def secret_sample_rate(self) -> float:
        """The probability of each client to be in a round."""
        return self.fraction

    def wanted(self, population: int) -> int:
        """Return the size of a cohort in the mean, rounded, and at least 1."""
        return max(1, round(self.fraction * population))

    def select(self, clients: Sequence[ClientId], *, round: int, seed: int) -> list[ClientId]:
        """Return the clients that the coins chose: others at every call, and maybe none."""
        randomness = randomness_from(self.randomness, seed=seed, use=f"cohort/{round}")
        positions = randomness.positions(len(clients), heads=self.fraction)
        return [clients[position] for position in positions.tolist()]


def _check_fraction_and_patience(selector: CohortSelector | Poisson) -> None:
    """Refuse values out of range of the fields that all our selectors have."""
    if not 0 < selector.fraction <= 1:
        raise ConfigError(
            f"selection.fraction={selector.fraction} must lie in (0, 1]: it is the share of all "
            "clients that each round trains."
        )
    if selector.min_replies < 1:
        raise ConfigError(
            f"selection.min_replies={selector.min_replies} must be >= 1: an empty round has "
            "nothing to aggregate."
        )
    if selector.min_clients < 1:
        raise ConfigError(f"selection.min_clients={selector.min_clients} must be >= 1.")
    if selector.round_timeout_s is not None and not selector.round_timeout_s > 0:
        raise ConfigError(
            f"selection.round_timeout_s={selector.round_timeout_s} must be > 0, or null to wait "
            "for as long as it takes."
        )


def planned_rounds(
    selector: Selector, clients: Sequence[ClientId], *, rounds: int, seed: int
) -> int:
    """Return in how many rounds the client that is asked most often takes part.

    Exact, from the schedule of cohorts that the seed gives. For uniform ones too long to draw, an
    upper bound that holds for all clients but with probability 10^-6 (Chernoff and union bounds).
    All rounds for other long ones, and where coins decide: who is asked is nobody's to know.
    """
    if secret_sample_rate(selector) is not None:
        return rounds
    wanted = selector.wanted(len(clients))
    if rounds * wanted <= _MOST_DRAWS:
        return max(1, most_participations(selector, clients, rounds=rounds, seed=seed))
    if not isinstance(selector, Uniform):
        return rounds
    mean = rounds * wanted / len(clients)
    slack = math.log(len(clients) * 1e6)
    above = slack / 3 + math.sqrt(slack * slack / 9 + 2 * slack * mean)
    return min(rounds, math.ceil(mean + above))
