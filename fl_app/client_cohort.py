"""What the clients of a cohort do when they are asked together, as `fl_app.client` does for one.

Each answers what it would answer alone, and fails alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from fl_app.client import ClientRuntime
from fl_app.cohort import CohortTrainer, is_out_of_memory
from fl_app.failures import failure_from
from fl_app.metric_records import as_sent
from fl_app.privacy.base import Admission
from fl_app.stacked.layer import NotStackableError
from fl_app.training import EVALUATION_BATCH, Trained, TrainedModel
from fl_app.types import (
    ClientExamples,
    ClientId,
    ClientUpdate,
    Evaluation,
    Examples,
    Failure,
    FlAppError,
    Params,
    TrainInstruction,
)

log = logging.getLogger(__name__)


class Work(Protocol):
    """Trains admitted clients."""

    @property
    def side_by_side(self) -> bool:
        """Whether it does so all at once."""
        ...

    @property
    def at_once(self) -> int:
        """How many it trains at once."""
        ...

    def __call__(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> Sequence[Trained | Failure]:
        """Return what came of each client's training, in their order."""
        ...

    def forget(self) -> None:
        """Use for other deltas what those it has given lie in."""
        ...


class CohortWork:
    """Trains admitted clients side by side, in this process.

    Args:
        runtime: Serves them.
        trainer: Trains them.
    """

    side_by_side = True

    def __init__(self, runtime: ClientRuntime, trainer: CohortTrainer) -> None:
        self._runtime = runtime
        self._trainer = trainer

    @property
    def at_once(self) -> int:
        """How many are trained side by side."""
        return self._trainer.at_once

    def forget(self) -> None:
        """Do nothing: each delta lies in memory of its own."""

    def __call__(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> Sequence[Trained | Failure]:
        """Return what came of each client's training."""
        patience = instruction.deadline_s
        deadline = None if patience is None else time.monotonic() + patience
        outcomes: dict[ClientId, Trained | Failure] = {}
        owned: dict[ClientId, ClientExamples] = {}
        for client in clients:
            try:
                self._runtime.maybe_fail(client, instruction.round)
                owned[client] = self._runtime.data.examples_of(client)
            except Exception as error:  # whatever a client raises costs the round that client alone
                outcomes[client] = _failed(client, error)
        evaluations: dict[ClientId, Evaluation] = {}
        for client, measured in self._measured(owned, instruction).items():
            if isinstance(measured, Evaluation):
                evaluations[client] = measured
            else:
                outcomes[client] = _failed(client, measured)
                del owned[client]
        trained = self._trained(owned, instruction, deadline) if owned else {}
        for client, model in trained.items():
            outcomes[client] = (
                _failed(client, model)
                if isinstance(model, Exception)
                else Trained(
                    count=owned[client].train.targets.shape[0],
                    model=model,
                    evaluation=evaluations.get(client),
                )
            )
        return [outcomes[client] for client in clients]

    def _measured(
        self, owned: Mapping[ClientId, ClientExamples], instruction: TrainInstruction
    ) -> dict[ClientId, Evaluation | Exception]:
        """Return how the received model does on the clients' own records, or why that is unknown.

        If they cannot be measured together they are measured one by one, as `_trained` does.
        """
        parts = {client: own.test for client, own in owned.items() if own.test is not None}
        if not parts or not self._runtime.measures():
            return {}
        try:
            measured = self._runtime.measure(list(parts.values()), instruction.params)
            return dict(zip(parts, measured, strict=True))
        except Exception:
            answers: dict[ClientId, Evaluation | Exception] = {}
            for client, part in parts.items():
                try:
                    [answers[client]] = self._runtime.measure([part], instruction.params)
                except Exception as error:
                    answers[client] = error
            return answers

    def _trained(
        self,
        owned: Mapping[ClientId, ClientExamples],
        instruction: TrainInstruction,
        deadline: float | None,
    ) -> dict[ClientId, TrainedModel | Exception]:
        """Return what training makes of each client's model, or why there is none.

        If the clients cannot be trained together they are trained one by one, for the error to be
        that of the one that is to blame for it.

        Raises:
            Exception: None of them is: the error is ours.
        """
        runtime = self._runtime
        examples = {client: runtime.poisoned(client, own) for client, own in owned.items()}
        assignments = [runtime.assignment(c, instruction, own) for c, own in examples.items()]
        try:
            trained = self._trainer.train(instruction.params, assignments, deadline=deadline)
            return dict(zip(examples, trained, strict=True))
        except Exception as error:
            answers: dict[ClientId, TrainedModel | Exception] = {}
            for client, own in examples.items():
                try:
                    answers[client] = runtime.train_alone(
                        *(client, instruction, own),
                        optimizer_state=runtime.remembered_optimizer(client, instruction),
                        deadline=deadline,
                    )
                except Exception as own_error:
                    answers[client] = own_error
            if any(isinstance(answer, Exception) for answer in answers.values()):
                return answers
            if not (is_out_of_memory(error) or isinstance(error, NotStackableError)):
                raise
            log.warning("These clients were trained one by one: %s", error)
            return answers


class AloneWork:
    """Trains admitted clients one by one, in this process, as `ClientRuntime.train` does.

    Args:
        runtime: Serves them.
    """

    side_by_side = False
    at_once = 1

    def __init__(self, runtime: ClientRuntime) -> None:
        self._runtime = runtime

    def forget(self) -> None:
        """Do nothing: each delta lies in memory of its own."""

    def __call__(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> Sequence[Trained | Failure]:
        """Return what came of each client's training."""
        outcomes: list[Trained | Failure] = []
        for client in clients:
            try:
                outcomes.append(self._runtime.train_admitted(client, instruction))
            except Exception as error:  # whatever a client raises costs the round that client alone
                outcomes.append(_failed(client, error))
        return outcomes


class ClientCohort:
    """The clients asked in one round; their privacy is paid for when they are.

    Args:
        runtime: Serves them.
        work: Trains them.
        clients: In the order in which their answers are preferred.
        instruction: What the server asks of all of them.

    Attributes:
        side_by_side: Whether they are trained all at once.
        at_once: How many are.
        forget: To be called when the deltas of the answers so far are needed no more.
    """

    def __init__(
        self,
        runtime: ClientRuntime,
        work: Work,
        clients: Sequence[ClientId],
        instruction: TrainInstruction,
    ) -> None:
        self.side_by_side, self.at_once = work.side_by_side, work.at_once
        self.forget = work.forget
        self._runtime = runtime
        self._work = work
        self._instruction = instruction
        patience = instruction.deadline_s
        self._deadline = None if patience is None else time.monotonic() + patience
        if runtime.is_private():
            admissions = runtime.admit(clients, instruction)
        else:
            admissions = [Admission(budget=None)] * len(clients)
        self._waiting = deque(zip(clients, admissions, strict=True))

    def train(self, count: int) -> list[tuple[ClientId, ClientUpdate | Failure]]:
        """Return the answers of the next ``count`` clients."""
        asked = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        admitted = [client for client, admission in asked if isinstance(admission, Admission)]
        outcomes = dict(zip(admitted, self._work(admitted, self._left()), strict=True))
        answers: list[tuple[ClientId, ClientUpdate | Failure]] = []
        for client, admission in asked:
            if isinstance(admission, FlAppError):
                answers.append((client, _failed(client, admission)))
                continue
            outcome = outcomes[client]
            if isinstance(outcome, Trained):
                answers.append((client, self._reported(client, outcome, admission)))
            else:
                answers.append((client, outcome))
        return answers

    def _left(self) -> TrainInstruction:
        """Return the instruction with the seconds that are left of the round."""
        if self._deadline is None:
            return self._instruction
        left = max(0.0, self._deadline - time.monotonic())
        return replace(self._instruction, deadline_s=left)

    def _reported(
        self, client: ClientId, outcome: Trained, admission: Admission
    ) -> ClientUpdate | Failure:
        try:
            return self._runtime.report(
                *(client, self._instruction, outcome.count, outcome.model),
                *(outcome.evaluation, admission),
            )
        except Exception as error:  # it costs the round that client alone
            return _failed(client, error)


def measure_clients(
    runtime: ClientRuntime, clients: Sequence[ClientId], params: Params, deadline: float | None
) -> dict[ClientId, Evaluation]:
    """Return all metrics of a model on clients' own held-out parts.

    Left out are those without such a part, whose policy withholds it, that fail, or whose turn
    would come after the deadline. As many are measured together as a model is run on at once.

    Args:
        runtime: Serves them.
        clients: Whom to ask.
        params: The model.
        deadline: A `time.monotonic` value, or None.
    """
    evaluations: dict[ClientId, Evaluation] = {}
    if not runtime.measures():
        return evaluations
    waiting: dict[ClientId, Examples] = {}
    records = 0
    for client in clients:
        if deadline is not None and time.monotonic() > deadline:
            return evaluations
        with suppress(Exception):  # whatever a client raises costs its own evaluation alone
            test = runtime.data.examples_of(client).test
            if test is not None:
                records += len(test)
                waiting[client] = test
        if records >= EVALUATION_BATCH:
            evaluations |= _measured_together(runtime, waiting, params)
            waiting, records = {}, 0
    return evaluations | _measured_together(runtime, waiting, params)


def _measured_together(
    runtime: ClientRuntime, parts: Mapping[ClientId, Examples], params: Params
) -> dict[ClientId, Evaluation]:
    """Return what can be measured; one by one if it cannot be done together."""
    if not parts:
        return {}
    try:
        measured = runtime.measure_fully(list(parts.values()), params)
        return _as_sent(dict(zip(parts, measured, strict=True)))
    except Exception:
        evaluations: dict[ClientId, Evaluation] = {}
        for client, part in parts.items():
            with suppress(Exception):
                evaluations |= _as_sent({client: runtime.measure_fully([part], params)[0]})
        return evaluations


def _as_sent(evaluations: Mapping[ClientId, Evaluation]) -> dict[ClientId, Evaluation]:
    sent = {client: as_sent(evaluation) for client, evaluation in evaluations.items()}
    return {client: evaluation for client, evaluation in sent.items() if evaluation is not None}


def _failed(client: ClientId, error: Exception) -> Failure:
    kind, reason = failure_from(error)
    return Failure(client=client, kind=kind, reason=reason)
