"""The one door of a site into a federation: Flower's Fleet API, and nothing else of it.

flwr 1.41 serves the Fleet, Control and Runtime APIs on one port, and asks nobody who submits or
stops a run for a password. A site must reach the first of them only. This server stands between:
it ends TLS, lets through POSTs to the twelve paths that `fleet.BODY_BYTES` lists, as they are,
and answers all else by 403. What the SuperLink says goes back as it is.

It also keeps the SuperLink's memory from its clients: bodies are limited, large ones are taken
from SuperNodes alone that the SuperLink knows, and all objects of a reply together have a limit,
also as the ServerApp unfolds them: an array may name one chunk of its values many times.

What happens to a reply that is too large: its SuperNode gets 413, which it logs as "Failed to
send message" and goes on. The SuperLink, however, has the reply announced already, and the
ServerApp would wait for its objects until their session ends, 180 s after the last of them. So
the gateway takes the reply back: in the SuperNode's name, with the headers of the push that it
refuses, it confirms the reply as received, upon which the SuperLink drops what there is of it,
and the ServerApp is told at its next pull that the reply is unavailable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fl_app.deployment.fleet import (
    BODY_BYTES,
    CONFIRM,
    MIB,
    PUBLIC_KEY,
    PULL_OBJECT,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    Nodes,
    Replies,
    Reply,
    is_signed,
)
from fl_app.deployment.objects import Chunks, MalformedError, PushedObject, parsed

LOG = logging.getLogger("fl_app.gateway")

ANYBODYS_BYTES = MIB // 16
"""Up to this a body is taken from anybody: those of all calls but pushes are far smaller."""

# SuperNodes wait 30 s for an answer and try again on 502, 503 and 504, for ever.
TIMEOUT_S = {"connect": 5.0, "read": 28.0, "write": 28.0, "pool": 5.0}
HEALTH_TIMEOUT_S = dict.fromkeys(TIMEOUT_S, 3.0)
SILENCE_S = 30.0
"""For how long a body may stand still."""

_NO_OBJECT_BYTES = 16
"""An answer to a pull that is no longer says only that the object is not there yet."""

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te")
    + (b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length")
)


class SparingLog:
    """Writes warnings, yet never more than so many lines a minute: callers cause them."""

    def __init__(self, *, lines_a_minute: int = 30) -> None:
        self._most = lines_a_minute
        self._began = 0.0
        self._count = 0

    def warn(self, text: str, *values: object) -> None:
        """Write a line, or count it."""
        now = time.monotonic()
        if now - self._began > 60:
            if self._count > self._most:
                LOG.warning("%d more such lines in the minute before", self._count - self._most)
            self._began, self._count = now, 0
        self._count += 1
        if self._count <= self._most:
            LOG.warning(text, *values)


class _RefusedError(Exception):
    """An answer without asking the SuperLink."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.response = _says(status, text)


class _TooLargeError(Exception):
    """An object would bring its reply beyond the limit, or did so before.

    Attributes:
        envelope: The object's push, without the object.
        reply: What it belongs to.
        first: Whether it is the one by which the limit was passed.
    """

    def __init__(self, envelope: PushObjectRequest, reply: Reply, *, first: bool) -> None:
        super().__init__()
        self.envelope, self.reply, self.first = envelope, reply, first


@dataclass(kw_only=True)
class Gateway:
    """An ASGI application.

    Attributes:
        superlink: Its URL, without a path.
        transport: Connections to it. Not a client, which would add headers, follow redirects
            and heed proxies that the environment names.
        max_reply_bytes: How large the objects of one reply may be together.
    """

    superlink: str
    transport: httpx.AsyncBaseTransport
    max_reply_bytes: int
    replies: Replies = field(default_factory=Replies)
    nodes: Nodes = field(default_factory=Nodes)
    chunks: Chunks = field(default_factory=Chunks)
    log: SparingLog = field(default_factory=SparingLog)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        response = await self._answer(request)
        if response.status_code in (400, 403, 411, 413):
            client = request.client.host if request.client else "?"
            # As a literal: what a caller writes must not look like lines of ours.
            path = ascii(request.scope["raw_path"][:120].decode("latin-1"))
            told = (request.method, path, client, response.status_code)
            self.log.warn("refused %s %s of %s: %d", *told)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        # What the client wrote, undecoded: no two spellings of a path are one.
        path: bytes = request.scope["raw_path"]
        asks = bool(request.scope["query_string"])
        if path == b"/health" and request.method in ("GET", "HEAD") and not asks:
            return await self._health()
        if path not in BODY_BYTES or request.method != "POST" or asks:
            return _says(403, "only the Fleet API of SuperNodes goes through this gateway")
        try:
            num_bytes = self._body_bytes(request, path)
            if path == PUSH_OBJECT:
                return await self._push_object(request, num_bytes)
            if path == PUSH_MESSAGES:
                return await self._push_messages(request)
            if path == PULL_OBJECT:
                return await self._pull_object(request)
            return await self._relay(request, path, await _whole(request))
        except _RefusedError as refused:
            return refused.response
        except MalformedError as error:
            return _says(400, str(error))
        except ClientDisconnect:
            return _says(400, "the caller went away")  # nobody hears it
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            self.log.warn("the SuperLink cannot be reached: %s", error or type(error).__name__)
            return _says(503, "the SuperLink cannot be reached; try again")
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return _says(504, "the SuperLink does not answer; try again")
        except httpx.TransportError as error:
            self.log.warn("the SuperLink broke off: %s", error or type(error).__name__)
            return _says(502, "the SuperLink broke off; try again")

    async def _health(self) -> Response:
        """Return 200 if the SuperLink does."""
        request = httpx.Request(
            "GET", f"{self.superlink}/health", extensions={"timeout": HEALTH_TIMEOUT_S}
        )
        try:
            response = await self.transport.handle_async_request(request)
            await response.aclose()
        except httpx.TransportError:
            return _says(503, "the SuperLink cannot be reached")
        if response.status_code != 200:
            return _says(503, f"the SuperLink is not healthy ({response.status_code})")
        return Response()

    def _body_bytes(self, request: Request, path: bytes) -> int:
        """Return how long a body is; refuse it if that is too long for the path or the caller."""
        text = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not text.isdecimal():
            raise _RefusedError(411, "a Content-Length is needed")
        num_bytes = int(text)
        # Too large an object is read all the same, to learn which reply it breaks.
        if num_bytes > BODY_BYTES[path] and path != PUSH_OBJECT:
            raise _RefusedError(413, f"a body of {num_bytes:,} bytes is too large")
        if num_bytes > ANYBODYS_BYTES:
            key = request.headers.get(PUBLIC_KEY)
            if key is None or not self.nodes.knows(key):
                # Also after a restart, until the SuperNode's next heartbeat.
                raise _RefusedError(503, "this SuperNode is not known yet; try again")
            if not is_signed(request.headers):
                raise _RefusedError(400, "the signature is wrong")
        return num_bytes

    async def _push_messages(self, request: Request) -> Response:
        """Forward the announcement of a reply, and remember the session that it gets."""
        body = await _whole(request)
        announced = parsed(PushMessagesRequest, body)
        response = await self._ask(request, PUSH_MESSAGES, body, len(body))
        content = await response.aread()
        if response.status_code == 200:
            self.replies.opened(announced, PushMessagesResponse.FromString(content))
        return _passed_on(response, content)

    async def _push_object(self, request: Request, num_bytes: int) -> Response:
        """Forward an object as it comes, but for its end, which waits until its reply is known."""
        key = request.headers.get(PUBLIC_KEY, "")
        if not self.nodes.may_push(key):
            raise _RefusedError(503, "too many pushes of this SuperNode at once; try again")
        pushed, admitted = PushedObject(), list[tuple[Reply, int]]()
        fits = num_bytes <= BODY_BYTES[PUSH_OBJECT]

        async def body() -> AsyncIterator[bytes]:
            held = b""
            async for chunk in _chunks(request):
                pushed.feed(chunk)
                if held and fits:
                    yield held
                held = chunk
            named = pushed.chunks()
            admitted.append(await self._admit(pushed.envelope(), num_bytes, named))
            yield held

        with self.nodes.push(key):
            try:
                response = await self._ask(request, PUSH_OBJECT, body(), num_bytes)
                content = await response.aread()
            except httpx.TransportError:
                for reply, unfolded in admitted:  # the object will come again
                    reply.num_bytes -= num_bytes
                    reply.unfolded_bytes -= unfolded
                raise
            except _TooLargeError as error:
                if error.first:
                    await self._take_back(request, error.envelope, error.reply)
                return _says(413, self._limits)
        # A 200 also goes to what is not taken, such as an object under a false id.
        stored = response.status_code == 200 and PushObjectResponse.FromString(content).stored
        if stored and pushed.is_chunk:
            self.chunks.came(pushed.envelope().object_id, num_bytes)
        return _passed_on(response, content)

    @property
    def _limits(self) -> str:
        whole, each = self.max_reply_bytes / MIB, BODY_BYTES[PUSH_OBJECT] / MIB
        return f"a reply may have {whole:,.6g} MiB, and each object of it {each:g}"

    async def _admit(
        self, envelope: PushObjectRequest, num_bytes: int, named: Sequence[str]
    ) -> tuple[Reply, int]:
        """Add an object to its reply; return that, and what the object unfolds to.

        Args:
            envelope: The object's push, without the object.
            num_bytes: Of the push.
            named: Chunks that the object, an array, is made of.

        Raises:
            _TooLargeError: The reply would be beyond the limit.
        """
        reply = self.replies.of(envelope.session_id)
        unfolded, known = await self.chunks.weigh(named, patience_s=reply.patience_s)
        if not known:
            reply.patience_s = 0.0  # of one reply this is enough
        most = min(self.max_reply_bytes - reply.num_bytes, BODY_BYTES[PUSH_OBJECT])
        fits = num_bytes <= most and reply.unfolded_bytes + unfolded <= self.max_reply_bytes
        if reply.refused or not fits:
            first, reply.refused = not reply.refused, True
            raise _TooLargeError(envelope, reply, first=first)
        reply.num_bytes += num_bytes
        reply.unfolded_bytes += unfolded
        return reply, unfolded

    async def _take_back(self, request: Request, envelope: PushObjectRequest, reply: Reply) -> None:
        """Have the SuperLink drop a reply, so that nobody waits for the rest of it."""
        told = (envelope.node.node_id, envelope.run_id, self._limits)
        self.log.warn("the reply of node %d in run %d is taken back: %s", *told)
        if not reply.root:
            return
        body = ConfirmMessageReceivedRequest(
            node=envelope.node, run_id=envelope.run_id, message_object_id=reply.root
        ).SerializeToString(deterministic=True)
        try:
            response = await self._ask(request, CONFIRM, body, len(body))
            await response.aread()
        except httpx.TransportError as error:
            self.log.warn("it could not be taken back: %s", error or type(error).__name__)
            return
        if response.status_code != 200:
            self.log.warn("it could not be taken back: %d", response.status_code)

    async def _pull_object(self, request: Request) -> Response:
        """Forward the call for an object, and note how large the object is."""
        body = await _whole(request)
        asked = parsed(PullObjectRequest, body)
        response = await self._ask(request, PULL_OBJECT, body, len(body))
        num_bytes = int(response.headers.get("content-length", 0))
        if response.status_code == 200 and num_bytes > _NO_OBJECT_BYTES:
            self.chunks.came(asked.object_id, num_bytes)
        return _passed_on(response)

    async def _relay(self, request: Request, path: bytes, body: bytes) -> Response:
        """Forward a call, and stream back what the SuperLink answers."""
        return _passed_on(await self._ask(request, path, body, len(body)))

    async def _ask(
        self, request: Request, path: bytes, body: bytes | AsyncIterator[bytes], num_bytes: int
    ) -> httpx.Response:
        """Return the SuperLink's answer, its body yet to be read."""
        headers = [(k, v) for k, v in request.headers.raw if k.lower() not in _HOP_BY_HOP]
        response = await self.transport.handle_async_request(
            httpx.Request(
                "POST",
                f"{self.superlink}{path.decode()}",
                headers=[*headers, (b"content-length", b"%d" % num_bytes)],
                content=body,
                extensions={"timeout": TIMEOUT_S},
            )
        )
        self.nodes.told(request.headers.get(PUBLIC_KEY), response.status_code)
        return response


def _passed_on(response: httpx.Response, content: bytes | None = None) -> Response:
    """Return an answer of the SuperLink as it is; its body streamed unless it was read."""
    headers = [(k, v) for k, v in response.headers.raw if k.lower() not in _HOP_BY_HOP]
    passed: Response
    if content is not None:
        passed = Response(content, response.status_code)
        headers.append((b"content-length", b"%d" % len(content)))
    else:
        passed = _Streamed(response)
        length = response.headers.get("content-length")
        if length is not None:
            headers.append((b"content-length", length.encode()))
    passed.raw_headers = headers
    return passed


class _Streamed(StreamingResponse):
    """An answer that is handed on as it comes; its connection is given back in any case."""

    def __init__(self, upstream: httpx.Response) -> None:
        super().__init__(upstream.aiter_raw(), upstream.status_code)
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """Yield a body as it comes.

    Raises:
        _RefusedError: Nothing came for `SILENCE_S`.
        ClientDisconnect: The caller went away.
    """
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise _RefusedError(408, "the body does not come") from error
        if chunk:
            yield chunk


async def _whole(request: Request) -> bytes:
    return b"".join([chunk async for chunk in _chunks(request)])


def _says(status: int, text: str) -> Response:
    return PlainTextResponse(f"fl-app gateway: {text}.\n", status_code=status)
