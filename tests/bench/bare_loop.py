"""Contender: the clients' steps in a plain PyTorch loop, the floor of training one by one.

The very steps of ``engine=local`` in the same order, and nothing else: no messages, no records,
no checks, no metrics, no files. Cohorts and the order of records are drawn before the clock runs,
model and optimizer are made once. Its final model must be that of ours; see `bench_round`.
"""

from __future__ import annotations

import sys
import time

import torch
from hydra.utils import instantiate
from safetensors.torch import save_file
from synthetic_task import BATCH, CLIENTS, FRACTION, LR, SEED, RandomImages
from torch import Tensor
from torch.nn import functional
from turns import Turns

from fl_app.selection import Uniform
from fl_app.tasks.federated import ClientRange
from fl_app.types import ClientId, Role, stream, stream_seed


def main(model: str, rounds: int, saved_to: str) -> None:
    """Play rounds and save the final model.

    Args:
        model: Import path of the model's recipe.
        rounds: Rounds to play.
        saved_to: Path of a ``.safetensors`` file.
    """
    torch.set_num_threads(1)
    task = RandomImages(model=instantiate({"_target_": model}))
    torch.manual_seed(stream_seed(SEED, Role.MODEL))
    network = task.build_model()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    local = list(network.parameters())
    server = [p.detach().clone() for p in local]
    turns = Turns()
    turns.report(ready=True)
    for number in range(1, rounds + 1):
        drawn = _draw(number)
        turns.wait()
        began = time.perf_counter()
        change = [torch.zeros_like(p) for p in server]
        for client, batches in drawn:
            records = task.generate(client, SEED).train
            with torch.no_grad():
                torch._foreach_copy_(local, server)
            for batch in batches:
                optimizer.zero_grad()
                outputs = network(records.inputs[batch])
                functional.cross_entropy(outputs, records.targets[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                delta = torch._foreach_sub(local, server)
                torch._foreach_add_(change, delta, alpha=1 / len(drawn))
        torch._foreach_add_(server, change)
        seconds = time.perf_counter() - began
        turns.report(round=number, seconds=seconds, clients=len(drawn))
    names = [name for name, _ in network.named_parameters()]
    save_file(dict(zip(names, server, strict=True)), saved_to)


def _draw(round: int) -> list[tuple[ClientId, tuple[Tensor, ...]]]:
    """Return the cohort of a round in canonical order, each client with its batches."""
    cohort = Uniform(fraction=FRACTION).select(ClientRange(CLIENTS), round=round, seed=SEED)
    drawn = []
    for client in sorted(cohort, key=lambda c: (len(c), c)):
        generator = stream(SEED, Role.BATCHES, round=round, client=client)
        order = torch.randperm(RandomImages.examples_per_client, generator=generator)
        drawn.append((client, torch.split(order, BATCH)))
    return drawn


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
