"""Who guards the records of this process's clients: their owner's policy, or a simulation's terms.

A deployed client finds its owner's policy where the person who started it said, never where a
configuration says: that comes from the server. Simulated clients have no owner but whoever runs
them, so the configuration is their policy.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from fl_app.privacy.accounting import accountant_named
from fl_app.privacy.base import Guard, PolicyError, Privacy
from fl_app.privacy.guard import LedgerGuard, OpenGuard, guard_of
from fl_app.privacy.ledger import LEDGER_NAME, Ledger
from fl_app.privacy.policy import Policy, Terms, read_policy
from fl_app.privacy.randomness import Source
from fl_app.types import ClientId, ConfigError, Examples, PrivacyUnit

POLICY = "FL_APP_POLICY"
"""Environment variable that names a site's policy, unless its node config does."""


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
    """A client whose owner has written a policy, or has none and trains without privacy.

    Attributes:
        privacy: What the server asks.
        policy: The owner's, or None.
    """

    privacy: Privacy
    policy: Policy | None
    _guard: list[Guard] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.privacy.randomness != Source.SECRET:
            raise PolicyError(
                "privacy.randomness=reproducible_for_tests promises no privacy: a deployed client "
                "draws its noise in secret. Set privacy.randomness=secret."
            )
        if self.policy is None and self.privacy.unit is not PrivacyUnit.NONE:
            raise PolicyError(
                f"privacy={self.privacy.unit} needs a policy of the data's owner, which holds the "
                f"budget and names the ledger: set {POLICY}=PATH where this client is started, or "
                "policy=PATH in its --node-config. PRIVACY.md shows one."
            )

    def guard(self, run_dir: str | None) -> Guard:
        """Return who admits a round, on the owner's terms; a server can only ask for less."""
        if not self._guard:
            self._guard.append(self._made())
        return self._guard[0]

    def _made(self) -> Guard:
        if self.policy is None:
            return OpenGuard()
        guard, asked = guard_of(self.policy), self.privacy.limit
        allowed = guard.terms.epsilon
        if asked is None or (allowed is not None and allowed <= asked):
            return guard
        return replace(guard, terms=replace(guard.terms, epsilon=asked))

    def may_tell(self) -> Collection[str]:
        """Return what both the server asks to be public and the owner has declared so."""
        if self.policy is None:
            return self.privacy.public
        return frozenset(self.privacy.public) & frozenset(map(str, self.policy.public))

    def tells_budget(self) -> bool:
        """Return what the policy says."""
        return self.policy is not None and self.policy.share_budget

    def account(self, client: ClientId) -> ClientId:
        """Return one name for whatever a server calls this client: the policy's data set counts."""
        return "site"

    def check_records(self, train: Examples) -> None:
        """Compare them with what the policy says of them. Raises `PolicyError`."""
        if self.policy is None:
            return
        try:
            self.policy.check_records(train)
        except ConfigError as error:
            raise PolicyError(str(error)) from error


def site_of(
    privacy: Privacy, *, task: str, dealt: str, policy: str | None, simulated: bool
) -> Site:
    """Return the side of the records in this process.

    Args:
        privacy: What is asked.
        task: Name of the task.
        dealt: What the records of each client depend on, such as partition and seed.
        policy: Path of the owner's policy that the node was started with, or None.
        simulated: Whether the clients are.

    Raises:
        ConfigError: The policy cannot be used.
        PolicyError: What is asked cannot be done without one.
    """
    if simulated:
        return SimulatedSite(
            privacy=privacy, data_set=f"{task}-{sha256(dealt.encode()).hexdigest()[:8]}"
        )
    path = os.environ.get(POLICY) if policy is None else policy
    if path == "":
        raise PolicyError(f"{POLICY} is set and empty: name the policy's file, or unset it.")
    try:
        found = read_policy(Path(path), task=task) if path else None
    except ConfigError as error:
        raise PolicyError(f"the policy of this site cannot be used: {error}") from error
    return DeployedSite(privacy=privacy, policy=found)
