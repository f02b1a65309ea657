"""Contender: one model trained on a round's records as one batch a step, the floor of all.

    python the_limit.py WORKLOAD ROUNDS THREADS

Step k trains on what all clients of the cohort train on in their step k, so there are as many
steps as one client takes, of a hundred times the batch. It is no federated learning; no training
of the same records in batches as small can be expected to be faster. Needs clients of equal size.
"""

from __future__ import annotations

import sys
import time

import torch
from schedule import seed_model, turns_of
from torch import Tensor
from torch.nn import functional
from turns import Turns
from workloads import WORKLOADS, Workload, pool


def main(workload: Workload, rounds: int, threads: int) -> None:
    """Play rounds."""
    torch.set_num_threads(threads)
    seed_model()
    network = workload.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=workload.lr)
    inputs, targets = pool(workload.input_shape)
    turns = Turns()
    turns.report(ready=True)
    for number in range(1, rounds + 1):
        batches = _batches(workload, number)
        turns.wait()
        began = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad()
            outputs = network(inputs.index_select(0, batch))
            functional.cross_entropy(outputs, targets.index_select(0, batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        seconds = time.perf_counter() - began
        turns.report(round=number, seconds=seconds)


def _batches(workload: Workload, round: int) -> list[Tensor]:
    """Return the positions in the pool of each step's records."""
    drawn = turns_of(workload, round)
    steps = zip(*(turn.batches for turn in drawn), strict=True)
    firsts = [workload.first_of(turn.client) for turn in drawn]
    return [
        torch.cat([first + batch for first, batch in zip(firsts, step, strict=True)])
        for step in steps
    ]


if __name__ == "__main__":
    main(WORKLOADS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]))
