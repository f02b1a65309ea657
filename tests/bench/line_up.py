"""Who competes: each way to train as a `Contender`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import BENCH, Contender
from workloads import SEED, WORKLOADS

COHORT, ONE_BY_ONE = "cohort", "one by one"
"""What ``training`` says in a summary."""

OURS, OURS_ONE_BY_ONE = "ours", "ours, one by one"
BARE, BARE_THREADS, BARE_PROCESSES = (
    "bare PyTorch loop",
    "bare PyTorch loop, 2 threads",
    "bare PyTorch loop, 2 processes",
)
PFL = "pfl-research 0.6"
FLOWER, FLOWER_TUNED = "flwr.simulation", "flwr.simulation, tuned"
OPACUS, OPACUS_THREADS = "Opacus loop", "Opacus loop, 2 threads"
LIMIT, LIMIT_THREADS = "the limit", "the limit, 2 threads"
LIMIT_TUNED, LIMIT_TUNED_THREADS = "the limit, malloc tuned", "the limit, malloc tuned, 2 threads"

MALLOC_TUNED = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
"""Has glibc keep what is freed, so that no page is faulted in twice."""

PRIVATE = ("privacy=record", "privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")

BARE_MODEL = "bare.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where contenders of one row play, and for how many rounds.

    Attributes:
        folder: Of the row.
        rounds: Rounds each of them plays, warm-up included.
        pfl_python: Interpreter that has pfl-research, or None.
    """

    folder: Path
    rounds: int
    pfl_python: Path | None = None

    def contender(
        self,
        name: str,
        path: str,
        script: str,
        *arguments: object,
        frozen_between_turns: bool = False,
        threads: int | None = 1,
        variables: dict[str, str] | None = None,
    ) -> Contender:
        """Return a contender that runs a script of this folder."""
        return Contender(
            name=name,
            path=path,
            command=[str(BENCH / script), *(str(argument) for argument in arguments)],
            folder=self.folder_of(name),
            frozen_between_turns=frozen_between_turns,
            threads=threads,
            variables=variables or {},
        )

    def folder_of(self, name: str) -> Path:
        """Return the folder of a contender."""
        return self.folder / "".join(c if c.isalnum() else "_" for c in name)


MakeContender = Callable[[Stage], Contender | None]
"""Returns a contender, or None where what it needs is not there."""


def ours(workload: str, *overrides: str, name: str = OURS, training: str = COHORT) -> MakeContender:
    """Return ours with its default settings, and further overrides."""
    asked = WORKLOADS[workload]

    def make(stage: Stage) -> Contender:
        command = [
            *("-m", "fl_app", "run", f"rounds={stage.rounds}", f"seed={SEED}", "progress=none"),
            *("task._target_=synthetic_task.RandomImages", f"+task.workload={workload}"),
            *("~task.model", "~task.test_fraction", "~task.extra_metrics"),
            *("partition=generated", f"partition.num_clients={asked.clients}"),
            f"selection.count={asked.cohort}",
            *(f"client.batch_size={asked.batch}", "client.epochs=1"),
            f"client.optimizer.lr={asked.lr}",
            *("fairness_clients=0", "checkpoint_every=0", "+tracking._target_=turns.TakeTurns"),
            *overrides,
        ]
        return Contender(
            name=name,
            path=" ".join(("fl-app run engine=local", *overrides)),
            command=command,
            folder=stage.folder_of(name),
            threads=None,
            training=training,
        )

    return make


def ours_one_by_one(workload: str, *overrides: str) -> MakeContender:
    """Return ours, told to train clients one by one in one process."""
    alone = ("engine.vectorize=false", "engine.workers=1", "engine.threads=1")
    return ours(workload, *alone, *overrides, name=OURS_ONE_BY_ONE, training=ONE_BY_ONE)


def bare(workload: str, name: str = BARE, *, threads: int = 1, processes: int = 1) -> MakeContender:
    """Return the bare PyTorch loop; the model of `BARE` or `BARE_THREADS` is kept."""
    return lambda stage: stage.contender(
        name,
        f"the same steps and mean in a plain loop; {processes} x {threads} threads",
        "bare_loop.py",
        *(workload, stage.rounds, threads, processes),
        stage.folder / (f"{processes}_{BARE_MODEL}" if processes > 1 else BARE_MODEL),
        threads=threads,
    )


def the_limit(workload: str, name: str, *, threads: int, tuned: bool) -> MakeContender:
    """Return one model trained on all records of a round in large batches."""
    return lambda stage: stage.contender(
        name,
        "one model on the same records, in steps of a whole cohort's batches",
        *("the_limit.py", workload, stage.rounds, threads),
        threads=threads,
        variables=MALLOC_TUNED if tuned else {},
    )


def opacus(workload: str, name: str = OPACUS, *, threads: int = 1) -> MakeContender:
    """Return private clients as a user of Opacus writes them."""
    return lambda stage: stage.contender(
        name,
        "PrivacyEngine.make_private for every client, one after another",
        *("opacus_loop.py", workload, stage.rounds, threads),
        threads=threads,
    )


def flower(workload: str, name: str = FLOWER, *, cpus: int = 0) -> MakeContender:
    """Return Flower's simulation on Ray, if Ray is there."""
    how = f"Ray told to run an actor on {cpus} core" if cpus else "Ray as it comes"

    def make(stage: Stage) -> Contender | None:
        if importlib.util.find_spec("ray") is None:
            return None
        return stage.contender(
            name,
            f"run_simulation, FedAvg, the quickstart's client; {how}",
            *("flower_simulation.py", workload, stage.rounds, cpus),
            frozen_between_turns=True,
        )

    return make


def pfl(workload: str) -> MakeContender:
    """Return pfl-research in its own environment, if that is there."""

    def make(stage: Stage) -> Contender | None:
        if stage.pfl_python is None:
            return None
        contender = stage.contender(
            PFL,
            "FederatedAveraging on SimulatedBackend, without evaluation",
            *("pfl_simulation.py", workload, stage.rounds),
            variables={"PYTHONPATH": str(BENCH)},  # and nothing of ours
        )
        contender.python = str(stage.pfl_python)
        return contender

    return make
