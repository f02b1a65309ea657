"""What a configuration would run, for ``fl-app check``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_app.components import Components, build, check_stopping, make_engine, make_tracker
from fl_app.config import to_json
from fl_app.federation import initial_model
from fl_app.params import num_bytes
from fl_app.privacy.accounting import accountant_named
from fl_app.private_preflight import FixedTask, client_sizes
from fl_app.selection import planned_rounds
from fl_app.types import PrivacyUnit

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
        "privacy": str(components.privacy.unit),
        **(
            {"replaced_layers": "; ".join(components.task.changes()) or "none"}
            if isinstance(components.task, FixedTask)
            else {}
        ),
        **_privacy_plan(components, rounds=config["rounds"]),
        "engine": type(engine).__name__,
        "seed": components.seed,
    }


def _privacy_plan(components: Components, *, rounds: int) -> dict[str, Any]:
    """Return what privacy costs: the smallest and the largest client, per round and at the end.

    With the noise on the server, what everybody pays.
    """
    privacy, release = components.privacy, components.release
    if release is not None:
        return {
            "privacy_plan": {
                "noise": release.noise_multiplier,
                "sample_rate": release.sample_rate or 1.0,
                "epsilon_end": release.planned_epsilon,
                "delta": privacy.delta,
            }
        }
    if privacy.unit is PrivacyUnit.NONE:
        return {}
    accountant, sizes = accountant_named(privacy.accountant), client_sizes(components.data)
    planned = getattr(privacy, "planned_rounds", None) or planned_rounds(
        components.selector, components.data.clients, rounds=rounds, seed=components.seed
    )
    training, plan = components.training, {}
    for who, size in (("smallest", min(sizes)), ("largest", max(sizes))):
        event = privacy.event(size, batch_size=training.batch_size, epochs=training.epochs)
        if event is None:
            continue
        plan[f"privacy_of_{who}_client"] = {
            "records": size,
            "noise": event.noise_multiplier,
            "sample_rate": event.sample_rate,
            "steps": event.count,
            "epsilon_a_round": accountant.epsilon([event], delta=privacy.delta),
            "rounds": planned,
            "epsilon_end": accountant.epsilon([event.times(planned)], delta=privacy.delta),
            "delta": privacy.delta,
        }
    return plan


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print a plan as a table."""
    table = Table(title="This would run", show_header=False, title_justify="left")
    for name, value in plan.items():
        if isinstance(value, Mapping):
            value = ", ".join(
                f"{key.replace('_', ' ')} {entry:.4g}" for key, entry in value.items()
            )
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
