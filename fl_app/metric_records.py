"""Figures <-> Flower's MetricRecord, as `fl_app.codec` puts them into messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

from flwr.app import MetricRecord

from fl_app.types import Evaluation

TEST_NUM_EXAMPLES = "test-num-examples"
_TEST = "test-"
_MOST_METRICS, _LONGEST_NAME = 64, 64


def figures_of(metrics: MetricRecord, prefix: str) -> Mapping[str, float]:
    """Return the figures with a prefix; what is no plain finite figure is left out.

    They go into means, and into files that must stay readable, whatever a client sends.
    """
    named = {
        key.removeprefix(prefix).replace("-", "_"): float(value)
        for key, value in islice(metrics.items(), _MOST_METRICS)
        if key.startswith(prefix) and isinstance(value, (int, float))
    }
    return {
        name: value
        for name, value in named.items()
        if math.isfinite(value) and len(name) <= _LONGEST_NAME and name.isidentifier()
    }


def evaluation_figures(evaluation: Evaluation | None) -> dict[str, int | float]:
    """Return what a MetricRecord says of an evaluation: nothing if there is none."""
    if evaluation is None:
        return {}
    figures: dict[str, int | float] = {TEST_NUM_EXAMPLES: evaluation.num_examples}
    return figures | {
        f"{_TEST}{name.replace('_', '-')}": value for name, value in evaluation.metrics.items()
    }


def decode_evaluation_in(metrics: MetricRecord) -> Evaluation | None:
    """Return the evaluation in a MetricRecord, or None if there is none."""
    count = metrics.get(TEST_NUM_EXAMPLES)
    if not isinstance(count, int) or count <= 0:
        return None
    figures = {k: v for k, v in figures_of(metrics, _TEST).items() if k != "num_examples"}
    return Evaluation(num_examples=count, metrics=figures)


def as_sent(evaluation: Evaluation) -> Evaluation | None:
    """Return an evaluation as it would come out of a message; None if that would be malformed.

    Raises:
        TypeError: A figure is no number.
    """
    return decode_evaluation_in(MetricRecord(dict(evaluation_figures(evaluation))))
