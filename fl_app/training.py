"""Training and measuring one model on one client's records.

Pure in (parameters, records, randomness): the module handed in is scratch space, overwritten at
the start of every call, so a thousand clients can share one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fl_app.attacks import Attack, NoAttack
from fl_app.local_optimizer import LocalOptimizer, make_local_optimizer
from fl_app.objective import LocalObjective
from fl_app.params import change_of, copy_into, entries_of, read_params, write_params
from fl_app.server_optimizer import OptimizerFactory
from fl_app.tasks.base import Task
from fl_app.tasks.classification import accuracy
from fl_app.types import (
    ClientExamples,
    ClientId,
    ConfigError,
    Evaluation,
    Examples,
    FlAppError,
    Params,
    Role,
    stream_seed,
)

EVALUATION_BATCH = 1024
"""Records measured at once; bounds the memory of a pass, changes no figure beyond rounding."""


class ClientTimeoutError(FlAppError):
    """A client could not finish before the round's deadline."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a client trains.

    Attributes:
        optimizer: Makes the local optimizer from the model's parameters.
        epochs: Passes over the client's training records, >= 1.
        batch_size: Records a step, >= 1; the last batch of an epoch may be smaller.
        early_stopping_patience: Epochs without a better loss on the client's own validation part
            after which it stops, keeping the best epoch's parameters; None trains all epochs.
        keep_optimizer_state: Whether the local optimizer's state (momentum) lives on between
            rounds, in the client's own store.
        share_label_counts: Whether a client tells the server how many records of each class it
            owns. Off: label counts are personal data in small groups.
        failure_fraction: Share of client rounds that fail, for simulating unreliable devices, in
            [0, 1); drawn from the run's seed.
        attack: What hostile clients do, for experiments with robust rules; simulated clients only.
    """

    optimizer: OptimizerFactory
    epochs: int = 5
    batch_size: int = 16
    early_stopping_patience: int | None = None
    keep_optimizer_state: bool = False
    share_label_counts: bool = False
    failure_fraction: float = 0.0
    attack: Attack = NoAttack()

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"client.epochs={self.epochs} must be >= 1.")
        if self.batch_size < 1:
            raise ConfigError(f"client.batch_size={self.batch_size} must be >= 1.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ConfigError(
                f"client.early_stopping_patience={self.early_stopping_patience} must be >= 1, "
                "or null to train all epochs."
            )
        if not 0 <= self.failure_fraction < 1:
            raise ConfigError(
                f"client.failure_fraction={self.failure_fraction} must lie in [0, 1): with 1 "
                "no client would ever reply."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Randomness:
    """Where one client's draws of one round come from."""

    seed: int
    round: int
    client: ClientId

    def batches(self) -> torch.Generator:
        """Return the generator of the order of records."""
        return torch.Generator().manual_seed(self.batches_seed())

    def batches_seed(self) -> int:
        """Return the seed of that generator."""
        return stream_seed(self.seed, Role.BATCHES, round=self.round, client=self.client)

    def layers(self) -> int:
        """Return the seed of what the layers draw, such as dropout masks."""
        return stream_seed(self.seed, Role.LAYERS, round=self.round, client=self.client)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What local training gives.

    Attributes:
        delta: Local minus received parameters.
        metrics: ``loss``: mean training loss over the last epoch's steps, weighted by records;
            ``epochs``: epochs trained.
        optimizer_state: The local optimizer's ``state_dict()`` after the last step.
    """

    delta: Params
    metrics: Mapping[str, float]
    optimizer_state: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What came of one client's training.

    Attributes:
        count: Its training records.
        model: What training made of the received model.
        evaluation: The received model on its own held-out part, if it has one and may tell.
    """

    count: int
    model: TrainedModel
    evaluation: Evaluation | None


def train_locally(
    model: nn.Module,
    task: Task,
    examples: ClientExamples,
    training: LocalTraining,
    objective: LocalObjective,
    received: Params,
    randomness: Randomness,
    *,
    optimizer_state: Mapping[str, Any] | None = None,
    deadline: float | None = None,
) -> TrainedModel:
    """Return what training on a client's own records makes of the received parameters.

    The client's part of FedAvg (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1,
    ClientUpdate), with the objective's term in the gradient.

    Args:
        model: Scratch module of the task's architecture.
        task: Gives the loss.
        examples: The client's records.
        training: Epochs, batch size, local optimizer.
        objective: What is minimised besides the loss.
        received: Global parameters.
        randomness: Streams of this client and round.
        optimizer_state: State to continue from, or None to start afresh.
        deadline: `time.monotonic` value after which to give up, or None.

    Raises:
        ClientTimeoutError: The deadline passed.
    """
    entries, local, start = loaded(model, received)
    optimizer = make_local_optimizer(training.optimizer, local, optimizer_state)
    generator = randomness.batches()
    best = _BestEpoch(training.early_stopping_patience)
    loss_sum, epoch = torch.zeros(()), 0
    with layers_seeded(randomness.layers()), others_restored(model, received):
        for epoch in range(1, training.epochs + 1):
            loss_sum = torch.zeros(())
            for batch in _batches(examples.train, training.batch_size, generator):
                if deadline is not None and time.monotonic() > deadline:
                    raise ClientTimeoutError(f"Still training in epoch {epoch} at the deadline.")
                loss_sum += _step(model, task, batch, optimizer, objective, local, start)
            if best.seen_enough(model, task, examples.validation):
                break
    best.restore(model)
    return TrainedModel(
        delta=change_of(entries, received),
        metrics={"loss": loss_sum.item() / len(examples.train), "epochs": float(epoch)},
        optimizer_state=optimizer.state_dict(),
    )


def loaded(
    model: nn.Module, received: Params
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Load the received parameters into a scratch module, in training mode.

    Returns:
        The module's own entries by name; of these the trainable ones; and what these were sent as.
    """
    entries = entries_of(model)
    copy_into(entries, received)
    model.train()
    trainable = {name: tensor for name, tensor in entries.items() if tensor.requires_grad}
    return entries, list(trainable.values()), [received[name] for name in trainable]


@contextmanager
def layers_seeded(seed: int) -> Iterator[None]:
    """Draw dropout masks from ``seed``, and leave torch's global generator as it was.

    A tenth of the time of ``torch.random.fork_rng`` with ``manual_seed``, which visit every
    kind of accelerator.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def others_restored(model: nn.Module, params: Params) -> Iterator[None]:
    """Leave buffers that are no parameters (batch counters) as they were, for the next client."""
    others = [buffer for name, buffer in model.named_buffers() if name not in params]
    before = [buffer.clone() for buffer in others]
    try:
        yield
    finally:
        for buffer, value in zip(others, before, strict=True):
            buffer.copy_(value)


def _batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[Examples]:
    order = torch.randperm(len(examples), generator=generator)
    shuffled = examples.take(order)  # one copy an epoch; batches are views of it
    inputs, targets = torch.split(shuffled.inputs, size), torch.split(shuffled.targets, size)
    for batch_inputs, batch_targets in zip(inputs, targets, strict=True):
        yield Examples(inputs=batch_inputs, targets=batch_targets)


def _step(
    model: nn.Module,
    task: Task,
    batch: Examples,
    optimizer: LocalOptimizer,
    objective: LocalObjective,
    local: list[Tensor],
    start: list[Tensor],
) -> Tensor:
    """Take one optimizer step on the batch's mean loss; return the sum of the losses before it."""
    for parameter in local:  # what zero_grad() does, in a tenth of the time
        parameter.grad = None
    losses = task.losses(model(batch.inputs), batch.targets)
    # The gradient of the mean, without the mean: a tenth of a small model's step.
    losses.backward(_mean_weights(len(losses), losses.dtype))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    objective.add_gradient(local, start)
    optimizer.step()
    return losses.detach().sum()


@lru_cache(maxsize=256)
def _mean_weights(count: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(count, dtype=dtype) / count


class _BestEpoch:
    """Remembers the parameters of the epoch with the lowest validation loss."""

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._loss = float("inf")
        self._params: Params | None = None
        self._stale_epochs = 0

    def seen_enough(self, model: nn.Module, task: Task, validation: Examples | None) -> bool:
        if self._patience is None or validation is None:
            return False
        loss = evaluate_quickly(model, task, validation).metrics["loss"]
        model.train()
        if loss < self._loss:
            self._loss, self._params, self._stale_epochs = loss, read_params(model), 0
        else:
            self._stale_epochs += 1
        return self._stale_epochs >= self._patience

    def restore(self, model: nn.Module) -> None:
        if self._params is not None:
            write_params(model, self._params)


@torch.no_grad()
def _outputs_and_losses(model: nn.Module, task: Task, examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the model's outputs ``(n, *)`` in evaluation mode, and the losses ``(n,)``."""
    model.eval()
    parts = [model(inputs) for inputs in torch.split(examples.inputs, EVALUATION_BATCH)]
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
    return outputs, task.losses(outputs, examples.targets)


def evaluate(model: nn.Module, task: Task, examples: Examples, *, params: Params) -> Evaluation:
    """Return the mean loss and all the task's metrics of a model on records.

    Args:
        model: Scratch module, overwritten.
        task: Gives loss and metrics.
        examples: Records, at least one.
        params: The model to measure.
    """
    write_params(model, params)
    outputs, losses = _outputs_and_losses(model, task, examples)
    metrics = {"loss": losses.double().mean().item(), **task.metrics(outputs, examples.targets)}
    return Evaluation(num_examples=len(examples), metrics=metrics)


def evaluate_quickly(model: nn.Module, task: Task, examples: Examples) -> Evaluation:
    """Return the mean loss, and the accuracy of a classifier: what every round can afford."""
    outputs, losses = _outputs_and_losses(model, task, examples)
    metrics = {"loss": losses.double().mean().item()}
    if outputs.ndim == 2 and not examples.targets.is_floating_point():
        metrics["accuracy"] = accuracy(outputs, examples.targets)
    return Evaluation(num_examples=len(examples), metrics=metrics)


def evaluate_fully_each(
    model: nn.Module, task: Task, parts: Sequence[Examples], *, params: Params
) -> list[Evaluation]:
    """Return what `evaluate` gives for one model on each of several sets of records.

    Arguments as of `evaluate_each`.
    """
    _, outputs, losses = _run_together(model, task, parts, params)
    counts = [len(part) for part in parts]
    return [
        Evaluation(
            num_examples=len(part),
            metrics={"loss": own_losses.mean().item(), **task.metrics(own_outputs, part.targets)},
        )
        for part, own_outputs, own_losses in zip(
            parts, torch.split(outputs, counts), torch.split(losses.double(), counts), strict=True
        )
    ]


def _run_together(
    model: nn.Module, task: Task, parts: Sequence[Examples], params: Params
) -> tuple[Examples, Tensor, Tensor]:
    """Return all parts in one, and the model's outputs and losses on them."""
    write_params(model, params)
    together = Examples(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
    )
    return together, *_outputs_and_losses(model, task, together)


def evaluate_each(
    model: nn.Module, task: Task, parts: Sequence[Examples], *, params: Params
) -> list[Evaluation]:
    """Return what `evaluate_quickly` gives for one model on each of several sets of records.

    The model is run on all of them together.

    Args:
        model: Scratch module, overwritten.
        task: Gives the loss.
        parts: Sets of at least one record each.
        params: The model to measure.
    """
    together, outputs, losses = _run_together(model, task, parts, params)
    counts = [len(part) for part in parts]
    figures = {"loss": losses.double()}
    if outputs.ndim == 2 and not together.targets.is_floating_point():
        figures["accuracy"] = (outputs.argmax(dim=1) == together.targets).double()
    means = {
        name: [part.mean().item() for part in torch.split(values, counts)]
        for name, values in figures.items()
    }
    return [
        Evaluation(num_examples=count, metrics={name: means[name][k] for name in means})
        for k, count in enumerate(counts)
    ]
