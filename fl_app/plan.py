"""What a configuration would run, for ``fl-app check``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_app.components import build, check_stopping, make_engine, make_tracker
from fl_app.config import to_json
from fl_app.federation import initial_model
from fl_app.params import num_bytes

_SAMPLED_CLIENTS = 100


def describe_plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what would run: everything is built, nothing is trained and no file is written.

    Example counts are those of all clients, or of the first 100 of a larger population.

    Raises:
        ConfigError: It could not run.
    """
    components = build(to_json(config))
    check_stopping(components)
    engine = make_engine(config)
    make_tracker(config)
    components.client_app.load()
    params, trainable = initial_model(components, config["initial_model"])
    clients = components.data.clients
    sizes = [
        len(components.data.examples_of(client).train) for client in clients[:_SAMPLED_CLIENTS]
    ]
    cohort = components.selector.wanted(len(clients))
    held_out = components.data.held_out
    return {
        "task": components.task.name,
        "model_parameters": sum(params[name].numel() for name in trainable),
        "clients": len(clients),
        "examples_per_client": {
            "min": min(sizes),
            "median": statistics.median(sizes),
            "max": max(sizes),
        },
        "held_out_examples": 0 if held_out is None else len(held_out),
        "strategy": components.algorithm.name,
        "rounds": config["rounds"],
        "cohort_size": cohort,
        "uplink_bytes_per_round": cohort * num_bytes(params),
        "privacy": type(components.privacy).__name__,
        "engine": type(engine).__name__,
        "seed": components.seed,
    }


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print a plan as a table."""
    table = Table(title="This would run", show_header=False, title_justify="left")
    for name, value in plan.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry:g}" for key, entry in value.items())
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
