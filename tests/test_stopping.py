"""When a run ends early: a target, a plateau, the clock; and what a NaN means for each."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.stopping import Progress, Stopping, describe_stop
from fl_app.types import ConfigError, StopReason


def stops_after(stopping: Stopping, values: list[float], *, metric: str) -> int | None:
    """Return the round, from 1, after which a run with these values would stop."""
    progress = Progress()
    for round, value in enumerate(values, start=1):
        progress, reason = stopping.after_round(progress, {metric: value}, elapsed_s=0.0)
        if reason:
            return round
    return None


@pytest.mark.parametrize(
    ("metric", "values", "target", "round"),
    [
        ("accuracy", [0.5, 0.89, 0.9, 0.95], 0.9, 3),
        ("accuracy", [0.5, 0.6], 0.9, None),
        ("loss", [1.0, 0.31, 0.3, 0.1], 0.3, 3),
        ("loss", [1.0, math.nan, 0.2], 0.3, 3),
        ("loss", [1.0, 0.4], 0.3, None),
    ],
)
def test_the_target_ends_the_run_in_the_round_that_reaches_it(
    metric, values, target, round
) -> None:
    assert stops_after(Stopping(metric=metric, target=target), values, metric=metric) == round


@pytest.mark.parametrize(
    ("metric", "values", "round"),
    [
        ("accuracy", [0.5, 0.6, 0.6, 0.59, 0.7], 4),
        ("accuracy", [0.5, 0.4, 0.6, 0.5, 0.5], 5),
        ("loss", [1.0, 0.9, 0.9, 0.95, 0.1], 4),
        ("loss", [1.0, 0.9, 0.95, 0.8, 0.7], None),
    ],
)
def test_a_plateau_is_patience_rounds_without_an_improvement(metric, values, round) -> None:
    assert stops_after(Stopping(metric=metric, patience=2), values, metric=metric) == round


def test_an_improvement_must_exceed_min_delta() -> None:
    stopping = Stopping(patience=1, min_delta=0.25)
    assert stops_after(stopping, [0.25, 0.5], metric="accuracy") == 2
    assert stops_after(stopping, [0.25, 0.75], metric="accuracy") is None


def test_small_steps_add_up_against_the_best_not_the_last_value() -> None:
    stopping = Stopping(patience=3, min_delta=0.1)
    assert stops_after(stopping, [0.5, 0.55, 0.58, 0.62], metric="accuracy") is None


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_nan_is_never_the_best(metric) -> None:
    stopping = Stopping(metric=metric, patience=2)
    values = [math.nan, 0.5, math.nan, 0.4 if metric == "loss" else 0.6]
    assert stops_after(stopping, values, metric=metric) is None
    assert stops_after(stopping, [0.5, math.nan, math.nan], metric=metric) == 3
    assert stops_after(stopping, [math.nan, math.nan], metric=metric) == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 5))
def test_patience_counts_the_rounds_since_the_best(values, patience) -> None:
    round = stops_after(Stopping(patience=patience), values, metric="accuracy")
    expected = next(
        (r for r in range(1, len(values) + 1) if r - 1 - first_best(values[:r]) >= patience), None
    )
    assert round == expected


def first_best(values: list[float]) -> int:
    return values.index(max(values))


@given(st.lists(st.floats(allow_nan=True), min_size=2, max_size=20), st.integers(1, 19))
def test_progress_from_a_checkpoint_goes_on_as_if_never_interrupted(values, cut) -> None:
    stopping = Stopping(patience=3)

    def play(progress: Progress, values: list[float]) -> Progress:
        for value in values:
            progress, _ = stopping.after_round(progress, {"accuracy": value}, elapsed_s=0.0)
        return progress

    assert play(play(Progress(), values[:cut]), values[cut:]) == play(Progress(), values)


def test_rounds_without_a_measurement_change_nothing() -> None:
    progress = Progress(best=0.5, stale_rounds=1)
    stopping = Stopping(patience=2, target=0.9)
    assert stopping.after_round(progress, {}, elapsed_s=0.0) == (progress, None)


def test_the_clock_ends_a_run_also_in_a_round_without_a_measurement() -> None:
    stopping = Stopping(max_seconds=10.0)
    assert stopping.after_round(Progress(), {}, elapsed_s=9.9)[1] is None
    assert stopping.after_round(Progress(), {}, elapsed_s=10.0)[1] == StopReason.TIME


def test_the_target_is_named_before_the_clock() -> None:
    stopping = Stopping(target=0.5, max_seconds=1.0)
    _, reason = stopping.after_round(Progress(), {"accuracy": 0.6}, elapsed_s=2.0)
    assert reason == StopReason.TARGET


def test_without_a_rule_no_metric_is_needed_and_nothing_stops() -> None:
    progress = Progress()
    assert Stopping().after_round(progress, {"mse": 1.0}, elapsed_s=1e9) == (progress, None)


@pytest.mark.parametrize("rule", [{"target": 0.5}, {"patience": 1}])
def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(rule) -> None:
    stopping = Stopping(metric="auc", **rule)
    with pytest.raises(ConfigError, match="stopping.metric=auc .* accuracy, loss"):
        stopping.after_round(Progress(), {"loss": 1.0, "accuracy": 0.1}, elapsed_s=0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patience", 0),
        ("patience", -1),
        ("min_delta", -0.1),
        ("min_delta", math.nan),
        ("max_seconds", 0.0),
        ("max_seconds", math.nan),
        ("target", math.nan),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        Stopping(**{key: value})
    assert f"stopping.{key}={value} " in str(caught.value)


@pytest.mark.parametrize("reason", StopReason)
def test_every_reason_has_words_of_its_own(reason) -> None:
    line = describe_stop(reason, 7)
    assert "round 7" in line
    assert [describe_stop(other, 7) for other in StopReason].count(line) == 1
