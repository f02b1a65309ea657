"""Which Flower node is which client.

Flower names a node by a random number, drawn anew whenever it connects. A directory maps our
stable client ids to the nodes that are connected now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from flwr.serverapp import Grid

from fl_app.arrays import MalformedReplyError
from fl_app.codec import decode_description, query_messages
from fl_app.exchange import exchange
from fl_app.failures import failure_of
from fl_app.types import (
    ClientDescription,
    ClientId,
    ClientUpdate,
    Evaluation,
    Failure,
    Params,
    TrainInstruction,
    client_order,
)

log = logging.getLogger(__name__)


class Directory(Protocol):
    """Client ids, and where to find them."""

    def clients(self) -> Sequence[ClientId]:
        """Return the ids of all clients known so far, in canonical order; may be lazy."""
        ...

    def node_of(self, client: ClientId) -> int | None:
        """Return the node that is this client now, or None while it is offline."""
        ...


@runtime_checkable
class KnowsClients(Protocol):
    """A Grid that knows its clients without asking them."""

    @property
    def directory(self) -> Directory:
        """Its clients."""
        ...


class Cohort(Protocol):
    """Clients that have been asked to train, and answer when they are waited for."""

    @property
    def side_by_side(self) -> bool:
        """Whether they are trained all at once."""
        ...

    @property
    def at_once(self) -> int:
        """How many of them are trained at once: to wait for fewer costs time."""
        ...

    def train(self, count: int) -> Sequence[tuple[ClientId, ClientUpdate | Failure]]:
        """Return the answers of the next ``count`` of them: an update, or why there is none."""
        ...

    def forget(self) -> None:
        """Use for other deltas what those of the answers so far lie in: these are worth nothing."""
        ...


@runtime_checkable
class TrainsCohorts(Protocol):
    """A Grid that can have a cohort train together, without a message to each client."""

    def cohort(self, clients: Sequence[ClientId], instruction: TrainInstruction) -> Cohort | None:
        """Return the cohort, asked; None if its clients take messages."""
        ...

    def evaluations(
        self, clients: Sequence[ClientId], params: Params, *, timeout_s: float | None
    ) -> Mapping[ClientId, Evaluation] | None:
        """Return a model measured by clients on their own held-out parts; None as in `cohort`.

        Clients that would not answer a message, or not in time, are left out.
        """
        ...


class QueryDirectory:
    """Learns client ids by asking each node once, when it is first seen.

    A client keeps its place in the population while its node is away, so the cohorts of a seed do
    not depend on who happens to be connected; when asked to train meanwhile it counts as offline.

    Args:
        grid: Where the nodes are.
        timeout_s: Seconds a node has to answer.
        retry_s: Seconds after which a node that did not is asked again: asked in every round, one
            silent node would make each of them wait.

    Attributes:
        descriptions: What each client told when it was first seen.
        refusals: Why nodes could not say who they are, by node.
    """

    def __init__(self, grid: Grid, *, timeout_s: float = 60.0, retry_s: float = 300.0) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._not_before: dict[int, float] = {}
        self.refusals: dict[int, str] = {}
        self._names: dict[int, ClientId] = {}
        self._clients: list[ClientId] = []
        self._nodes: dict[ClientId, int] = {}
        self.descriptions: dict[ClientId, ClientDescription] = {}

    def clients(self) -> Sequence[ClientId]:
        """Return all client ids known so far, after asking the nodes that are new."""
        self._refresh()
        return self._clients

    def node_of(self, client: ClientId) -> int | None:
        """Return the node that is this client now, or None while it is offline."""
        return self._nodes.get(client)

    def _refresh(self) -> None:
        connected = set(self._grid.get_node_ids())
        self._nodes = {c: node for c, node in self._nodes.items() if node in connected}
        for node in sorted(connected & self._names.keys()):
            self._nodes.setdefault(self._names[node], node)  # one that is back
        now = time.monotonic()
        unknown = sorted(
            node for node in connected - self._names.keys() if self._not_before.get(node, 0) <= now
        )
        if not unknown:
            return
        silent = set(unknown)
        for node, told in ask(self._grid, unknown, timeout_s=self._timeout_s):
            silent.discard(node)
            if isinstance(told, ClientDescription):
                self._add(node, told)
            else:
                self._refuse(node, told)
        self._not_before = dict.fromkeys(silent, now + self._retry_s) | {
            node: after for node, after in self._not_before.items() if after > now
        }

    def _refuse(self, node: int, reason: str) -> None:
        if self.refusals.get(node) != reason:
            log.warning("Node %d does not say who it is: %s", node, reason)
        self.refusals[node] = reason

    def _add(self, node: int, told: ClientDescription) -> None:
        client = told.client
        if client in self._nodes:
            log.warning("Node %d says it is client %s, which is connected already.", node, client)
            return
        self._names[node] = client
        self._nodes[client] = node
        self.descriptions[client] = told
        self._clients = sorted({*self._clients, client}, key=client_order)


def ask(
    grid: Grid, nodes: Sequence[int], *, timeout_s: float
) -> Iterator[tuple[int, ClientDescription | str]]:
    """Yield each node that answers, with what it tells about itself, or why it tells nothing."""
    for reply in exchange(grid, query_messages(nodes, ttl=timeout_s), timeout_s=timeout_s):
        node, failure = reply.metadata.src_node_id, failure_of(reply)
        if failure:
            yield node, failure[1]
            continue
        try:
            yield node, decode_description(reply)
        except MalformedReplyError as error:
            yield node, str(error)


def describe(
    grid: Grid, directory: Directory, clients: Sequence[ClientId], *, timeout_s: float
) -> list[ClientDescription]:
    """Return what clients tell about themselves, without those that do not.

    A `QueryDirectory` has asked already; its nodes are not asked again.
    """
    if isinstance(directory, QueryDirectory):
        return [directory.descriptions[c] for c in clients if c in directory.descriptions]
    nodes = {node: c for c in clients if (node := directory.node_of(c)) is not None}
    told = {}
    for node, answer in ask(grid, list(nodes), timeout_s=timeout_s):
        if isinstance(answer, ClientDescription):
            told[node] = answer
        else:
            log.warning("Client %s tells nothing of itself: %s", nodes.get(node, "?"), answer)
    return [told[node] for node in nodes if node in told]
