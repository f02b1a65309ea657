"""One comparison: contenders play in turn, and their seconds become ratios and verdicts."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import Contender, ContenderError
from line_up import BARE_MODEL, Stage
from rows import Need, Row
from workloads import WORKLOADS

LARGEST_DIFFERENCE = 3e-3
"""Between a weight of ours and the bare loop's at the end; more is no rounding.

The bare loop in single precision is as far from itself in double: 9e-4 for LeNet after 20 rounds,
1e-7 until one rectifier more or less is on. A batch of another client moves weights by 1e-1.
"""

MEMORY_AT = (0.25, 0.5, 0.75, 1.0)
"""Shares of the rounds after which memory is read."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many rounds are played.

    A contender plays a few rounds in a row, of which the first is not timed: while others played
    they had the caches, and rounds of a real run follow each other.

    Attributes:
        rounds: Timed, of each contender, at least.
        warm_up: Untimed, before them.
        in_a_row: Rounds of a turn, >= 2.
        quick: Play no more of them, whatever a row asks for.
    """

    rounds: int
    warm_up: int
    in_a_row: int
    quick: bool = False

    def turns(self, row: Row) -> list[int]:
        """Return how many rounds are played in each turn of a row, first of all the warm-up."""
        turns = math.ceil(self.rounds / (self.in_a_row - 1))
        if not self.quick:
            # A tenth more: cohorts of different rounds overlap.
            needed = math.ceil(1.1 * row.distinct_clients / row.workload.cohort)
            turns = max(turns, math.ceil(needed / self.in_a_row))
        return [self.warm_up, *[self.in_a_row] * turns]

    def timed(self, values: Sequence[float]) -> list[float]:
        """Return those of the values of all rounds that are of timed ones."""
        return [v for k, v in enumerate(values[self.warm_up :]) if k % self.in_a_row]


def measure(row: Row, plan: Plan, folder: Path, pfl_python: Path | None) -> dict[str, Any]:
    """Have all contenders of a row play in turn; return its figures, and what went wrong."""
    turns = plan.turns(row)
    stage = Stage(folder=folder, rounds=sum(turns), pfl_python=pfl_python)
    made = [make(stage) for make in row.contenders]
    contenders = [contender for contender in made if contender is not None]
    load_before = os.getloadavg()
    faults = _play(row, contenders, turns)
    load_after = os.getloadavg()
    faults += _wrong_ways(contenders)
    differences = _differences(contenders, folder) if row.same_model else {}
    faults += [
        f"{name}: a weight differs by {difference:.1e} from the bare loop's after "
        f"{stage.rounds} rounds, more than {LARGEST_DIFFERENCE:.0e}."
        for name, difference in differences.items()
        if not difference <= LARGEST_DIFFERENCE
    ]
    costs = {c.name: plan.timed(_costs(row, c)) for c in contenders}
    medians = {name: statistics.median(values) for name, values in costs.items() if values}
    return {
        "key": row.key,
        "title": row.title,
        "turns": turns,
        "timed_rounds": len(plan.timed(range(stage.rounds))),
        "per_record": row.per_record,
        "reference": row.reference,
        "contenders": [_figures(row, c, plan, medians) for c in contenders],
        "needs": [_verdict(need, medians) for need in row.needs],
        "same_model": differences,
        "shows_memory": row.distinct_clients > 0,
        "faults": faults,
        "load_before": load_before,
        "load_after": load_after,
    }


def _play(row: Row, contenders: Sequence[Contender], turns: Sequence[int]) -> list[str]:
    """Have contenders play; return what was wrong with those that had to leave."""
    equal = row.workload.sizes[0] == row.workload.sizes[1] and not row.per_record
    steps = row.workload.cohort * row.workload.steps_of("0") if equal else None
    reads = {math.ceil(share * sum(turns)) for share in MEMORY_AT}
    playing, faults = list(contenders), []
    try:
        for number, rounds in enumerate([0, *turns]):
            for contender in list(playing):
                try:
                    if number == 0:
                        contender.start()
                    for _ in range(rounds):
                        contender.play(clients=row.workload.cohort, steps=steps)
                        if len(contender.rounds_s) in reads:
                            contender.read_memory()
                except ContenderError as error:
                    faults.append(str(error))
                    playing.remove(contender)
    finally:
        for contender in contenders:
            contender.finish()
    return faults


def _wrong_ways(contenders: Sequence[Contender]) -> list[str]:
    """Return who of ours trained in another way than its row is about."""
    faults = []
    for contender in contenders:
        if contender.training is None:
            continue
        told = contender.told_training()
        if told is None or contender.training not in ("", told):
            expected = contender.training or "to be told"
            faults.append(
                f"{contender.name}: training was expected {expected!r}, but its summary.json says "
                f"{told!r}: its seconds are not what this row is about."
            )
    return faults


def _differences(contenders: Sequence[Contender], folder: Path) -> dict[str, float]:
    """Return by how much, at most, a weight of ours differs from the bare loop's at the end."""
    from safetensors.torch import load_file

    found: dict[str, float] = {}
    if not (folder / BARE_MODEL).exists():
        return found
    bare = load_file(folder / BARE_MODEL)
    for contender in contenders:
        for path in contender.folder.glob("outputs/*/*/model.safetensors"):
            ours = load_file(path)
            found[contender.name] = max(float((ours[n] - bare[n]).abs().max()) for n in bare)
    return found


def _costs(row: Row, contender: Contender) -> list[float]:
    """Return what is compared: seconds of each round, or seconds a record of each round."""
    if not row.per_record:
        return contender.rounds_s
    return [
        seconds / records
        for seconds, records in zip(contender.rounds_s, _records(contender), strict=True)
    ]


def _records(contender: Contender) -> list[int]:
    """Return how many records were trained on in each round, of one of ours."""
    asked = next(a.partition("=")[2] for a in contender.command if a.startswith("+task.workload="))
    return [sum(map(WORKLOADS[asked].size_of, cohort)) for cohort in contender.cohorts]


def _figures(
    row: Row, contender: Contender, plan: Plan, medians: dict[str, float]
) -> dict[str, Any]:
    timed = plan.timed(contender.rounds_s)
    median, reference = medians.get(contender.name), medians.get(row.reference)
    return {
        "name": contender.name,
        "path": contender.path,
        "training": contender.told_training() if contender.training is not None else None,
        "times_reference": median / reference if median and reference else None,
        "median_s": statistics.median(timed) if timed else None,
        "min_s": min(timed, default=None),
        "max_s": max(timed, default=None),
        "median_s_per_record": median if row.per_record else None,
        "rounds_s": contender.rounds_s,
        "records": _records(contender) if row.per_record else None,
        "distinct_clients": len(set().union(*contender.cohorts)),
        "memory_mib": contender.memory_mib,
        "start_up_s": contender.start_up_s,
        "versions": contender.versions,
        "variables": contender.variables,
        "command": contender.command,
    }


def _verdict(need: Need, medians: dict[str, float]) -> dict[str, Any]:
    """Return the ratio that was reached, of the fastest that are named, beside the needed one."""
    above, below = (
        min((name for name in named if name in medians), key=medians.__getitem__, default=None)
        for named in (need.of, need.over)
    )
    reached = medians[above] / medians[below] if above and below else None
    return {
        "of": above or need.of[0],
        "over": below or need.over[0],
        "reached": reached,
        "at_least": need.at_least,
        "at_most": need.at_most,
        "met": None
        if reached is None
        else (need.at_least is None or reached >= need.at_least)
        and (need.at_most is None or reached <= need.at_most),
    }
