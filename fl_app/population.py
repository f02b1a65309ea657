"""Who takes part in a run: waits for nodes, tells which clients they are, asks what they own."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fl_app.components import Components
from fl_app.directory import Directory, KnowsClients, QueryDirectory, describe
from fl_app.rounds import writing_to
from fl_app.tracking.partition_plot import Partition, has_partition, write_partition
from fl_app.types import ClientId, EmptyCohortError, Role, stream_seed

log = logging.getLogger(__name__)

MOST_DESCRIBED = 100
"""Clients, at most, whose share of the records is shown."""
PATIENCE_S = 120.0
"""Seconds that a run waits for the clients it needs before its first round."""


def engine_of(grid: Grid) -> str:
    """Return which engine carries the messages: what a run was, whatever it was asked to be."""
    if isinstance(grid, KnowsClients):
        return "local"
    return "simulation" if isinstance(grid, InMemoryGrid) else "deployment"


def wait_for_nodes(grid: Grid, *, patience_s: float | None = None, settle_s: float = 0.5) -> int:
    """Return how many nodes are connected, once there are some and no more come.

    Flower's simulation registers its nodes one by one while the ServerApp is already running.

    Args:
        grid: Reaches the nodes.
        patience_s: Seconds to wait for the first; None for what suits the runtime.
        settle_s: Seconds without another that count as "no more come".

    Raises:
        EmptyCohortError: None came.
    """
    if patience_s is None:
        patience_s = 10.0 if isinstance(grid, InMemoryGrid) else PATIENCE_S
    count, since = 0, time.monotonic()
    while True:
        connected, now = len(list(grid.get_node_ids())), time.monotonic()
        if connected != count:
            count, since = connected, now
        if count and now - since >= settle_s:
            return count
        if not count and now - since >= patience_s:
            raise EmptyCohortError(
                f"no SuperNode is connected, {patience_s:.0f} s after the start; a federation "
                "needs at least one. In a simulation, ask for some: flwr run . "
                "--federation-config 'num-supernodes=10'; in a deployment, start SuperNodes first."
            )
        time.sleep(min(settle_s, 0.1))


def directory_of(grid: Grid, components: Components) -> Directory:
    """Return who the clients are, once enough are known; say so if nodes and population differ."""
    count = components.selector.min_clients
    if isinstance(grid, KnowsClients):
        wait_for_clients(grid.directory, count)
        return grid.directory
    simulated = isinstance(grid, InMemoryGrid)
    # A simulated node answers once its actor has started, which takes long on a busy machine; but
    # all there will ever be are there from the beginning.
    directory = QueryDirectory(grid, timeout_s=300.0 if simulated else 60.0)
    wait_for_clients(directory, count, patience_s=0.0 if simulated else PATIENCE_S)
    nodes, population = len(list(grid.get_node_ids())), len(components.data.clients)
    if nodes != population:
        idle = (
            f"{nodes - population} nodes own nothing and take no part"
            if nodes > population
            else f"{population - nodes} clients take no part"
        )
        log.warning(
            "%d nodes are connected, but the population (partition.num_clients) is %d: node i is "
            "client i, so %s. Leave partition.num_clients out to have as many clients as nodes, or "
            "connect %d nodes (in a simulation: --federation-config 'num-supernodes=%d').",
            *(nodes, population, idle, population, population),
        )
    return directory


def wait_for_clients(directory: Directory, count: int, *, patience_s: float = PATIENCE_S) -> None:
    """Return once ``count`` clients are known.

    Raises:
        EmptyCohortError: They did not come.
    """
    deadline = time.monotonic() + patience_s
    while (known := len(directory.clients())) < count:
        if time.monotonic() >= deadline:
            refusals = directory.refusals if isinstance(directory, QueryDirectory) else {}
            reason = f" Node {min(refusals)} said: {refusals[min(refusals)]}" if refusals else ""
            within = f" within {patience_s:.0f} s" if patience_s else ""
            raise EmptyCohortError(
                f"selection.min_clients={count}, but only {known} clients came{within}: start "
                f"more, or lower it.{reason}"
            )
        log.info("Waiting for clients: %d of %d are here.", known, count)
        time.sleep(1.0)


def some_of(clients: Sequence[ClientId], count: int, *, seed: int) -> Sequence[ClientId]:
    """Return all clients, or ``count`` of them drawn from the seed if there are more."""
    if count >= len(clients):
        return clients
    generator = random.Random(stream_seed(seed, Role.FAIRNESS))
    return [clients[position] for position in sorted(generator.sample(range(len(clients)), count))]


def record_partition(
    grid: Grid, directory: Directory, config: Mapping[str, Any], run_dir: Path
) -> None:
    """Write how records are spread over the clients, or over some of them, once in a run."""
    most = min(config["fairness_clients"], MOST_DESCRIBED)
    if not most or has_partition(run_dir):
        return
    clients = directory.clients()
    some = some_of(clients, most, seed=config["seed"])
    told = [
        description
        for description in describe(grid, directory, some, timeout_s=60.0)
        if description.num_examples is not None
    ]
    with writing_to(run_dir):
        write_partition(Partition(population=len(clients), described=tuple(told)), run_dir)
