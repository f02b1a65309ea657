"""Guards: whether a round may use a client's records, and its price on disk before it does.

A budget is enforced by counting. For a mechanism, and all else that an account holds, the number
of applications within the budget is solved once; from then on every charge counts towards it,
whoever made it. Only an event of another mechanism makes a new number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from fl_app.privacy.accounting import (
    MOST_ROUNDS,
    Accountant,
    GaussianEvent,
    RdpAccountant,
    UnaccountableError,
    adaptive_delta,
    composes_adaptively,
    epsilons,
    rounds_allowed,
)
from fl_app.privacy.base import Budget, BudgetExhaustedError, PolicyError, Request
from fl_app.privacy.ledger import NOTHING, Ledger, Page
from fl_app.privacy.ledger_format import Account, Charge, Mechanism, Tally, mechanism_of
from fl_app.privacy.policy import Policy, Terms
from fl_app.types import ClientId, FlAppError, PrivacyUnit

log = logging.getLogger(__name__)

MOST_NOISE = 1000.0
"""Noise multiplier above which a request can only be meant to do harm: it costs next to nothing."""

_ANY_NUMBER = 10**9
"""Applications beyond which nobody counts."""

Verdict: TypeAlias = Budget | FlAppError | None


class OpenGuard:
    """No ledger and no limit: for training without privacy, where no owner wrote a policy."""

    def admit(self, requests: Sequence[Request]) -> list[Verdict]:
        """Let pass whatever costs nothing; what must be paid for has no ledger to be paid from."""
        return [
            None
            if request.event is None
            else PolicyError(
                f"client {request.client} has no ledger, so privacy={request.unit} has nowhere to "
                "be counted: give its guard a ledger."
            )
            for request in requests
        ]


@dataclass(frozen=True, kw_only=True)
class LedgerGuard:
    """Admits what the owner's terms allow, paid from a ledger.

    Attributes:
        ledger: Where charges go.
        terms: Of the owner; of all clients alike in a simulation.
        accountant: Counts. One that does not compose adaptively is held to one mechanism for the
            whole life of an account, where stopping early or late is all that can be chosen.
        limits: Client -> epsilon instead of that of the terms; None for no limit.
    """

    ledger: Ledger
    terms: Terms
    accountant: Accountant = field(default_factory=RdpAccountant)
    limits: Mapping[ClientId, float | None] = field(default_factory=dict)

    def admit(self, requests: Sequence[Request]) -> list[Verdict]:
        """Pay for what is allowed, in one synced write. See `fl_app.privacy.base.Guard`."""
        verdicts: list[Verdict] = [self._objection(request) for request in requests]
        paying = {
            index: request
            for index, request in enumerate(requests)
            if verdicts[index] is None and request.event is not None
        }
        if not paying:
            return verdicts
        # What takes long is solved before the ledger is held, and then remembered.
        accounts = [self._account(request) for request in paying.values()]
        known = self.ledger.tallies_of(accounts)
        for request, tally in zip(paying.values(), known, strict=True):
            self._weigh(request, tally)
        with self.ledger.exclusively() as page:
            for index, verdict in self._pay(paying, page).items():
                verdicts[index] = verdict
        return verdicts

    def _pay(self, paying: Mapping[int, Request], page: Page) -> dict[int, Verdict]:
        """Return the verdict on each request, once the charges of those admitted are written."""
        verdicts: dict[int, Verdict] = {}
        after: dict[Account, Tally] = {}
        admitted: dict[int, tuple[Request, GaussianEvent, Tally, int | None]] = {}
        for index, request in paying.items():
            account, event = self._account(request), _event_of(request)
            tally = after.get(account) or page.tallies.get(account, NOTHING)
            left = self._weigh(request, tally)
            if isinstance(left, PolicyError):
                verdicts[index] = left
                continue
            if left == 0:
                verdicts[index] = self._exhausted(request, tally)
                continue
            after[account] = tally.plus(request.unit, event)
            admitted[index] = (request, event, after[account], left)
        histories = [tally.events for _, _, tally, _ in admitted.values()]
        costs = epsilons(self.accountant, histories, delta=self.terms.delta)
        charges = []
        for (index, (request, event, _, left)), cost in zip(admitted.items(), costs, strict=True):
            if not math.isfinite(cost):
                verdicts[index] = self._unaccountable(request)
                continue
            verdicts[index] = Budget(
                epsilon_spent=cost,
                epsilon=self._limit(request.client),
                delta=self.terms.delta,
                rounds_left=None if left is None else left - 1,
            )
            charges.append(
                Charge(
                    account=self._account(request),
                    unit=request.unit,
                    run=request.run,
                    round=request.round,
                    event=event,
                )
            )
        page.append(charges)
        return verdicts

    def _objection(self, request: Request) -> PolicyError | None:
        """Return what the terms say against a request, whatever the budget."""
        terms, who = self.terms, f"client {request.client}"
        by_server = request.event is None and request.unit is PrivacyUnit.CLIENT
        if by_server and terms.unit in (None, PrivacyUnit.CLIENT) and terms.trust_server:
            return self._foreign_task(request)
        if by_server and terms.unit is PrivacyUnit.CLIENT:
            return PolicyError(
                f"{who} does not leave its noise to the server, as privacy=client does: choose "
                "privacy=local, or ask its owner to set trust_server in its policy."
            )
        if request.event is None or request.unit is PrivacyUnit.NONE:
            if terms.unit is None and request.event is None:
                return None
            return PolicyError(
                f"{who} trains with privacy only: choose privacy={terms.unit or 'record'}."
            )
        if terms.unit is not None and request.unit is not terms.unit:
            return PolicyError(
                f"{who} wants each {terms.unit} hidden, and privacy={request.unit} hides each "
                f"{request.unit}: an epsilon of one is not an epsilon of the other. Choose "
                f"privacy={terms.unit}, or ask its owner for another policy."
            )
        if foreign := self._foreign_task(request):
            return foreign
        if request.event.noise_multiplier > MOST_NOISE:
            return PolicyError(
                f"{who} declines a noise multiplier of {request.event.noise_multiplier:g}: above "
                f"{MOST_NOISE:g} nothing is learnt, and its account fills with rounds of no use."
            )
        if request.event.noise_multiplier < terms.least_noise_multiplier:
            return PolicyError(
                f"{who} wants a noise multiplier of at least {terms.least_noise_multiplier:g}, not "
                f"{request.event.noise_multiplier:g}: plan with more noise."
            )
        # Without the number itself: who asked reads this, and the number is the client's own.
        if request.unit is PrivacyUnit.RECORD and terms.delta * request.num_examples >= 1:
            return PolicyError(
                f"{who} counts at delta={terms.delta:g}, which is not below one over the number "
                "of its records, so that a whole record could leak: lower delta in its policy."
            )
        return None

    def _foreign_task(self, request: Request) -> PolicyError | None:
        allowed = self.terms.tasks
        if not allowed or request.task in allowed:
            return None
        return PolicyError(
            f"client {request.client} does not train task={request.task}: its owner allows "
            f"{', '.join(allowed)}."
        )

    def _weigh(self, request: Request, tally: Tally) -> int | None | PolicyError:
        """Return how many such rounds may follow a tally, None without a limit, or an objection.

        The number of applications does not depend on how many of them are spent, so that it is
        the same for all accounts alike, and for all their rounds.
        """
        event, limit = _event_of(request), self._limit(request.client)
        others = {m: n for m, n in tally.counts.items() if m != mechanism_of(event)}
        adaptive = composes_adaptively(self.accountant)
        if others and not adaptive:
            return PolicyError(
                f"client {request.client} counts by {self.accountant.name}, which is proven for "
                "one mechanism that never changes, and it has paid for another noise multiplier "
                "or sample rate before: plan those again, or let its owner choose accountant: rdp."
            )
        if tally.units - {request.unit}:
            return PolicyError(
                f"client {request.client} has paid for privacy={next(iter(tally.units))} before, "
                f"and privacy={request.unit} cannot be added to that: use that one, or another "
                "ledger for other records."
            )
        if limit is None:
            return None
        try:
            allowed = _applications_allowed(
                self.accountant,
                mechanism_of(event),
                1 if adaptive else event.count,
                frozenset(others.items()),
                limit,
                self.terms.delta,
            )
        except UnaccountableError:
            return self._unaccountable(request)
        spent = tally.counts.get(mechanism_of(event), 0)
        return max(0, min((allowed - spent) // event.count, MOST_ROUNDS))

    def _exhausted(self, request: Request, tally: Tally) -> BudgetExhaustedError:
        who, event = f"client {request.client}", _event_of(request)
        [spent] = epsilons(self.accountant, [tally.events], delta=self.terms.delta)
        told = (
            f"{who} declines: a round of {event.count} steps with noise multiplier "
            f"{event.noise_multiplier:g} and sample rate {event.sample_rate:g} would pass its "
            f"budget, epsilon={self._limit(request.client):g} at delta={self.terms.delta:g}, of "
            f"which {spent:.4g} is spent. Plan fewer rounds or more noise, or ask its owner."
        )
        log.info("%s", told)
        if self.terms.share_budget:
            return BudgetExhaustedError(told)
        return BudgetExhaustedError(
            f"{who} declines: the round would pass its budget. Plan fewer rounds or more noise, or "
            "ask its owner."
        )

    def _unaccountable(self, request: Request) -> PolicyError:
        event = _event_of(request)
        return PolicyError(
            f"client {request.client} declines: with noise multiplier {event.noise_multiplier:g} "
            f"{self.accountant.name} has no finite epsilon. Plan with more noise."
        )

    def _account(self, request: Request) -> Account:
        return Account(client=request.client, data_set=self.terms.data_set)

    def _limit(self, client: ClientId) -> float | None:
        return self.limits.get(client, self.terms.epsilon)


def guard_of(policy: Policy) -> LedgerGuard | OpenGuard:
    """Return the guard that keeps a policy."""
    if policy.unit is PrivacyUnit.NONE:
        return OpenGuard()
    return LedgerGuard(
        ledger=policy.open_ledger(), terms=policy.terms, accountant=policy.make_accountant()
    )


@lru_cache(maxsize=1 << 16)
def _applications_allowed(
    accountant: Accountant,
    mechanism: Mechanism,
    step: int,
    others: frozenset[tuple[Mechanism, int]],
    epsilon: float,
    delta: float,
) -> int:
    """Return how often a mechanism may be applied in all, besides others, in multiples of a step.

    Raises:
        UnaccountableError: Not even once has a finite cost.
    """
    noise_multiplier, sample_rate = mechanism
    event = GaussianEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, count=step)
    history = Tally(counts=dict(sorted(others))).events
    if not composes_adaptively(accountant):
        return step * _steps_allowed(accountant, event, epsilon=epsilon, delta=delta)
    delta = adaptive_delta([*history, event], delta)
    return rounds_allowed(
        accountant, history, event, epsilon=epsilon, delta=delta, at_most=_ANY_NUMBER
    )


def _steps_allowed(
    accountant: Accountant, event: GaussianEvent, *, epsilon: float, delta: float
) -> int:
    """Return `rounds_allowed` of an empty history, for accountants that take long to answer.

    Renyi DP, a thousand times as fast, says where to begin: the others are never much looser.
    """

    def fits(rounds: int) -> bool:
        [cost] = epsilons(accountant, [[event.times(rounds)]], delta=delta)
        return cost <= epsilon

    low = rounds_allowed(RdpAccountant(), [], event, epsilon=epsilon, delta=delta)
    while low > 0 and not fits(low):
        low //= 2
    high = max(low + 1, low + low // 4)
    while high <= MOST_ROUNDS and fits(high):
        low, high = high, high + max(1, high // 4)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _event_of(request: Request) -> GaussianEvent:
    if request.event is None:
        raise ValueError("a request that costs nothing has no event")
    return request.event
