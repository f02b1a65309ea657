"""What an update must be before it may touch the global model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_app.params import describe_misfit, is_shorter, l2_norm
from fl_app.types import ClientUpdate, ConfigError, Params


@dataclass(frozen=True, kw_only=True)
class UpdateChecks:
    """Bounds that every update is held to; one that breaks any is rejected, and only itself.

    Attributes:
        max_norm: Largest L2 norm of a delta, > 0. Training that works moves parameters by a few
            units at most; the default only stops an update that would wreck the model at once.
        max_num_examples: Largest number of records a client may claim, >= 1: a claim is its
            weight in the mean, and nobody can verify it.
    """

    max_norm: float = 1e4
    max_num_examples: int = 10_000_000

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ConfigError(f"checks.max_norm={self.max_norm} must be a number > 0.")
        if self.max_num_examples < 1:
            raise ConfigError(f"checks.max_num_examples={self.max_num_examples} must be >= 1.")

    def objection(self, update: ClientUpdate, model: Params) -> str | None:
        """Return what is wrong with an update, in one line, or None.

        Checked in this order: the count of examples, names, shapes and types, finiteness, norm.

        Args:
            update: What a client sent.
            model: The global parameters it was to train.
        """
        if not 0 < update.num_examples <= self.max_num_examples:
            return (
                f"num_examples={update.num_examples} is outside "
                f"[1, checks.max_num_examples={self.max_num_examples}]"
            )
        if update.evaluation and update.evaluation.num_examples > self.max_num_examples:
            return (
                f"test-num-examples={update.evaluation.num_examples} is above "
                f"checks.max_num_examples={self.max_num_examples}"
            )
        misfit = describe_misfit(update.delta, model, same_types=True)
        if misfit:
            return f"update does not fit the model: {misfit}"
        if is_shorter(update.delta, self.max_norm):
            return None
        norm = l2_norm(update.delta)
        if not math.isfinite(norm):
            return "update holds NaN or infinite values"
        if norm > self.max_norm:
            return f"update has norm {norm:.4g}, above checks.max_norm={self.max_norm:g}"
        return None
