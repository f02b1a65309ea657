"""Persistent worker processes that train clients, for models that keep a core busy.

Workers are forked from a small server process that has imported torch once and started no
threads, so they are cheap to start and safe to fork. A client's memory travels with its
instruction and comes back with its reply: it lives in the parent, whichever worker trains.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

import torch
from flwr.app import Message, RecordDict, UserConfig
from flwr.app.message.message import make_message

from fl_app.client_state import MemoryClientState
from fl_app.failures import error_reply
from fl_app.storage import tree_from_bytes, tree_to_bytes
from fl_app.training import ClientTimeoutError
from fl_app.types import FlAppError

GRACE_S = 1.0
"""Seconds past a round's deadline that a worker has to give up by itself before it is ended."""


_Answer: TypeAlias = tuple[Message, Mapping[str, Any]]
"""A reply, and what its client remembers now."""


class WorkerDiedError(FlAppError):
    """A worker process ended while it trained a client: killed, out of memory, or crashed."""


@dataclass(kw_only=True)
class _Job:
    number: int
    message: Message
    node_config: UserConfig

    @property
    def client(self) -> str:
        return str(self.node_config["client-id"])

    @property
    def deadline(self) -> float:
        metadata = self.message.metadata
        return metadata.created_at + metadata.ttl


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    held_content: RecordDict | None = None
    jobs: deque[_Job] = field(default_factory=deque)
    abandoned: deque[_Job] = field(default_factory=deque)

    @property
    def deadline(self) -> float | None:
        """When what it does now must be done; None if it is idle."""
        doing = self.abandoned or self.jobs
        return doing[0].deadline if doing else None


class WorkerPool:
    """Carries out instructions in several processes; replies come in the order of instructions.

    Args:
        workers: Processes, >= 1.
        threads: Torch's intra-op threads in each.
        run_config: Flower's run config.
        states: What clients remember.
        prefetch: Instructions a worker is given ahead, so that it need not wait for the next.
    """

    def __init__(
        self,
        *,
        workers: int,
        threads: int,
        run_config: UserConfig,
        states: MemoryClientState,
        prefetch: int = 2,
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fl_app.client_messages"])
        self._threads = threads
        self._run_config = run_config
        self._states = states
        self._prefetch = prefetch
        self._workers = [self._start() for _ in range(workers)]
        self._next_number = 0

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=1.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def run(self, jobs: Iterable[tuple[Message, UserConfig]]) -> Generator[Message, None, None]:
        """Yield one reply for each (instruction, node config), in that order."""
        self.wait_until_ready()
        waiting = deque(self._numbered(jobs))
        due = deque(job.number for job in waiting)
        done: dict[int, _Answer] = {}
        try:
            while due:
                self._hand_out(waiting, done)
                self._gather(waiting, done)
                while due and due[0] in done:
                    reply, state = done.pop(due.popleft())
                    # Kept only now: a reply that nobody asks for any more must leave no trace,
                    # or the number of workers would show in what clients remember.
                    self._states.merge(state)
                    yield reply
        finally:
            self._abandon()

    def wait_until_ready(self) -> None:
        """Wait for workers that are still starting: that should not count as their clients' time.

        Raises:
            WorkerDiedError: One could not start.
        """
        for worker in self._workers:
            if not worker.ready:
                try:
                    worker.connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise WorkerDiedError(
                        "A worker process could not start; its own message stands above. "
                        "engine.workers=1 does without."
                    ) from error
                worker.ready = True

    def _numbered(self, jobs: Iterable[tuple[Message, UserConfig]]) -> Generator[_Job, None, None]:
        for message, node_config in jobs:
            self._next_number += 1
            yield _Job(number=self._next_number, message=message, node_config=node_config)

    def _hand_out(self, waiting: deque[_Job], done: dict[int, _Answer]) -> None:
        """Give each worker instructions until it has as many as it may have ahead."""
        for depth in range(1, self._prefetch + 1):
            for worker in self._workers:
                if (
                    not waiting
                    or len(worker.jobs) >= depth
                    or not self._may_take(worker, waiting[0])
                ):
                    continue
                job = waiting.popleft()
                if time.time() > job.deadline:
                    late = ClientTimeoutError("The round's time was up before this client's turn.")
                    done[job.number] = (error_reply(job.message, late), {})
                    continue
                worker.jobs.append(job)
                # A worker that has just died is noticed, and its jobs are taken back, in _gather.
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._send(worker, job)

    def _may_take(self, worker: _Worker, job: _Job) -> bool:
        """Return whether sending a job to a worker cannot block.

        One that is busy may be sending a large reply, and reads nothing until that has been read:
        only what surely fits into the pipe's buffer may be sent to it.
        """
        if worker.abandoned:
            return False
        small = worker.held_content is job.message.content and not self._states.of(job.client)
        return small or not worker.jobs

    def _send(self, worker: _Worker, job: _Job) -> None:
        """Send an instruction; its content only if the worker does not hold it already."""
        content = job.message.content
        payload = None
        if worker.held_content is not content:
            payload = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
            worker.held_content = content
        bare = make_message(metadata=job.message.metadata, content=RecordDict())
        # As bytes: torch would send each tensor as an open file of its own.
        state = _state_to_bytes(self._states.of(job.client))
        worker.connection.send((job.number, bare, payload, job.node_config, state))

    def _gather(self, waiting: deque[_Job], done: dict[int, _Answer]) -> None:
        """Wait for something to happen: replies, a worker that died, or one that hangs."""
        by_connection = {worker.connection: worker for worker in self._workers}
        busy = [worker.deadline for worker in self._workers if worker.deadline is not None]
        if not busy:
            return
        patience = max(0.0, min(busy) + GRACE_S - time.time())
        for connection in wait(list(by_connection), timeout=min(patience, 3600.0)):
            worker = by_connection[connection]  # type: ignore[index]  # wait() types it wider
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                died = WorkerDiedError("The worker process that trained this client died.")
                self._replace(worker, died, waiting, done)
                continue
            worker.ready = True
            if answer is None:  # it has started, in place of one that died
                continue
            number, reply, state = answer
            if worker.abandoned:
                worker.abandoned.popleft()
            else:
                worker.jobs.popleft()
                done[number] = (reply, _state_from_bytes(state))
        for worker in list(self._workers):
            if worker.deadline is not None and time.time() > worker.deadline + GRACE_S:
                late = ClientTimeoutError("Still busy at the deadline; its process was ended.")
                self._replace(worker, late, waiting, done)

    def _replace(
        self,
        worker: _Worker,
        error: Exception,
        waiting: deque[_Job],
        done: dict[int, _Answer],
    ) -> None:
        """End a worker, fail the client it was at, and start another in its place."""
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        if worker.jobs and not worker.abandoned:
            job = worker.jobs.popleft()
            done[job.number] = (error_reply(job.message, error), {})
        waiting.extendleft(reversed(worker.jobs))
        self._workers[self._workers.index(worker)] = self._start()

    def _abandon(self) -> None:
        """Forget what is still under way.

        A worker takes nothing new until it has answered what it was abandoned with, or is ended
        at the deadline of that.
        """
        for worker in self._workers:
            worker.abandoned.extend(worker.jobs)
            worker.jobs.clear()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self._run_config, self._threads), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process=process, connection=ours)


def serve(connection: Connection, run_config: UserConfig, threads: int) -> None:
    """Carry out instructions until the other end closes; the main function of a worker."""
    from fl_app.engines.local import adopt_identity, simulated_clients
    from fl_app.engines.local_grid import call_client

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(threads)
    adopt_identity()
    app, states = simulated_clients(run_config)
    held = RecordDict()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(None)
        while True:
            number, bare, payload, node_config, state = connection.recv()
            if payload is not None:
                held = pickle.loads(payload)
            message = make_message(metadata=bare.metadata, content=held)
            states.restore(_state_from_bytes(state))
            reply = call_client(app, message, node_config, run_config)
            connection.send((number, reply, _state_to_bytes(states.snapshot())))


def _state_to_bytes(state: Mapping[str, Any]) -> bytes:
    return tree_to_bytes(dict(state)) if state else b""


def _state_from_bytes(content: bytes) -> Mapping[str, Any]:
    state: Mapping[str, Any] = tree_from_bytes(content) if content else {}
    return state
