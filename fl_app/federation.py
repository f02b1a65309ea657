"""One run of the server, from a configuration to the files it leaves.

`run_federation` is what the ServerApp does, whichever engine carries the messages. The files and
their content are a contract; see README, "What a run leaves".
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from fl_app.algorithm import ServerState
from fl_app.attacks import NoAttack
from fl_app.checkpoint import Checkpoints
from fl_app.config import Components, build, check_stopping, make_tracker, to_json, to_yaml
from fl_app.directory import Directory, KnowsClients, QueryDirectory, describe
from fl_app.files import write_atomically
from fl_app.params import load_model, model_hash, read_params, save_model, trainable_names
from fl_app.rounds import Run, resume_from_checkpoint, run_rounds, writing_to
from fl_app.run_config import file_name, local_path
from fl_app.strategy import FederatedStrategy
from fl_app.tracking.base import Tracker, Trackers
from fl_app.tracking.console import ConsoleProgress
from fl_app.tracking.partition_plot import Partition, has_partition, write_partition
from fl_app.tracking.report import write_report
from fl_app.tracking.rounds_file import RoundsFile, iter_reports
from fl_app.tracking.summary import (
    Summary,
    Times,
    config_hash,
    fairness_of,
    totals_of,
    write_json_atomically,
)
from fl_app.training import evaluate
from fl_app.types import (
    ClientId,
    ConfigError,
    EmptyCohortError,
    Evaluation,
    InterruptedRunError,
    Params,
    Role,
    StopReason,
    stream_seed,
)

log = logging.getLogger(__name__)

MOST_DESCRIBED = 100
"""Clients, at most, whose share of the records is shown."""
PATIENCE_S = 120.0
"""Seconds that a run waits for the clients it needs before its first round."""


def run_federation(config: Mapping[str, Any], grid: Grid, *, launched_at: float) -> Path:
    """Play a run, or the rest of one, and return the folder that holds what it leaves.

    Args:
        config: A checked configuration.
        grid: Reaches the clients.
        launched_at: `time.time` value when the command was started.

    Raises:
        ConfigError: The configuration cannot be run.
        RunFolderError: The folder cannot be written; what was written before is whole.
        InterruptedRunError: Ctrl-C was pressed.
        EmptyCohortError: Too few clients came.
    """
    components = build(to_json(config))
    check_stopping(components)
    if engine_of(grid) == "deployment" and components.training.attack != NoAttack():
        raise ConfigError(
            f"client.attack={components.training.attack} is for simulated clients, and these are "
            "real: choose client/attack=none, or engine=local."
        )
    # A resumed run has its model in a checkpoint; the file it began from may be gone.
    path = None if config["resume"] else config["initial_model"]
    start = initial_model(components, path)
    run_dir = run_folder(config)
    try:
        with _locked(run_dir):
            run, resumed_from = _set_up(config, components, start, grid, run_dir, launched_at)
            setup_s = time.time() - launched_at
            try:
                run.trackers.start(config, run_dir)
                reason = run_rounds(run)
                summary = _conclude(run, config, components, run_dir, reason, resumed_from, setup_s)
                run.trackers.finish(summary.to_json())
            finally:
                run.trackers.close()
                run.rounds_file.close()
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; a run that has begun goes on with: fl-app run resume={run_dir}"
        ) from None
    return run_dir


def run_folder(config: Mapping[str, Any]) -> Path:
    """Return the run's folder, made if need be; never that of another run.

    Raises:
        ConfigError: ``output_url`` is not a local path, or cannot be written.
    """
    if config["resume"]:
        return Path(config["resume"])
    folder = local_path(config["output_url"])
    wanted = (
        config["run_dir"]
        or f"{folder}/{datetime.now():%Y-%m-%d/%H-%M-%S}_{file_name(config['name'])}"
    )
    path, number = Path(wanted), 1
    try:
        while True:
            path.mkdir(parents=True, exist_ok=True)
            try:
                # The file that marks a folder as a run's is made exclusively: two runs started in
                # the same second get two folders.
                (path / "config.yaml").open("x").close()
            except FileExistsError:
                number += 1
                path = Path(f"{wanted}_{number}")
            else:
                return path
    except OSError as error:
        raise ConfigError(
            f"output_url={config['output_url']}: {path} cannot be written ({error.strerror}): "
            "choose a folder that can, with output_url=PATH."
        ) from error


@contextmanager
def _locked(run_dir: Path) -> Generator[None, None, None]:
    """Hold the run's folder, so that no second process writes the same run."""
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"resume={run_dir}: another process is still playing this run. Wait or end it."
            ) from error
        yield


def _set_up(
    config: Mapping[str, Any],
    components: Components,
    start: tuple[Params, frozenset[str]],
    grid: Grid,
    run_dir: Path,
    launched_at: float,
) -> tuple[Run, int | None]:
    """Return the run, at its beginning or where its last checkpoint was, and that round."""
    initial, trainable = start
    directory = _directory_of(grid, components)
    run = Run(
        name=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
        strategy=FederatedStrategy(
            algorithm=components.algorithm,
            selector=components.selector,
            checks=components.checks,
            directory=directory,
            initial=initial,
            trainable=trainable,
            seed=components.seed,
            replies=components.client_app.reader(),
        ),
        grid=grid,
        evaluate=_evaluator(components),
        rounds=config["rounds"],
        evaluate_every=config["evaluate_every"],
        stopping=components.stopping,
        timeout_s=components.selector.round_timeout_s,
        rounds_file=RoundsFile(run_dir / "rounds.jsonl"),
        trackers=Trackers(tuple(_trackers(config))),
        checkpoints=Checkpoints(run_dir / "checkpoints", keep=config["checkpoint_keep"]),
        checkpoint_every=config["checkpoint_every"],
        launched_at=launched_at,
        train_config=components.client_app.train_config,
    )
    saved = {**config, "resume": None, "run_dir": str(run_dir)}
    with writing_to(run_dir):
        write_atomically(run_dir / "config.yaml", to_yaml(saved).encode())
    _record_partition(grid, directory, config, run_dir)
    if not config["resume"]:
        return run, None
    resumed_from = resume_from_checkpoint(run)
    if resumed_from == 0 and config["initial_model"]:
        params = load_model(config["initial_model"], initial)
        run.strategy.resume(ServerState(round=0, params=params))
    log.info("Resumed after round %d.", resumed_from)
    return run, resumed_from


def initial_model(components: Components, path: str | None) -> tuple[Params, frozenset[str]]:
    """Return the global model before the first round, and which of its names are trainable.

    Drawn from the seed alone, or read from a ``.safetensors`` file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(components.seed, Role.MODEL))
        model = components.task.build_model()
    params = read_params(model)
    return load_model(path, params) if path else params, trainable_names(model)


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


def _directory_of(grid: Grid, components: Components) -> Directory:
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


def _some(clients: Sequence[ClientId], count: int, *, seed: int) -> Sequence[ClientId]:
    """Return all clients, or ``count`` of them drawn from the seed if there are more."""
    if count >= len(clients):
        return clients
    generator = random.Random(stream_seed(seed, Role.FAIRNESS))
    return [clients[position] for position in sorted(generator.sample(range(len(clients)), count))]


def _record_partition(
    grid: Grid, directory: Directory, config: Mapping[str, Any], run_dir: Path
) -> None:
    """Write how records are spread over the clients, or over some of them, once in a run."""
    most = min(config["fairness_clients"], MOST_DESCRIBED)
    if not most or has_partition(run_dir):
        return
    clients = directory.clients()
    some = _some(clients, most, seed=config["seed"])
    told = describe(grid, directory, some, timeout_s=60.0)
    with writing_to(run_dir):
        write_partition(Partition(population=len(clients), described=tuple(told)), run_dir)


def engine_of(grid: Grid) -> str:
    """Return which engine carries the messages: what a run was, whatever it was asked to be."""
    if isinstance(grid, KnowsClients):
        return "local"
    return "simulation" if isinstance(grid, InMemoryGrid) else "deployment"


def _evaluator(components: Components) -> Callable[[Params], Evaluation] | None:
    """Return what measures a global model on the held-out set, or None if there is no such set."""
    held_out = components.data.held_out
    if held_out is None:
        return None
    model = components.task.build_model()
    return lambda params: evaluate(model, components.task, held_out, params=params)


def _trackers(config: Mapping[str, Any]) -> Generator[Tracker, None, None]:
    if config["progress"] != "none":
        yield ConsoleProgress()
    if (chosen := make_tracker(config)) is not None:
        yield chosen


def _conclude(
    run: Run,
    config: Mapping[str, Any],
    components: Components,
    run_dir: Path,
    reason: StopReason,
    resumed_from: int | None,
    setup_s: float,
) -> Summary:
    """Measure the final model and write what a run leaves."""
    params = run.strategy.state.params
    clients = run.strategy.clients()
    asked = _some(clients, config["fairness_clients"], seed=components.seed)
    evaluations = run.strategy.evaluate_clients(run.grid, asked) if asked else {}
    accuracies = {
        client: evaluation.metrics["accuracy"]
        for client, evaluation in evaluations.items()
        if "accuracy" in evaluation.metrics
    }
    totals = (
        totals_of(iter_reports(run.rounds_file.path)) if run.rounds_file.path.exists() else None
    )
    summary = Summary(
        task=components.task.name,
        engine=engine_of(run.grid),
        strategy=components.algorithm.name,
        seed=components.seed,
        rounds=run.strategy.state.round,
        clients=len(clients),
        cohort_size=components.selector.wanted(len(clients)),
        config_hash=config_hash(config),
        model_hash=model_hash(params),
        metrics=run.evaluate(params).metrics if run.evaluate else {},
        time_s=Times(
            setup=setup_s,
            total=run.elapsed_s(),
            per_round=totals.median_round_s if totals else None,
        ),
        fairness=fairness_of(accuracies),
        stopped_by=reason,
        resumed_from_round=resumed_from,
    )
    if totals:
        summary = replace(summary, communication=totals.communication, failures=totals.failures)
    per_client = {client: dict(e.metrics) for client, e in evaluations.items()}
    with writing_to(run_dir):
        write_json_atomically(run_dir / "clients.json", per_client)
        save_model(params, run_dir / "model.safetensors")
        write_json_atomically(run_dir / "summary.json", summary.to_json())
        write_report(run_dir)
    return summary
