"""Contender: the clients' steps in a plain PyTorch loop, the floor of training one by one.

    python bare_loop.py WORKLOAD ROUNDS THREADS PROCESSES FILE

The very steps of ``engine=local`` in the same order, and nothing else: no messages, no records,
no checks, no metrics, no files. Cohorts and the order of records are drawn before the clock runs,
model and optimizer are made once. Its final model, saved to FILE, must be that of ours. With two
processes each trains every other client, and parameters are in memory that both share.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from safetensors.torch import save_file
from schedule import Turn, seed_model, turns_of
from torch import Tensor, multiprocessing
from torch.nn import functional
from turns import Turns
from workloads import WORKLOADS, Workload


class Loop:
    """One process' share of the work.

    Args:
        workload: What is trained.
        server: The global parameters; read only.
        change: Where the sum of the clients' changes over the cohort's size is left.
    """

    def __init__(
        self, workload: Workload, server: Sequence[Tensor], change: Sequence[Tensor]
    ) -> None:
        self._workload = workload
        self._server = list(server)
        self._change = list(change)
        self._network = workload.model()
        self._local: list[Tensor] = list(self._network.parameters())
        self._optimizer = torch.optim.SGD(self._local, lr=workload.lr)

    def play(self, drawn: Sequence[Turn]) -> int:
        """Train these clients one after another; return the steps taken."""
        torch._foreach_zero_(self._change)
        steps = 0
        for turn in drawn:
            inputs, targets = self._workload.records_of(turn.client)
            with torch.no_grad():
                torch._foreach_copy_(self._local, self._server)
            for batch in turn.batches:
                self._optimizer.zero_grad()
                outputs = self._network(inputs[batch])
                functional.cross_entropy(outputs, targets[batch]).backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                steps += 1
            with torch.no_grad():
                delta = torch._foreach_sub(self._local, self._server)
                torch._foreach_add_(self._change, delta, alpha=1 / self._workload.cohort)
        return steps


def help_out(loop: Loop, connection: Connection) -> None:
    """Play what the other process sends, on one core, until it sends None."""
    torch.set_num_threads(1)
    while (drawn := connection.recv()) is not None:
        connection.recv()  # the round begins
        connection.send(loop.play(drawn))


def main(workload: Workload, rounds: int, threads: int, processes: int, saved_to: str) -> None:
    """Play rounds and save the final model."""
    torch.set_num_threads(threads)
    seed_model()
    network = workload.model()
    server = [p.detach().clone().share_memory_() for p in network.parameters()]  # type: ignore[no-untyped-call]
    changes = [[torch.zeros_like(p).share_memory_() for p in server] for _ in range(processes)]  # type: ignore[no-untyped-call]
    loops = [Loop(workload, server, change) for change in changes]
    helpers = []
    for loop in loops[1:]:
        connection, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=help_out, args=(loop, theirs), daemon=True
        )
        process.start()
        helpers.append((connection, process))
    turns = Turns()
    turns.report(ready=True)
    for number in range(1, rounds + 1):
        drawn = turns_of(workload, number)
        for share, (connection, _) in enumerate(helpers, start=1):
            connection.send(drawn[share::processes])
        turns.wait()
        began = time.perf_counter()
        for connection, _ in helpers:
            connection.send(None)
        steps = loops[0].play(drawn[::processes])
        steps += sum(connection.recv() for connection, _ in helpers)
        for change in changes:
            torch._foreach_add_(server, change)
        seconds = time.perf_counter() - began
        turns.report(round=number, seconds=seconds, clients=len(drawn), steps=steps)
    for connection, process in helpers:
        connection.send(None)
        process.join()
    names = [name for name, _ in network.named_parameters()]
    save_file({n: p.clone() for n, p in zip(names, server, strict=True)}, saved_to)


if __name__ == "__main__":
    key, rounds, threads, processes, file = sys.argv[1:]
    main(WORKLOADS[key], int(rounds), int(threads), int(processes), file)
