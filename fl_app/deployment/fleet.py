"""What of Flower's Fleet API a gateway has to know: its paths, its sizes, and who speaks.

All of it is flwr 1.41's: 12 calls, each a POST of one protobuf message of known length. What a
client answers goes up as one ``push-messages`` with the ids of its objects, answered by a
session, and then one ``push-object`` for each that the SuperLink has not yet, parts before the
whole, of 5 MiB at most unless an app sends larger records than arrays.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

MIB = 1024 * 1024

PULL_OBJECT = b"/v1/fleet/pull-object"
PUSH_OBJECT = b"/v1/fleet/push-object"
PUSH_MESSAGES = b"/v1/fleet/push-messages"
CONFIRM = b"/v1/fleet/confirm-message-received"

BODY_BYTES: Mapping[bytes, int] = {
    b"/v1/fleet/register-node": MIB // 16,
    b"/v1/fleet/activate-node": MIB // 16,
    b"/v1/fleet/deactivate-node": MIB // 16,
    b"/v1/fleet/unregister-node": MIB // 16,
    b"/v1/fleet/send-node-heartbeat": MIB // 16,
    b"/v1/fleet/pull-messages": MIB // 16,
    PUSH_MESSAGES: 16 * MIB,  # some 80 bytes an object: 200,000 of them
    b"/v1/fleet/get-run": MIB // 16,
    b"/v1/fleet/get-fab": MIB // 16,
    PUSH_OBJECT: 64 * MIB,
    PULL_OBJECT: MIB // 16,
    CONFIRM: MIB // 16,
}
"""Every path of the Fleet API -> the largest body that is let through."""

PUBLIC_KEY, TIMESTAMP, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"
"""Headers by which a SuperNode shows who it is. They sign the time of the call, nothing else."""


@dataclass(kw_only=True)
class Reply:
    """A client's answer on its way up.

    Attributes:
        root: Id of its first object, which all others hang on; empty if its ``push-messages``
            was not seen, because the gateway has been restarted since.
        num_bytes: Of its objects so far.
        unfolded_bytes: Of the chunks of its arrays so far, each as often as it is in one.
        patience_s: How long a chunk is still waited for.
        refused: It was too large, and none of its objects is let through any more.
    """

    root: str
    num_bytes: int = 0
    unfolded_bytes: int = 0
    patience_s: float = 3.0
    refused: bool = False


class Replies:
    """How much each reply has brought so far; the oldest are forgotten first."""

    def __init__(self, *, kept: int = 16_384) -> None:
        self._kept = kept
        self._by_session: OrderedDict[str, Reply] = OrderedDict()
        self._by_root: OrderedDict[str, Reply] = OrderedDict()

    def opened(self, request: PushMessagesRequest, response: PushMessagesResponse) -> None:
        """Note that a reply was announced. One that is announced again is the same reply."""
        if not request.message_object_trees or not response.session_id:
            return
        root = request.message_object_trees[0].object_id
        reply = self._by_root.setdefault(root, Reply(root=root))
        self._by_session[response.session_id] = reply
        self._forget()

    def of(self, session: str) -> Reply:
        """Return the reply of a session."""
        reply = self._by_session.setdefault(session, Reply(root=""))
        self._forget()
        return reply

    def _forget(self) -> None:
        for known in (self._by_session, self._by_root):
            while len(known) > self._kept:
                known.popitem(last=False)


class Nodes:
    """The SuperNodes that the SuperLink knows, as its answers tell: a 200 is for those alone.

    Large bodies are taken from them only: the SuperLink reads a body before it asks whose it is,
    so that anybody could fill its memory.
    """

    def __init__(self, *, kept: int = 65_536, pushes_at_once: int = 4) -> None:
        self._kept = kept
        self._pushes_at_once = pushes_at_once  # a SuperNode makes two
        self._known: OrderedDict[str, None] = OrderedDict()
        self._pushing: Counter[str] = Counter()

    def told(self, key: str | None, status: int) -> None:
        """Learn from what the SuperLink answered to who showed a public key."""
        if key is None:
            return
        if status == 200:
            self._known[key] = None
            self._known.move_to_end(key)
            if len(self._known) > self._kept:
                self._known.popitem(last=False)
        elif status == 401:
            self._known.pop(key, None)

    def knows(self, key: str | None) -> bool:
        """Return whether the SuperLink has answered to this key."""
        return key in self._known

    def may_push(self, key: str) -> bool:
        """Return whether a SuperNode has not too many pushes under way."""
        return self._pushing[key] < self._pushes_at_once

    @contextmanager
    def push(self, key: str) -> Iterator[None]:
        """Count a push while it lasts."""
        self._pushing[key] += 1
        try:
            yield
        finally:
            self._pushing[key] -= 1
            if not self._pushing[key]:
                del self._pushing[key]


def is_signed(headers: Mapping[str, str]) -> bool:
    """Return whether who sends these headers holds the secret half of the key that they show.

    When it was signed is left to the SuperLink, whose clock counts.
    """
    try:
        key = bytes_to_public_key(b64decode(headers[PUBLIC_KEY], validate=True))
        signature = b64decode(headers[SIGNATURE], validate=True)
        return verify_signature(key, headers[TIMESTAMP].encode("ascii"), signature)
    except (KeyError, ValueError, TypeError, binascii.Error, UnsupportedAlgorithm):
        return False
