"""What may watch a run, and how several watchers are kept from ending it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fl_app.tracking.json_files import JSON
from fl_app.types import RoundReport

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Watches a run. Called in this order: [restore] start on_round* [finish] close.

    ``state`` may be asked for at any time after ``start``. Nothing of a run reads a tracker back,
    so what it does cannot change a result.
    """

    def start(self, config: Mapping[str, object], run_dir: Path) -> None:
        """Open the record of the run with this resolved config and this folder."""
        ...

    def on_round(self, report: RoundReport) -> None:
        """Record a round that has just ended."""
        ...

    def finish(self, summary: Mapping[str, object]) -> None:
        """Record the result, as in ``summary.json``; not called for a run that failed."""
        ...

    def state(self) -> Mapping[str, JSON]:
        """Return what a checkpoint must keep so that a resumed run continues this record."""
        ...

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Take over what ``state`` returned in the run that is resumed; comes before ``start``."""
        ...

    def close(self) -> None:
        """Release what is held; always called, however the run ended."""
        ...


@dataclass(frozen=True)
class Trackers:
    """Several trackers as one, none of which can end the run.

    A tracker that raises is logged once, closed, and from then on left out. The run's own record,
    `RoundsFile`, is on purpose not a tracker: the loop writes it itself, so that a full disk ends
    the run instead of its record.

    Attributes:
        trackers: Called in this order.
    """

    trackers: tuple[Tracker, ...] = ()
    _dropped: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _states: dict[str, Mapping[str, JSON]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def start(self, config: Mapping[str, object], run_dir: Path) -> None:
        """Open the record of every tracker."""
        self._each("start", lambda _, tracker: tracker.start(config, run_dir))

    def on_round(self, report: RoundReport) -> None:
        """Record a round with every tracker."""
        self._each("on_round", lambda _, tracker: tracker.on_round(report))

    def finish(self, summary: Mapping[str, object]) -> None:
        """Record the result with every tracker."""
        self._each("finish", lambda _, tracker: tracker.finish(summary))

    def state(self) -> Mapping[str, JSON]:
        """Return tracker's name -> its state; of a dropped tracker, the last one it gave."""

        def ask(name: str, tracker: Tracker) -> None:
            self._states[name] = tracker.state()

        self._each("state", ask)
        return dict(self._states)

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Give each tracker its part of ``state``; a tracker that is new has none."""

        def give(name: str, tracker: Tracker) -> None:
            part = state.get(name)
            if isinstance(part, Mapping):
                self._states[name] = part
                tracker.restore(part)

        self._each("restore", give)

    def close(self) -> None:
        """Close every tracker that has not been closed when it was dropped."""
        self._each("close", lambda _, tracker: tracker.close())

    def _each(self, step: str, call: Callable[[str, Tracker], None]) -> None:
        for name, tracker in zip(_names(self.trackers), self.trackers, strict=True):
            if name in self._dropped:
                continue
            try:
                call(name, tracker)
            except Exception:
                self._dropped.add(name)
                _log.warning(
                    "tracker %s failed in %s and is left out; the run goes on",
                    name,
                    step,
                    exc_info=True,
                )
                with suppress(Exception):
                    tracker.close()


def _names(trackers: Sequence[Tracker]) -> list[str]:
    """Return a name for each: its class, numbered from the second of the same class on."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for tracker in trackers:
        name = type(tracker).__name__
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names
