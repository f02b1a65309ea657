"""Who guards the records of this process's clients: their owner's policy, or a simulation's terms.

A deployed client is served by its site's own worker, which was started with its owner's policy: no
configuration can name another, since that comes from the server. Simulated clients have no owner
but whoever runs them, so the configuration is their policy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from fl_app.privacy.accounting import accountant_named
from fl_app.privacy.base import Guard, PolicyError, Privacy
from fl_app.privacy.guard import LedgerGuard, OpenGuard, guard_of
from fl_app.privacy.ledger import LEDGER_NAME, Ledger
from fl_app.privacy.policy import Policy, Terms
from fl_app.privacy.randomness import Source
from fl_app.types import ClientId, ConfigError, Examples, PrivacyUnit


class Site(Protocol):
    """What is decided on the side of the records."""

    def guard(self, run_dir: str | None) -> Guard:
        """Return who admits a round of the run with this folder, if that is known."""
        ...

    def may_tell(self) -> Collection[str]:
        """Return what clients may tell as it is; see `fl_app.privacy.release`."""
        ...

    def tells_budget(self) -> bool:
        """Return whether the server may see how budgets stand."""
        ...

    def account(self, client: ClientId) -> ClientId:
        """Return the name by which a client's records are accounted for."""
        ...

    def check_records(self, train: Examples) -> None:
        """Refuse training records that the owner's policy was not written for.

        Raises:
            PolicyError: They are others.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SimulatedSite:
    """Clients of a simulation: what the configuration asks for is what their owner allows.

    Attributes:
        privacy: What is asked.
        data_set: Name of the records as they are dealt out; with a client it names an account.
    """

    privacy: Privacy
    data_set: str
    _guards: dict[str, Guard] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def dealt(cls, privacy: Privacy, *, task: str, dealt: str) -> SimulatedSite:
        """Return the site of clients whose records depend on these settings of a task."""
        return cls(privacy=privacy, data_set=f"{task}-{sha256(dealt.encode()).hexdigest()[:8]}")

    def guard(self, run_dir: str | None) -> Guard:
        """Return who admits a round, from a ledger in the run's folder or the one configured."""
        if self.privacy.unit is PrivacyUnit.NONE:
            return OpenGuard()
        path = self.privacy.ledger or (f"{run_dir}/{LEDGER_NAME}" if run_dir else LEDGER_NAME)
        if path not in self._guards:
            terms = Terms(
                data_set=self.data_set,
                delta=self.privacy.delta,
                epsilon=self.privacy.limit,
                trust_server=True,
            )
            self._guards[path] = LedgerGuard(
                ledger=Ledger(Path(path)),
                terms=terms,
                accountant=accountant_named(self.privacy.accountant),
            )
        return self._guards[path]

    def may_tell(self) -> Collection[str]:
        """Return what the configuration declares public."""
        return self.privacy.public

    def tells_budget(self) -> bool:
        """Return True: whoever runs the server runs the clients."""
        return True

    def account(self, client: ClientId) -> ClientId:
        """Return the client's own name."""
        return client

    def check_records(self, train: Examples) -> None:
        """Accept any: they were made for the run."""


@dataclass(frozen=True, kw_only=True)
class DeployedSite:
    """A client under the policy that its owner wrote.

    Attributes:
        privacy: What the server asks.
        policy: The owner's.
    """

    privacy: Privacy
    policy: Policy
    _guard: list[Guard] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.privacy.randomness != Source.SECRET:
            raise PolicyError(
                "privacy.randomness=reproducible_for_tests promises no privacy: a deployed client "
                "draws its noise in secret. Set privacy.randomness=secret."
            )

    def guard(self, run_dir: str | None) -> Guard:
        """Return who admits a round, on the owner's terms; a server can only ask for less."""
        if not self._guard:
            self._guard.append(self._made())
        return self._guard[0]

    def _made(self) -> Guard:
        guard, asked = guard_of(self.policy), self.privacy.limit
        if not isinstance(guard, LedgerGuard) or asked is None:
            return guard
        allowed = guard.terms.epsilon
        if allowed is not None and allowed <= asked:
            return guard
        return replace(guard, terms=replace(guard.terms, epsilon=asked))

    def may_tell(self) -> Collection[str]:
        """Return what both the server asks to be public and the owner has declared so."""
        return frozenset(self.privacy.public) & frozenset(map(str, self.policy.public))

    def tells_budget(self) -> bool:
        """Return what the policy says."""
        return self.policy.share_budget

    def account(self, client: ClientId) -> ClientId:
        """Return one name for whatever a server calls this client: the policy's data set counts."""
        return "site"

    def check_records(self, train: Examples) -> None:
        """Compare them with what the policy says of them. Raises `PolicyError`."""
        try:
            self.policy.check_records(train)
        except ConfigError as error:
            raise PolicyError(str(error)) from error
