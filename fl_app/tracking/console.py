"""What a person at the terminal sees: progress on stderr, and the result as a table."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.tracking.json_files import JSON
from fl_app.tracking.sections import (
    group,
    human_number,
    human_seconds,
    number,
    printable,
    sections_of,
)
from fl_app.tracking.sweep_file import Member, MemberStatus, common_overrides, figures_of
from fl_app.types import RoundReport

if TYPE_CHECKING:
    import logging

    from rich.console import Console
    from rich.progress import Progress, TaskID

_RECENT_ROUNDS = 20
_LINES_A_RUN = 10
_SWEEP_COLUMNS = {
    "accuracy": "accuracy",
    "loss": "loss",
    "accuracy_min": "worst client",
    "epsilon": "ε",
}


@cache
def stderr_console() -> Console:
    """Return the console on stderr that `ConsoleProgress` and `log_handler` share."""
    from rich.console import Console

    return Console(stderr=True)


def log_handler(console: Console) -> logging.Handler:
    """Return a handler that writes log lines above the progress bar of the same ``console``.

    A handler on the bare stderr would write into the bar.
    """
    from rich.logging import RichHandler

    return RichHandler(console=console, show_path=False, markup=False, log_time_format="[%X]")


class ConsoleProgress:
    """A tracker that shows where the run is: a live bar, or some ten plain lines off a terminal."""

    def __init__(self, *, console: Console | None = None, quiet: bool = False) -> None:
        """Show on ``console`` (by default stderr), or nothing at all if ``quiet``."""
        self._console = console
        self._quiet = quiet
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._rounds: int | None = None
        self._lines = -1
        self._seconds: deque[float] = deque(maxlen=_RECENT_ROUNDS)
        self._figures = ""

    def start(self, config: Mapping[str, object], run_dir: Path) -> None:
        """Start the bar; its length is ``config["rounds"]``, if that is a number."""
        rounds = config.get("rounds")
        self._rounds = rounds if isinstance(rounds, int) else None
        if self._quiet:
            return
        if self._console is None:
            self._console = stderr_console()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _new_bar(self._console)
            self._bar_task = self._bar.add_task("starting", total=self._rounds)
            self._bar.start()

    def on_round(self, report: RoundReport) -> None:
        """Move the bar, or print a line if a tenth of the rounds has gone by since the last."""
        self._seconds.append(report.seconds)
        self._figures = "  ".join(_figures(report)) or self._figures
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(
                self._bar_task,
                completed=report.round,
                description=self._description(report),
            )
        elif self._console is not None and not self._quiet and self._is_due(report.round):
            self._console.print(
                self._description(report), markup=False, highlight=False, soft_wrap=True
            )

    def finish(self, summary: Mapping[str, object]) -> None:
        """Leave the bar as it is; the result is printed by `print_summary`."""
        self.close()

    def state(self) -> Mapping[str, JSON]:
        """Return nothing: a resumed run starts a new bar at the round it resumes."""
        return {}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Take nothing."""

    def close(self) -> None:
        """Stop the bar and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_due(self, round: int) -> bool:
        """Whether ``round`` is the first seen, the first of its tenth of the run, or the last.

        Of an open-ended run: the powers of two.
        """
        if self._rounds is None:
            return round & (round - 1) == 0
        lines = math.floor(round * _LINES_A_RUN / self._rounds)
        due = lines > self._lines or round >= self._rounds
        self._lines = max(self._lines, lines)
        return due

    def _description(self, report: RoundReport) -> str:
        of = "" if self._rounds is None else f"/{self._rounds}"
        width = len(of) - 1
        parts = [f"round {report.round:>{max(width, 1)}}{of}"]
        if self._figures:
            parts.append(self._figures)
        if report.epsilon is not None:
            of_budget = "" if report.epsilon_budget is None else f" of {report.epsilon_budget:.3g}"
            parts.append(f"ε {report.epsilon:.3g}{of_budget}")
        if report.num_updates is not None:
            parts.append(f"replies {report.num_updates}/{len(report.cohort)}")
        if report.failures:
            parts.append(f"failed {len(report.failures)}")
        if not report.applied:
            parts.append("old model kept")
        mean_s = statistics.fmean(self._seconds)
        parts.append(f"{human_seconds(mean_s)}/round")
        if self._rounds is not None and report.round < self._rounds and math.isfinite(mean_s):
            parts.append(f"ETA {human_seconds(mean_s * (self._rounds - report.round))}")
        return "  ".join(parts)


def print_summary(summary: Mapping[str, object], console: Console | None = None) -> None:
    """Print the result in ``summary`` (as in ``summary.json``) as a table, by default to stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = (printable(summary.get(key, "?")) for key in ("task", "strategy", "engine"))
    table = Table(
        title=Text(" · ".join(names), style="bold"),
        box=box.SIMPLE_HEAD,
        show_header=False,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for section in sections_of(summary):
        table.add_row(Text(section.title, style="bold not dim"), "")
        for index, (label, value) in enumerate(section.rows):
            last = index == len(section.rows) - 1
            table.add_row(Text(f"  {label}"), Text(value), end_section=last)
    (console or Console()).print(table)


def print_sweep(members: Sequence[Member], console: Console | None = None) -> None:
    """Print one line for each member of a sweep: what was chosen, and what came of it.

    Args:
        members: At least one, in the order of their numbers.
        console: Where to; by default stdout.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    common = common_overrides(members)
    title = " ".join(f"{key}={value}" for key, value in common.items())
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("run", overflow="fold")
    figures = [figures_of(member) for member in members]
    shown = {
        label: name
        for name, label in _SWEEP_COLUMNS.items()
        if name in ("accuracy", "loss") or any(name in each for each in figures)
    }
    for label in (*shown, "rounds", "seconds"):
        table.add_column(label, justify="right")
    for member, each in zip(members, figures, strict=True):
        chosen = {key: value for key, value in member.overrides.items() if key not in common}
        words = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
        if member.status is not MemberStatus.OK:
            words += f" [{member.status}]"
        done = member.status is MemberStatus.OK
        cells = [human_number(each.get(name)) for name in shown.values()]
        cells.append(human_number(number(member.summary, "rounds")))
        cells.append(human_seconds(number(group(member.summary, "time_s"), "total")))
        table.add_row(
            str(member.number), Text(words.strip()), *(cells if done else ["" for _ in cells])
        )
    (console or Console()).print(table)


def _new_bar(console: Console) -> Progress:
    import sys

    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        console=console,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe stays out of the terminal
        redirect_stderr=True,
    )


def _figures(report: RoundReport) -> Iterator[str]:
    """Yield "name value" of the accuracy and the loss, or of what stands in for them."""
    for metrics, names in (
        (report.metrics, ("accuracy", "loss")),
        (report.client_metrics, ("test_accuracy", "test_loss", "train_loss")),
    ):
        found = [name for name in names if name in metrics][:2]
        if found:
            yield from (f"{name} {human_number(metrics[name])}" for name in found)
            return
