"""What a ledger adds up to: a statement for each account, and a bound over many runs together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fl_app.privacy.accounting import (
    Accountant,
    UnaccountableError,
    adaptive_delta,
    composes_adaptively,
    epsilons,
    rounds_allowed,
)
from fl_app.privacy.ledger import NOTHING
from fl_app.privacy.ledger_format import Account, Entry, Tally
from fl_app.privacy.policy import Policy
from fl_app.types import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """How one account stands.

    Attributes:
        account: Whose.
        tally: What it has been charged.
        runs: Names of the runs, in the order in which they first charged it.
        epsilon: Spent, at the delta that was asked for; inf if the accountant has no answer.
        limit: Of the policy, or None without one for this account.
        rounds_left: Further rounds like its last one; None without a limit.
    """

    account: Account
    tally: Tally
    runs: tuple[str, ...]
    epsilon: float
    limit: float | None = None
    rounds_left: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundOverRuns:
    """What all runs in a ledger together may have leaked of one account, the worst.

    By basic composition: epsilons and deltas of its runs are added, so that it also holds for
    accountants whose bound does not extend over runs that were planned in view of earlier ones.
    """

    account: Account
    runs: int
    epsilon: float
    delta: float


@dataclass
class _Account:
    tally: Tally = NOTHING
    by_run: dict[str, Tally] = field(default_factory=dict)
    last: Entry | None = None


def statements(
    entries: Iterable[Entry],
    accountant: Accountant,
    *,
    delta: float,
    policy: Policy | None = None,
) -> list[Statement]:
    """Return the statement of each account, in the order in which they were opened.

    Raises:
        ConfigError: The accountant does not compose what an account holds.
    """
    accounts = _accounts(entries)
    for account, held in accounts.items():
        check_composes(accountant, account, held.tally)
    tallies = [held.tally for held in accounts.values()]
    spent = epsilons(accountant, [tally.events for tally in tallies], delta=delta)
    found = []
    for (account, held), epsilon in zip(accounts.items(), spent, strict=True):
        ruled = policy is not None and account.data_set == policy.data_set
        limit = policy.epsilon if policy is not None and ruled else None
        found.append(
            Statement(
                account=account,
                tally=held.tally,
                runs=tuple(held.by_run),
                epsilon=epsilon,
                limit=limit,
                rounds_left=None
                if limit is None
                else _rounds_left(held, accountant, limit=limit, delta=delta),
            )
        )
    return found


def bound_over_runs(
    entries: Iterable[Entry], accountant: Accountant, *, delta: float
) -> BoundOverRuns | None:
    """Return the bound of the account with the largest epsilon, or None for an empty ledger.

    For sweeps: whoever publishes the best of many runs has released something of each of them.

    Raises:
        ConfigError: The accountant does not compose what one run charged.
    """
    worst: BoundOverRuns | None = None
    for account, held in _accounts(entries).items():
        for tally in held.by_run.values():
            check_composes(accountant, account, tally)
        runs = [tally.events for tally in held.by_run.values()]
        bound = BoundOverRuns(
            account=account,
            runs=len(runs),
            epsilon=math.fsum(epsilons(accountant, runs, delta=delta)),
            delta=min(1.0, len(runs) * delta),
        )
        if worst is None or bound.epsilon > worst.epsilon:
            worst = bound
    return worst


def cumulative(
    entries: Iterable[Entry], accountant: Accountant, *, delta: float
) -> Iterator[tuple[Entry, float]]:
    """Yield each entry, and the epsilon that its account had spent after it.

    Raises:
        ConfigError: The accountant does not compose what an account holds.
    """
    tallies: dict[Account, Tally] = {}
    for entry in entries:
        charge = entry.charge
        tally = tallies.get(charge.account, NOTHING).plus(charge.unit, charge.event)
        tallies[charge.account] = tally
        check_composes(accountant, charge.account, tally)
        [epsilon] = epsilons(accountant, [tally.events], delta=delta)
        yield entry, epsilon


def check_composes(accountant: Accountant, account: Account, tally: Tally) -> None:
    """Refuse a figure that nothing proves.

    Raises:
        ConfigError: Several mechanisms, which may have been chosen in view of one another, by an
            accountant that does not compose adaptively; or several units.
    """
    who = f"client {account.client} of {account.data_set}"
    if len(tally.counts) > 1 and not composes_adaptively(accountant):
        raise ConfigError(
            f"accountant={accountant.name} is proven for mechanisms that were fixed beforehand, "
            f"and {who} has paid for {len(tally.counts)} different ones: use --accountant rdp."
        )
    if len(tally.units) > 1:
        raise ConfigError(
            f"{who} has paid for units {' and '.join(sorted(tally.units))}, whose epsilons do not "
            "add up to one of either: keep them in ledgers of their own."
        )


def _accounts(entries: Iterable[Entry]) -> dict[Account, _Account]:
    accounts: dict[Account, _Account] = {}
    for entry in entries:
        charge = entry.charge
        held = accounts.setdefault(charge.account, _Account())
        held.tally = held.tally.plus(charge.unit, charge.event)
        run = held.by_run.get(charge.run, NOTHING)
        held.by_run[charge.run] = run.plus(charge.unit, charge.event)
        held.last = entry
    return accounts


def _rounds_left(
    held: _Account, accountant: Accountant, *, limit: float, delta: float
) -> int | None:
    if held.last is None:
        return None
    event = held.last.charge.event
    try:
        delta = adaptive_delta([*held.tally.events, event], delta)
        return rounds_allowed(accountant, held.tally.events, event, epsilon=limit, delta=delta)
    except UnaccountableError:
        return 0
