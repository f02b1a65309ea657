"""Client-level differential privacy with a trusted server (``privacy=client``).

DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963, Algorithm 1) with uniform weights and a fixed
denominator: clients clip whole updates to C, the server clips again what it received, adds Gaussian
noise of standard deviation z C to the sum, and divides by the expected cohort.

What is hidden from whoever sees the models is whether a client's updates are in them at all:
neighbours differ in one client, whose contributions to all rounds are its own or zero. The
population, the schedule of seeded cohorts and the expected cohort are public and the same for both.
The server sees every update, and is trusted to add the noise and to forget what it saw.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from fl_app.params import l2_norm
from fl_app.privacy.accounting import (
    GaussianEvent,
    UnaccountableError,
    accountant_named,
    solve_noise,
)
from fl_app.privacy.checks import check_bound, check_delta, check_noise_and_target
from fl_app.privacy.noisy_sum import clipped_sum, rounded_like, with_noise
from fl_app.privacy.randomness import PrivacyRandomness, Source, check_source
from fl_app.types import ConfigError, Params, PrivacyUnit

CLIPPED = "clipped"
"""The figure in which a client tells whether its update was longer than the bound: 1 or 0."""


@dataclass(frozen=True, kw_only=True)
class ClientLevel:
    """Clipped updates, and noise on their sum.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the bound (z), > 0; None if
            ``target_epsilon`` is given.
        target_epsilon: Epsilon that the planned rounds may cost, and beyond which no round is
            played; the noise is solved from it. None if the noise is given.
        planned_rounds: Rounds that the target is for: of the run under secret coins, else those
            that one client takes part in. None for the run's rounds, or for those of the client
            that the schedule of its cohorts asks most often.
        delta: In (0, 1), below one over the number of clients.
        max_norm: L2 bound C on a client's whole update, > 0; of the first round, if it adapts.
        target_quantile: Share of the updates, gamma in (0, 1), that the bound is to let through
            unclipped; the bound then follows the clients' norms (Andrew et al. 2021,
            arXiv:1905.03871, Algorithm 1). None: the bound is fixed.
        bound_learning_rate: How fast the bound adapts (eta_C), > 0.
        bit_noise: Standard deviation of the noise on the sum of the clients' bits (sigma_b), > z/2;
            None for a twentieth of the expected cohort.
        accountant: "rdp", "pld" or "prv".
        randomness: "secret"; or "reproducible_for_tests", which promises no privacy.
    """

    noise_multiplier: float | None = 1.0
    target_epsilon: float | None = None
    planned_rounds: int | None = None
    delta: float = 1e-5
    max_norm: float = 1.0
    target_quantile: float | None = None
    bound_learning_rate: float = 0.2
    bit_noise: float | None = None
    accountant: str = "rdp"
    randomness: str = Source.SECRET

    def __post_init__(self) -> None:
        check_noise_and_target(self.noise_multiplier, self.target_epsilon, self.planned_rounds)
        check_bound(self.max_norm)
        check_delta(self.delta)
        if self.target_quantile is not None and not 0 < self.target_quantile < 1:
            raise ConfigError(
                f"privacy.target_quantile={self.target_quantile} must lie in (0, 1): 0.5 lets half "
                "of the updates through unclipped; null fixes the bound."
            )
        if not 0 < self.bound_learning_rate < math.inf:
            raise ConfigError(
                f"privacy.bound_learning_rate={self.bound_learning_rate} must be > 0 and finite; "
                "privacy.target_quantile=null fixes the bound."
            )
        if self.bit_noise is not None and not 0 < self.bit_noise < math.inf:
            raise ConfigError(
                f"privacy.bit_noise={self.bit_noise} must be > 0 and finite, or null."
            )
        accountant_named(self.accountant)
        check_source("privacy.randomness", self.randomness)

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden."""
        return PrivacyUnit.CLIENT

    @property
    def limit(self) -> None:
        """Clients have no say: the server stops before ``target_epsilon`` is passed."""
        return

    @property
    def public(self) -> Collection[str]:
        """Clients tell nothing but their update."""
        return ()

    @property
    def ledger(self) -> None:
        """Clients pay nothing themselves."""
        return

    def event(self, num_examples: int, *, batch_size: int, epochs: int) -> None:
        """Return None: the server adds the noise, and pays for it on behalf of all clients."""

    def steps(self, num_examples: int, *, batch_size: int, epochs: int) -> None:
        """Return None: clients train plainly."""

    def protect(
        self, delta: Params, *, max_norm: float | None, randomness: PrivacyRandomness
    ) -> tuple[Params, Mapping[str, float]]:
        """Return a client's update clipped, and what is told besides.

        Args:
            delta: The update as training made it.
            max_norm: The round's C, as the server tells it; None for the first round's.
            randomness: Unused: the server adds the noise.

        Returns:
            The update, in its own types; and `CLIPPED` if the bound adapts, which the server makes
            noise on and pays for.
        """
        max_norm = self.max_norm if max_norm is None else max_norm
        clipped = rounded_like(clipped_sum([delta], like=delta, max_norm=max_norm), delta)
        if self.target_quantile is None:
            return clipped, {}
        return clipped, {CLIPPED: float(not l2_norm(delta) <= max_norm)}

    def plan(
        self, *, sample_rate: float | None, participations: int, expected_cohort: float
    ) -> ClientLevelPlan:
        """Return the mechanism of a run, which never changes, and what each round is charged as.

        Args:
            sample_rate: Probability of each client to be asked, if the coins are secret; else
                None, and every round that a client is asked in is charged without amplification.
            participations: Rounds that one client pays for, > 0.
            expected_cohort: What noisy sums are divided by, > 0: a public constant.

        Raises:
            ConfigError: No noise meets the target, or it cannot be accounted; or ``bit_noise`` is
                too small for it.
        """
        accountant, paid = accountant_named(self.accountant), self.planned_rounds or participations

        def all_rounds(noise: float) -> GaussianEvent:
            return GaussianEvent(
                noise_multiplier=noise, sample_rate=sample_rate or 1.0, count=max(paid, 1)
            )

        if self.noise_multiplier is not None:
            noise = self.noise_multiplier
        else:
            target = self.target_epsilon or 0.0  # one of them is given
            noise = solve_noise(accountant, all_rounds, epsilon=target, delta=self.delta)
        try:
            epsilon = accountant.epsilon([all_rounds(noise)], delta=self.delta)
        except UnaccountableError as error:
            raise ConfigError(
                f"privacy.noise_multiplier={noise} over {paid} rounds: {error} Raise it."
            ) from error
        return ClientLevelPlan(
            privacy=self,
            noise_multiplier=noise,
            sample_rate=sample_rate,
            expected_cohort=expected_cohort,
            planned_epsilon=epsilon,
        )


@dataclass(frozen=True, kw_only=True)
class ClientLevelPlan:
    """What every round of a run does: the mechanism, and the event it is charged as.

    Attributes:
        privacy: What was asked for.
        noise_multiplier: z, of update and bit together; 0 is for tests, and promises nothing.
        sample_rate: Probability of each client to be asked by secret coins; None for seeded ones.
        expected_cohort: What noisy sums are divided by, > 0.
        planned_epsilon: What the planned rounds cost.
    """

    privacy: ClientLevel
    noise_multiplier: float
    sample_rate: float | None
    expected_cohort: float
    planned_epsilon: float = math.inf

    def __post_init__(self) -> None:
        if self.privacy.target_quantile is None or not self.noise_multiplier:
            return
        if not 2 * self.bit_noise > self.noise_multiplier:
            raise ConfigError(
                f"privacy.bit_noise={self.bit_noise:g} must exceed half of the noise multiplier "
                f"{self.noise_multiplier:g}: the bits alone would cost more than the round may. "
                "Raise it (null is a twentieth of the expected cohort of "
                f"{self.expected_cohort:g}), enlarge the cohort, or fix the bound with "
                "privacy.target_quantile=null."
            )

    @property
    def bit_noise(self) -> float:
        """Standard deviation of the noise on the sum of the bits (sigma_b)."""
        given = self.privacy.bit_noise
        return self.expected_cohort / 20 if given is None else given

    @property
    def update_noise_multiplier(self) -> float:
        """Noise on the sum of updates over C: raised so that it and the bits cost what z costs.

        ``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)`` (Andrew et al. 2021, arXiv:1905.03871). A
        client moves the sum of ``bit - 1/2`` by at most 1/2, hence the 2.
        """
        if self.privacy.target_quantile is None or not self.noise_multiplier:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2)

    @property
    def event(self) -> GaussianEvent | None:
        """What one round costs each client (under secret coins), or each that was asked; or None.

        None without noise, which no accountant can put a price on.
        """
        if not self.noise_multiplier:
            return None
        return GaussianEvent(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate or 1.0
        )

    def noisy_mean(
        self,
        deltas: Iterable[Params],
        *,
        like: Params,
        max_norm: float,
        randomness: PrivacyRandomness,
    ) -> Params:
        """Return the round's change of the model: the noisy sum over the expected cohort.

        Noise of standard deviation ``update_noise_multiplier * max_norm`` is added to the sum;
        the division, by a constant, and the rounding to the model's types come after it. No
        update at all gives noise alone.

        Args:
            deltas: What came back, in client order; nothing is assumed of it but names and shapes.
            like: The model.
            max_norm: The round's C.
            randomness: Where the noise comes from.
        """
        total = clipped_sum(deltas, like=like, max_norm=max_norm)
        std = self.update_noise_multiplier * max_norm
        noisy = with_noise(total, std=std, randomness=randomness)
        return rounded_like(noisy, like, divisor=self.expected_cohort)

    def next_max_norm(
        self, max_norm: float, clipped: Iterable[float | None], *, randomness: PrivacyRandomness
    ) -> float:
        """Return the bound of the next round (Andrew et al. 2021, arXiv:1905.03871, Algorithm 1).

        ``C exp(-eta_C (b - gamma))``, where b is the noisy share of updates within C. Like the
        mean, it is over the expected cohort; who brought no bit counts as half within.

        Args:
            max_norm: The round's C.
            clipped: Each client's figure `CLIPPED`, or None if it gave none; whatever it is, it
                counts as 0 or 1.
            randomness: Where the noise comes from.
        """
        gamma = self.privacy.target_quantile
        if gamma is None:
            return max_norm
        terms = [-0.5 if bit else 0.5 for bit in clipped if bit is not None]
        std = self.bit_noise if self.noise_multiplier else 0.0
        noise = float(randomness.normal(torch.zeros(1, dtype=torch.float64), std=std))
        share = (sum(terms) + noise) / self.expected_cohort + 0.5
        return max_norm * math.exp(-self.privacy.bound_learning_rate * (share - gamma))
