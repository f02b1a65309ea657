"""What gateways read of the objects of a reply: whose they are, and what they come to together.

In flwr 1.41 an array goes as chunks of its values and as a list of which of them it is made of, in
order, and a chunk that comes again is sent once. Some bytes can so stand for any number of them,
which the ServerApp unfolds; a reply therefore weighs what its chunks do, as often as it names them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)

_NODE, _RUN, _OBJECT, _CONTENT, _SESSION = 0x0A, 0x10, 0x1A, 0x22, 0x2A  # fields 1 to 5, tagged
_FIELD_BYTES = 1024
_ARRAY, _CHUNK = b"Array ", b"ArrayChunk "  # how such objects begin
_ARRAY_BYTES = 1 << 20  # names 15,000 chunks
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2


class MalformedError(ValueError):
    """A body that no SuperNode sends."""


def parsed(kind: type[M], body: bytes) -> M:
    """Return the protobuf message that a body holds.

    Raises:
        MalformedError: It holds none of that kind.
    """
    try:
        message: M = kind.FromString(body)
    except DecodeError as error:
        raise MalformedError(f"the body is no {kind.__name__}") from error
    return message


class PushedObject:
    """Reads a ``PushObjectRequest`` as it passes by, without keeping the object.

    Strict: each field at most once and in their order, which is how Flower writes them. What is
    read here is then what the SuperLink reads; of fields that come twice, it takes the last.
    """

    def __init__(self) -> None:
        self._unread = bytearray()  # begins at a field
        self._envelope = bytearray()  # all fields but the object
        self._content = bytearray()  # of the object: its beginning, or all of an array's
        self._to_skip = 0  # bytes of the object still to come
        self._last_tag = 0

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes.

        Raises:
            MalformedError: They cannot be of such a message.
        """
        skipped = min(self._to_skip, len(chunk))
        self._to_skip -= skipped
        self._keep(chunk[:skipped])
        self._unread += chunk[skipped:]
        while self._unread and not self._to_skip and self._read_field():
            pass

    def envelope(self) -> PushObjectRequest:
        """Return the message without its object, once all of it was read.

        Raises:
            MalformedError: Bytes are missing, or it names no session.
        """
        if self._to_skip or self._unread:
            raise MalformedError("the body ends within a field")
        request = parsed(PushObjectRequest, bytes(self._envelope))
        if not request.session_id:
            raise MalformedError("the object names no session")
        return request

    @property
    def is_chunk(self) -> bool:
        """Whether the object is a part of an array's values."""
        return self._content.startswith(_CHUNK)

    def chunks(self) -> list[str]:
        """Return the ids of the chunks that an array is made of, each as often as it is in it.

        Of any other object there are none.

        Raises:
            MalformedError: The array is not one of Flower's.
        """
        if not self._content.startswith(_ARRAY):
            return []
        try:
            content = bytes(self._content)
            _, ids, _ = get_object_head_values_from_object_content(content)
            _, _, body = content.partition(HEAD_BODY_DIVIDER)
            return [ids[number] for number in json.loads(body)["arraychunk_ids"]]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise MalformedError("the array does not say what it is made of") from error

    def _keep(self, content: bytes) -> None:
        """Keep an array, which holds no values but names their chunks; of all else what it is."""
        if len(self._content) < len(_CHUNK) or self._content.startswith(_ARRAY):
            self._content += content
        if not self._content.startswith(_ARRAY):
            del self._content[len(_CHUNK) :]
        elif len(self._content) > _ARRAY_BYTES:
            raise MalformedError("the array is made of more chunks than any reply has")

    def _read_field(self) -> bool:
        """Read one field; return False if more bytes are needed."""
        tag = self._unread[0]
        if tag not in (_NODE, _RUN, _OBJECT, _CONTENT, _SESSION) or tag <= self._last_tag:
            raise MalformedError("a field is unknown, or out of its order")
        number = _varint(self._unread, 1)
        if number is None:
            return False
        value, end = number
        if tag == _CONTENT:
            del self._unread[:end]
            here = min(value, len(self._unread))
            self._keep(bytes(self._unread[:here]))
            del self._unread[:here]
            self._to_skip = value - here
        else:
            end += 0 if tag == _RUN else value
            if end > _FIELD_BYTES:
                raise MalformedError("a field is longer than any that Flower writes")
            if len(self._unread) < end:
                return False
            self._envelope += self._unread[:end]
            del self._unread[:end]
        self._last_tag = tag
        return True


def _varint(buffer: bytearray, start: int) -> tuple[int, int] | None:
    """Return a number and where it ends; None if it does not end yet."""
    value = 0
    for place, byte in enumerate(buffer[start : start + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, start + place + 1
    if len(buffer) >= start + 10:
        raise MalformedError("a number has more than ten bytes")
    return None


class Chunks:
    """How large the objects are that went through lately, in either direction."""

    def __init__(self, *, kept: int = 262_144) -> None:
        self._kept = kept
        self._bytes: OrderedDict[str, int] = OrderedDict()

    def came(self, object_id: str, num_bytes: int) -> None:
        """Note an object of which the SuperLink said, by an answer, that its id is right."""
        self._bytes[object_id] = max(num_bytes, self._bytes.pop(object_id, 0))
        if len(self._bytes) > self._kept:
            self._bytes.popitem(last=False)

    async def weigh(self, ids: Iterable[str], *, patience_s: float) -> tuple[int, bool]:
        """Return what some chunks weigh together, and whether all of them are known.

        Args:
            ids: Theirs, as often as each counts. One that is not known counts as the largest
                that Flower makes.
            patience_s: For how long those that are not known are waited for: a SuperNode
                sends some objects at a time.
        """
        ids = list(ids)
        missing, deadline, pause_s = set(ids), time.monotonic() + patience_s, _FIRST_PAUSE_S
        while missing := {chunk for chunk in missing if chunk not in self._bytes}:
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        largest = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
        return sum(self._bytes.get(chunk, largest) for chunk in ids), not missing
