"""What a whole ``fl-app run`` costs beside its rounds: start-up, end, and memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from contenders import Contender, ContenderError, environment, memory_mib, on_stage

POLL_S = 0.005
"""Seconds between two looks for the first line of ``rounds.jsonl``."""

RSS_ROUNDS = (50, 500)
"""Rounds after which memory is compared."""


def start_up(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Return medians over whole runs of the default experiment, timed from outside.

    ``first_round_s``: from the start of the process to the beginning of its first round (the
    arrival of that round's line, less the seconds in it). ``end_s``: to the end of the process.
    ``setup_s``: what its own summary says, which counts from when its command module is loaded.
    """
    runs = [_time_a_run(folder / f"default_{number}") for number in range(repeats)]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "repeats": repeats, "runs": runs, "command": "python -m fl_app run"}


def _time_a_run(folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True)
    log_path = folder / "log.txt"
    with log_path.open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "fl_app", "run"],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        first_line = _await_first_line(folder, process)
        arrived = time.perf_counter()
        code = process.wait()
        ended = time.perf_counter()
    if code != 0 or first_line is None:
        raise ContenderError(f"fl-app run gave exit code {code}:\n{log_path.read_text()[-3000:]}")
    summary = json.loads(next(folder.glob("outputs/*/*/summary.json")).read_text())
    return {
        "first_round_s": arrived - began - json.loads(first_line)["seconds"],
        "end_s": ended - began,
        "setup_s": summary["time_s"]["setup"],
        "own_total_s": summary["time_s"]["total"],
    }


def _await_first_line(folder: Path, process: subprocess.Popen[bytes]) -> bytes | None:
    while process.poll() is None:
        for path in folder.glob("outputs/*/*/rounds.jsonl"):
            line, newline, _ = path.read_bytes().partition(b"\n")
            if newline:
                return line
        time.sleep(POLL_S)
    return None


def memory(folder: Path) -> dict[str, Any]:
    """Return the resident memory of a quickstart of 500 rounds, at `RSS_ROUNDS` and at its peak."""
    rounds = RSS_ROUNDS[-1]
    quickstart = Contender(
        name="quickstart",
        path="fl-app run experiment=quickstart",
        command=[
            *("-m", "fl_app", "run", "experiment=quickstart", f"rounds={rounds}"),
            *("progress=none", "+tracking._target_=turns.TakeTurns"),
        ],
        folder=folder / "quickstart",
    )
    rss: dict[int, float | None] = {}
    with on_stage([quickstart]):
        for number in range(1, rounds + 1):
            quickstart.play()
            if number % RSS_ROUNDS[0] == 0:
                rss[number] = memory_mib(quickstart.pid)
        peak = memory_mib(quickstart.pid, "VmHWM")
    return {
        "rss_mib": rss,
        "peak_mib": peak,
        "median_round_s": statistics.median(quickstart.rounds_s),
        "command": " ".join(quickstart.command),
    }
