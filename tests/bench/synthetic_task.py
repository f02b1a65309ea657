"""The benchmark's task: random images for any number of clients, at no cost to make.

What is measured is what a federation adds to training, so records must neither have to be
downloaded nor cost time in a round. Every contender takes its records and its model from here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fl_app.tasks import classification
from fl_app.tasks.models import ModelBuilder
from fl_app.types import ClientExamples, ClientId, Examples

SEED, CLIENTS, FRACTION, BATCH, LR = 1, 1000, 0.1, 10, 0.1
"""The workload; `bench_round` says the same to ``fl-app run`` on its command line."""

POOL = 10_000
"""Images that exist; more clients than these suffice for share theirs."""


@dataclass(frozen=True, kw_only=True)
class RandomImages:
    """Noise with random labels; satisfies `fl_app.tasks.base.GeneratedTask`.

    Inputs have shape ``(n, 1, 28, 28)``, float32, standard normal; there are ten classes.
    Client k, a number, owns ``examples_per_client`` records. There is no held-out set.

    Attributes:
        model: Recipe of the model.
        examples_per_client: Records of each client, in [1, `POOL`].
    """

    name: ClassVar[str] = "random_images"

    model: ModelBuilder
    examples_per_client: int = 50

    def build_model(self) -> nn.Module:
        """Return a new model, initialised from torch's global generator."""
        return self.model((1, 28, 28), 10)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every record, shape ``(n,)``."""
        return classification.losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the metrics of a classifier; unused, for nobody has held-out records."""
        return classification.metrics(outputs, targets)

    def generate(self, client: ClientId, seed: int) -> ClientExamples:
        """Return the records of ``client``: views of the pool, so that they cost nothing."""
        pool = _pool(seed)
        first = int(client) * self.examples_per_client % (POOL - self.examples_per_client + 1)
        part = slice(first, first + self.examples_per_client)
        return ClientExamples(train=Examples(inputs=pool.inputs[part], targets=pool.targets[part]))

    def held_out(self, seed: int) -> None:
        """Return None: a round of this benchmark measures no model."""


@dataclass(frozen=True, kw_only=True)
class LeNet:
    """LeNet-5 with ReLU and max pooling: 44,426 parameters on 28x28 pixels and ten classes.

    LeCun et al. 1998, "Gradient-based learning applied to document recognition", Figure 2.
    """

    def __call__(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module from ``(n, colours, 28, 28)`` to logits ``(n, num_outputs)``."""
        return nn.Sequential(
            nn.Conv2d(input_shape[0], 6, kernel_size=5),  # (n, 6, 24, 24)
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),  # (n, 16, 8, 8)
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),  # (n, 256)
            nn.Linear(256, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_outputs),
        )


@functools.cache
def _pool(seed: int) -> Examples:
    """Return all images there are, made once a process."""
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        inputs=torch.randn(POOL, 1, 28, 28, generator=generator),
        targets=torch.randint(10, (POOL,), generator=generator),
    )
