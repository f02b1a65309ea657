"""Taking turns: how contenders in processes of their own play one round at a time.

Each contender waits for its turn, plays one round, says how long that took, and waits again. So
rounds of all contenders interleave, and a machine that is slow for a while is slow for all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_app.types import RoundReport

PIPES = "FL_APP_BENCH_PIPES"
"""Environment variable: numbers of the pipe ends that a contender reads and writes."""


class Turns:
    """A contender's end of the pipes. Once the other end is closed, it is always its turn."""

    def __init__(self) -> None:
        reading, writing = os.environ[PIPES].split(",")
        self._in = open(int(reading), "rb", buffering=0)  # noqa: SIM115  # open for life
        self._out = open(int(writing), "wb", buffering=0)  # noqa: SIM115

    def wait(self) -> None:
        """Return when it is this contender's turn."""
        self._in.readline()

    def report(self, **told: Any) -> None:
        """Say something, such as ``seconds=0.2`` at the end of a round."""
        self._out.write(json.dumps(told).encode() + b"\n")


class TakeTurns:
    """Tracker (`fl_app.tracking.base.Tracker`) that makes ``fl-app run`` a contender.

    The loop calls `on_round` when the round's line is in ``rounds.jsonl``, and goes on to the
    next round when it returns. What lies between a return and the next call is therefore one
    whole round, from the selection of the cohort to its line, with nothing left out.
    """

    def __init__(self) -> None:
        self._turns = Turns()
        self._began = 0.0

    def start(self, config: Mapping[str, object], run_dir: object) -> None:
        """Wait for the first turn."""
        self._turns.report(ready=True)
        self._turns.wait()
        self._began = time.perf_counter()

    def on_round(self, report: RoundReport) -> None:
        """Report the round that has just ended, and wait for the next turn."""
        seconds = time.perf_counter() - self._began
        clients = report.num_updates
        cohort = list(report.cohort)
        self._turns.report(round=report.round, seconds=seconds, clients=clients, cohort=cohort)
        self._turns.wait()
        self._began = time.perf_counter()

    def finish(self, summary: Mapping[str, object]) -> None:
        """Do nothing."""

    def state(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
