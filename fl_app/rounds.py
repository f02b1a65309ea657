"""The loop over rounds: train, measure, record, checkpoint, stop.

`run_rounds` is the whole life of a run. What a round *is* stands in `fl_app.strategy`; this module
adds what must survive a crash and what others may watch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fl_app.algorithm import ServerState
from fl_app.checkpoint import Checkpoints
from fl_app.codec import instruction_config
from fl_app.exchange import exchange
from fl_app.privacy.base import BudgetExhaustedError
from fl_app.stopping import Progress, Stopping, describe_stop
from fl_app.strategy import BudgetsSpentError, FederatedStrategy
from fl_app.tracking.base import Trackers
from fl_app.tracking.rounds_file import RoundsFile
from fl_app.types import Evaluation, FlAppError, Params, RoundReport, StopReason

log = logging.getLogger(__name__)


class RunFolderError(FlAppError):
    """The run's folder cannot be written: not allowed, or the disk is full."""


@runtime_checkable
class Resumable(Protocol):
    """A Grid that holds part of a run's state, such as the memory of simulated clients."""

    def snapshot(self) -> Mapping[str, Any]:
        """Return that part as a tree."""
        ...

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Set that part to what `snapshot` returned."""
        ...


@dataclass(kw_only=True)
class Run:
    """A run in progress.

    Attributes:
        name: Name of the run, the same after a resume.
        strategy: Holds the server state.
        grid: Reaches the clients.
        evaluate: Measures a global model on the held-out set; None if there is none.
        rounds: Last round.
        evaluate_every: Rounds between two measurements on the held-out set; the last is measured.
        stopping: What ends the run earlier.
        timeout_s: Seconds a round waits for replies, or None.
        rounds_file: The run's record.
        trackers: Who watches.
        checkpoints: Where checkpoints go.
        checkpoint_every: Rounds between two of them, or 0 for none; the last round has one.
        launched_at: `time.time` value at the start of the command.
        told_run_dir: The run's folder, if clients are simulated and so may know it.
        train_config: What training instructions carry besides model and round.
        elapsed_before_s: Seconds that the run had taken before it was resumed.
        progress: What stopping remembers.
        stopped: Why the run ended, once it has.
    """

    name: str
    strategy: FederatedStrategy
    grid: Grid
    evaluate: Callable[[Params], Evaluation] | None
    rounds: int
    evaluate_every: int
    stopping: Stopping
    timeout_s: float | None
    rounds_file: RoundsFile
    trackers: Trackers
    checkpoints: Checkpoints
    checkpoint_every: int
    launched_at: float
    told_run_dir: str | None = None
    train_config: Mapping[str, Any] = field(default_factory=dict)
    elapsed_before_s: float = 0.0
    progress: Progress = field(default_factory=Progress)
    stopped: StopReason | None = None

    def elapsed_s(self) -> float:
        """Return the wall-clock seconds the run has taken, those before a resume included."""
        return self.elapsed_before_s + time.time() - self.launched_at


def run_rounds(run: Run) -> StopReason:
    """Play the rounds that are left and return why the run ended."""
    arrays = run.strategy.current_arrays()
    while run.stopped is None:
        number = run.strategy.state.round + 1
        if number > run.rounds:
            run.stopped = StopReason.ROUNDS
            break
        try:
            arrays, report = _play_round(run, number, arrays)
        except (BudgetsSpentError, BudgetExhaustedError) as error:
            log.warning("%s", error)
            run.stopped = StopReason.BUDGET
            log.info(describe_stop(run.stopped, number - 1))
            if run.checkpoint_every:
                save_checkpoint(run)
            break
        with writing_to(run.rounds_file.path.parent):
            run.rounds_file.append(report)
        run.trackers.on_round(report)
        run.progress, run.stopped = run.stopping.after_round(
            run.progress, report.metrics, elapsed_s=run.elapsed_s()
        )
        due = run.checkpoint_every and number % run.checkpoint_every == 0
        if due or (run.checkpoint_every and (run.stopped or number == run.rounds)):
            save_checkpoint(run)
        if run.stopped:
            log.info(describe_stop(run.stopped, number))
    return run.stopped


def _play_round(run: Run, number: int, arrays: ArrayRecord) -> tuple[ArrayRecord, RoundReport]:
    """Play one round; return the global model after it, and what happened."""
    began = time.perf_counter()
    config = instruction_config(run.name, run.train_config, run_dir=run.told_run_dir)
    contents = run.strategy.ask(number, arrays, config)
    cohort = run.strategy.cohort(contents, run.grid)
    if cohort is not None:
        changed, _ = run.strategy.aggregate_cohort(number, cohort)
    else:
        messages = run.strategy.messages(number, contents, run.grid)
        replies = exchange(run.grid, messages, timeout_s=run.timeout_s)
        changed, _ = run.strategy.aggregate_train(number, replies)
        replies.close()
    metrics: Mapping[str, float] = {}
    if run.evaluate and (number % run.evaluate_every == 0 or number == run.rounds):
        metrics = run.evaluate(run.strategy.state.params).metrics
    report = run.strategy.last_report()
    seconds = time.perf_counter() - began
    return changed or arrays, replace(report, metrics=metrics, seconds=seconds)


def save_checkpoint(run: Run) -> None:
    """Write all that a resumed run needs; the record is made durable first."""
    content = {
        "server": run.strategy.state.to_tree(),
        "progress": asdict(run.progress),
        "stopped": None if run.stopped is None else str(run.stopped),
        "stopping": repr(run.stopping),
        "rounds_file": run.rounds_file.position(),
        "trackers": run.trackers.state(),
        "grid": run.grid.snapshot() if isinstance(run.grid, Resumable) else None,
        "elapsed_s": run.elapsed_s(),
    }
    with writing_to(run.rounds_file.path.parent):
        run.rounds_file.sync()
        run.checkpoints.save(run.strategy.state.round, content)


@contextmanager
def writing_to(run_dir: Path) -> Generator[None, None, None]:
    """Turn an error of the operating system in the block into `RunFolderError`."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{run_dir} cannot be written ({error}): make room; a run that has begun goes on with: "
            f"fl-app run resume={run_dir}"
        ) from error


def resume_from_checkpoint(run: Run) -> int:
    """Bring a run to where its newest readable checkpoint was taken; return that round.

    What was recorded after it is cut off the record: those rounds are played again. Without a
    checkpoint, for a run killed before its first, that is the beginning.
    """
    content = run.checkpoints.load_latest()
    if content is None:
        log.warning("No checkpoint can be read: the run starts again from its first round.")
        run.checkpoints.set_aside_after(0)
        run.rounds_file.truncate(0)
        return 0
    run.strategy.resume(ServerState.from_tree(content["server"]))
    run.progress = Progress(**content["progress"])
    run.elapsed_before_s = content["elapsed_s"]
    if content["stopped"] and content["stopping"] == repr(run.stopping):
        run.stopped = StopReason(content["stopped"])
    run.rounds_file.truncate(content["rounds_file"])
    run.trackers.restore(content["trackers"])
    if isinstance(run.grid, Resumable) and content["grid"] is not None:
        run.grid.restore(content["grid"])
    run.checkpoints.set_aside_after(run.strategy.state.round)
    return run.strategy.state.round
