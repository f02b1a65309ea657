"""What the parts of privacy tell one another: requests, budgets, refusals, and who guards.

The boundary runs here. On one side is what a configuration asks for, which comes from the server;
on the other a `Guard`, which belongs to the data owner: it holds the ledger and the limits, and
nothing in a configuration can raise what it allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fl_app.privacy.accounting import GaussianEvent
from fl_app.types import ClientId, FlAppError, PrivacyUnit


class BudgetExhaustedError(FlAppError):
    """A client declines: the round would pass its budget. Nothing was trained."""


class PolicyError(FlAppError):
    """A client declines: what is asked is not what its owner allows. Nothing was trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What one round asks of one client's records.

    Attributes:
        client: Whose records.
        run: Name of the run, the same after a resume.
        round: Its number, from 1.
        unit: Whose presence is hidden; NONE for training without privacy.
        event: What it releases; None without privacy.
        delta: The delta at which the configuration counts, in (0, 1).
        num_examples: Records in the client's training part; stays on the client.
        task: Name of the task, for owners who allow some tasks only.
    """

    client: ClientId
    run: str
    round: int
    unit: PrivacyUnit
    event: GaussianEvent | None
    delta: float
    num_examples: int
    task: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How a client's budget stands after a round has been paid for.

    Attributes:
        epsilon_spent: Over all that the ledger holds, at ``delta``.
        epsilon: Limit, or None if there is none.
        delta: The owner's delta.
        rounds_left: Further rounds like the one paid for; None without a limit.
    """

    epsilon_spent: float
    epsilon: float | None
    delta: float
    rounds_left: int | None


class Guard(Protocol):
    """Stands between requests and records."""

    def admit(self, requests: Sequence[Request]) -> list[Budget | FlAppError | None]:
        """Pay for the rounds that are allowed, in one synced write, before any of them is trained.

        Paid is paid: a round that is then not trained, or trained again, is paid for again.

        Returns:
            For each request the budget after it, None if nothing had to be paid, or why it is
            declined: `BudgetExhaustedError` or `PolicyError`.

        Raises:
            FlAppError: The ledger cannot be read or written: nothing may be trained.
        """
        ...
