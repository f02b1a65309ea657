"""``partition.json``: how records are spread over the clients, and the plot of it.

Clients tell of themselves what they are willing to; nothing of it is trusted, and nothing of a
run depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_app.tracking.drawing import INK, SERIES, Chart, Paint, draw, draw_png
from fl_app.tracking.summary import write_json_atomically
from fl_app.types import ClientDescription

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILE = "partition.json"
_TITLE = "Partition"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """What a run's clients told of themselves when it began.

    Attributes:
        population: Clients there were.
        described: Those that were asked and answered, in canonical order.
    """

    population: int
    described: tuple[ClientDescription, ...]


def has_partition(run_dir: Path) -> bool:
    """Return whether the clients of a run have been asked already."""
    return (run_dir / _FILE).is_file()


def write_partition(partition: Partition, run_dir: Path) -> None:
    """Put what clients told into a run's folder.

    Raises:
        OSError: The folder cannot be written.
    """
    clients = {
        told.client: {"num_examples": told.num_examples, "label_counts": told.label_counts}
        for told in partition.described
    }
    content = {"population": partition.population, "clients": clients}
    write_json_atomically(run_dir / _FILE, content)


def read_partition(run_dir: Path) -> Partition | None:
    """Return what is in a run's folder; None if nobody was asked, or the file is of no use."""
    try:
        content: Any = json.loads((run_dir / _FILE).read_bytes())
        described = tuple(_described(content["clients"]))
        return Partition(population=int(content["population"]), described=described)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _described(clients: Mapping[str, Mapping[str, Any]]) -> Iterator[ClientDescription]:
    for client, told in clients.items():
        counts = told["label_counts"]
        yield ClientDescription(
            client=client,
            num_examples=int(told["num_examples"]),
            label_counts=None if counts is None else tuple(map(int, counts)),
        )


def partition_chart(run_dir: Path) -> Chart | None:
    """Return the plot of a run's folder, or None if there is nothing to show."""
    partition = read_partition(run_dir)
    if partition is None or not partition.described:
        return None
    return draw(_TITLE, _caption(partition), _paint(partition.described))


def partition_png(partition: Partition) -> bytes:
    """Return the plot as a picture. Like the other, it names no client."""
    return draw_png(_TITLE, _paint(partition.described))


def _caption(partition: Partition) -> str:
    sizes = [told.num_examples or 0 for told in partition.described]
    shown, silent = len(sizes), sum(told.label_counts is None for told in partition.described)
    who = (
        f"all {shown} clients"
        if shown == partition.population
        else (f"{shown} of {partition.population} clients")
    )
    labels = (
        "by label"
        if silent == 0
        else (
            "none of which tells its labels (client.share_label_counts)"
            if silent == shown
            else f"by label, which {silent} of them do not tell"
        )
    )
    return (
        f"Training records of {who}, a bar each in canonical order, {labels}. "
        f"Smallest {min(sizes):,}, largest {max(sizes):,}."
    )


def _paint(described: Sequence[ClientDescription]) -> Paint:
    """Return what draws a bar for each client, in which its labels are stacked if it tells them."""

    def paint(axes: Axes) -> None:
        base = [0.0] * len(described)
        for name, color, counts in _layers(described):
            top = [low + count for low, count in zip(base, counts, strict=True)]
            # One path for all clients, with a gap between two, whatever their number.
            edges = [place + side for place in range(len(top)) for side in (-0.4, 0.4)]
            values = _with_gaps(top)
            axes.stairs(
                values, edges, baseline=_with_gaps(base), fill=True, color=color, label=name
            )
            base = top
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.6, len(described) - 0.4)
        axes.set_xticks([])
        axes.set_xlabel("client")
        axes.set_ylabel("records")

    return paint


def _with_gaps(values: Sequence[float]) -> list[float]:
    """Return the values with a zero between each two."""
    spaced = [0.0] * (2 * len(values) - 1)
    spaced[::2] = values
    return spaced


def _layers(described: Sequence[ClientDescription]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (name, colour, records of each client) of each label, the frequent ones if many."""
    known = [told.label_counts or () for told in described]
    totals = [0] * max(map(len, known), default=0)
    for counts in known:
        for label, count in enumerate(counts):
            totals[label] += count
    places = len(SERIES) if len(totals) <= len(SERIES) else len(SERIES) - 1
    frequent = sorted(sorted(range(len(totals)), key=lambda label: -totals[label])[:places])
    for label, color in zip(frequent, SERIES, strict=False):
        column = [counts[label] if label < len(counts) else 0 for counts in known]
        yield f"label {label}", color, column
    chosen = set(frequent)
    others = [sum(n for i, n in enumerate(counts) if i not in chosen) for counts in known]
    if any(others):
        yield "other labels", SERIES[-1], others
    silent = [(told.num_examples or 0) if told.label_counts is None else 0 for told in described]
    if any(silent):
        yield "labels not told", INK, silent
