"""When a run ends before its last round: a target reached, a plateau, or the clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fl_app.types import ConfigError, StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What stopping remembers between rounds; part of every checkpoint.

    Attributes:
        best: Best value of the metric so far, or None before the first.
        stale_rounds: Evaluated rounds since it last improved.
    """

    best: float | None = None
    stale_rounds: int = 0


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Rules that end a run early; those set to None do not apply.

    Attributes:
        metric: Metric of the global model on the held-out set that ``target`` and ``patience``
            watch. A loss is minimised, everything else maximised.
        target: Value of the metric that ends the run once reached.
        patience: Evaluated rounds without an improvement after which the run ends, >= 1.
        min_delta: What a change must exceed to count as an improvement, >= 0.
        max_seconds: Wall-clock seconds after which no further round is started; time spent before
            a resume counts.
    """

    metric: str = "accuracy"
    target: float | None = None
    patience: int | None = None
    min_delta: float = 0.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"stopping.patience={self.patience} must be >= 1, or null.")
        if not self.min_delta >= 0:
            raise ConfigError(f"stopping.min_delta={self.min_delta} must be >= 0.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"stopping.max_seconds={self.max_seconds} must be > 0, or null.")
        if self.target is not None and math.isnan(self.target):
            raise ConfigError("stopping.target=nan can never be reached: give a number, or null.")

    @property
    def watches(self) -> bool:
        """Whether a rule watches a metric of the held-out set."""
        return self.target is not None or self.patience is not None

    def after_round(
        self, progress: Progress, metrics: Mapping[str, float], *, elapsed_s: float
    ) -> tuple[Progress, StopReason | None]:
        """Return what to remember, and why to stop now, or None to go on.

        Args:
            progress: What the last call returned.
            metrics: The round's ``RoundReport.metrics``; empty if it was not evaluated.
            elapsed_s: Wall-clock seconds since the run began.

        Raises:
            ConfigError: A rule watches a metric that this task does not give.
        """
        reason = None
        if metrics and self.watches:
            progress, reason = self._watch(progress, metrics)
        if reason is None and self.max_seconds is not None and elapsed_s >= self.max_seconds:
            reason = StopReason.TIME
        return progress, reason

    def _watch(
        self, progress: Progress, metrics: Mapping[str, float]
    ) -> tuple[Progress, StopReason | None]:
        if self.metric not in metrics:
            raise ConfigError(
                f"stopping.metric={self.metric} is not measured here: choose one of "
                f"{', '.join(sorted(metrics))}."
            )
        value, sign = metrics[self.metric], -1.0 if self.metric == "loss" else 1.0
        if self.target is not None and sign * value >= sign * self.target:
            return progress, StopReason.TARGET
        threshold = -math.inf if progress.best is None else sign * progress.best + self.min_delta
        if sign * value > threshold:  # never with NaN
            return Progress(best=value), None
        progress = Progress(best=progress.best, stale_rounds=progress.stale_rounds + 1)
        spent = self.patience is not None and progress.stale_rounds >= self.patience
        return progress, StopReason.PLATEAU if spent else None


def describe_stop(reason: StopReason, round: int) -> str:
    """Return one line for the log: why the run ended, and after which round."""
    words = {
        StopReason.ROUNDS: "all rounds are done",
        StopReason.TARGET: "the target metric was reached",
        StopReason.PLATEAU: "the metric no longer improves",
        StopReason.TIME: "the time is up",
        StopReason.BUDGET: "the privacy budget allows no further one",
    }
    return f"Stopped after round {round}: {words[reason]}."
