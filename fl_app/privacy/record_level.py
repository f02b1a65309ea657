"""Record-level differential privacy: DP-SGD in the client (``privacy=record``).

What is hidden is whether any one record is among a client's training records: neighbours differ
by one record that is added or removed. The number of records, through sample rate and number of
steps, is taken as known, as in Abadi et al. 2016 (arXiv:1607.00133).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fl_app.privacy.accounting import GaussianEvent, accountant_named, solve_noise
from fl_app.privacy.base import RecordPlan
from fl_app.privacy.checks import check_budget, check_delta, check_noise_and_target, lower_of
from fl_app.privacy.dp_sgd import DpSgd, GradientMode
from fl_app.privacy.randomness import PoissonSampling, PrivacyRandomness, Source, check_source
from fl_app.privacy.release import check_public
from fl_app.types import ConfigError, Params, PrivacyUnit


@dataclass(frozen=True, kw_only=True)
class RecordLevel:
    """DP-SGD with Poisson batches, charged to each client's own ledger.

    A round of a client with n records takes ``epochs * ceil(n / batch_size)`` steps, on batches in
    which each record lies with probability ``batch_size / n``.

    The noise of a run never changes: with a target it is solved once, from the planned number of
    rounds. Solving it anew whenever participation differs from the plan would let what was
    released choose what is released next; composing that needs a privacy filter at each order, and
    would still leave the owner with noise that depends on others. A client that is asked more often
    than planned declines instead, and one that is asked less often has spent less.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm`` (sigma), > 0; None
            if ``target_epsilon`` is given.
        target_epsilon: Epsilon at which a client has taken part ``planned_rounds`` times, and
            beyond which it declines; the noise is solved from it for each client by its own
            sample rate. None if the noise is given.
        planned_rounds: Rounds in which a client is planned to take part; None for those of the
            client that the run's schedule of cohorts asks most often.
        epsilon_budget: Epsilon beyond which a client declines, > 0; None for ``target_epsilon``,
            and for no limit if there is none. A policy of the data owner can only lower it.
        delta: In (0, 1/n) for every client's n.
        max_grad_norm: L2 bound C on each record's gradient, > 0.
        accountant: "rdp", "pld" or "prv".
        gradients: "hooks", "functorch" or "ghost"; see `GradientMode`.
        max_physical_batch: Records whose gradients are held in memory at once; None for a batch.
        public: What clients may tell as it is, besides the private update: of
            `fl_app.privacy.release.DECLARABLE`.
        fix: Whether layers that cannot be private are replaced by ones that can (BatchNorm by
            GroupNorm, LSTM by Opacus' own); what was replaced is logged.
        ledger: File that accounts for the clients of a simulation; None for one in the run's
            folder. One file for several runs accounts for them together. A deployed client's
            ledger is where its owner's policy says.
        randomness: "secret"; or "reproducible_for_tests", which promises no privacy, and which
            deployed clients refuse.
    """

    noise_multiplier: float | None = None
    target_epsilon: float | None = 8.0
    planned_rounds: int | None = None
    epsilon_budget: float | None = None
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    accountant: str = "rdp"
    gradients: str = GradientMode.HOOKS
    max_physical_batch: int | None = None
    public: Sequence[str] = ()
    fix: bool = False
    ledger: str | None = None
    randomness: str = Source.SECRET

    def __post_init__(self) -> None:
        check_noise_and_target(self.noise_multiplier, self.target_epsilon, self.planned_rounds)
        check_budget(self.epsilon_budget)
        check_delta(self.delta)
        check_source("privacy.randomness", self.randomness)
        accountant_named(self.accountant)
        check_public(self.public)
        self._mechanism(1.0, 1)  # checks the rest

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden."""
        return PrivacyUnit.RECORD

    @property
    def limit(self) -> float | None:
        """Epsilon beyond which a client declines, as far as the configuration says; or None."""
        return lower_of(self.epsilon_budget, self.target_epsilon)

    def event(self, num_examples: int, *, batch_size: int, epochs: int) -> GaussianEvent:
        """Return what one round costs a client with that many records: all its steps.

        Raises:
            ConfigError: The batch is larger than the client's data, delta is not below 1/n, or no
                noise meets the target.
        """
        if batch_size > num_examples:
            raise ConfigError(
                f"client.batch_size={batch_size} exceeds a client's {num_examples} records: a "
                "sample rate cannot exceed 1. Lower it, or give clients more records."
            )
        if self.delta * num_examples >= 1:
            raise ConfigError(
                f"privacy.delta={self.delta:g} is not below 1/n for a client with {num_examples} "
                "records: publishing one of them at random would pass for private. Lower it."
            )
        rate, steps = batch_size / num_examples, epochs * math.ceil(num_examples / batch_size)
        noise = self.noise_multiplier
        if self.target_epsilon is not None:
            total = steps * (self.planned_rounds or 1)
            noise = _solved(self.accountant, rate, total, self.target_epsilon, self.delta)
        if noise is None:
            raise ConfigError("privacy.noise_multiplier=null needs privacy.target_epsilon.")
        return GaussianEvent(noise_multiplier=noise, sample_rate=rate, count=steps)

    def steps(self, num_examples: int, *, batch_size: int, epochs: int) -> RecordPlan:
        """Return the mechanism that `event` is the cost of. Raises likewise."""
        event = self.event(num_examples, batch_size=batch_size, epochs=epochs)
        return RecordPlan(
            sampling=PoissonSampling(sample_rate=event.sample_rate, steps=event.count),
            mechanism=self._mechanism(event.noise_multiplier, batch_size),
        )

    def protect(
        self, delta: Params, *, max_norm: float | None, randomness: PrivacyRandomness
    ) -> tuple[Params, Mapping[str, float]]:
        """Return the update as it is: it is private already."""
        return delta, {}

    def _mechanism(self, noise_multiplier: float, batch_size: int) -> DpSgd:
        return DpSgd(
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=batch_size,
            gradients=self.gradients,
            max_physical_batch=self.max_physical_batch,
        )


@lru_cache(maxsize=4096)
def _solved(accountant: str, rate: float, steps: int, epsilon: float, delta: float) -> float:
    return solve_noise(
        accountant_named(accountant),
        lambda noise: GaussianEvent(noise_multiplier=noise, sample_rate=rate, count=steps),
        epsilon=epsilon,
        delta=delta,
    )
