"""Training many clients in one computation: the training of `fl_app.training`, stacked.

A small model's step takes ten times as long to ask for as to compute. So clients are trained side
by side: their weights stacked, their batches padded (`fl_app.stacked.batches`), each operation
asked for once. What comes out is what training them one by one gives, up to the order in which
floats are added; dropout masks are other ones, of the same distribution.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_app.local_optimizer import StackedOptimizer
from fl_app.objective import LocalObjective, OwnLoss
from fl_app.params import StackedParams
from fl_app.privacy.base import RecordPlan
from fl_app.privacy.randomness import PrivacyRandomness, secret_randomness
from fl_app.stacked.batches import Batch, Booleans, drawn, in_epochs, pooled
from fl_app.stacked.draws import Draws, DrawsOfEach, DrawsTogether
from fl_app.stacked.model import StackedModel
from fl_app.stacked.steps import PlainSteps, PrivateSteps
from fl_app.tasks.base import Task
from fl_app.training import (
    ClientTimeoutError,
    LocalTraining,
    Randomness,
    TrainedModel,
    layers_seeded,
)
from fl_app.types import Examples, Params

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What one client of a cohort is to do.

    Attributes:
        examples: Its training records.
        count: How many these are.
        randomness: Its streams of this round.
        plan: Batches and mechanism of private training; None for plain training.
        secret: Where its private draws come from; None for a secret that the clients trained side
            by side share: as good, where one process holds them all, and faster.
        optimizer_state: State to continue from, or None to start afresh.
    """

    examples: Examples
    count: int
    randomness: Randomness
    plan: RecordPlan | None = None
    secret: PrivacyRandomness | None = None
    optimizer_state: Mapping[str, Any] | None = None


@dataclass(kw_only=True)
class CohortTrainer:
    """Trains cohorts of clients side by side.

    Attributes:
        model: The architecture, on the device to train on.
        task: Gives the loss.
        training: Epochs, batch size, local optimizer.
        objective: What is minimised besides the loss.
        once: Whether the model uses each of its weights once in a pass.
        client_bytes: Memory that one client's training takes, about.
        chunk_bytes: Memory that the clients trained side by side may take, about.
    """

    model: StackedModel
    task: Task
    training: LocalTraining
    objective: LocalObjective
    once: bool
    client_bytes: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        self._forget_recordings()

    def _forget_recordings(self) -> None:
        self.plain_steps = PlainSteps(self.model, self.task.losses)
        self.private_steps = PrivateSteps(self.model, self.task.losses)

    def train(
        self,
        received: Params,
        assignments: Sequence[Assignment],
        *,
        deadline: float | None = None,
    ) -> list[TrainedModel | ClientTimeoutError]:
        """Return what training makes of the received parameters, client by client.

        Args:
            received: Global parameters.
            assignments: Clients; all private, or none of them.
            deadline: `time.monotonic` value after which clients that are not done give up.

        Raises:
            TypeError: Some are private and others not.
        """
        if len({client.plan is None for client in assignments}) > 1:
            raise TypeError("Private training needs a plan for each client.")
        received = {name: tensor.to(self.model.device) for name, tensor in received.items()}
        if self.model.load(received):
            self._forget_recordings()  # they hold what all clients share
        done: dict[int, TrainedModel | ClientTimeoutError] = {}
        # Before anything can fail for want of memory: batches drawn anew would be smaller ones.
        coins = _coins(assignments)
        chunks = deque(self._chunks(assignments))
        while chunks:
            chunk = chunks.popleft()
            part = [assignments[position] for position in chunk]
            try:
                tossed = [coins[position] for position in chunk] if coins else []
                trained = self._train(received, part, tossed, deadline)
            except Exception as error:
                if not is_out_of_memory(error) or len(chunk) == 1:
                    raise
                half = len(chunk) // 2
                self._halve(half)
                chunks.extendleft((chunk[half:], chunk[:half]))
            else:
                done |= zip(chunk, trained, strict=True)
        return [done[position] for position in range(len(assignments))]

    def _halve(self, clients: int) -> None:
        """Train no more than that many side by side from now on."""
        if clients * self.client_bytes >= self.chunk_bytes:
            return
        self.chunk_bytes = clients * self.client_bytes
        log.warning(
            "%d clients side by side do not fit into memory: from now on %d at a time. "
            "engine.chunk_mib=%d says so from the start.",
            *(2 * clients, clients, max(1, self.chunk_bytes >> 20)),
        )

    @property
    def at_once(self) -> int:
        """How many clients are trained side by side, at most."""
        return max(1, self.chunk_bytes // self.client_bytes)

    @property
    def _descends(self) -> bool:
        """Whether weights may be stepped as soon as their gradients are known."""
        return self.once and isinstance(self.objective, OwnLoss)

    def _chunks(self, assignments: Sequence[Assignment]) -> Iterator[list[int]]:
        """Yield positions of clients that are trained side by side, by descending steps.

        Together are those whose optimizers have come equally far, as bias corrections need.
        """
        size = self.at_once
        groups: dict[Any, list[int]] = {}
        for position, assignment in enumerate(assignments):
            age = StackedOptimizer.age(assignment.optimizer_state)
            groups.setdefault(age, []).append(position)
        for members in groups.values():
            members.sort(key=lambda position: -self._steps(assignments[position]))
            parts = -(-len(members) // size)
            for part in range(parts):
                yield members[part * len(members) // parts : (part + 1) * len(members) // parts]

    def _steps(self, client: Assignment) -> int:
        if client.plan is not None:
            return client.plan.sampling.steps
        return self.training.epochs * -(-client.count // self.training.batch_size)

    def _train(
        self,
        received: Params,
        clients: Sequence[Assignment],
        coins: Sequence[Booleans],
        deadline: float | None,
    ) -> list[TrainedModel | ClientTimeoutError]:
        """Train one chunk, in the order of descending steps."""
        model = self.model
        start = [received[name] for name in model.names]
        weights = [tensor.expand(len(clients), *tensor.shape).clone() for tensor in start]
        records, firsts = pooled([client.examples for client in clients])
        stack = (
            _PlainStack(self, clients, firsts)
            if clients[0].plan is None
            else _PrivateStack(self, clients, firsts, coins)
        )
        states = [client.optimizer_state for client in clients]
        optimizer = StackedOptimizer(self.training.optimizer, weights, states)
        rate = optimizer.rate if self._descends and clients[0].plan is None else None
        device, late = start[0].device, 0
        with layers_seeded(clients[0].randomness.layers()):
            for batch in stack.schedule.batches(start[0].dtype, start[0].device):
                if deadline is not None and time.monotonic() > deadline:
                    late = batch.active
                    break
                part = _on(device, records.take(batch.rows))
                whole = [weight[: batch.clients] for weight in weights]
                gradients = stack.gradients(part, whole, batch, rate)
                if rate is not None:
                    continue
                local = optimizer.active(batch.active)
                for tensor, gradient in zip(local, gradients, strict=True):
                    tensor.grad = None if gradient is None else gradient[: batch.active]
                self.objective.add_gradient(local, start)
                optimizer.step()
        delta = _change(received, dict(zip(model.names, weights, strict=True)))
        metrics = stack.metrics()
        timeout = ClientTimeoutError("Still training at the deadline.")
        keeps = self.training.keep_optimizer_state
        return [
            timeout
            if row < late
            else TrainedModel(
                delta=delta.row(row),
                metrics=metrics[row],
                optimizer_state=optimizer.state_of(row) if keeps else {},
            )
            for row in range(len(clients))
        ]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether there was not enough memory; on a CPU torch has no error of its own for it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _on(device: torch.device, examples: Examples) -> Examples:
    """Return examples on a device: themselves, if they are there."""
    if device.type == "cpu":
        return examples
    return Examples(inputs=examples.inputs.to(device), targets=examples.targets.to(device))


def _coins(clients: Sequence[Assignment]) -> list[Booleans]:
    """Return of each private client its batches' coins, from its own secret or a common one."""
    common = secret_randomness()
    return [
        (client.secret or common).coins(
            client.plan.sampling.steps * client.count, heads=client.plan.sampling.sample_rate
        )
        for client in clients
        if client.plan is not None
    ]


def _change(received: Params, trained: Mapping[str, Tensor]) -> StackedParams:
    """Turn weights into their change from received parameters; zero for what is not trained."""
    clients = len(next(iter(trained.values())))
    return StackedParams(
        {
            name: trained[name].sub_(tensor).cpu()
            if name in trained
            else torch.zeros_like(tensor, device="cpu").expand(clients, *tensor.shape)
            for name, tensor in received.items()
        }
    )


class _PlainStack:
    """Clients that go through their records in epochs.

    Args:
        trainer: How they train.
        clients: By descending steps.
        firsts: Where each one's records begin.
    """

    def __init__(
        self,
        trainer: CohortTrainer,
        clients: Sequence[Assignment],
        firsts: Sequence[int],
    ) -> None:
        self._steps = trainer.plain_steps
        self._counts = [client.count for client in clients]
        self._epochs = trainer.training.epochs
        generator, orders = torch.Generator(), []
        for client, count in zip(clients, self._counts, strict=True):
            generator.manual_seed(client.randomness.batches_seed())
            orders.append([torch.randperm(count, generator=generator) for _ in range(self._epochs)])
        self.schedule = in_epochs(orders, firsts, trainer.training.batch_size)
        self._losses: list[tuple[Batch, Tensor]] = []

    def gradients(
        self, records: Examples, weights: Sequence[Tensor], batch: Batch, rate: float | None
    ) -> Sequence[Tensor | None]:
        """Return the gradient of each client's mean loss; as `PlainSteps` does."""
        losses, gradients = self._steps(records, weights, batch, rate=rate)
        self._losses.append((batch, losses))
        return gradients

    def metrics(self) -> list[Mapping[str, float]]:
        """Return of each client the mean loss over its last epoch's steps, and its epochs."""
        last_epoch = self.schedule.steps // self._epochs * (self._epochs - 1)
        counted = [
            (number, batch, losses)
            for number, (batch, losses) in enumerate(self._losses)
            if number >= last_epoch[batch.clients - 1]
        ]
        if not counted:  # late in the first step
            return [{} for _ in self._counts]
        values = torch.cat([losses * batch.real for _, batch, losses in counted]).cpu().numpy()
        owners = [np.arange(batch.clients).repeat(batch.width) for _, batch, _ in counted]
        late = [
            (last_epoch[: batch.clients] <= number).repeat(batch.width)
            for number, batch, _ in counted
        ]
        values = np.where(np.concatenate(late), values, 0.0)
        sums = np.bincount(np.concatenate(owners), values, minlength=len(self._counts))
        means = (sums / self._counts).tolist()
        return [{"loss": mean, "epochs": float(self._epochs)} for mean in means]


class _PrivateStack:
    """Clients that train on Poisson batches with clipped and noisy gradients.

    Args:
        trainer: How they train.
        clients: By descending steps.
        firsts: Where each one's records begin.
        coins: Of each its batches' coins, ``steps * records``.
    """

    def __init__(
        self,
        trainer: CohortTrainer,
        clients: Sequence[Assignment],
        firsts: Sequence[int],
        coins: Sequence[Booleans],
    ) -> None:
        self._steps = trainer.private_steps
        plans = [client.plan for client in clients if client.plan is not None]
        secrets = [client.secret for client in clients if client.secret is not None]
        self._draws: Draws
        if len(secrets) == len(clients):
            self._draws = DrawsOfEach(secrets)
        else:  # one of this stack alone: two threads that drew from one could draw the same
            self._draws = DrawsTogether(secret_randomness())
        self._mechanisms = [plan.mechanism for plan in plans]
        counts, steps = [c.count for c in clients], [plan.sampling.steps for plan in plans]
        self.schedule = drawn(np.concatenate(coins), counts, steps, firsts)

    def gradients(
        self, records: Examples, weights: Sequence[Tensor], batch: Batch, rate: float | None
    ) -> Sequence[Tensor | None]:
        """Return each client's noisy gradient."""
        mechanisms = self._mechanisms[: batch.clients]
        return self._steps(records, weights, batch, mechanisms, self._draws)

    def metrics(self) -> list[Mapping[str, float]]:
        """Return nothing: each figure would be one more release."""
        return [{} for _ in self._mechanisms]
