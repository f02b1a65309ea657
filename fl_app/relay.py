"""The client's side of a bundle: passes messages on to the worker of its site, and answers back.

A SuperNode runs whatever bundle the server sends it, so the code that arrives must not be what
guards the data. It holds none: no records, no ledger, no policy, no client state. What it may have
of a site is what the site's own worker (`fl_app.site_worker`) answers over a local socket.
"""

from __future__ import annotations

import time

from flwr.app import Context, Error, Message
from flwr.app.message_type import MessageType
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fl_app.site_protocol import (
    LONGEST_PATIENCE_S,
    MOST_BODY_BYTES,
    Kind,
    ProtocolError,
    Request,
    ask,
)

_START_S = 30.0
"""Seconds for which a worker that is not there yet, or is being restarted, is waited for."""
_RETRY_S = 0.2

_KINDS = {
    MessageType.TRAIN: Kind.TRAIN,
    MessageType.EVALUATE: Kind.EVALUATE,
    MessageType.QUERY: Kind.QUERY,
}


def relay(message: Message, context: Context, *, path: str) -> Message:
    """Return the reply of the worker at a socket to a message; an error reply if there is none."""
    metadata = message.metadata
    # Not by when it was made: that is another machine's clock. Too old ones the SuperLink keeps.
    patience_s = min(metadata.ttl, LONGEST_PATIENCE_S)
    request = Request(
        kind=_KINDS[metadata.message_type],
        config_json=str(context.run_config.get("config-json") or ""),
        overrides=str(context.run_config.get("overrides") or ""),
        node=dict(context.node_config),
        patience_s=patience_s,
    )
    body = recorddict_to_proto(message.content).SerializeToString()
    try:
        _wait_for(path, within_s=min(_START_S, patience_s))
        reply, answer = ask(
            path, request, body, patience_s=patience_s, most_body_bytes=MOST_BODY_BYTES
        )
    except (OSError, ValueError, ProtocolError) as error:
        reason = f"SiteError: the worker of this site does not answer ({type(error).__name__})"
        failed = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        return Message(failed, reply_to=message)
    if reply.code:
        return Message(Error(code=reply.code, reason=reply.reason), reply_to=message)
    return Message(recorddict_from_proto(RecordDictProto.FromString(answer)), reply_to=message)


def _wait_for(path: str, *, within_s: float) -> None:
    """Return once somebody listens at a socket. Raises `OSError` if nobody comes to."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            health = Request(kind=Kind.HEALTH, node={}, patience_s=within_s)
            ask(path, health, b"", patience_s=max(within_s, 0.1), most_body_bytes=0)
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() + _RETRY_S >= deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return
