"""What a client does when it is asked: train, evaluate, or say who it is.

One `ClientRuntime` serves all clients that live in its process: every one of them in
``engine=local``, those that its actor was given in a simulation, the site's own in a deployment.
It speaks our types only; Flower's messages end in `fl_app.client_app`. What may be done with the
records is not its to decide: a `Guard` is asked, and paid, before they are touched.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fl_app.attacks import Counts
from fl_app.client_state import ClientStateStore
from fl_app.cohort import Assignment, CohortTrainer
from fl_app.objective import LocalObjective
from fl_app.params import num_bytes, write_params
from fl_app.privacy.base import Admission, PolicyError, Privacy, Request
from fl_app.privacy.randomness import PrivacyRandomness, Source, randomness_from
from fl_app.privacy.release import CLASSES, may_tell
from fl_app.private_training import train_privately
from fl_app.site import Site
from fl_app.tasks.base import Task
from fl_app.training import (
    LocalTraining,
    Randomness,
    Trained,
    TrainedModel,
    evaluate,
    evaluate_each,
    evaluate_fully_each,
    evaluate_quickly,
    train_locally,
)
from fl_app.types import (
    ClientDescription,
    ClientExamples,
    ClientId,
    ClientUpdate,
    ConfigError,
    Evaluation,
    Examples,
    FederatedData,
    FlAppError,
    Params,
    PrivacyUnit,
    Role,
    TrainInstruction,
    client_order,
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
        privacy: What updates go through before they leave.
        trainer: What trains a client instead of `train_alone`, on another device, or None.
        site: Allows each round and accounts for it, on behalf of the data's owners.
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
        privacy: Privacy,
        site: Site,
        trainer: CohortTrainer | None = None,
    ) -> None:
        self._task = task
        self._data = data
        self._training = training
        self._objective = objective
        self._seed = seed
        self.states = states
        self._privacy = privacy
        self._trainer = trainer
        self._site = site
        self._told = frozenset(name for name in CLASSES if may_tell(name, site.may_tell()))
        self._model = task.build_model()
        self._hostile = training.attack.hostile(data.clients, seed)
        self._conspiracy: tuple[Params, Sequence[Params]] | None = None

    @property
    def data(self) -> FederatedData:
        """Who the clients are, and what they own."""
        return self._data

    def admit(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> list[Admission | FlAppError]:
        """Pay for a round of these clients, in one synced write, before any of them is trained.

        Returns:
            For each the admission that `train` takes, or why it declines.
        """
        requests: dict[int, Request] = {}
        answers: list[Admission | FlAppError] = []
        for position, client in enumerate(clients):
            answers.append(Admission(budget=None))
            try:
                requests[position] = self._request(client, instruction)
            except FlAppError as error:
                answers[position] = error
        paid = self._site.guard(instruction.run_dir).admit(list(requests.values()))
        for position, answer in zip(requests, paid, strict=True):
            answers[position] = (
                answer if isinstance(answer, FlAppError) else Admission(budget=answer)
            )
        return answers

    def train(
        self,
        client: ClientId,
        instruction: TrainInstruction,
        *,
        admission: Admission | None = None,
    ) -> ClientUpdate:
        """Measure the received model on the client's own held-out part, train it, and report.

        Args:
            client: Whose records.
            instruction: What the server asks.
            admission: What `admit` gave for this client and round; None to ask for it here.

        Raises:
            BudgetExhaustedError, PolicyError: The client declines; nothing was trained.
            ClientTimeoutError: The deadline passed.
            SimulatedFailureError: The configured failures hit this client and round.
        """
        if admission is None:
            self.maybe_fail(client, instruction.round)  # before it pays
            [answer] = self.admit([client], instruction)
            if isinstance(answer, FlAppError):
                raise answer
            admission = answer
        done = self.train_admitted(client, instruction)
        return self.report(client, instruction, done.count, done.model, done.evaluation, admission)

    def train_admitted(self, client: ClientId, instruction: TrainInstruction) -> Trained:
        """Measure and train for a client whose round is paid for. Raises as `train`."""
        patience = instruction.deadline_s
        deadline = None if patience is None else time.monotonic() + patience
        self.maybe_fail(client, instruction.round)
        examples = self._data.examples_of(client)
        evaluation = None
        if examples.test is not None and self.measures():
            write_params(self._model, instruction.params)
            evaluation = evaluate_quickly(self._model, self._task, examples.test)
        own = self.poisoned(client, examples)
        if self._trainer is not None:
            assignment = self.assignment(client, instruction, own)
            [made] = self._trainer.train(instruction.params, [assignment], deadline=deadline)
            if isinstance(made, Exception):
                raise made
            model = made
        else:
            model = self.train_alone(
                client,
                instruction,
                own,
                optimizer_state=self.remembered_optimizer(client, instruction),
                deadline=deadline,
            )
        return Trained(count=len(examples.train), model=model, evaluation=evaluation)

    def maybe_fail(self, client: ClientId, round: int) -> None:
        """Raise if the configured failures hit this client and round.

        Raises:
            SimulatedFailureError: They do.
        """
        fraction = self._training.failure_fraction
        if fraction == 0:
            return
        seed = stream_seed(self._seed, Role.FAULTS, round=round, client=client)
        if random.Random(seed).random() < fraction:
            raise SimulatedFailureError(f"client.failure_fraction={fraction} hit this round.")

    def remembered_optimizer(
        self, client: ClientId, instruction: TrainInstruction
    ) -> dict[str, object] | None:
        """Return what a client's optimizer remembers of earlier rounds, or None."""
        if not self._training.keep_optimizer_state:
            return None
        states = self.states.of_run(instruction.run)
        state = states.get(client, before_round=instruction.round)
        return None if state is None else dict(state[_OPTIMIZER])

    def is_private(self) -> bool:
        """Return whether training has to be paid for."""
        return self._privacy.unit is not PrivacyUnit.NONE

    def measures(self) -> bool:
        """Return whether clients tell how the received model does on their own held-out parts."""
        return "evaluation" in self._told

    def measure(self, parts: Sequence[Examples], params: Params) -> list[Evaluation]:
        """Return how a model does on each of several clients' held-out parts."""
        return evaluate_each(self._model, self._task, parts, params=params)

    def measure_fully(self, parts: Sequence[Examples], params: Params) -> list[Evaluation]:
        """Return all metrics of a model on each of several clients' held-out parts."""
        return evaluate_fully_each(self._model, self._task, parts, params=params)

    def assignment(
        self, client: ClientId, instruction: TrainInstruction, examples: ClientExamples
    ) -> Assignment:
        """Return what `fl_app.cohort` is to do for a client; as `train_alone` does it.

        Private draws come from a secret of the client's own only where they are to be repeated.
        """
        training, round = self._training, instruction.round
        count = len(examples.train)
        plan = self._privacy.steps(count, batch_size=training.batch_size, epochs=training.epochs)
        own_secret = plan is not None and self._privacy.randomness != Source.SECRET
        return Assignment(
            examples=examples.train,
            count=count,
            randomness=Randomness(seed=self._seed, round=round, client=client),
            plan=plan,
            secret=self._randomness(client, round, "training") if own_secret else None,
            optimizer_state=self.remembered_optimizer(client, instruction),
        )

    def poisoned(self, client: ClientId, examples: ClientExamples) -> ClientExamples:
        """Return a client's examples, as a hostile one would have them."""
        if client not in self._hostile:
            return examples
        return self._training.attack.poison(examples, self._num_classes())

    def train_alone(
        self,
        client: ClientId,
        instruction: TrainInstruction,
        examples: ClientExamples,
        *,
        optimizer_state: Mapping[str, object] | None = None,
        deadline: float | None = None,
    ) -> TrainedModel:
        """Return what training makes of the received model, on these examples."""
        training, round = self._training, instruction.round
        plan = self._privacy.steps(
            len(examples.train), batch_size=training.batch_size, epochs=training.epochs
        )
        train = (
            train_locally
            if plan is None
            else partial(
                train_privately, plan=plan, secret=self._randomness(client, round, "training")
            )
        )
        return train(
            self._model,
            self._task,
            examples,
            training,
            self._objective,
            instruction.params,
            Randomness(seed=self._seed, round=round, client=client),
            optimizer_state=optimizer_state,
            deadline=deadline,
        )

    def report(
        self,
        client: ClientId,
        instruction: TrainInstruction,
        count: int,
        trained: TrainedModel,
        evaluation: Evaluation | None,
        admission: Admission,
    ) -> ClientUpdate:
        """Return what a client with ``count`` records sends; keep what it is to remember."""
        delta = trained.delta
        if client in self._hostile:
            counts = Counts(clients=len(self._data.clients), hostile=len(self._hostile))
            delta = self._training.attack.forge(delta, partial(self._honest, instruction), counts)
        delta, figures = self._privacy.protect(
            delta,
            max_norm=instruction.max_norm,
            randomness=self._randomness(client, instruction.round, "update"),
        )
        if self._training.keep_optimizer_state:
            state = {_OPTIMIZER: trained.optimizer_state}
            self.states.of_run(instruction.run).put(client, state, round=instruction.round)
        return ClientUpdate(
            client=client,
            round=instruction.round,
            delta=delta,
            num_examples=count if "num_examples" in self._told else 1,
            metrics={**(trained.metrics if "metrics" in self._told else {}), **figures},
            evaluation=evaluation,
            num_bytes=num_bytes(delta),
            num_bytes_uncompressed=num_bytes(delta),
            budget=admission.budget if self._site.tells_budget() else None,
        )

    def evaluate(self, client: ClientId, params: Params) -> Evaluation:
        """Return all metrics of a model on the client's own held-out part.

        Raises:
            PolicyError: It may not be told.
            ConfigError: The client has no held-out part.
        """
        if not self.measures():
            raise PolicyError("measurements on this client's own records are withheld.")
        examples = self._data.examples_of(client)
        self._site.check_records(examples.train)
        test = examples.test
        if test is None:
            raise ConfigError(
                f"client {client} has no held-out records of its own: raise "
                "partition.test_fraction or give it more records."
            )
        return evaluate(self._model, self._task, test, params=params)

    def describe(self, client: ClientId) -> ClientDescription:
        """Return what the client is willing to tell about itself."""
        train = self._data.examples_of(client).train
        self._site.check_records(train)
        counts = None
        shares = self._training.share_label_counts and "label_counts" in self._told
        if shares and not train.targets.is_floating_point():
            counts = tuple(torch.bincount(train.targets).tolist())
        size = len(train) if "num_examples" in self._told else None
        return ClientDescription(client=client, num_examples=size, label_counts=counts)

    def _request(self, client: ClientId, instruction: TrainInstruction) -> Request:
        train = self._data.examples_of(client).train
        self._site.check_records(train)
        num_examples = len(train)
        event = self._privacy.event(
            num_examples, batch_size=self._training.batch_size, epochs=self._training.epochs
        )
        return Request(
            client=self._site.account(client),
            run=instruction.run,
            round=instruction.round,
            unit=self._privacy.unit,
            event=event,
            delta=self._privacy.delta,
            num_examples=num_examples,
            task=self._task.name,
        )

    def _randomness(self, client: ClientId, round: int, use: str) -> PrivacyRandomness:
        return randomness_from(
            self._privacy.randomness, seed=self._seed, use=f"{client}/{round}/{use}"
        )

    def _honest(self, instruction: TrainInstruction, count: int) -> Sequence[Params]:
        """Return what that many hostile clients would send this round, had they been honest.

        Kept for the round: every accomplice in this process needs it. Without what optimizers
        remember, which in a worker process is known of one client alone.
        """
        if self._conspiracy is None or self._conspiracy[0] is not instruction.params:
            first = sorted(self._hostile, key=client_order)[:count]
            deltas = [
                self.train_alone(client, instruction, self._data.examples_of(client)).delta
                for client in first
            ]
            self._conspiracy = (instruction.params, deltas)
        return self._conspiracy[1]

    def _num_classes(self) -> int:
        """Return how many outputs the model has for one record."""
        probe = self._data.examples_of(self._data.clients[0]).train.inputs[:1]
        self._model.eval()
        with torch.no_grad():
            return int(self._model(probe)[0].numel())
