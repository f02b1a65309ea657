"""The Flower ClientApp: messages in, messages out.

Two ways lead on from here. A client of a simulation is served in its own process, by
`fl_app.client_messages`. A deployed client's bundle only passes messages on to the worker that its
site runs itself (`fl_app.relay`); this module loads neither torch nor any of the rest for that.
"""

from __future__ import annotations

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_app.relay import relay
from fl_app.site_protocol import SOCKET

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model, and measure it on the way, in one reply."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received model on the client's own held-out part."""
    return _answer(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell who this client is, and what it is willing to tell about itself."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    if path := os.environ.get(SOCKET):
        return relay(message, context, path=path)
    from fl_app.client_messages import answer

    return answer(message, context)
