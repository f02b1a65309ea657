"""Contender: private clients as a user of Opacus writes them, one after another.

    python opacus_loop.py WORKLOAD ROUNDS THREADS

Each client has a `PrivacyEngine` of its own, which makes model, optimizer and loader private:
Poisson batches at the sample rate of the plain loader, and as many steps. Cohorts are drawn before
the clock runs. No epsilon is asked for: ours writes its ledger within the round, this does not.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings

import torch
from opacus import PrivacyEngine
from schedule import cohort_of, seed_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns
from workloads import WORKLOADS, Workload

NOISE_MULTIPLIER, MAX_GRAD_NORM = 1.0, 1.0


def train(workload: Workload, client: str, network: nn.Module) -> int:
    """Train a client's model in place, privately; return the steps taken."""
    loader = DataLoader(TensorDataset(*workload.records_of(client)), batch_size=workload.batch)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=workload.lr)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=network,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        poisson_sampling=True,
    )
    steps = 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        steps += 1
    return steps


def play(workload: Workload, cohort: list[str], server: nn.Module) -> int:
    """Train a cohort and move the server's model to the mean; return the steps taken."""
    change: list[Tensor] = [torch.zeros_like(p) for p in server.parameters()]
    start = [p.detach() for p in server.parameters()]
    steps = 0
    for client in cohort:
        network = copy.deepcopy(server)
        steps += train(workload, client, network)
        with torch.no_grad():
            delta = torch._foreach_sub([p.detach() for p in network.parameters()], start)
            torch._foreach_add_(change, delta, alpha=1 / len(cohort))
    torch._foreach_add_(start, change)
    return steps


def main(workload: Workload, rounds: int, threads: int) -> None:
    """Play rounds."""
    warnings.simplefilter("ignore")  # that this is not cryptographic randomness, a line a client
    torch.set_num_threads(threads)
    seed_model()
    server = workload.model()
    turns = Turns()
    turns.report(ready=True)
    for number in range(1, rounds + 1):
        cohort = cohort_of(workload, number)
        turns.wait()
        began = time.perf_counter()
        steps = play(workload, cohort, server)
        seconds = time.perf_counter() - began
        turns.report(round=number, seconds=seconds, clients=len(cohort), steps=steps)


if __name__ == "__main__":
    main(WORKLOADS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]))
