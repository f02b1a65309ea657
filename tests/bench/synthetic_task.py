"""A benchmark's workload as a task of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from workloads import WORKLOADS

from fl_app.tasks import classification
from fl_app.types import ClientExamples, ClientId, Examples


@dataclass(frozen=True, kw_only=True)
class RandomImages:
    """Noise with random labels; satisfies `fl_app.tasks.base.GeneratedTask`.

    There is no held-out set, and no client keeps any records back. Records follow from the
    workload, whatever the run's seed.

    Attributes:
        workload: One of `workloads.WORKLOADS`.
    """

    name: ClassVar[str] = "random_images"

    workload: str

    def build_model(self) -> nn.Module:
        """Return a new model, initialised from torch's global generator."""
        return WORKLOADS[self.workload].model()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every record, shape ``(n,)``."""
        return classification.losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the metrics of a classifier; unused, for nobody has held-out records."""
        return classification.metrics(outputs, targets)

    def generate(self, client: ClientId, seed: int) -> ClientExamples:
        """Return the records of ``client``."""
        inputs, targets = WORKLOADS[self.workload].records_of(client)
        return ClientExamples(train=Examples(inputs=inputs, targets=targets))

    def held_out(self, seed: int) -> None:
        """Return None: a round of this benchmark measures no model."""
