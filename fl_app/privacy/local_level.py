"""Local differential privacy (``privacy=local``): clients add the noise themselves.

Nobody is trusted, the server included: what leaves a client is its update, clipped to C, plus
Gaussian noise of standard deviation z C on every entry. Neighbours are any two updates that a
client could have sent in a round: exchanging one for the other moves the clipped update by up to
2 C, so what a round costs is a Gaussian mechanism of noise multiplier z / 2. To compare an update
with none would be half as strict, and hide nothing of a client that is seen to answer.

Not hidden: that a client was asked, whether it answered, and when.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from fl_app.privacy.accounting import (
    GaussianEvent,
    UnaccountableError,
    accountant_named,
    solve_noise,
)
from fl_app.privacy.checks import (
    check_bound,
    check_budget,
    check_delta,
    check_noise_and_target,
    lower_of,
)
from fl_app.privacy.noisy_sum import clipped_sum, rounded_like, with_noise
from fl_app.privacy.randomness import PrivacyRandomness, Source, check_source
from fl_app.types import ConfigError, Params, PrivacyUnit


@dataclass(frozen=True, kw_only=True)
class LocalLevel:
    """A clipped and noised update, charged to each client's own ledger.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``max_norm`` (z), > 0; charged as
            half of it. None if ``target_epsilon`` is given.
        target_epsilon: Epsilon at which a client has taken part ``planned_rounds`` times, and
            beyond which it declines; the noise is solved from it. None if the noise is given.
        planned_rounds: Rounds that a client is planned to take part in; None for those of the
            client that the run's schedule asks most often, which whoever builds the run fills in.
        epsilon_budget: Epsilon beyond which a client declines, > 0; None for ``target_epsilon``,
            and for no limit if there is none.
        delta: In (0, 1).
        max_norm: L2 bound C on a client's whole update, > 0.
        accountant: "rdp", "pld" or "prv".
        ledger: File that accounts for the clients of a simulation; None for one in the run's
            folder.
        randomness: "secret"; or "reproducible_for_tests", which promises no privacy.
    """

    noise_multiplier: float | None = 4.0
    target_epsilon: float | None = None
    planned_rounds: int | None = None
    epsilon_budget: float | None = None
    delta: float = 1e-5
    max_norm: float = 1.0
    accountant: str = "rdp"
    ledger: str | None = None
    randomness: str = Source.SECRET

    def __post_init__(self) -> None:
        check_noise_and_target(self.noise_multiplier, self.target_epsilon, self.planned_rounds)
        check_bound(self.max_norm)
        check_delta(self.delta)
        check_budget(self.epsilon_budget)
        accountant_named(self.accountant)
        check_source("privacy.randomness", self.randomness)
        if self.noise_multiplier is not None:
            _check_accountable(self.accountant, self.noise_multiplier, self.delta)

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden."""
        return PrivacyUnit.CLIENT

    @property
    def limit(self) -> float | None:
        """Epsilon beyond which a client declines, as far as the configuration says; or None."""
        return lower_of(self.epsilon_budget, self.target_epsilon)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise over ``max_norm``, given or solved from the target.

        Raises:
            ConfigError: No noise meets the target, or it is not known for how many rounds.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        if self.planned_rounds is None:
            raise ConfigError(
                f"privacy.target_epsilon={self.target_epsilon} needs privacy.planned_rounds: say "
                "in how many rounds a client is to take part."
            )
        return _solved(self.accountant, self.planned_rounds, self.target_epsilon or 0.0, self.delta)

    @property
    def public(self) -> Collection[str]:
        """Clients tell nothing but their update."""
        return ()

    def steps(self, num_examples: int, *, batch_size: int, epochs: int) -> None:
        """Return None: clients train plainly."""

    def event(self, num_examples: int, *, batch_size: int, epochs: int) -> GaussianEvent:
        """Return what one round costs the client: the same whatever it owns and how it trains."""
        return GaussianEvent(noise_multiplier=self.noise / 2)

    def protect(
        self, delta: Params, *, max_norm: float | None, randomness: PrivacyRandomness
    ) -> tuple[Params, Mapping[str, float]]:
        """Return a client's update clipped and noised, in its own types; and nothing besides.

        Clipped and noised in double precision, then rounded. An update with NaN or infinities
        becomes noise alone.

        Args:
            delta: The update as training made it.
            max_norm: Unused: no server's word changes the bound.
            randomness: Where the noise comes from.
        """
        clipped = clipped_sum([delta], like=delta, max_norm=self.max_norm)
        noisy = with_noise(clipped, std=self.noise * self.max_norm, randomness=randomness)
        return rounded_like(noisy, delta), {}


@lru_cache(maxsize=256)
def _solved(accountant: str, rounds: int, epsilon: float, delta: float) -> float:
    return solve_noise(
        accountant_named(accountant),
        lambda noise: GaussianEvent(noise_multiplier=noise / 2, count=rounds),
        epsilon=epsilon,
        delta=delta,
    )


def _check_accountable(accountant: str, noise_multiplier: float, delta: float) -> None:
    event = GaussianEvent(noise_multiplier=noise_multiplier / 2)
    try:
        accountant_named(accountant).epsilon([event], delta=delta)
    except UnaccountableError as error:
        raise ConfigError(
            f"privacy.noise_multiplier={noise_multiplier}: {error} Raise it."
        ) from error
