"""Ranges that several kinds of privacy share."""

from __future__ import annotations

import math

from fl_app.types import ConfigError

LEAST_BOUND = 1e-12
"""Least norm to which single precision is clipped: far from its denormal numbers, of which a bound
would be a few units in the last place, and what rounding adds to a norm no small part of it."""


def check_noise_and_target(
    noise_multiplier: float | None, target_epsilon: float | None, planned_rounds: int | None
) -> None:
    """Refuse noise or target out of range, both of them, or neither.

    Raises:
        ConfigError: As said.
    """
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ConfigError(
            f"privacy.noise_multiplier={noise_multiplier} and privacy.target_epsilon="
            f"{target_epsilon}: give one of them and set the other to null."
        )
    for key, value in (("noise_multiplier", noise_multiplier), ("target_epsilon", target_epsilon)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(
                f"privacy.{key}={value} must be > 0 and finite, or null; for a run without noise "
                "choose privacy=none."
            )
    if planned_rounds is not None and planned_rounds < 1:
        raise ConfigError(f"privacy.planned_rounds={planned_rounds} must be >= 1, or null.")


def check_bound(max_norm: float) -> None:
    """Refuse a bound on updates out of range.

    Raises:
        ConfigError: As said.
    """
    if not LEAST_BOUND <= max_norm < math.inf:
        raise ConfigError(
            f"privacy.max_norm={max_norm} must be finite and >= {LEAST_BOUND:g}: noise is in "
            "proportion to it, and below that rounding makes updates longer than it."
        )


def check_delta(delta: float) -> None:
    """Refuse a delta out of range.

    Raises:
        ConfigError: As said.
    """
    if not 0 < delta < 1:
        raise ConfigError(
            f"privacy.delta={delta} must lie in (0, 1), well below one over the number of units "
            "(records or clients) that it is to hide."
        )


def check_budget(epsilon_budget: float | None) -> None:
    """Refuse a budget out of range.

    Raises:
        ConfigError: As said.
    """
    if epsilon_budget is not None and not 0 < epsilon_budget < math.inf:
        raise ConfigError(
            f"privacy.epsilon_budget={epsilon_budget} must be > 0 and finite, or null."
        )


def lower_of(epsilon_budget: float | None, target_epsilon: float | None) -> float | None:
    """Return the limit that a budget and a target come to; None if neither is given."""
    limits = [epsilon for epsilon in (epsilon_budget, target_epsilon) if epsilon is not None]
    return min(limits, default=None)
