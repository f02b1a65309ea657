"""Seconds per round, side by side: ours, a bare PyTorch loop, and stock Flower.

Run by ``make bench``: ``python tests/bench/bench_round.py [--json PATH] [--rounds N] [--quick]``.

One workload: 1,000 simulated clients with 50 random 28x28 images each, of which 100 train in a
round, one local epoch in batches of 10, SGD with lr 0.1; a row of a small MLP and one of a CNN.
Each contender is a process of its own; they play their rounds in turn, and medians are quoted.
Torch uses one intra-op thread everywhere: two make models this small slower.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import process_costs
from contenders import BENCH, Contender, on_stage
from rich.console import Console
from rich.table import Table

COHORT = 100
OURS, WORKERS, BARE = "ours", "ours, 2 workers", "bare PyTorch loop"
FLOWER, FLOWER_TUNED = "flwr.simulation", "flwr.simulation, tuned"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model to train; all else is the same for every workload."""

    name: str
    model: str


WORKLOADS = (
    Workload(name="MLP 784-10-10", model="fl_app.tasks.models.Mlp"),
    Workload(name="CNN (LeNet, 44k)", model="synthetic_task.LeNet"),
)


def main() -> None:
    """Measure, print, and write the JSON."""
    options = _options()
    console = Console()
    result: dict[str, Any] = {"machine": _machine(), "workloads": []}
    load, cores = result["machine"]["load_before"][0], result["machine"]["cores"]
    console.print(f"Load {load:.1f} on {cores} cores; figures are best taken below 0.5.")
    with tempfile.TemporaryDirectory(prefix="fl-app-bench-") as scratch:
        folder = Path(scratch)
        for workload in WORKLOADS[: 1 if options.quick else None]:
            console.print(f"Measuring {workload.name}: {options.rounds} rounds of each …")
            measured = measure(workload, folder, rounds=options.rounds, warm_up=options.warm_up)
            result["workloads"].append(measured)
            console.print(_table(measured))
        if not options.quick:
            console.print("Measuring start-up and memory …")
            result["start_up"] = process_costs.start_up(folder, repeats=3)
            result["memory"] = process_costs.memory(folder)
            console.print(_costs(result))
    result["machine"]["load_after"] = os.getloadavg()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"Written to {options.json}.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each (default 7)")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed rounds before (default 2)")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, 3 rounds of each")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 3)
    if options.rounds < 1 or options.warm_up < 0:
        parser.error("--rounds must be >= 1 and --warm-up >= 0.")
    return options


def measure(workload: Workload, folder: Path, *, rounds: int, warm_up: int) -> dict[str, Any]:
    """Have all contenders play in turn; return the figures of one workload."""
    contenders = _contenders(workload, folder / workload.model, warm_up + rounds)
    with on_stage(contenders):
        for _ in range(warm_up + rounds):
            for contender in contenders:
                contender.play(clients=COHORT)
    rows = []
    medians = {c.name: statistics.median(c.rounds_s[warm_up:]) for c in contenders}
    for contender in contenders:
        median, timed = medians[contender.name], contender.rounds_s[warm_up:]
        rows.append(
            {
                "name": contender.name,
                "path": contender.path,
                "times_ours": median / medians[OURS],
                "times_bare": median / medians[BARE],
                "median_s": median,
                "min_s": min(timed),
                "max_s": max(timed),
                "rounds_s": contender.rounds_s,
                "start_up_s": contender.start_up_s,
            }
        )
    return {
        "name": workload.name,
        "timed_rounds": rounds,
        "warm_up_rounds": warm_up,
        "rows": rows,
        "skipped": [] if _has_ray() else [f"{FLOWER}: ray is not installed"],
        "same_model": _differences(contenders),
    }


def _contenders(workload: Workload, folder: Path, rounds: int) -> list[Contender]:
    """Return who competes, each in a folder of its own."""
    contenders = [
        Contender(
            name=BARE,
            path="the same steps and mean in a plain loop",
            command=[
                *(str(BENCH / "bare_loop.py"), workload.model, str(rounds)),
                str(folder / "bare.safetensors"),
            ],
            folder=folder / "bare",
        ),
        *(
            Contender(
                name=name,
                path=f"fl-app run engine=local workers={workers}, client by client",
                command=_our_command(workload.model, rounds, workers),
                folder=folder / f"ours_{workers}",
            )
            for name, workers in ((OURS, 1), (WORKERS, 2))
        ),
    ]
    if _has_ray():
        contenders += [
            Contender(
                name=name,
                path=f"run_simulation, FedAvg, the quickstart's client; {how}",
                command=[str(BENCH / "flower_simulation.py"), workload.model, str(rounds), cpus],
                folder=folder / f"flower_{cpus}",
                frozen_between_turns=True,
            )
            for name, cpus, how in (
                (FLOWER, "0", "Ray as it comes: an actor claims two cores"),
                (FLOWER_TUNED, "1", "Ray told to run an actor on each core"),
            )
        ]
    return contenders


def _our_command(model: str, rounds: int, workers: int) -> list[str]:
    return [
        *("-m", "fl_app", "run", f"rounds={rounds}", "seed=1", "progress=none"),
        *("task._target_=synthetic_task.RandomImages", "~task.test_fraction"),
        *("~task.model", f"+task.model={{_target_: {model}}}"),
        *("partition=generated", "partition.num_clients=1000", "selection.fraction=0.1"),
        *("client.batch_size=10", "client.epochs=1", "client.optimizer.lr=0.1"),
        *(f"engine.workers={workers}", "engine.threads=1", "engine.vectorize=false"),
        *("fairness_clients=0", "checkpoint_every=0", "+tracking._target_=turns.TakeTurns"),
    ]


def _differences(contenders: Sequence[Contender]) -> dict[str, float]:
    """Return by how much, at most, a weight of ours differs from the bare loop's at the end."""
    from safetensors.torch import load_file

    bare = load_file(
        next(c for c in contenders if c.name == BARE).folder.parent / "bare.safetensors"
    )
    found = {}
    for contender in contenders:
        for path in contender.folder.glob("outputs/*/*/model.safetensors"):
            ours = load_file(path)
            found[contender.name] = max(float((ours[n] - bare[n]).abs().max()) for n in bare)
    return found


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def _machine() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "flwr", "ray", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch_threads": 1,
        "load_before": os.getloadavg(),
        **versions,
    }


def _table(measured: dict[str, Any]) -> Table:
    table = Table(title=f"{measured['name']}: 100 of 1,000 clients a round")
    for heading in ("", "x bare", "x ours", "s a round", "min to max", "start-up"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in measured["rows"]:
        table.add_row(
            row["name"],
            f"{row['times_bare']:.2f}",
            f"{row['times_ours']:.2f}",
            f"{row['median_s']:.3f}",
            f"{row['min_s']:.3f}-{row['max_s']:.3f}",
            f"{row['start_up_s']:.1f} s",
        )
    notes = [f"{row['name']}: {row['path']}" for row in measured["rows"]]
    notes += [f"skipped: {reason}" for reason in measured["skipped"]]
    for name, difference in measured["same_model"].items():
        notes.append(f"{name}: final weights within {difference:.1e} of the bare loop's")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _costs(result: dict[str, Any]) -> Table:
    """Return the table of start-up and memory."""
    start_up, memory = result["start_up"], result["memory"]
    table = Table("whole runs", "", title="fl-app run, from outside")
    table.add_row("default run, to its first round", f"{start_up['first_round_s']:.1f} s")
    table.add_row("default run, to its end", f"{start_up['end_s']:.1f} s")
    table.add_row("what its summary calls setup", f"{start_up['setup_s']:.1f} s")
    first, last = (memory["rss_mib"].get(number) for number in process_costs.RSS_ROUNDS)
    if first is not None and last is not None:
        table.add_row("quickstart, memory after round 50", f"{first:.0f} MiB")
        table.add_row("quickstart, memory after round 500", f"{last:.0f} MiB")
        table.add_row("quickstart, peak memory", f"{memory['peak_mib']:.0f} MiB")
    return table


if __name__ == "__main__":
    main()
