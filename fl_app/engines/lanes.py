"""Processes that train parts of a cohort side by side, each on a core of its own.

Threads would not do: the operations of a small model are so short that threads spend their time
handing Python's lock to one another, and torch's own threads wait for one another at each of them.
Processes are forked, before there are other threads, so they share all that was loaded; a model
and what became of it travel through memory that they share, everything else through a pipe.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from fl_app.client_cohort import Work
from fl_app.params import StackedParams, StackedRow
from fl_app.training import Trained, TrainedModel
from fl_app.types import ClientId, Evaluation, Failure, FlAppError, Params, TrainInstruction

_FITS = 1 << 14
"""Bytes that a pipe takes whether or not somebody receives them."""
ORPHANED_S = 1.0
"""Seconds after which a process that waits looks whether it still has a parent."""


class LaneError(FlAppError):
    """A process that trains a part of a cohort failed, or died."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Where the deltas of one stack lie in shared memory: a tensor a name, one behind another."""

    first_byte: int
    count: int


class _Placed(NamedTuple):
    """What came of a client's training, and where its delta is; a tuple, which travels fast."""

    records: int
    metrics: Mapping[str, float]
    evaluation: Evaluation | None
    stack: int
    row: int


class Lanes:
    """Shares a cohort out to processes, of which this one is the first.

    Args:
        work: Trains clients, in any of the processes.
        model: Names, shapes and types of a model.
        processes: How many, this one included; >= 2.
        most_clients: Clients whose deltas are held at a time, at most; of more, those beyond are
            trained here.
        threads: Torch's intra-op threads of each of the others.

    Attributes:
        side_by_side: Whether each process trains all its clients at once.
    """

    def __init__(
        self, work: Work, model: Params, *, processes: int, most_clients: int, threads: int = 1
    ) -> None:
        self.side_by_side = work.side_by_side
        self.at_once = processes * work.at_once
        self._work = work
        self._broken = False
        rows = -(-most_clients // processes)
        self._lanes = [_Lane(work, model, rows, threads) for _ in range(processes - 1)]

    def __call__(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> Sequence[Trained | Failure]:
        """Return what came of each client's training.

        Raises:
            LaneError: A process died, or training failed in a way that no client is to blame for.
        """
        if self._broken:
            raise LaneError("an earlier round failed in one of the processes: resume the run.")
        self._broken = True  # until all have answered: an answer left over is not the next one's
        parts = [
            list(clients[lane :: len(self._lanes) + 1]) for lane in range(len(self._lanes) + 1)
        ]
        for lane, part in zip(self._lanes, parts[1:], strict=True):
            parts[0] += part[lane.rows_left(instruction) :]
            del part[lane.rows_left(instruction) :]
            lane.ask(part, instruction)
        outcomes = dict(zip(parts[0], self._work(parts[0], instruction), strict=True))
        for lane, part in zip(self._lanes, parts[1:], strict=True):
            outcomes |= zip(part, lane.answer(), strict=True)
        self._broken = False
        return [outcomes[client] for client in clients]

    def forget(self) -> None:
        """Use for other deltas the memory of those that were given."""
        for lane in self._lanes:
            lane.forget()

    def close(self) -> None:
        """End the processes."""
        for lane in self._lanes:
            lane.close()


class _Lane:
    """One further process."""

    def __init__(self, work: Work, model: Params, rows: int, threads: int) -> None:
        self._threads = threads
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in model.items()}
        self._row_bytes = sum(t.numel() * t.element_size() for t in model.values())
        self._rows, self._used, self._round = rows, 0, -1
        # Anonymous, so shared with the child alone; it ends with the two of them.
        self._memory = mmap.mmap(-1, max(1, (rows + 1) * self._row_bytes))
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        # Whoever waits at a pipe is woken on the core of whoever writes to it, and would take turns
        # with it there. Whoever waits at a semaphore is woken on a core that is idle.
        self._asked = context.Semaphore(0)
        self._process = context.Process(target=self._serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def rows_left(self, instruction: TrainInstruction) -> int:
        """Return how many more clients this process can train in an instruction's round."""
        return self._rows - (self._used if instruction.round == self._round else 0)

    def ask(self, clients: Sequence[ClientId], instruction: TrainInstruction) -> None:
        """Have the process train clients."""
        if instruction.round != self._round:  # what it left of the round before is needed no more
            self._round, self._used = instruction.round, 0
        for name, tensor in self._stack(0, 1).items():
            tensor[0].copy_(instruction.params[name])
        first_row = 1 + self._used
        self._used += len(clients)
        with suppress(BrokenPipeError, ConnectionResetError):  # `answer` says that it is dead
            self._tell((list(clients), replace(instruction, params={}), first_row))

    def _tell(self, request: object) -> None:
        message = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        if len(message) > _FITS:  # sending it takes somebody who receives
            self._asked.release()
            self._pipe.send_bytes(message)
        else:
            self._pipe.send_bytes(message)
            self._asked.release()

    def forget(self) -> None:
        """Use all rows again."""
        self._used = 0

    def answer(self) -> Sequence[Trained | Failure]:
        """Return what came of it.

        Raises:
            LaneError: The process died, or says that something failed.
        """
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise LaneError(
                "a process that trained a part of the cohort ended: killed, or out of memory. "
                "engine.workers=1 trains all clients in one process, and engine.chunk_mib lowers "
                "what it takes; a run that has begun can be resumed."
            ) from error
        if isinstance(answer, str):
            raise LaneError(f"training failed in another process:\n{answer}")
        outcomes, stacks = answer
        known = [StackedParams(self._stack(rows.first_byte, rows.count)) for rows in stacks]

        def whole(outcome: _Placed | Failure) -> Trained | Failure:
            if isinstance(outcome, Failure):
                return outcome
            stack = known[outcome.stack]
            row = stack.row(outcome.row)
            model = TrainedModel(
                # One that was trained alone is to be added up as such.
                delta=row if len(stack) > 1 else dict(row),
                metrics=outcome.metrics,
                optimizer_state={},  # lanes are for clients whose optimizers remember nothing
            )
            return Trained(count=outcome.records, model=model, evaluation=outcome.evaluation)

        return [whole(outcome) for outcome in outcomes]

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._tell(None)
        self._process.join(timeout=1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _stack(self, first_byte: int, count: int) -> dict[str, Tensor]:
        """Return views of shared memory as ``(count, *shape)`` tensors, one behind another."""
        stack = {}
        for name, (shape, dtype) in self._like.items():
            numel = count * shape.numel()
            if numel:
                flat = torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=first_byte)
            else:
                flat = torch.empty(0, dtype=dtype)
            stack[name] = flat.view(count, *shape)
            first_byte += numel * dtype.itemsize
        return stack

    def _serve(self, pipe: Connection, work: Work) -> None:
        """Train what is asked for until the other end is closed; the child's main function."""
        self._pipe.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its lanes
        # With a handler of its own: somebody may have held the locks of those there are.
        for logger in (logging.getLogger(), logging.getLogger("fl_app")):
            logger.handlers = []
        logging.getLogger().addHandler(logging.StreamHandler())
        torch.set_num_threads(self._threads)
        parent = os.getppid()
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                while not self._asked.acquire(timeout=ORPHANED_S):
                    if os.getppid() != parent:  # it was killed
                        return
                request = pickle.loads(pipe.recv_bytes())
                if request is None:
                    return
                clients, instruction, first_row = request
                params = {name: tensor[0] for name, tensor in self._stack(0, 1).items()}
                try:
                    outcomes = work(clients, replace(instruction, params=params))
                    pipe.send(self._packed(outcomes, first_row * self._row_bytes))
                except Exception:
                    pipe.send(traceback.format_exc())

    def _packed(
        self, outcomes: Sequence[Trained | Failure], first_byte: int
    ) -> tuple[list[_Placed | Failure], list[_Rows]]:
        """Put deltas into shared memory; return outcomes with the places of their deltas."""
        places: dict[int, int] = {}
        stacks: list[StackedParams] = []  # kept, for their ids not to be another's
        rows: list[_Rows] = []
        packed: list[_Placed | Failure] = []
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                packed.append(outcome)
                continue
            delta = outcome.model.delta
            stack, row = (
                (delta.stack, delta.number)
                if isinstance(delta, StackedRow)
                else (StackedParams({n: t.unsqueeze(0) for n, t in delta.items()}), 0)
            )
            if id(stack) not in places:
                places[id(stack)] = len(rows)
                stacks.append(stack)
                rows.append(_Rows(first_byte=first_byte, count=len(stack)))
                for name, tensor in self._stack(first_byte, len(stack)).items():
                    tensor.copy_(stack.tensors[name])
                first_byte += len(stack) * self._row_bytes
            packed.append(
                _Placed(
                    records=outcome.count,
                    metrics=outcome.model.metrics,
                    evaluation=outcome.evaluation,
                    stack=places[id(stack)],
                    row=row,
                )
            )
        return packed, rows
