"""How the updates of a cohort become one change of the global model.

A rule is a frozen dataclass with ``__call__(updates) -> Params``, named by ``_target_`` under
``strategy.aggregation``. Rules are pure; the updates they get are validated and in client order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from fl_app.params import StackedParams, StackedRow, describe_misfit, l2_norm
from fl_app.types import ClientUpdate, ConfigError, FlAppError, Params


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


def min_updates(rule: Aggregation) -> int:
    """Return how many updates a rule says it needs by a ``min_updates`` of its own; else 1.

    It is known before the run, so that a cohort that can never be enough is refused then.
    """
    return int(getattr(rule, "min_updates", 1))


def is_uniform_mean(rule: Aggregation) -> bool:
    """Return whether a rule says by an ``is_uniform_mean`` of its own that it is just that.

    Then one update moves its result by no more than its share, whatever the others are.
    """
    return bool(getattr(rule, "is_uniform_mean", False))


class RunningMean:
    """The mean of updates that come in parts, of which no more is held than their sum.

    Sums are kept in double precision, so a mean that came in one part is that part's to the bit.

    Args:
        rule: The mean; of a part, it gives that part's.
        weight_of: What an update counts in it, > 0.
    """

    def __init__(self, rule: Aggregation, weight_of: Callable[[ClientUpdate], float]) -> None:
        self.rule = rule
        self._weight_of = weight_of
        self._weight = 0.0
        self._sum: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}

    def add(self, updates: Sequence[ClientUpdate]) -> None:
        """Add a part: at least one update, in canonical client order."""
        weight = float(sum(map(self._weight_of, updates)))
        for name, mean in self.rule(updates).items():
            if name not in self._sum:
                self._sum[name] = torch.zeros_like(mean, dtype=torch.float64)
                self._types[name] = mean.dtype
            self._sum[name].add_(mean, alpha=weight)
        self._weight += weight

    def change(self) -> Params:
        """Return the mean of all that was added, which must be something."""
        return {name: (t / self._weight).to(self._types[name]) for name, t in self._sum.items()}


def running_mean(rule: Aggregation) -> RunningMean | None:
    """Return what takes updates in parts, if a rule makes one by a ``running`` of its own.

    None for all other rules: they are given all updates of a round at once.
    """
    make = getattr(rule, "running", None)
    running = make() if callable(make) else None
    return running if isinstance(running, RunningMean) else None


class BrokenRuleError(FlAppError):
    """An aggregation rule raised, or returned something that is no change of the model."""


def combine(rule: Aggregation, updates: Sequence[ClientUpdate], model: Params) -> Params:
    """Return what a rule makes of a cohort's updates, once it is known to fit the model.

    Args:
        rule: Ours, or anybody's.
        updates: As `Aggregation` promises them.
        model: The global parameters that the change is for.

    Raises:
        TooFewUpdatesError: The rule needs more updates.
        BrokenRuleError: It raised something else, or the change has other names or shapes than
            the model, or NaN or infinite values: one such step would end the model for good.
    """
    try:
        change = rule(updates)
    except FlAppError:
        raise
    except Exception as error:
        raise BrokenRuleError(
            f"strategy.aggregation={rule!r:.80} raised {type(error).__name__} "
            f"({' '.join(str(error).split())[:200]}) on {len(updates)} updates: mend the rule, or "
            "choose another; HYDRA_FULL_ERROR=1 shows where it was raised."
        ) from error
    return fitting(rule, change, model)


def fitting(rule: Aggregation, change: Params, model: Params) -> Params:
    """Return the change that a rule has made, in the model's order and types.

    Raises:
        BrokenRuleError: It is none; see `combine`.
    """
    name = f"strategy.aggregation={rule!r:.80}"
    way_out = "it must return a finite change for every name of a delta, in its shape: mend it."
    tensors = isinstance(change, Mapping) and all(isinstance(t, Tensor) for t in change.values())
    if not tensors:
        raise BrokenRuleError(f"{name} returned a {type(change).__name__}: {way_out}")
    misfit = describe_misfit(change, model)
    if misfit is None and not math.isfinite(l2_norm(change)):
        misfit = "it holds NaN or infinite values"
    if misfit:
        raise BrokenRuleError(f"{name} returned no change of the model ({misfit}): {way_out}")
    return {name: change[name].to(tensor.dtype) for name, tensor in model.items()}


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

    @property
    def is_uniform_mean(self) -> bool:
        """Whether all updates count alike."""
        return self.weighting == Weighting.UNIFORM

    def running(self) -> RunningMean | None:
        """Return what takes updates in parts; None for a subclass that makes something else."""
        if type(self).__call__ is not WeightedMean.__call__:
            return None
        return RunningMean(self, self._weight_of)

    def _weight_of(self, update: ClientUpdate) -> int:
        return update.num_examples if self.weighting == Weighting.EXAMPLES else 1

    def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
        """Return the weighted mean of the deltas."""
        weights = [self._weight_of(update) for update in updates]
        total = sum(weights)
        stacked = _stacked_sum(updates, [weight / total for weight in weights])
        if stacked is not None:
            return stacked
        names = list(updates[0].delta)
        mean = [torch.zeros_like(updates[0].delta[name]) for name in names]
        for update, weight in zip(updates, weights, strict=True):
            deltas = [update.delta[name] for name in names]
            torch._foreach_add_(mean, deltas, alpha=weight / total)
        return dict(zip(names, mean, strict=True))


def _stacked_sum(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Params | None:
    """Return the weighted sum of deltas that are rows of stacks; None if some are not."""
    by_stack: dict[int, tuple[StackedParams, list[int], list[float]]] = {}
    for update, weight in zip(updates, weights, strict=True):
        row = update.delta
        if not isinstance(row, StackedRow):
            return None
        _, rows, factors = by_stack.setdefault(id(row.stack), (row.stack, [], []))
        rows.append(row.number)
        factors.append(weight)
    total: dict[str, Tensor] = {}
    for stack, rows, factors in by_stack.values():
        exact = torch.tensor(factors, dtype=torch.float64)
        order = list(range(len(stack)))
        if sorted(rows) == order:  # all of them: a gather less
            exact, rows = exact[torch.tensor(rows).argsort()], order
        for name, tensor in stack.tensors.items():
            # Not by a weight of zero: a row that was rejected may hold NaN.
            chosen = tensor if rows == order else tensor[rows]
            summed = (exact.to(tensor) @ chosen.reshape(len(rows), -1)).view(tensor.shape[1:])
            total[name] = total[name].add_(summed) if name in total else summed
    return total
