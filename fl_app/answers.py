"""What the clients of a round answer, and what of it may be used.

Answers come as replies, one message a client, or, where a cohort has trained together, without
messages. They are judged alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message

from fl_app.aggregation import RunningMean
from fl_app.arrays import MalformedReplyError
from fl_app.directory import Cohort
from fl_app.failures import failure_of
from fl_app.foreign import Replies
from fl_app.types import (
    ClientId,
    ClientUpdate,
    Failure,
    FailureKind,
    Params,
    client_order,
)
from fl_app.validation import UpdateChecks

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Answers:
    """Takes the answers of one round, until there are as many good updates as are wanted.

    Attributes:
        round: Its number.
        asked: Node -> client, of those that were asked.
        offline: Clients of the cohort that could not be asked.
        wanted: Good updates that are enough.
        model: The global parameters that were sent.
        checks: What an update must be.
        hidden: Whether who answered, and how, is told to those alone who look for faults here.
    """

    round: int
    asked: Mapping[int, ClientId]
    offline: Iterable[Failure]
    wanted: int
    model: Params
    checks: UpdateChecks
    hidden: bool
    _updates: dict[ClientId, ClientUpdate] = field(default_factory=dict, init=False)
    _failures: dict[ClientId, Failure] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._failures = {failure.client: failure for failure in self.offline}
        self._level = logging.DEBUG if self.hidden else logging.WARNING

    def updates(self) -> list[ClientUpdate]:
        """Return the good updates, in canonical client order."""
        return [self._updates[client] for client in sorted(self._updates, key=client_order)]

    def failures(self) -> tuple[Failure, ...]:
        """Return what became of the other clients, in canonical client order."""
        return tuple(self._failures[c] for c in sorted(self._failures, key=client_order))

    def take_replies(self, messages: Iterable[Message], read: Replies) -> None:
        """Take replies one by one, and no more than are needed.

        Args:
            messages: As they come in.
            read: Reads what clients send.
        """
        for reply in messages:
            client = self.asked.get(reply.metadata.src_node_id)
            if client is None or client in self._updates or client in self._failures:
                log.log(
                    self._level,
                    "Round %d: an unasked reply of node %d is ignored.",
                    *(self.round, reply.metadata.src_node_id),
                )
                continue
            self._take(client, self._read(reply, client, read))
            if len(self._updates) == self.wanted:
                return
        for client in self.asked.values():
            if client not in self._updates and client not in self._failures:
                late = FailureKind.TIMEOUT
                self._failures[client] = Failure(
                    client=client, kind=late, reason="no reply in time"
                )

    def take_cohort(self, cohort: Cohort, mean: RunningMean | None = None) -> bool:
        """Have no more clients of a cohort train than are needed, in the order of preference.

        Args:
            cohort: The clients.
            mean: What takes updates in parts, if there is something. It is used if more clients
                are asked than are trained at once: then the good updates of each part go into it,
                and are kept without their deltas.

        Returns:
            Whether it was used.
        """
        waiting = len(self.asked)
        in_parts = mean is not None and cohort.side_by_side and waiting > cohort.at_once
        most = cohort.at_once if in_parts else waiting
        while waiting and len(self._updates) < self.wanted:
            count = min(waiting, self.wanted - len(self._updates), most)
            waiting -= count
            clients = self._take_part(cohort, count)
            if mean is not None and in_parts:
                self._add(mean, clients)
                cohort.forget()
        return in_parts

    def _take_part(self, cohort: Cohort, count: int) -> list[ClientId]:
        """Take the answers of the next clients of a cohort; hold no other reference to them."""
        clients = []
        for client, answer in cohort.train(count):
            self._take(client, _as_sent(answer) if isinstance(answer, ClientUpdate) else answer)
            clients.append(client)
        return clients

    def _add(self, mean: RunningMean, clients: Iterable[ClientId]) -> None:
        good = [client for client in sorted(clients, key=client_order) if client in self._updates]
        if good:
            mean.add([self._updates[client] for client in good])
        for client in good:
            self._updates[client] = replace(self._updates[client], delta={})

    def _read(self, reply: Message, client: ClientId, read: Replies) -> ClientUpdate | Failure:
        failure = failure_of(reply)
        if failure:
            return Failure(client=client, kind=failure[0], reason=failure[1])
        try:
            return read.update(reply, client, self.model)
        except MalformedReplyError as error:
            return _rejected(client, str(error))

    def _take(self, client: ClientId, answer: ClientUpdate | Failure) -> None:
        if isinstance(answer, ClientUpdate):
            objection = self.checks.objection(answer, self.model)
            if answer.round != self.round:
                objection = f"it answers round {answer.round}"
            if not objection:
                self._updates[client] = answer
                return
            answer = _rejected(client, objection)
        self._failures[client] = answer
        log.log(
            self._level,
            "Round %d: client %s, %s: %s",
            *(self.round, client, answer.kind, answer.reason),
        )


def _rejected(client: ClientId, objection: str) -> Failure:
    reason = " ".join(objection.split())[:500]  # it may quote what a client sent
    return Failure(client=client, kind=FailureKind.REJECTED, reason=reason)


def _as_sent(update: ClientUpdate) -> ClientUpdate:
    """Return an update that needed no message as it would come out of one: its figures finite."""
    evaluation = update.evaluation
    if not all(map(math.isfinite, update.metrics.values())):
        update = replace(update, metrics=_finite(update.metrics))
    if evaluation is not None and not all(map(math.isfinite, evaluation.metrics.values())):
        told = replace(evaluation, metrics=_finite(evaluation.metrics))
        update = replace(update, evaluation=told)
    return update


def _finite(figures: Mapping[str, float]) -> Mapping[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
