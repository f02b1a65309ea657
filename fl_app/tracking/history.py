"""What the plots need of a ``rounds.jsonl``: figures by round, clients only as counts."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fl_app.types import ClientId, FailureKind, RoundReport

_MOST_REASONS = 1000
_REASON_CHARACTERS = 200
_NAN = float("nan")


@dataclass(kw_only=True, slots=True)
class RunHistory:
    """A run by round. Lists are parallel to ``rounds``; NaN where a round has no such figure.

    Its size grows with the rounds and with the clients, never with their product.

    Attributes:
        rounds: Round numbers, ascending.
        loss, accuracy: New global model on held-out records.
        train_loss, test_loss: Weighted means over the cohort; the latter of the received model.
        client_accuracy: Mean over the cohort of the received model on each client's own part.
        client_accuracy_low, client_accuracy_high: 10th and 90th percentile over the cohort.
        epsilon: Largest loss of a client so far.
        uplink_bytes, downlink_bytes, uplink_uncompressed_bytes, seconds: Of the round.
        failures: Kind -> how many in each round; every kind is there.
        asked: Client -> in how many rounds it was in the cohort.
        reasons: (kind, reason) -> how often; reasons are cut short.
        last_accuracy: Client -> accuracy in the last round that measured any, ``last_measured``;
            of the final model, and None, once the run has ended.
        not_applied: Rounds that kept the old model.
    """

    rounds: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    client_accuracy: list[float] = field(default_factory=list)
    client_accuracy_low: list[float] = field(default_factory=list)
    client_accuracy_high: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)
    uplink_bytes: list[int] = field(default_factory=list)
    downlink_bytes: list[int] = field(default_factory=list)
    uplink_uncompressed_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: dict[FailureKind, list[int]] = field(
        default_factory=lambda: {kind: [] for kind in FailureKind}
    )
    asked: Counter[ClientId] = field(default_factory=Counter)
    reasons: Counter[tuple[FailureKind, str]] = field(default_factory=Counter)
    last_accuracy: Mapping[ClientId, float] = field(default_factory=dict)
    last_measured: int | None = None
    not_applied: int = 0


def history_of(reports: Iterable[RoundReport]) -> RunHistory:
    """Return the history of ``reports``, which are read once and not kept."""
    history = RunHistory()
    for report in reports:
        _add(history, report)
    return history


def _add(history: RunHistory, report: RoundReport) -> None:
    history.rounds.append(report.round)
    history.loss.append(report.metrics.get("loss", _NAN))
    history.accuracy.append(report.metrics.get("accuracy", _NAN))
    history.train_loss.append(report.client_metrics.get("train_loss", _NAN))
    history.test_loss.append(report.client_metrics.get("test_loss", _NAN))
    history.epsilon.append(_NAN if report.epsilon is None else report.epsilon)
    history.uplink_bytes.append(report.uplink_bytes)
    history.downlink_bytes.append(report.downlink_bytes)
    history.uplink_uncompressed_bytes.append(report.uplink_uncompressed_bytes)
    history.seconds.append(report.seconds)
    history.not_applied += not report.applied
    history.asked.update(report.cohort)

    kinds = Counter(failure.kind for failure in report.failures)
    for kind, counts in history.failures.items():
        counts.append(kinds[kind])
    for failure in report.failures:
        entry = (failure.kind, failure.reason[:_REASON_CHARACTERS])
        if entry not in history.reasons and len(history.reasons) >= _MOST_REASONS:
            entry = (failure.kind, "(other reasons)")
        history.reasons[entry] += 1

    measured = {c: value for c, value in report.client_accuracy.items() if math.isfinite(value)}
    if measured:
        history.last_accuracy, history.last_measured = measured, report.round
    values = sorted(measured.values())
    history.client_accuracy.append(
        statistics.fmean(values) if values else report.client_metrics.get("test_accuracy", _NAN)
    )
    history.client_accuracy_low.append(_percentile(values, 0.1))
    history.client_accuracy_high.append(_percentile(values, 0.9))


def _percentile(ascending: list[float], fraction: float) -> float:
    """Return the percentile by linear interpolation between ranks, or NaN of nothing."""
    if not ascending:
        return _NAN
    rank = fraction * (len(ascending) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (rank - low) * (ascending[high] - ascending[low])
