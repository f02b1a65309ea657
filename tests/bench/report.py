"""What the benchmark prints: a table for each comparison, with the needed ratios beside."""

from __future__ import annotations

from typing import Any

import process_costs
from rich.table import Table


def table_of(measured: dict[str, Any]) -> Table:
    """Return the table of one comparison; what went wrong stands below it."""
    table = Table(title=measured["title"])
    unit = "a record" if measured["per_record"] else "a round"
    times = f"x {measured['reference']}" + (f", {unit}" if measured["per_record"] else "")
    for heading in ("", "s a round", "min to max", times, "needed", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for figures in measured["contenders"]:
        if figures["median_s"] is None:
            table.add_row(figures["name"], "failed", "", "", "", "")
            continue
        needed, met = _needed(measured, figures["name"])
        ratio = figures["times_reference"]
        table.add_row(
            figures["name"],
            f"{figures['median_s']:.4f}",
            f"{figures['min_s']:.4f}-{figures['max_s']:.4f}",
            "" if ratio is None else f"{ratio:.3g}",
            needed,
            met,
        )
    table.caption, table.caption_justify = "\n".join(_notes(measured)), "left"
    return table


def _needed(measured: dict[str, Any], name: str) -> tuple[str, str]:
    """Return what a contender's multiple of the reference must be, and whether it is."""
    for need in measured["needs"]:
        above = need["over"] == measured["reference"]
        if name != need["of" if above else "over"]:
            continue
        bounds = []
        for bound, sign, mirrored in (
            (need["at_least"], ">=", "<="),
            (need["at_most"], "<=", ">="),
        ):
            if bound is not None:
                bounds.append(f"{sign} {bound:g}" if above else f"{mirrored} {1 / bound:.3g}")
        return " ".join(bounds), {True: "met", False: "NOT MET", None: "?"}[need["met"]]
    return "", ""


def _notes(measured: dict[str, Any]) -> list[str]:
    load = measured["load_before"][0]
    notes = [
        f"{measured['timed_rounds']} timed rounds of each; in turn, {measured['turns'][-1]} in a "
        f"row, the first untimed; {measured['turns'][0]} of warm-up; load before: {load:.1f}"
    ]
    for need in measured["needs"]:
        bound, sign = (
            (need["at_least"], ">=") if need["at_most"] is None else (need["at_most"], "<=")
        )
        reached = "not measured" if need["reached"] is None else f"{need['reached']:.3g}"
        notes.append(f"{need['of']} / {need['over']}: {reached}, needed {sign} {bound:g}")
    for figures in measured["contenders"]:
        training = f" [{figures['training']}]" if figures["training"] else ""
        if not figures["name"].startswith("the limit, "):  # a variant of what is said already
            notes.append(f"{figures['name']}{training}: {figures['path']}")
        if measured["shows_memory"]:
            memory = ", ".join(
                f"{mib:.0f} MiB after round {number}"
                for number, mib in figures["memory_mib"].items()
            )
            notes.append(f"  {figures['distinct_clients']} different clients took part; {memory}")
    for name, difference in measured["same_model"].items():
        notes.append(f"{name}: final weights within {difference:.1e} of the bare loop's")
    notes += [f"FAULT: {fault}" for fault in measured["faults"]]
    # Rich takes what stands in square brackets for markup.
    return [note.replace("[", r"\[") for note in notes]


def costs_table(costs: dict[str, Any]) -> Table:
    """Return the table of start-up and memory of whole runs."""
    start_up, memory = costs["start_up"], costs["memory"]
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
