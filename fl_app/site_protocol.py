"""What crosses the local socket between a bundle and the worker of its site.

A frame is a fixed prefix, a header in JSON and a body in bytes. One connection carries one request
and its reply. Whoever reads a frame trusts none of it: lengths are bounded before anything is
read, a reader waits no longer than it said, and a header has exactly the keys and types below.

========  ==============================================================================
frame     header keys; body
========  ==============================================================================
request   kind, config_json, overrides, node, patience_s; a Flower ``RecordDict``, encoded
reply     code, reason; the same, or nothing where ``code`` is not 0
========  ==============================================================================

Imports neither torch nor anything that does: a bundle's process lives for one message.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fl_app.errors import FlAppError

PROTOCOL = 1
"""Version of the frames. A site's worker and the bundles it serves must agree on it."""

SOCKET = "FL_APP_SITE_SOCKET"
"""Environment variable, where bundles run: path of the socket of their site's worker."""

MOST_BODY_BYTES = 512 << 20
"""Bytes of a body, at most, unless a worker is told another number."""

MOST_HEADER_BYTES = 1 << 20
LONGEST_PATIENCE_S = 7 * 24 * 3600.0
"""Seconds for which a server may say that it waits."""

SILENCE_S = 10.0
"""Seconds for which whoever sends a frame may stand still."""

_LONGEST_REASON = 2000
_MOST_NODE_KEYS = 32
_CHUNK_BYTES = 1 << 20
_PREFIX = struct.Struct(">4sHIQ")  # magic, protocol, bytes of the header, bytes of the body
_MAGIC = b"FLAP"


class ProtocolError(FlAppError):
    """The other side of the socket sent what no frame is."""


class Kind(StrEnum):
    """What a request is for. The first three are Flower's message types."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    QUERY = "query"
    HEALTH = "health"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a bundle passes on.

    Attributes:
        kind: What for.
        config_json: Flower's run config of that name, or empty.
        overrides: Flower's run config of that name, or empty.
        node: Flower's node config.
        patience_s: Seconds for which the server waits for an answer.
    """

    kind: Kind
    config_json: str = ""
    overrides: str = ""
    node: Mapping[str, str | int | float | bool]
    patience_s: float

    @classmethod
    def checked(cls, header: Mapping[str, Any]) -> Request:
        """Return the request in a header. Raises `ProtocolError`."""
        _check(header, kind=str, config_json=str, overrides=str, node=dict, patience_s=float)
        node = header["node"]
        plain = all(isinstance(value, str | int | float) for value in node.values())
        if not plain or len(node) > _MOST_NODE_KEYS:
            raise ProtocolError("node must hold a few texts and numbers.")
        if not 0 < header["patience_s"] <= LONGEST_PATIENCE_S:  # nor is NaN
            raise ProtocolError(f"patience_s must lie in (0, {LONGEST_PATIENCE_S:.0f}].")
        if header["kind"] not in list(Kind):
            raise ProtocolError(f"kind={header['kind']!r:.40} is not known: {', '.join(Kind)}.")
        return cls(**{**header, "kind": Kind(header["kind"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a worker answers.

    Attributes:
        code: 0, or the code of a Flower error.
        reason: Of the error, for the server.
    """

    code: int = 0
    reason: str = ""

    @classmethod
    def checked(cls, header: Mapping[str, Any]) -> Reply:
        """Return the reply in a header. Raises `ProtocolError`."""
        _check(header, code=int, reason=str)
        return cls(code=header["code"], reason=header["reason"][:_LONGEST_REASON])


def send(peer: socket.socket, header: Request | Reply, body: bytes, *, within_s: float) -> None:
    """Send one frame.

    Raises:
        OSError: The peer is gone, or did not read it in time.
    """
    encoded = json.dumps(asdict(header)).encode()
    peer.settimeout(within_s)
    peer.sendall(_PREFIX.pack(_MAGIC, PROTOCOL, len(encoded), len(body)) + encoded)
    if body:
        peer.sendall(body)


def receive_header(peer: socket.socket, *, deadline: float) -> tuple[dict[str, Any], int]:
    """Return a frame's header, and how many bytes its body has; the body is still to be read.

    Args:
        peer: The other side.
        deadline: `time.monotonic` value by which it must have come.

    Raises:
        ProtocolError: It is no header, or too long.
        OSError: It did not come in time, or the peer is gone.
    """
    magic, protocol, header_bytes, body_bytes = _PREFIX.unpack(
        receive(peer, _PREFIX.size, deadline=deadline)
    )
    if magic != _MAGIC:
        raise ProtocolError("this is no frame of fl-app.")
    if protocol != PROTOCOL:
        raise ProtocolError(
            f"the bundle speaks protocol {protocol} and this site {PROTOCOL}: the older one of "
            "fl-app at the server and at the site has to be upgraded."
        )
    if header_bytes > MOST_HEADER_BYTES:
        raise ProtocolError(f"a header of {header_bytes} bytes; {MOST_HEADER_BYTES} are allowed.")
    try:
        header = json.loads(receive(peer, header_bytes, deadline=deadline))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the header is not JSON.") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is no JSON object.")
    return header, body_bytes


def receive(
    peer: socket.socket, count: int, *, deadline: float, silence_s: float | None = None
) -> bytes:
    """Return exactly ``count`` bytes; memory is taken as they come, not as they are announced.

    Args:
        peer: The other side.
        count: How many.
        deadline: `time.monotonic` value by which they must have come.
        silence_s: Seconds for which none may come, or None.

    Raises:
        OSError: They did not come in time, or the peer is gone.
    """
    received = bytearray()
    while len(received) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side is too slow")
        peer.settimeout(left if silence_s is None else min(left, silence_s))
        chunk = peer.recv(min(count - len(received), _CHUNK_BYTES))
        if not chunk:
            raise ConnectionResetError("the other side has gone")
        received += chunk
    return bytes(received)


def ask(
    path: str, request: Request, body: bytes, *, patience_s: float, most_body_bytes: int
) -> tuple[Reply, bytes]:
    """Return what the worker at a socket answers.

    Raises:
        ProtocolError: It answers in no frame, or at too great a length.
        OSError: It cannot be reached, or does not answer in time.
    """
    deadline = time.monotonic() + patience_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(patience_s)
        peer.connect(path)
        with suppress(BrokenPipeError):  # refused before it was read: the answer says why
            send(peer, request, body, within_s=patience_s)
        header, body_bytes = receive_header(peer, deadline=deadline)
        if body_bytes > most_body_bytes:
            raise ProtocolError(f"an answer of {body_bytes} bytes; {most_body_bytes} are allowed.")
        return Reply.checked(header), receive(peer, body_bytes, deadline=deadline)


def _check(header: Mapping[str, Any], **kinds: type) -> None:
    """Refuse a header whose keys or types are not exactly these."""
    if set(header) != set(kinds):
        raise ProtocolError(f"a header has the keys {', '.join(kinds)}, and no others.")
    for key, kind in kinds.items():
        value = header[key]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ProtocolError(f"{key} must be a {kind.__name__}.")
