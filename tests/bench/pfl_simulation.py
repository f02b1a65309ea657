"""Contender: pfl-research 0.6, in an environment of its own, which does not have ours.

    python pfl_simulation.py WORKLOAD ROUNDS

`FederatedAveraging` on `SimulatedBackend`, as pfl's own benchmarks are written, and as fast as it
goes in one process: every user's data set is made once and keeps its batches, so the order of its
records never changes; nothing is evaluated; metrics are not printed. Users are drawn by pfl.
"""

from __future__ import annotations

import functools
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pfl.aggregate.base import get_num_devices_weight_name
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted, get_overall_value
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional
from turns import Turns
from workloads import SEED, WORKLOADS, Workload


class Trained(nn.Module):
    """A model with the two methods that pfl asks for; counts its steps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.steps = 0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        self.steps += 1
        return functional.cross_entropy(self.network(inputs), targets)

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return the loss; pfl asks in its first iteration, which is not timed."""
        with torch.no_grad():
            total = functional.cross_entropy(self.network(inputs), targets, reduction="sum")
        return {"loss": Weighted(float(total), len(targets))}


class TakeTurns(TrainingProcessCallback):  # type: ignore[misc]  # checked where pfl is not
    """Makes pfl's loop a contender: what lies between two calls is one whole iteration.

    pfl evaluates in its iteration 0, whatever it is told, so that is none of the rounds.
    """

    def __init__(self, trained: Trained) -> None:
        self._turns = Turns()
        self._trained = trained
        self._before = self._weights()
        self._began = 0.0

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Report the iteration that has just ended, and wait for the next turn."""
        seconds = time.perf_counter() - self._began
        if central_iteration == 0:
            versions = {package: version(package) for package in ("pfl", "torch", "numpy")}
            self._turns.report(ready=True, versions=versions)
        else:
            devices = aggregate_metrics[get_num_devices_weight_name(Population.TRAIN)]
            self._turns.report(
                round=central_iteration,
                seconds=seconds,
                clients=int(get_overall_value(devices)),
                steps=self._trained.steps,
                moved=float((self._weights() - self._before).abs().max()),
            )
        self._trained.steps = 0
        self._before = self._weights()
        self._turns.wait()
        self._began = time.perf_counter()
        return False, Metrics()

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._trained.parameters()])


def main(workload: Workload, rounds: int) -> None:
    """Play rounds."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    trained = Trained(workload.model())
    model = PyTorchModel(
        model=trained,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(trained.parameters(), lr=1.0),
    )

    @functools.cache
    def data_set(user: str) -> Dataset:
        return PyTorchTensorDataset(workload.records_of(user), user_id=user)

    users = [str(number) for number in range(workload.clients)]
    users_data = FederatedDataset(data_set, get_user_sampler("random", users))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=rounds + 2,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=users_data, val_data=users_data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.lr,
            local_batch_size=workload.batch,
        ),
        callbacks=[TakeTurns(trained)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main(WORKLOADS[sys.argv[1]], int(sys.argv[2]))
