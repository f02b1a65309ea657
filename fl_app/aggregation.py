"""How the updates of a cohort become one change of the global model.

A rule is a frozen dataclass with ``__call__(updates) -> Params``, named by ``_target_`` under
``strategy.aggregation``. Rules are pure; the updates they get are validated and in client order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch

from fl_app.types import ClientUpdate, ConfigError, Params


class Aggregation(Protocol):
    """Combines the updates of one round into one change."""

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the change of the global model; names and shapes of each ``delta``.

        Args:
            updates: At least one, in canonical client order (float addition is not associative).

        Raises:
            TooFewUpdatesError: The rule needs more; the round then keeps the old model.
        """
        ...


class Weighting(StrEnum):
    """What a client's share in the mean is proportional to."""

    EXAMPLES = "examples"
    UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class WeightedMean:
    """Mean of the updates (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

    ``sum_k n_k delta_k / sum_k n_k`` for weights by examples, ``sum_k delta_k / K`` for uniform
    ones, over the K clients that replied.
    """

    weighting: str = Weighting.EXAMPLES

    def __post_init__(self) -> None:
        if self.weighting not in list(Weighting):
            raise ConfigError(
                f"strategy.aggregation.weighting={self.weighting} is not known: choose "
                f"{' or '.join(Weighting)}."
            )

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the weighted mean of the deltas."""
        weights = [u.num_examples if self.weighting == Weighting.EXAMPLES else 1 for u in updates]
        total = sum(weights)
        names = list(updates[0].delta)
        mean = [torch.zeros_like(updates[0].delta[name]) for name in names]
        for update, weight in zip(updates, weights, strict=True):
            deltas = [update.delta[name] for name in names]
            torch._foreach_add_(mean, deltas, alpha=weight / total)
        return dict(zip(names, mean, strict=True))
