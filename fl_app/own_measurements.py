"""The global model, measured by clients on their own held-out parts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fl_app.arrays import MalformedReplyError
from fl_app.codec import encode_model, evaluate_messages, instruction
from fl_app.directory import Directory, TrainsCohorts
from fl_app.exchange import exchange
from fl_app.foreign import OurReplies, Replies
from fl_app.types import ClientId, Evaluation, Params, client_order

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnMeasurements:
    """Has clients measure a model, without messages where the Grid sees to it.

    Attributes:
        directory: Who the clients are.
        replies: Reads what they send.
        timeout_s: Seconds to wait for them, or None.
        ttl_s: Time to live of a message if there is no timeout.
    """

    directory: Directory
    replies: Replies
    timeout_s: float | None
    ttl_s: float

    def __call__(
        self, grid: Grid, clients: Iterable[ClientId], params: Params, *, round: int
    ) -> dict[ClientId, Evaluation]:
        """Return what clients measure, in canonical order.

        Clients without such a part, that are offline or do not answer are left out.

        Args:
            grid: Reaches the clients.
            clients: Whom to ask.
            params: The model.
            round: The last that was played.
        """
        nodes = {self.directory.node_of(client): client for client in clients}
        known = {node: client for node, client in nodes.items() if node is not None}
        measured: Mapping[ClientId, Evaluation] | None = None
        if isinstance(self.replies, OurReplies) and isinstance(grid, TrainsCohorts):
            asked = list(known.values())
            measured = grid.evaluations(asked, params, timeout_s=self.timeout_s)
        if measured is None:
            measured = self._answered(grid, known, params, round)
        return dict(sorted(measured.items(), key=lambda entry: client_order(entry[0])))

    def _answered(
        self, grid: Grid, known: Mapping[int, ClientId], params: Params, round: int
    ) -> dict[ClientId, Evaluation]:
        content = instruction(encode_model(params), ConfigRecord(), round=round)
        messages = evaluate_messages(
            dict.fromkeys(known, content), round=round, ttl=self.timeout_s or self.ttl_s
        )
        evaluations = {}
        for reply in exchange(grid, messages, timeout_s=self.timeout_s):
            client = known.get(reply.metadata.src_node_id)
            if client is None or reply.has_error():
                continue
            try:
                evaluations[client] = self.replies.evaluation(reply)
            except MalformedReplyError as error:
                log.warning("Client %s: evaluation ignored, %s.", client, error)
        return evaluations
