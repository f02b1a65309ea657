"""Messages out, replies in, over any Grid, without waiting longer than it takes."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

POLL_S = (0.005, 0.2)
"""Seconds between the first two looks for replies on a Grid that does not wait by itself, and at
most; doubled in between, so that waiting costs neither a quick round time nor a slow one work."""


def exchange(
    grid: Grid, messages: Iterable[Message], *, timeout_s: float | None
) -> Generator[Message, None, None]:
    """Send messages and yield replies as they come in; closing it stops waiting for the rest.

    Flower's ``send_and_receive`` returns only once all have answered, and looks every 3 seconds.

    Args:
        grid: Reaches the clients.
        messages: Instructions, one a client.
        timeout_s: Seconds to wait at most, or None.
    """
    pending = {identifier for identifier in grid.push_messages(list(messages)) if identifier}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause, longest = POLL_S
    while pending:
        for reply in grid.pull_messages(list(pending)):
            pending.discard(reply.metadata.reply_to_message_id)
            pause = POLL_S[0]
            yield reply
        if not pending or (deadline is not None and time.monotonic() >= deadline):
            return
        time.sleep(pause)
        pause = min(2 * pause, longest)
