"""Seconds per round, side by side: ours, bare PyTorch and Opacus loops, pfl-research, and Flower.

Run by ``make bench``; ``make bench ARGS="--only mlp,cnn_dp --json bench.json"`` plays some rows.

Unless a row says otherwise: 1,000 simulated clients with 50 random images each, of which 100 train
in a round, one local epoch in batches of 10, SGD with lr 0.1. Each contender is a process of its
own below this one; they play a few rounds in turn, on the same two cores, the first of each turn
untimed, and medians are quoted.
A round of ours lasts from the selection of its cohort until its line is in ``rounds.jsonl``, the
ledgers' writing included. Ours may use both cores, as it comes; loops are measured with one thread
or with two, whichever is faster counts.

Exit status 1: a contender failed, ended with another model, or ours trained in another way than the
row is about. That a needed ratio is missed is printed, and in the JSON, but is no failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import process_costs
from line_up import PFL
from measuring import Plan, measure
from pfl_environment import NoPflError, pfl_python
from report import costs_table, table_of
from rich.console import Console
from rows import ROWS

COSTS = "costs"
"""What ``--only`` calls start-up and memory of whole runs."""

PACKAGES = ("torch", "numpy", "opacus", "flwr", "ray")
CORES = 2
IN_A_ROW = 3  # rounds of a turn, of which the first is not timed
WIDTH = 120  # of what is not a terminal


def main() -> int:
    """Measure, print, and write the JSON; return the exit status."""
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    kept_off = _use_two_cores()
    result: dict[str, Any] = {"machine": _machine(), "command": sys.argv, "rows": []}
    load = result["machine"]["load_before"][0]
    console.print(f"Load {load:.1f} on {CORES} cores{kept_off}; best taken below 0.5.")
    rows = [row for row in ROWS if row.key in options.only]
    python = _pfl(console) if any(PFL in need.of for row in rows for need in row.needs) else None
    plan = Plan(
        rounds=options.rounds,
        warm_up=options.warm_up,
        in_a_row=IN_A_ROW,
        quick=options.quick,
    )
    with tempfile.TemporaryDirectory(prefix="fl-app-bench-") as scratch:
        for row in rows:
            console.print(f"Measuring {row.title}: {sum(plan.turns(row))} rounds of each …")
            measured = measure(row, plan, Path(scratch) / row.key, python)
            result["rows"].append(measured)
            console.print(table_of(measured))
            _write(result, options.json)
        if COSTS in options.only:
            console.print("Measuring start-up and memory …")
            result["start_up"] = process_costs.start_up(Path(scratch), repeats=3)
            result["memory"] = process_costs.memory(Path(scratch))
            console.print(costs_table(result))
    result["machine"]["load_after"] = os.getloadavg()
    _write(result, options.json)
    if options.json:
        console.print(f"Written to {options.json}.")
    return 1 if any(measured["faults"] for measured in result["rows"]) else 0


def _options() -> argparse.Namespace:
    keys = [*(row.key for row in ROWS), COSTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help=f"rows to play, of {','.join(keys)} (default: all)")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--rounds", type=int, help="timed rounds of each (default 8; quick: 2)")
    parser.add_argument("--warm-up", type=int, help="untimed rounds before (default 2; quick: 1)")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, also for memory; the MLP alone"
    )
    options = parser.parse_args()
    default = ["mlp"] if options.quick else keys
    options.only = options.only.split(",") if options.only else default
    for key in options.only:
        if key not in keys:
            parser.error(f"--only {key}: there is no such row; choose from {','.join(keys)}.")
    if options.rounds is None:
        options.rounds = 2 if options.quick else 8
    if options.warm_up is None:
        options.warm_up = 1 if options.quick else 2
    if options.rounds < 1 or options.warm_up < 0:
        parser.error("--rounds must be >= 1 and --warm-up >= 0.")
    return options


def _pfl(console: Console) -> Path | None:
    """Return the interpreter of pfl-research; where there is none, say so in a line."""
    try:
        return pfl_python()
    except NoPflError as error:
        console.print(f"Skipping {PFL}: {error}", markup=False)
        return None


def _use_two_cores() -> str:
    """Keep this process and all below it to two cores, where there are more; say so (Linux)."""
    with suppress(AttributeError, OSError):
        allowed = sorted(os.sched_getaffinity(0))
        siblings: dict[str, int] = {}  # one hardware thread of each core
        for cpu in allowed:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            siblings.setdefault(topology.read_text() if topology.exists() else str(cpu), cpu)
        cores = list(siblings.values()) if len(siblings) >= CORES else allowed
        if len(allowed) > CORES:
            os.sched_setaffinity(0, cores[:CORES])
            return f" of {len(allowed)}, those numbered {cores[:CORES]}"
    return ""


def _machine() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        versions[package] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cores_used": CORES,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "processor": _processor(),
        "python": sys.version.split()[0],
        "versions": versions,
        "load_before": os.getloadavg(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _write(result: dict[str, Any], path: Path | None) -> None:
    """Write what has been measured so far: a run that is broken off keeps its rows."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
