"""What a trusted server has released about whom, and what that comes to for each client.

The server adds the noise of client-level privacy, so the server keeps the account: every step is
paid for, in a record that survives a crash, before its noise is drawn. A round that is played
again after a resume is paid for again: a resumed run never reports less than an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fl_app.privacy.accounting import Accountant, GaussianEvent
from fl_app.types import ClientId

_History: TypeAlias = frozenset[tuple[GaussianEvent, int]]
"""Event -> how often, for those who have the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payment:
    """What one step of the server costs, and whom.

    Attributes:
        round: The round it ends, from 1.
        event: What it releases.
        clients: Who pays: those that were asked; or None for everybody there is, because who was
            asked is secret and part of what the event's sample rate stands for.
    """

    round: int
    event: GaussianEvent
    clients: tuple[ClientId, ...] | None


class Payments(Protocol):
    """An append-only record of payments."""

    def pay(self, payment: Payment) -> None:
        """Append a payment, and return once it would survive a power cut.

        Raises:
            FlAppError: It cannot be written: nothing may be released.
        """
        ...

    def paid(self) -> Iterable[Payment]:
        """Return all payments so far, those before a resume included, in order."""
        ...


class InMemoryPayments:
    """A record that is gone with its process: for tests, and for runs that nobody resumes."""

    def __init__(self) -> None:
        self._paid: list[Payment] = []

    def pay(self, payment: Payment) -> None:
        """Append a payment."""
        self._paid.append(payment)

    def paid(self) -> Sequence[Payment]:
        """Return all payments so far, in order."""
        return tuple(self._paid)


class Spending:
    """Adds payments up, client by client.

    Args:
        accountant: Composes events.
        delta: At which epsilon is told.
        payments: What was paid before.
    """

    def __init__(
        self, accountant: Accountant, *, delta: float, payments: Iterable[Payment] = ()
    ) -> None:
        self._accountant = accountant
        self._delta = delta
        self._of_all: _History = frozenset()
        self._of: dict[ClientId, _History] = {}
        self._shared: Counter[_History] = Counter()
        self._known: dict[_History, float] = {frozenset(): 0.0}
        for payment in payments:
            self.add(payment)

    def add(self, payment: Payment) -> None:
        """Count a payment."""
        if payment.clients is None:
            self._of_all = _extended(self._of_all, payment.event)
            return
        for client in payment.clients:
            before = self._of.get(client, frozenset())
            after = _extended(before, payment.event)
            self._of[client] = after
            self._shared[after] += 1
            if before:
                self._shared[before] -= 1
                if not self._shared[before]:
                    del self._shared[before]

    def epsilon_max(self) -> float:
        """Return the largest loss of any client."""
        return self._largest(self._of_all, self._shared)

    def epsilon_after(self, payment: Payment) -> float:
        """Return the largest loss of any client if this were paid too."""
        if payment.clients is None:
            return self._largest(_extended(self._of_all, payment.event), self._shared)
        payers = {
            _extended(self._of.get(client, frozenset()), payment.event)
            for client in payment.clients
        }
        return self._largest(self._of_all, {*self._shared, *payers})

    def epsilon_mean(self, population: int) -> float:
        """Return the mean loss over that many clients; those never asked have lost nothing.

        Args:
            population: Clients there are, >= 1; more of them may have paid, if some have left.
        """
        population = max(population, len(self._of))
        total = sum(
            count * self._epsilon(_joined(self._of_all, history))
            for history, count in self._shared.items()
        )
        idle = population - len(self._of)
        return math.fsum([total, idle * self._epsilon(self._of_all)]) / population

    def _largest(self, of_all: _History, own: Iterable[_History]) -> float:
        candidates = [dict(_joined(of_all, history)) for history in {*own, frozenset()}]
        # Whoever has lost no more than another of everything need not be computed.
        largest = [
            one
            for one in candidates
            if not any(
                other is not one and all(other.get(event, 0) >= n for event, n in one.items())
                for other in candidates
            )
        ]
        return max(self._epsilon(frozenset(one.items())) for one in largest)

    def _epsilon(self, history: _History) -> float:
        if history not in self._known:
            events = [event.times(count) for event, count in history]
            self._known[history] = self._accountant.epsilon(events, delta=self._delta)
        return self._known[history]


def _extended(history: _History, event: GaussianEvent) -> _History:
    return _joined(history, frozenset({(event, 1)}))


def _joined(first: _History, second: _History) -> _History:
    counts: Counter[GaussianEvent] = Counter()
    for event, count in (*first, *second):
        counts[event] += count
    return frozenset(counts.items())
