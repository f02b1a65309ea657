"""The result of a run as labelled lines in human units, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A titled group of (label, value) lines, all plain text."""

    title: str
    rows: tuple[tuple[str, str], ...]


def sections_of(summary: Mapping[str, object]) -> tuple[Section, ...]:
    """Return the result in ``summary`` (the content of ``summary.json``) in reading order.

    What ``summary`` lacks reads "not measured", so the file of an older version can be shown too.
    """
    return (
        _metrics(summary),
        _fairness(group(summary, "fairness")),
        _privacy(group(summary, "privacy"), rounds=number(summary, "rounds")),
        _communication(group(summary, "communication")),
        _failures(group(summary, "failures")),
        _time(summary),
    )


def printable(text: object, *, limit: int = 200) -> str:
    """Return ``text`` on one line of at most ``limit`` characters, harmless to a terminal.

    Control characters, escape sequences and halves of surrogate pairs are shown as "�".
    """
    line = "".join(c if c.isprintable() else "�" for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def human_bytes(count: float | None) -> str:
    """Return ``count`` bytes in decimal units, such as "1.25 MB"."""
    if count is None:
        return _NOT_MEASURED
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def human_seconds(seconds: float | None) -> str:
    """Return a duration, such as "12 ms", "3.42 s", "4 min 05 s" or "2 h 03 min"."""
    if seconds is None or not math.isfinite(seconds):
        return _NOT_MEASURED
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def human_number(value: float | None) -> str:
    """Return ``value`` with four significant digits, or "not measured" for None and NaN."""
    return _NOT_MEASURED if value is None or math.isnan(value) else f"{value:.4g}"


def number(values: Mapping[str, object], key: str) -> float | None:
    """Return the number at ``key``, or None if there is none."""
    value = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def group(summary: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return the object at ``key``, or an empty one."""
    value = summary.get(key)
    return value if isinstance(value, Mapping) else {}


def epsilon_text(privacy: Mapping[str, object]) -> str:
    """Return the largest loss with its delta, or that there is no guarantee."""
    epsilon, delta = number(privacy, "epsilon_max"), number(privacy, "delta")
    if privacy.get("unit", "none") == "none":
        return "no guarantee"
    if epsilon is None:
        return "no finite guarantee"
    return f"{epsilon:.4g}" + ("" if delta is None else f" at δ = {delta:.4g}")


def _metrics(summary: Mapping[str, object]) -> Section:
    metrics = group(summary, "metrics")
    rows = tuple((printable(name), human_number(number(metrics, name))) for name in metrics)
    return Section(
        title="Final model, held-out records", rows=rows or (("metrics", _NOT_MEASURED),)
    )


def _fairness(fairness: Mapping[str, object]) -> Section:
    return Section(
        title="Fairness across clients",
        rows=(
            ("worst client's accuracy", human_number(number(fairness, "accuracy_min"))),
            ("10th percentile", human_number(number(fairness, "accuracy_p10"))),
            ("standard deviation", human_number(number(fairness, "accuracy_std"))),
            ("clients measured", _count(fairness, "clients")),
        ),
    )


def _privacy(privacy: Mapping[str, object], *, rounds: float | None) -> Section:
    unit = printable(privacy.get("unit", "none"))
    if unit == "none":
        return Section(title="Privacy", rows=(("unit", "none: no formal guarantee"),))
    composed = "all rounds" if rounds is None else f"all {rounds:.0f} rounds"
    rows = (
        ("unit", unit),
        ("largest ε of a client", epsilon_text(privacy)),
        ("mean ε over clients", human_number(number(privacy, "epsilon_mean"))),
        ("composed over", f"{composed}, by {printable(privacy.get('accountant') or 'unknown')}"),
        ("noise multiplier", human_number(number(privacy, "noise_multiplier"))),
    )
    return Section(title="Privacy", rows=rows)


def _communication(communication: Mapping[str, object]) -> Section:
    up = number(communication, "uplink_bytes")
    uncompressed = number(communication, "uplink_uncompressed_bytes")
    rows = [
        ("clients to server", human_bytes(up)),
        ("server to clients", human_bytes(number(communication, "downlink_bytes"))),
    ]
    if up and uncompressed and uncompressed != up:
        ratio = f"{uncompressed / up:.3g} ×"
        rows.append(("to server, uncompressed", f"{human_bytes(uncompressed)} ({ratio})"))
    return Section(title="Communication", rows=tuple(rows))


def _failures(failures: Mapping[str, object]) -> Section:
    return Section(
        title="Failures",
        rows=(
            ("clients without an answer", _count(failures, "clients")),
            ("updates refused", _count(failures, "rejected_updates")),
        ),
    )


def _time(summary: Mapping[str, object]) -> Section:
    times = group(summary, "time_s")
    rows = [
        ("setup", human_seconds(number(times, "setup"))),
        ("total", human_seconds(number(times, "total"))),
        ("a round (median)", human_seconds(number(times, "per_round"))),
        ("stopped by", printable(summary.get("stopped_by", "rounds"))),
    ]
    if (resumed := number(summary, "resumed_from_round")) is not None:
        rows.append(("resumed from round", f"{resumed:.0f}"))
    return Section(title="Time", rows=tuple(rows))


def _count(values: Mapping[str, object], key: str) -> str:
    value = number(values, key)
    return _NOT_MEASURED if value is None else f"{value:,.0f}"
