"""The plots of a report: a run round by round, and client by client."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fl_app.tracking.drawing import BLUE, GREEN, INK, ORANGE, PURPLE, RED, Chart, draw
from fl_app.tracking.history import RunHistory
from fl_app.tracking.sections import human_bytes, human_number, human_seconds, printable
from fl_app.types import ClientId, FailureKind, client_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MOST_BARS = 60
"""Up to this many clients are drawn as a bar each, more as a histogram."""

_MOST_STEPS = 100

_KIND_COLORS = {
    FailureKind.OFFLINE: BLUE,
    FailureKind.TIMEOUT: ORANGE,
    FailureKind.ERROR: RED,
    FailureKind.REJECTED: PURPLE,
    FailureKind.REFUSED: GREEN,
}


def charts_of(history: RunHistory) -> Iterator[Chart]:
    """Yield the plots for which ``history`` has figures, in reading order.

    The same history gives the same bytes. Names of clients are shown as text, never as markup.
    """
    if not history.rounds:
        return
    for build in (_accuracy, _loss, _clients, _epsilon, _bytes, _failures, _seconds, _asked):
        chart = build(history)
        if chart is not None:
            yield chart


def _accuracy(history: RunHistory) -> Chart | None:
    before = [number - 1 for number in history.rounds]
    if not _any_finite(history.accuracy) and not _any_finite(history.client_accuracy):
        return None

    def paint(axes: Axes) -> None:
        _line(axes, history.rounds, history.accuracy, BLUE, "global model, held-out records")
        _line(axes, before, history.client_accuracy, ORANGE, "mean of the clients' own parts")
        if _any_finite(history.client_accuracy_low):
            low, high = history.client_accuracy_low, history.client_accuracy_high
            axes.fill_between(before, low, high, color=ORANGE, alpha=0.15, linewidth=0)
        _finish(axes, "rounds trained")

    measured = history.accuracy if _any_finite(history.accuracy) else history.client_accuracy
    caption = (
        "Accuracy of the global model on held-out records, and the mean over each round's cohort "
        "on the clients' own held-out parts (band: 10th to 90th percentile). A client measures "
        "the model it receives, so its curve starts one round earlier. "
        f"Last: {human_number(_last(measured))}."
    )
    return draw("Accuracy", caption, paint)


def _loss(history: RunHistory) -> Chart | None:
    series = (history.loss, history.train_loss, history.test_loss)
    if not any(_any_finite(values) for values in series):
        return None

    def paint(axes: Axes) -> None:
        before = [number - 1 for number in history.rounds]
        _line(axes, history.rounds, history.loss, BLUE, "global model, held-out records")
        _line(axes, before, history.test_loss, ORANGE, "mean of the clients' own parts")
        _line(axes, history.rounds, history.train_loss, GREEN, "local training")
        _finish(axes, "rounds trained")

    last = ", ".join(
        f"{name} {human_number(value)}"
        for name, values in zip(("global", "local training", "clients"), series, strict=True)
        if (value := _last(values)) is not None
    )
    caption = (
        "Loss of the global model on held-out records, of the received model on the clients' own "
        f"parts, and during local training. Last: {last}."
    )
    return draw("Loss", caption, paint)


def _clients(history: RunHistory) -> Chart | None:
    if not history.last_accuracy:
        return None
    values = history.last_accuracy

    def paint(axes: Axes) -> None:
        if len(values) <= MOST_BARS:
            _bars(axes, values, ORANGE, "accuracy")
        else:
            axes.hist(list(values.values()), bins=30, range=(0, 1), color=ORANGE)
            _finish(axes, "accuracy on the client's own held-out part", label="clients")
        if len(values) <= MOST_BARS:
            axes.set_ylim(0, 1)

    shape = "a bar each" if len(values) <= MOST_BARS else "as a histogram"
    received = history.last_measured
    model = "the final model" if received is None else f"the model received in round {received}"
    caption = (
        f"Accuracy of {model} on the own held-out part of {len(values)} clients, {shape}. "
        f"Worst {human_number(min(values.values()))}, best {human_number(max(values.values()))}."
    )
    return draw("Accuracy by client", caption, paint)


def _epsilon(history: RunHistory) -> Chart | None:
    if not _any_finite(history.epsilon):
        return None

    def paint(axes: Axes) -> None:
        _line(axes, history.rounds, history.epsilon, PURPLE, "ε")
        axes.set_ylim(bottom=0)
        _finish(axes, "round")

    caption = (
        "Largest privacy loss ε any client has spent, composed over all rounds so far. "
        f"Last: {human_number(_last(history.epsilon))}."
    )
    return draw("Privacy loss", caption, paint)


def _bytes(history: RunHistory) -> Chart | None:
    up, down = history.uplink_bytes, history.downlink_bytes
    full = history.uplink_uncompressed_bytes
    if not any(up) and not any(down):
        return None

    def paint(axes: Axes) -> None:
        _line(axes, history.rounds, up, BLUE, "clients to server")
        _line(axes, history.rounds, down, GREEN, "server to clients", dashes=(4, 2))
        if any(full) and full != up:
            _line(axes, history.rounds, full, ORANGE, "to server, uncompressed", dashes=(1, 2))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: human_bytes(value))
        _finish(axes, "round")

    caption = (
        f"Model bytes in each round. In total {human_bytes(sum(up))} to the server and "
        f"{human_bytes(sum(down))} to the clients."
    )
    return draw("Communication", caption, paint)


def _failures(history: RunHistory) -> Chart | None:
    totals = {kind: sum(counts) for kind, counts in history.failures.items()}
    seen = [kind for kind in FailureKind if totals[kind]]
    if not seen:
        return None
    width = math.ceil(len(history.rounds) / _MOST_STEPS)

    def paint(axes: Axes) -> None:
        starts = history.rounds[::width]
        edges = [start - 0.5 for start in (*starts, history.rounds[-1] + 1)]
        base = [0.0] * len(starts)
        for kind in seen:
            means = [statistics.fmean(part) for part in _parts(history.failures[kind], width)]
            top = [low + mean for low, mean in zip(base, means, strict=True)]
            color = _KIND_COLORS[kind]
            axes.stairs(top, edges, baseline=base, fill=True, color=color, label=kind.value)
            base = top
        axes.set_ylim(bottom=0)
        _count_in_whole_numbers(axes.yaxis)
        _finish(axes, "round")

    counts = ", ".join(f"{kind.value} {totals[kind]}" for kind in seen)
    each = "in each round" if width == 1 else f"a round, as means over {width} rounds"
    caption = f"Clients that were asked and brought nothing {each}, by kind. In total: {counts}."
    return draw("Failures", caption, paint)


def _seconds(history: RunHistory) -> Chart | None:
    finite = sorted(value for value in history.seconds if math.isfinite(value))
    if not finite:
        return None
    median = statistics.median(finite)

    def paint(axes: Axes) -> None:
        _line(axes, history.rounds, history.seconds, GREEN, "seconds")
        axes.axhline(median, color=INK, linewidth=0.8, dashes=(3, 3))
        axes.set_ylim(bottom=0)
        _finish(axes, "round", label="seconds")

    caption = (
        f"Wall-clock time of each round; dashed: the median, {human_seconds(median)}. "
        f"Slowest: {human_seconds(finite[-1])}."
    )
    return draw("Time", caption, paint)


def _asked(history: RunHistory) -> Chart | None:
    if not history.asked:
        return None
    counts = history.asked

    def paint(axes: Axes) -> None:
        if len(counts) <= MOST_BARS:
            _bars(axes, counts, BLUE, "rounds")
        else:
            low, high = min(counts.values()), max(counts.values())
            step = max(1, math.ceil((high - low + 1) / 40))
            edges = [value - 0.5 for value in range(low, high + step + 1, step)]
            axes.hist(list(counts.values()), bins=edges, color=BLUE)
            _finish(axes, "rounds the client was asked", label="clients")
        _count_in_whole_numbers(axes.yaxis)

    caption = (
        f"How often each of the {len(counts)} clients that took part was in a round's cohort: "
        f"{min(counts.values())} to {max(counts.values())} times."
    )
    return draw("Participation", caption, paint)


def _line(
    axes: Axes,
    rounds: Sequence[int],
    values: Sequence[float],
    color: str,
    label: str,
    dashes: tuple[int, int] | None = None,
) -> None:
    """Draw the finite values, so that rounds without a measurement do not tear the line."""
    points = [(x, y) for x, y in zip(rounds, values, strict=True) if math.isfinite(y)]
    if not points:
        return
    style = "-" if dashes is None else (0, dashes)
    marker = "o" if len(points) <= 25 else ""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=color, linestyle=style, marker=marker, markersize=3.2, label=label)


def _bars(axes: Axes, values: Mapping[ClientId, float], color: str, label: str) -> None:
    """Draw a bar for each client, in canonical order; named if the names fit."""
    clients = sorted(values, key=client_order)
    names = [printable(client, limit=14) for client in clients]
    axes.bar(range(len(clients)), [values[client] for client in clients], color=color, width=0.7)
    fit = sum(map(len, names)) <= 60
    if fit or len(clients) <= 30:
        axes.set_xticks(range(len(clients)), names, rotation=0 if fit else 90)
    else:
        axes.set_xticks([])
    _finish(axes, "client", label=label)


def _finish(axes: Axes, what: str, *, label: str = "") -> None:
    axes.set_xlabel(what)
    axes.set_ylabel(label)
    if what in ("round", "rounds trained"):
        _count_in_whole_numbers(axes.xaxis)


def _count_in_whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _parts(values: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    return (values[start : start + width] for start in range(0, len(values), width))


def _any_finite(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _last(values: Sequence[float]) -> float | None:
    """Return the last finite value."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)
