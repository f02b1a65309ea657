"""One run of the server, from a configuration to the files it leaves.

`run_federation` is what the ServerApp does, whichever engine carries the messages. The files and
their content are a contract; see README, "What a run leaves".
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
from flwr.serverapp import Grid

from fl_app.algorithm import Algorithm, Composition, ServerState
from fl_app.attacks import NoAttack
from fl_app.checkpoint import Checkpoints
from fl_app.components import Components, build, check_stopping, make_tracker, settled
from fl_app.config import to_json, to_yaml
from fl_app.files import held, write_atomically
from fl_app.params import load_model, model_hash, read_params, save_model, trainable_names
from fl_app.population import directory_of, engine_of, record_partition, some_of
from fl_app.privacy.payments import LedgerPayments
from fl_app.privacy.randomness import Source
from fl_app.private_algorithm import ClientLevelAlgorithm
from fl_app.private_preflight import FixedTask
from fl_app.rounds import Run, resume_from_checkpoint, run_rounds, writing_to
from fl_app.run_config import file_name, local_path
from fl_app.strategy import FederatedStrategy
from fl_app.tracking.base import Tracker, Trackers
from fl_app.tracking.console import ConsoleProgress
from fl_app.tracking.report import write_report
from fl_app.tracking.rounds_file import RoundsFile, iter_reports
from fl_app.tracking.summary import (
    Summary,
    Times,
    config_hash,
    fairness_of,
    privacy_of,
    totals_of,
    write_json_atomically,
)
from fl_app.training import evaluate
from fl_app.types import (
    ConfigError,
    Evaluation,
    InterruptedRunError,
    Params,
    Role,
    StopReason,
    stream_seed,
)

log = logging.getLogger(__name__)

_TRAINING = {True: "cohort", False: "one by one", None: None}


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
    config = settled(config)
    components = build(to_json(config))
    check_stopping(components)
    if engine_of(grid) == "deployment" and components.training.attack != NoAttack():
        raise ConfigError(
            f"client.attack={components.training.attack} is for simulated clients, and these are "
            "real: choose client/attack=none, or simulate with fl-app run."
        )
    if engine_of(grid) == "deployment":
        for key, component in (("privacy", components.privacy), ("selection", components.selector)):
            if getattr(component, "randomness", Source.SECRET) != Source.SECRET:
                raise ConfigError(
                    f"{key}.randomness={Source.REPRODUCIBLE_FOR_TESTS} promises no privacy, and "
                    f"these clients are real: set {key}.randomness={Source.SECRET}."
                )
    if isinstance(components.task, FixedTask):
        for change in components.task.changes():
            log.info("privacy.fix=true: %s.", change)
    # A resumed run has its model in a checkpoint; the file it began from may be gone.
    path = None if config["resume"] else config["initial_model"]
    start = initial_model(components, path)
    run_dir = run_folder(config)
    try:
        with held(
            run_dir, f"resume={run_dir}: another process is still playing this run. Wait or end it."
        ):
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
        ConfigError: ``output_url`` is not a local path, or cannot be written, or the folder of a
            run to go on with is not there.
    """
    if config["resume"]:
        if not (Path(config["resume"]) / "config.yaml").is_file():
            raise ConfigError(
                f"resume={config['resume']} is not the folder of a run on this machine "
                f"({socket.gethostname()}): it never began here, or its files are gone. Start a "
                "new run."
            )
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
    directory = directory_of(grid, components)
    run = Run(
        name=_run_name(run_dir),
        strategy=FederatedStrategy(
            algorithm=_algorithm(components, run_dir),
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
        told_run_dir=None if engine_of(grid) == "deployment" else str(run_dir.resolve()),
        train_config=components.client_app.train_config,
    )
    saved = {**config, "resume": None, "run_dir": str(run_dir)}
    with writing_to(run_dir):
        write_atomically(run_dir / "config.yaml", to_yaml(saved).encode())
    record_partition(grid, directory, config, run_dir)
    if not config["resume"]:
        return run, None
    resumed_from = resume_from_checkpoint(run)
    if resumed_from == 0 and config["initial_model"]:
        params = load_model(config["initial_model"], initial)
        run.strategy.resume(ServerState(round=0, params=params))
    log.info("Resumed after round %d.", resumed_from)
    return run, resumed_from


def _algorithm(components: Components, run_dir: Path) -> Algorithm:
    """Return what plays the rounds: with noise of the server's, paid from the run's ledger."""
    if components.release is None:
        return components.algorithm
    return ClientLevelAlgorithm(
        inner=cast(Composition, components.algorithm),
        plan=components.release,
        payments=LedgerPayments(run_dir, run=_run_name(run_dir)),
        seed=components.seed,
    )


def _run_name(run_dir: Path) -> str:
    """Return the name by which clients keep what they remember of this run, made once in it.

    Not made of the folder's path: a folder may be deleted, and its name used again.
    """
    path = run_dir / ".run"
    if not path.exists():
        with writing_to(run_dir):
            write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text()


def initial_model(components: Components, path: str | None) -> tuple[Params, frozenset[str]]:
    """Return the global model before the first round, and which of its names are trainable.

    Drawn from the seed alone, or read from a ``.safetensors`` file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(components.seed, Role.MODEL))
        model = components.task.build_model()
    params = read_params(model)
    return load_model(path, params) if path else params, trainable_names(model)


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
    measured = "evaluation" in components.privacy.public
    asked = some_of(clients, config["fairness_clients"] if measured else 0, seed=components.seed)
    evaluations = run.strategy.evaluate_clients(run.grid, asked) if asked else {}
    accuracies = {
        client: evaluation.metrics["accuracy"]
        for client, evaluation in evaluations.items()
        if "accuracy" in evaluation.metrics
    }
    budgets = run.strategy.state.budgets.values()
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
        privacy=(
            algorithm.spent(len(clients))
            if isinstance(algorithm := run.strategy.algorithm, ClientLevelAlgorithm)
            else privacy_of(components.privacy, budgets)
        ),
        training=_TRAINING[run.strategy.trained_together],
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
