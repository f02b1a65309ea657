"""The Grid of ``engine=local``: Flower's Grid over clients of this machine."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fl_app.client_cohort import ClientCohort
from fl_app.client_state import MemoryClientState
from fl_app.failures import error_reply
from fl_app.tasks.federated import ClientRange
from fl_app.training import ClientTimeoutError
from fl_app.types import ClientId, Evaluation, Params, TrainInstruction, client_order

RUN_ID = 1
"""Flower's number of the one run that a process plays at a time."""


class Executor(Protocol):
    """Has instructions carried out."""

    def run(self, jobs: Iterable[tuple[Message, UserConfig]]) -> Generator[Message, None, None]:
        """Yield one reply for each (instruction, node config), in that order."""
        ...


class LocalDirectory:
    """Client ids by position: node n is the n-th client, counted from 1.

    Args:
        clients: In canonical order; may be lazy, of any length.
    """

    def __init__(self, clients: Sequence[ClientId]) -> None:
        self._clients = clients
        self._position: Callable[[ClientId], int | None]
        if isinstance(clients, ClientRange):
            self._position = clients.position
        elif isinstance(clients, tuple | list):
            self._position = {client: position for position, client in enumerate(clients)}.get
        else:
            self._position = self._searched

    def clients(self) -> Sequence[ClientId]:
        """Return the ids of all clients."""
        return self._clients

    def node_of(self, client: ClientId) -> int | None:
        """Return the client's node, or None if there is no such client."""
        position = self._position(client)
        return None if position is None else position + 1

    def node_config(self, node: int) -> UserConfig:
        """Return what Flower tells a node of itself."""
        return {
            "partition-id": node - 1,
            "num-partitions": len(self._clients),
            "client-id": self._clients[node - 1],
            "in-process": 1,
        }

    def _searched(self, client: ClientId) -> int | None:
        position = bisect_left(self._clients, client_order(client), key=client_order)
        known = position < len(self._clients) and self._clients[position] == client
        return position if known else None


class LocalGrid(Grid):
    """Flower's Grid over clients of this machine.

    Replies come in the order in which instructions were pushed, whichever process is done first,
    and instructions are carried out as replies are asked for: whoever stops asking, as a round
    does that has all the updates it wants, leaves the rest undone.

    Args:
        clients: Ids in canonical order; may be lazy.
        executor: Has instructions carried out.
        states: What clients remember; part of the run's checkpoints.
        admit: Pays for the training of a cohort at once; None if there is nothing to pay.
        gather: Has a cohort train together; None if its clients take messages.
        measure: Has clients measure a model together, given the `time.monotonic` value at which to
            stop, or None; None likewise.
        close: Called when the Grid is no longer needed.
    """

    def __init__(
        self,
        clients: Sequence[ClientId],
        executor: Executor,
        states: MemoryClientState,
        *,
        admit: Callable[[Sequence[Message], Sequence[ClientId]], list[Message | UserConfig]]
        | None = None,
        gather: Callable[[Sequence[ClientId], TrainInstruction], ClientCohort] | None = None,
        measure: Callable[[Sequence[ClientId], Params, float | None], Mapping[ClientId, Evaluation]]
        | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.directory = LocalDirectory(clients)
        self._executor = executor
        self._states = states
        self._admit = admit
        self._gather = gather
        self._measure = measure
        self._close = close
        self._run = Run.create_empty(RUN_ID)
        self._queue: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        if self._close is not None:
            self._close()

    def set_run(self, run: Run) -> None:
        """Set the run this Grid serves."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this Grid serves."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Return all node ids: 1 to the number of clients."""
        return range(1, len(self.directory.clients()) + 1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue instructions and return their ids."""
        identifiers = []
        for message in messages:
            identifier = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = identifier
            self._queue[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Generator[Message, None, None]:
        """Yield the replies to these instructions, in the order in which they were pushed."""
        wanted = set(message_ids)
        due = [self._queue[identifier] for identifier in self._queue if identifier in wanted]
        admitted = self._admitted(due)
        jobs = (
            (message, {**self.directory.node_config(message.metadata.dst_node_id), **answer})
            for message, answer in zip(due, admitted, strict=True)
            if not isinstance(answer, Message)
        )
        replies = self._executor.run(jobs)
        try:
            for message, answer in zip(due, admitted, strict=True):
                reply = answer if isinstance(answer, Message) else next(replies)
                self._queue.pop(message.metadata.message_id, None)
                yield reply
        finally:
            replies.close()
            for message in due:
                self._queue.pop(message.metadata.message_id, None)

    def _admitted(self, due: Sequence[Message]) -> list[Message | UserConfig]:
        """Return for each instruction what admits it, or the reply of a client that declines."""
        training = bool(due) and due[0].metadata.message_type == MessageType.TRAIN
        if self._admit is None or not training:
            return [{} for _ in due]
        clients = [self.directory.clients()[m.metadata.dst_node_id - 1] for m in due]
        return self._admit(due, clients)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push instructions and return all replies."""
        messages = list(messages)
        if timeout is not None:
            for message in messages:
                message.metadata.__dict__["_ttl"] = min(timeout, message.metadata.ttl)
        return list(self.pull_messages(self.push_messages(messages)))

    def cohort(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> ClientCohort | None:
        """Return clients asked to train together; None if they take messages."""
        return None if self._gather is None else self._gather(clients, instruction)

    def evaluations(
        self, clients: Sequence[ClientId], params: Params, *, timeout_s: float | None
    ) -> Mapping[ClientId, Evaluation] | None:
        """Return a model measured by clients; None if they take messages."""
        if self._measure is None:
            return None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return self._measure(clients, params, deadline)

    def snapshot(self) -> Mapping[str, Any]:
        """Return what the clients remember."""
        return self._states.snapshot()

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Set what the clients remember."""
        self._states.restore(snapshot)


class InProcess:
    """Carries out instructions one after another in this process.

    A client that is past its deadline is not started; ours give up between two batches. One that
    hangs for ever can only be ended in a worker process (``engine.workers`` > 1).

    Args:
        app: A Flower ClientApp.
        run_config: Flower's run config.
    """

    def __init__(self, app: Callable[[Message, Context], Message], run_config: UserConfig) -> None:
        self._app = app
        self._run_config = run_config

    def run(self, jobs: Iterable[tuple[Message, UserConfig]]) -> Generator[Message, None, None]:
        """Yield one reply for each (instruction, node config), in that order."""
        for message, node_config in jobs:
            yield call_client(self._app, message, node_config, self._run_config)


def call_client(
    app: Callable[[Message, Context], Message],
    message: Message,
    node_config: UserConfig,
    run_config: UserConfig,
) -> Message:
    """Return a ClientApp's reply, or the error reply that Flower's runtimes would give."""
    context = Context(
        run_id=RUN_ID,
        node_id=message.metadata.dst_node_id,
        node_config=node_config,
        state=RecordDict(),
        run_config=run_config,
    )
    try:
        if is_expired(message):
            raise ClientTimeoutError("The round's time was up before this client's turn.")
        return app(message, context)
    except Exception as error:  # whatever a client raises costs the round that client alone
        return error_reply(message, error)


def is_expired(message: Message) -> bool:
    """Return whether a message has outlived its time to live."""
    return time.time() > message.metadata.created_at + message.metadata.ttl
