"""What a client does when it is asked: train, evaluate, or say who it is.

One `ClientRuntime` serves all clients that live in its process: every one of them in
``engine=local``, those that its actor was given in a simulation, the site's own in a deployment.
It speaks our types only; Flower's messages end in `fl_app.client_app`.
"""

from __future__ import annotations

import random
import time

import torch

from fl_app.client_state import ClientStateStore
from fl_app.objective import LocalObjective
from fl_app.params import write_params
from fl_app.tasks.base import Task
from fl_app.training import (
    LocalTraining,
    Randomness,
    evaluate,
    evaluate_quickly,
    train_locally,
)
from fl_app.types import (
    ClientDescription,
    ClientId,
    ClientUpdate,
    ConfigError,
    Evaluation,
    FederatedData,
    FlAppError,
    Params,
    Role,
    TrainInstruction,
    stream_seed,
)

_OPTIMIZER = "optimizer"


class SimulatedFailureError(FlAppError):
    """A client failed because ``client.failure_fraction`` says that some do."""


class ClientRuntime:
    """Serves the clients of one process, with one scratch model for all of them.

    Args:
        task: Model, loss, metrics.
        data: What each client owns.
        training: How clients train.
        objective: What they minimise besides the loss.
        seed: The run's seed.
        states: Where a client's memory between rounds is kept.
    """

    def __init__(
        self,
        *,
        task: Task,
        data: FederatedData,
        training: LocalTraining,
        objective: LocalObjective,
        seed: int,
        states: ClientStateStore,
    ) -> None:
        self._task = task
        self._data = data
        self._training = training
        self._objective = objective
        self._seed = seed
        self.states = states
        self._model = task.build_model()

    @property
    def data(self) -> FederatedData:
        """Who the clients are, and what they own."""
        return self._data

    def train(self, client: ClientId, instruction: TrainInstruction) -> ClientUpdate:
        """Measure the received model on the client's own held-out part, train it, and report.

        Raises:
            ClientTimeoutError: The deadline passed.
            SimulatedFailureError: The configured failures hit this client and round.
        """
        patience = instruction.deadline_s
        deadline = None if patience is None else time.monotonic() + patience
        self._maybe_fail(client, instruction.round)
        examples = self._data.examples_of(client)
        evaluation = None
        if examples.test is not None:
            write_params(self._model, instruction.params)
            evaluation = evaluate_quickly(self._model, self._task, examples.test)
        trained = train_locally(
            self._model,
            self._task,
            examples,
            self._training,
            self._objective,
            instruction.params,
            Randomness(seed=self._seed, round=instruction.round, client=client),
            optimizer_state=self._remembered_optimizer(client, instruction),
            deadline=deadline,
        )
        if self._training.keep_optimizer_state:
            state = {_OPTIMIZER: trained.optimizer_state}
            self.states.of_run(instruction.run).put(client, state, round=instruction.round)
        return ClientUpdate(
            client=client,
            round=instruction.round,
            delta=trained.delta,
            num_examples=len(examples.train),
            metrics=trained.metrics,
            evaluation=evaluation,
        )

    def evaluate(self, client: ClientId, params: Params) -> Evaluation:
        """Return all metrics of a model on the client's own held-out part.

        Raises:
            ConfigError: The client has no held-out part.
        """
        test = self._data.examples_of(client).test
        if test is None:
            raise ConfigError(
                f"client {client} has no held-out records of its own: raise "
                "partition.test_fraction or give it more records."
            )
        return evaluate(self._model, self._task, test, params=params)

    def describe(self, client: ClientId) -> ClientDescription:
        """Return what the client is willing to tell about itself."""
        train = self._data.examples_of(client).train
        counts = None
        if self._training.share_label_counts and not train.targets.is_floating_point():
            counts = tuple(torch.bincount(train.targets).tolist())
        return ClientDescription(client=client, num_examples=len(train), label_counts=counts)

    def _remembered_optimizer(
        self, client: ClientId, instruction: TrainInstruction
    ) -> dict[str, object] | None:
        if not self._training.keep_optimizer_state:
            return None
        states = self.states.of_run(instruction.run)
        state = states.get(client, before_round=instruction.round)
        return None if state is None else dict(state[_OPTIMIZER])

    def _maybe_fail(self, client: ClientId, round: int) -> None:
        fraction = self._training.failure_fraction
        if fraction == 0:
            return
        seed = stream_seed(self._seed, Role.FAULTS, round=round, client=client)
        if random.Random(seed).random() < fraction:
            raise SimulatedFailureError(f"client.failure_fraction={fraction} hit this round.")
