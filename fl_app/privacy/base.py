"""What the parts of privacy tell one another: requests, budgets, refusals, and who guards.

The boundary runs here. On one side is what a configuration asks for, which comes from the server;
on the other a `Guard`, which belongs to the data owner: it holds the ledger and the limits, and
nothing in a configuration can raise what it allows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fl_app.privacy.accounting import GaussianEvent
from fl_app.privacy.dp_sgd import DpSgd
from fl_app.privacy.randomness import PoissonSampling, PrivacyRandomness
from fl_app.types import Budget as Budget
from fl_app.types import ClientId, FlAppError, Params, PrivacyUnit


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordPlan:
    """How one round trains on one client's records privately.

    Attributes:
        sampling: Its batches.
        mechanism: One step.
    """

    sampling: PoissonSampling
    mechanism: DpSgd


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
class Admission:
    """A round of a client that may be trained: allowed, and paid for.

    Attributes:
        budget: What the client tells of its budget after it; None if there is nothing to tell.
    """

    budget: Budget | None


class Privacy(Protocol):
    """What a configuration asks for: ``privacy=NAME``."""

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden."""
        ...

    @property
    def delta(self) -> float:
        """At which it counts, in (0, 1)."""
        ...

    @property
    def accountant(self) -> str:
        """Name of the accountant it counts by."""
        ...

    @property
    def noise_multiplier(self) -> float | None:
        """The noise, or None if it differs between clients."""
        ...

    @property
    def limit(self) -> float | None:
        """Epsilon beyond which clients decline, as far as the configuration says; or None."""
        ...

    @property
    def public(self) -> Collection[str]:
        """What clients may tell as it is; see `fl_app.privacy.release`."""
        ...

    @property
    def ledger(self) -> str | None:
        """File that accounts for simulated clients; None for one in the run's folder."""
        ...

    @property
    def randomness(self) -> str:
        """Where noise and coins come from; see `fl_app.privacy.randomness.Source`."""
        ...

    def event(self, num_examples: int, *, batch_size: int, epochs: int) -> GaussianEvent | None:
        """Return what one round costs a client with that many records; None if nothing.

        Raises:
            ConfigError: Such a client cannot take part; the message says why.
        """
        ...

    def steps(self, num_examples: int, *, batch_size: int, epochs: int) -> RecordPlan | None:
        """Return how such a client's records are trained on privately; None if plainly."""
        ...

    def protect(
        self, delta: Params, *, max_norm: float | None, randomness: PrivacyRandomness
    ) -> tuple[Params, Mapping[str, float]]:
        """Return an update as it may leave the client, and figures that are paid for with it.

        Args:
            delta: What training gave.
            max_norm: Bound that the server asks for in this round, if it does.
            randomness: Where noise comes from.
        """
        ...


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
