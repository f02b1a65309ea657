"""Training one client's records with record-level differential privacy.

As `fl_app.training` but for the batches, which are Poisson samples, and the gradients, which are
clipped and noisy. Pure in (parameters, records, both kinds of randomness); what is private about
it is `fl_app.privacy`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fl_app.objective import LocalObjective
from fl_app.params import change_of
from fl_app.privacy.base import RecordPlan
from fl_app.privacy.randomness import PrivacyRandomness
from fl_app.tasks.base import Task
from fl_app.training import (
    ClientTimeoutError,
    LocalTraining,
    Randomness,
    TrainedModel,
    layers_seeded,
    loaded,
    others_restored,
)
from fl_app.types import ClientExamples, Params


def train_privately(
    model: nn.Module,
    task: Task,
    examples: ClientExamples,
    training: LocalTraining,
    objective: LocalObjective,
    received: Params,
    randomness: Randomness,
    *,
    plan: RecordPlan,
    secret: PrivacyRandomness,
    optimizer_state: Mapping[str, Any] | None = None,
    deadline: float | None = None,
) -> TrainedModel:
    """Return what private training on a client's own records makes of the received parameters.

    The objective's term is added after the noise: it depends on parameters alone. No figure of the
    training is returned, since each would be one more release.

    Args:
        model: Scratch module of the task's architecture.
        task: Gives the loss.
        examples: The client's records.
        training: Gives the local optimizer.
        objective: What is minimised besides the loss.
        received: Global parameters.
        randomness: Streams of this client and round, for what is no secret (dropout).
        plan: Batches and mechanism.
        secret: Where coins and noise come from.
        optimizer_state: State to continue from, or None to start afresh.
        deadline: `time.monotonic` value after which to give up, or None.

    Raises:
        ClientTimeoutError: The deadline passed; what was paid for the round stays paid.
    """
    from fl_app.privacy.private_steps import private_steps  # Opacus takes a second to import

    entries, local, start = loaded(model, received)
    optimizer: Optimizer = training.optimizer(local)
    if optimizer_state:
        optimizer.load_state_dict(dict(optimizer_state))
    with (
        layers_seeded(randomness.layers()),
        others_restored(model, received),
        private_steps(model, optimizer, task.losses, plan.mechanism, secret) as stepper,
    ):
        for positions in plan.sampling.batches(len(examples.train), secret):
            if deadline is not None and time.monotonic() > deadline:
                raise ClientTimeoutError("Still training at the deadline.")
            batch = examples.train.take(positions)
            stepper.step(
                batch.inputs, batch.targets, then=lambda: objective.add_gradient(local, start)
            )
    return TrainedModel(
        delta=change_of(entries, received), metrics={}, optimizer_state=optimizer.state_dict()
    )
