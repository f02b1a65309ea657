"""``engine=local``: a Flower Grid that calls the ClientApp in this process, or in a few workers.

No Ray, no sockets, and nothing is serialised unless it crosses a process. The ServerApp and the
ClientApp are the ones that run in a real federation; only the Grid below them differs.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import active_count
from typing import Any

import torch
from flwr.app import Context, Message, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from fl_app.algorithm import make_running
from fl_app.client_app import app as client_app
from fl_app.client_cohort import AloneWork, ClientCohort, CohortWork, Work, measure_clients
from fl_app.client_messages import admit as admit_cohort
from fl_app.client_messages import local_runtime, local_states
from fl_app.client_state import MemoryClientState
from fl_app.cohort import CohortTrainer
from fl_app.components import Components, build, settled
from fl_app.config import to_json
from fl_app.engines.lanes import Lanes
from fl_app.engines.local_grid import RUN_ID, InProcess, LocalGrid
from fl_app.engines.memory import keep_freed_memory
from fl_app.engines.workers import WorkerPool
from fl_app.federation import run_federation
from fl_app.foreign import SimulatedApp
from fl_app.params import read_params
from fl_app.stacked.layer import NotStackableError
from fl_app.types import ClientId, ConfigError, PrivacyUnit
from fl_app.vectorizing import CORES, HeavyModelError, check_device, cohort_trainer, device_of

log = logging.getLogger(__name__)

CLIENTS_A_PROCESS = 16
"""Clients of a round side by side in one process before a further one pays."""


@dataclass(frozen=True, kw_only=True)
class LocalEngine:
    """Runs a whole federation on this machine.

    Attributes:
        vectorize: "auto": clients of a cohort are trained side by side (`fl_app.cohort`) where the
            model allows it, else one by one; "true": or the run is refused; "false": one by one,
            with the same bits on any number of workers, and as ``engine=simulation`` has them.
        workers: Processes that train, >= 1; 1 is this process itself. None: as many as there are
            cores, if clients are trained side by side and there are some for each process, or if
            a model keeps a core busy by itself; else 1. One by one any number gives the same bits,
            side by side another number gives others.
        threads: Torch's intra-op threads in each, >= 1. Another number gives other bits, and for
            small models more than one is slower.
        device: Where clients are trained side by side: "cpu", "cuda", "cuda:1", or "auto" for a
            GPU if there is one.
        chunk_mib: Memory that each process may take for clients side by side, about, in MiB, >= 1;
            None for what suits the device.
    """

    vectorize: str = "auto"
    workers: int | None = None
    threads: int = 1
    device: str = "cpu"
    chunk_mib: int | None = None

    def __post_init__(self) -> None:
        for key, value in (
            ("workers", self.workers),
            ("threads", self.threads),
            ("chunk_mib", self.chunk_mib),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"engine.{key}={value} must be >= 1, or null.")
        if self.vectorize.lower() not in ("auto", "true", "false"):
            raise ConfigError(
                f"engine.vectorize={self.vectorize} is not known: choose auto, true or false."
            )
        check_device("engine.device", self.device)

    def run(self, config: Mapping[str, Any], *, launched_at: float) -> Path:
        """Play a run, or the rest of one; return its folder. Raises as `run_federation`."""
        torch.set_num_threads(self.threads)
        config = settled(config)
        config_json = to_json(config)
        components = build(config_json)
        run_config = {**components.client_app.run_config, "config-json": config_json}
        adopt_identity()
        with self.grid(components.data.clients, run_config) as grid:
            return run_federation(config, grid, launched_at=launched_at)

    def grid(self, clients: Sequence[ClientId], run_config: UserConfig) -> LocalGrid:
        """Return a Grid over these clients that drives the ClientApp of the run config.

        Raises:
            ConfigError: The clients cannot be trained as they are told to be.
        """
        components = build(str(run_config["config-json"]))
        try:
            trainer = self._trainer(components)
        except NotStackableError as error:
            if self.vectorize.lower() == "true":
                raise ConfigError(
                    f"engine.vectorize={self.vectorize} cannot be done: {error}. Choose "
                    "engine.vectorize=auto to have clients trained one by one."
                ) from None
            log.info("Clients are trained one by one: %s.", error)
            heavy = isinstance(error, HeavyModelError)
            processes = self.workers or (CORES if heavy else 1)
            if heavy and self._shares_memory(components) and (self.workers or active_count() == 1):
                work = AloneWork(local_runtime(run_config))
                return self._together(components, clients, run_config, work, processes)
            return self._one_by_one(components, clients, run_config, processes)
        if trainer is None:
            return self._one_by_one(components, clients, run_config, self.workers or 1)
        if trainer.model.device.type == "cpu":
            keep_freed_memory()
        shared = self._shares_memory(components) and trainer.model.device.type == "cpu"
        if (self.workers or 1) > 1 and not shared and self.vectorize.lower() == "auto":
            log.info(
                "Clients are trained one by one: engine.workers=%d share no memory with a timeout, "
                "a remembered optimizer, several threads, or a GPU.",
                self.workers,
            )
            return self._one_by_one(components, clients, run_config, self.workers or 1)
        # Processes are forked, which is best done while there is one thread.
        wanted = components.selector.wanted(len(clients))
        pays = min(CORES, max(1, wanted // CLIENTS_A_PROCESS)) if active_count() == 1 else 1
        side_by_side = CohortWork(local_runtime(run_config), trainer)
        processes = (self.workers or pays) if shared else 1  # a GPU is not to be forked
        return self._together(components, clients, run_config, side_by_side, processes)

    def _shares_memory(self, components: Components) -> bool:
        """Return whether processes may be forked that share what a round needs.

        Other systems than Linux have libraries that do not bear it, nor do torch's own threads.
        What a client's optimizer remembers lies in this process. And one that hangs past a deadline
        can be ended without the run only if it is one of `fl_app.engines.workers`.
        """
        waits = components.selector.round_timeout_s is None
        remembers = components.training.keep_optimizer_state
        return sys.platform == "linux" and self.threads == 1 and waits and not remembers

    def _one_by_one(
        self,
        components: Components,
        clients: Sequence[ClientId],
        run_config: UserConfig,
        workers: int,
    ) -> LocalGrid:
        """Return a Grid whose clients are trained one by one, in that many processes."""
        private = components.privacy.unit is not PrivacyUnit.NONE
        admit = partial(admit_cohort, run_config=run_config) if private else None
        if workers == 1:
            app, states = simulated_clients(run_config)
            states.restore({})
            return LocalGrid(clients, InProcess(app, run_config), states, admit=admit)
        components.client_app.load()  # a bad one is told before workers
        states = MemoryClientState()
        pool = WorkerPool(
            workers=workers, threads=self.threads, run_config=run_config, states=states
        )
        try:
            pool.wait_until_ready()
        except BaseException:
            pool.close()
            raise
        return LocalGrid(clients, pool, states, admit=admit, close=pool.close)

    def _together(
        self,
        components: Components,
        clients: Sequence[ClientId],
        run_config: UserConfig,
        work: Work,
        processes: int,
    ) -> LocalGrid:
        """Return a Grid whose clients are trained without messages, in that many processes."""
        app, states = simulated_clients(run_config)
        states.restore({})
        close = None
        if processes > 1:
            wanted = components.selector.wanted(len(clients))
            asked = math.ceil(wanted * (1 + getattr(components.selector, "over_selection", 0.0)))
            if work.side_by_side and _streams(components):
                asked = min(asked, processes * work.at_once)
            lanes = Lanes(
                work,
                read_params(components.task.build_model()),
                processes=processes,
                most_clients=asked,
                threads=self.threads,
            )
            work, close = lanes, lanes.close
        runtime = local_runtime(run_config)
        return LocalGrid(
            clients,
            InProcess(app, run_config),
            states,
            gather=partial(ClientCohort, runtime, work),
            # Others may mix the records that they are run on together.
            measure=partial(measure_clients, runtime) if work.side_by_side else None,
            close=close,
        )

    def _trainer(self, components: Components) -> CohortTrainer | None:
        """Return what trains clients side by side; None if they are to be trained one by one.

        Raises:
            NotStackableError: They cannot be trained side by side.
            ConfigError: The device is not there.
        """
        device = device_of("engine.device", self.device)
        if self.vectorize.lower() == "false":
            return None
        chunk_bytes = None if self.chunk_mib is None else self.chunk_mib << 20
        return cohort_trainer(components, device=device, chunk_bytes=chunk_bytes)


def _streams(components: Components) -> bool:
    """Return whether the deltas of a part of a round are needed no more once the next is asked."""
    return components.release is None and make_running(components.algorithm) is not None


def simulated_clients(
    run_config: UserConfig,
) -> tuple[Callable[[Message, Context], Message], MemoryClientState]:
    """Return the ClientApp that this process drives, and what its clients remember.

    Raises:
        ConfigError: ``client_app.app`` names none.
    """
    components = build(str(run_config["config-json"]))
    if components.client_app.is_ours:
        return client_app, local_states(run_config)
    states = MemoryClientState()
    return SimulatedApp(components.client_app.load(), states, seed=components.seed), states


def adopt_identity() -> None:
    """Tell Flower which task this process is: it asks whenever a message is made."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
