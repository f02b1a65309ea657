"""What is trained, in plain PyTorch: every contender takes model and records from here.

Records must neither have to be downloaded nor cost time in a round, for what is measured is what a
federation adds to training. So they are noise, and a client's are a view of one pool. Nothing here
imports ours: pfl-research runs in an environment that does not have it.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import recipes
import torch
from torch import Tensor, nn

SEED = 1
"""Of models, cohorts, batches and records."""

POOL = 10_000
"""Records that exist; more clients than these suffice for share theirs."""

MEAN_RAGGED = 107
"""Mean of a log-uniform size between 5 and 500: ``495 / ln(100)``."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its records and their owners; client k is the number k, from 0.

    Attributes:
        model: Returns a new model, drawn from torch's global generator.
        input_shape: Of one record: standard normal noise, with one of ten random classes.
        clients: How many there are.
        cohort: How many of them train in a round.
        sizes: Least and largest number of a client's records, <= `POOL`; log-uniform in between.
        batch: Records of a batch; each client trains one epoch.
        lr: Of plain SGD.
    """

    model: Callable[[], nn.Module]
    input_shape: tuple[int, ...] = (1, 28, 28)
    clients: int = 1000
    cohort: int = 100
    sizes: tuple[int, int] = (50, 50)
    batch: int = 10
    lr: float = 0.1

    def size_of(self, client: str) -> int:
        """Return how many records a client has: a function of its number alone."""
        least, most = self.sizes
        share = random.Random(int(client)).random()
        return round(least * math.exp(share * math.log(most / least)))

    def first_of(self, client: str) -> int:
        """Return the position of a client's first record in the pool."""
        return int(client) * 50 % (POOL - self.size_of(client) + 1)

    def records_of(self, client: str) -> tuple[Tensor, Tensor]:
        """Return a client's inputs and targets: views of the pool."""
        inputs, targets = pool(self.input_shape)
        first = self.first_of(client)
        part = slice(first, first + self.size_of(client))
        return inputs[part], targets[part]

    def steps_of(self, client: str) -> int:
        """Return how many batches an epoch of a client has."""
        return -(-self.size_of(client) // self.batch)


@functools.cache
def pool(input_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return all inputs and targets of a shape, made once a process."""
    generator = torch.Generator().manual_seed(SEED)
    return (
        torch.randn(POOL, *input_shape, generator=generator),
        torch.randint(10, (POOL,), generator=generator),
    )


_MLP = Workload(model=recipes.mlp)
_CNN = Workload(model=recipes.le_net)

WORKLOADS = {
    "mlp": _MLP,
    "cnn": _CNN,
    "mlp_equal": replace(_MLP, sizes=(MEAN_RAGGED, MEAN_RAGGED)),
    "mlp_ragged": replace(_MLP, sizes=(5, 500)),
    "cnn_equal": replace(_CNN, sizes=(MEAN_RAGGED, MEAN_RAGGED)),
    "cnn_ragged": replace(_CNN, sizes=(5, 500)),
    "mlp_million": replace(_MLP, clients=1_000_000),
    "vgg": Workload(
        model=recipes.vgg,
        input_shape=(3, 32, 32),
        clients=100,
        cohort=10,
        sizes=(64, 64),
        batch=32,
        lr=0.01,
    ),
}
"""Workloads by name, which is how contenders are told theirs."""
