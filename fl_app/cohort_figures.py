"""What a cohort's replies come to, in the figures that clients tell of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fl_app.types import ClientId, ClientUpdate


def mean_metrics(updates: Iterable[ClientUpdate]) -> dict[str, float]:
    """Return means over the cohort, weighted by the records each figure was measured on."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}

    def add(prefix: str, metrics: Mapping[str, float], weight: int) -> None:
        for name, value in metrics.items():
            key = f"{prefix}_{name}"
            sums[key] = sums.get(key, 0.0) + weight * value
            weights[key] = weights.get(key, 0) + weight

    for update in updates:
        add("train", update.metrics, update.num_examples)
        if update.evaluation is not None:
            add("test", update.evaluation.metrics, update.evaluation.num_examples)
    return {key: sums[key] / weights[key] for key in sums}


def accuracies(updates: Iterable[ClientUpdate]) -> dict[ClientId, float]:
    """Return client -> accuracy of the received model on its own held-out part, if it tells."""
    return {
        update.client: update.evaluation.metrics["accuracy"]
        for update in updates
        if update.evaluation is not None and "accuracy" in update.evaluation.metrics
    }
