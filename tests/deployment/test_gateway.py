"""The gateway before a SuperLink of paper, which notes what reaches it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flower_process import free_port
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fl_app import cli
from fl_app.deployment.certificates import make
from fl_app.deployment.fleet import BODY_BYTES, MIB
from fl_app.deployment.objects import Chunks, MalformedError, PushedObject

FLEET = sorted(path.decode() for path in BODY_BYTES)
NOT_FLEET = sorted(path for _, path in PROTOBUF_REQUEST_TYPES if not path.startswith("/v1/fleet/"))
MAX_REPLY_MIB = 2


@dataclass(kw_only=True)
class PaperSuperLink:
    """Answers as a SuperLink that believes everybody, and keeps what it got."""

    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    sessions: int = 0
    breaks: int = 0
    pulled: bytes = b""
    stores: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        self.seen.append((request.url.path, dict(request.headers), body))
        if self.breaks:
            self.breaks -= 1
            announced = [(b"content-length", b"100")]
            await send({"type": "http.response.start", "status": 200, "headers": announced})
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            raise RuntimeError("breaks off, as it was told to")
        content = b"\x0a\x05hello"
        if request.url.path.endswith("pull-object"):
            content = self.pulled
        if request.url.path.endswith("push-messages"):
            self.sessions += 1
            session = PushMessagesResponse(session_id=f"session-{self.sessions}")
            content = session.SerializeToString()
        elif request.url.path.endswith("push-object"):
            content = PushObjectResponse(stored=self.stores).SerializeToString()
        await Response(content, media_type="application/protobuf")(scope, receive, send)

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]


@dataclass(frozen=True, kw_only=True)
class Door:
    """A gateway in a process of its own before a SuperLink of paper."""

    url: str
    port: int
    process: int
    superlink: PaperSuperLink

    def post(self, path: str, content: bytes = b"x", **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        names.setdefault("content-type", "application/protobuf")
        return httpx.post(f"{self.url}{path}", content=content, headers=names, timeout=20)

    def raw(self, text: bytes) -> bytes:
        """Send bytes as they are, and return the first line of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(text)
            return connection.recv(65536).partition(b"\r\n")[0]

    def memory_mib(self) -> float:
        """Return the most that the gateway ever held."""
        status = Path(f"/proc/{self.process}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def doors() -> Generator[Door, None, None]:
    superlink = PaperSuperLink()
    server = uvicorn.Server(
        uvicorn.Config(superlink, port=free_port(), lifespan="off", ws="none", log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    port = free_port()
    arguments = ["gateway", "--insecure", "--superlink", f"127.0.0.1:{server.config.port}"]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app", *arguments, "--max-reply-mib", str(MAX_REPLY_MIB)],
        env=environment(),
    )
    try:
        until_healthy(f"http://127.0.0.1:{port}")
        yield Door(
            url=f"http://127.0.0.1:{port}", port=port, process=process.pid, superlink=superlink
        )
    finally:
        process.terminate()
        assert process.wait(timeout=15) == -signal.SIGTERM
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def door(doors: Door) -> Door:
    doors.superlink.seen.clear()
    doors.superlink.breaks = 0
    doors.superlink.pulled = b"\x0a\x05hello"
    doors.superlink.stores = True
    return doors


def until_healthy(url: str, *, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} did not become healthy")


class SuperNode:
    """Speaks to a gateway as a SuperNode does."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.key = ec.generate_private_key(ec.SECP384R1())

    def headers(self) -> dict[str, str]:
        now = "2026-01-01T00:00:00+00:00"
        public = public_key_to_bytes(self.key.public_key())
        return {
            "flwr_public_key": b64encode(public).decode(),
            "flwr_timestamp": now,
            "flwr_signature": b64encode(sign_message(self.key, now.encode())).decode(),
        }

    def beat(self) -> None:
        path = "/v1/fleet/send-node-heartbeat"
        assert self.door.post(path, **self.headers()).status_code == 200

    def announce(self, root: str) -> str:
        request = PushMessagesRequest(message_object_trees=[ObjectTree(object_id=root)])
        path = "/v1/fleet/push-messages"
        answer = self.door.post(path, request.SerializeToString(), **self.headers())
        return str(PushMessagesResponse.FromString(answer.content).session_id)

    def push(self, session: str, content: int | InflatableObject) -> int:
        if isinstance(content, int):
            body = pushed(session=session, content=bytes(content))
        else:
            body = pushed(session=session, content=content.deflate(), name=content.object_id)
        path = "/v1/fleet/push-object"
        return self.door.post(path, body, **self.headers()).status_code

    def push_array(self, session: str, array: Array) -> list[int]:
        """Push the parts and then the whole."""
        parts = (array.children or {}).values()
        return [self.push(session, content) for content in (*parts, array)]


def pushed(
    *, session: str = "session", content: bytes = b"content", name: str = "ab" * 32
) -> bytes:
    return PushObjectRequest(
        node=Node(node_id=2**63 + 7),
        run_id=2**63 + 3,
        object_id=name,
        object_content=content,
        session_id=session,
    ).SerializeToString(deterministic=True)


def test_the_twelve_paths_are_all_of_flowers_fleet_api() -> None:
    theirs = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert set(FLEET) == theirs
    assert len(FLEET) == 12


@pytest.mark.parametrize("path", FLEET)
def test_a_fleet_call_goes_through_unchanged(door: Door, path: str) -> None:
    read = path.endswith(("push-messages", "pull-object"))  # nothing is a message of theirs, too
    content = pushed() if path.endswith("push-object") else b"" if read else b"\x00\xff"
    answer = door.post(path, content, flwr_public_key="k", flwr_signature="s", x_own="o")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/protobuf"
    ((seen, headers, body),) = door.superlink.seen
    assert (seen, body) == (path, content)
    sent = {"flwr-public-key": "k", "flwr-signature": "s", "x-own": "o"}
    assert sent.items() <= headers.items()
    assert headers["content-length"] == str(len(content))
    assert not headers["host"].endswith(str(door.port))


@pytest.mark.parametrize("path", NOT_FLEET)
def test_control_and_runtime_calls_are_refused(door: Door, path: str) -> None:
    answer = door.post(path)
    assert answer.status_code == 403
    assert answer.text.count("\n") == 1
    assert door.superlink.seen == []


@pytest.mark.parametrize(
    "target",
    [
        "//v1/control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet%2fpull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/pull-messages;/../../control/list-runs",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages#/v1/control/list-runs",
        "/v1/fleet/Pull-Messages",
        "/V1/FLEET/PULL-MESSAGES",
        "/%76%31/fleet/pull-messages",
        "http://localhost/v1/control/list-runs",
        "http://localhost/v1/fleet/pull-messages",
        "/v1/fleet/",
        "/v1/fleet",
        "/",
        "*",
        "/docs",
        "/openapi.json",
        "/health",
        "/health/../v1/control/list-runs",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_gate(door: Door, target: str) -> None:
    request = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    assert door.raw(request.encode()).startswith(b"HTTP/1.1 403")
    assert door.superlink.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post", "TRACE"])
def test_a_fleet_path_takes_posts_alone(door: Door, method: str) -> None:
    request = f"{method} /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    assert door.raw(request.encode()).startswith(b"HTTP/1.1 403")
    assert door.superlink.seen == []


def test_a_second_request_behind_a_body_is_judged_like_the_first(door: Door) -> None:
    second = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    first = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    door.raw(first + second)
    time.sleep(0.2)
    assert door.superlink.paths() == ["/v1/fleet/pull-messages"]


@pytest.mark.parametrize(
    "headers",
    ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 5", "A: b"],
)
def test_a_body_of_untold_length_is_refused(door: Door, headers: str) -> None:
    start = f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n"
    assert door.raw(start.encode() + b"0\r\n\r\n").split()[1] in (b"411", b"400")
    assert door.superlink.seen == []


def test_a_websocket_is_refused(door: Door) -> None:
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    request = f"GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n"
    assert door.raw(request.encode()).startswith(b"HTTP/1.1 403")
    assert door.superlink.seen == []


@pytest.mark.parametrize("path", [path for path in FLEET if "push-object" not in path])
def test_a_body_beyond_the_limit_of_its_call_is_answered_by_413(door: Door, path: str) -> None:
    limit = BODY_BYTES[path.encode()]
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {limit + 1}\r\n\r\n"
    assert door.raw(request.encode()).startswith(b"HTTP/1.1 413")
    assert door.superlink.seen == []


def test_a_caller_in_the_middle_of_a_large_body_hears_the_413(door: Door) -> None:
    # A broken pipe instead would make a SuperNode try again for ever.
    for path in ("push-messages", "pull-object"):
        assert door.post(f"/v1/fleet/{path}", bytes(65 * MIB)).status_code == 413
    assert door.superlink.seen == []


def test_a_large_body_is_taken_from_a_supernode_alone_that_the_superlink_knows(door: Door) -> None:
    node, stranger = SuperNode(door), SuperNode(door)
    assert node.push("session", MIB) == 503  # it comes again
    node.beat()
    assert node.push("session", MIB) == 200
    body = pushed(content=bytes(MIB))
    borrowed = {**stranger.headers(), "flwr_public_key": node.headers()["flwr_public_key"]}
    assert door.post("/v1/fleet/push-object", body, **borrowed).status_code == 400
    assert door.superlink.paths().count("/v1/fleet/push-object") == 1


def test_the_objects_of_a_reply_have_a_limit_together(door: Door) -> None:
    node = SuperNode(door)
    large, small = node.announce("root-of-large"), node.announce("root-of-small")
    assert node.push(large, MIB) == 200
    assert node.push(small, MIB) == 200
    assert node.push(large, MIB - 4096) == 200
    assert node.push(large, 8192) == 413
    assert node.push(large, 1) == 413
    assert node.push(small, MIB // 2) == 200
    # No second announcement makes it another reply.
    assert node.push(node.announce("root-of-large"), 1) == 413


def test_a_reply_that_is_too_large_is_taken_back_once(door: Door) -> None:
    node = SuperNode(door)
    session = node.announce("the-root")
    for _ in range(3):
        node.push(session, MIB)
    node.push(session, 100)
    calls = [body for path, _, body in door.superlink.seen if path.endswith("received")]
    assert len(calls) == 1
    confirmed = ConfirmMessageReceivedRequest.FromString(calls[0])
    assert confirmed.message_object_id == "the-root"
    assert (confirmed.run_id, confirmed.node.node_id) == (2**63 + 3, 2**63 + 7)


def test_a_single_object_that_is_too_large_takes_its_reply_back(door: Door) -> None:
    node = SuperNode(door)
    assert node.push(node.announce("of-one-object"), 65 * MIB) == 413
    calls = [path.rpartition("/")[2] for path in door.superlink.paths()]
    assert calls == ["push-messages", "confirm-message-received"]


def test_an_object_that_comes_again_after_a_breakdown_counts_once(door: Door) -> None:
    node = SuperNode(door)
    session = node.announce("broken")
    assert node.push(session, MIB) == 200
    for _ in range(9):
        door.superlink.breaks = 1
        assert node.push(session, MIB // 2) == 502
    assert node.push(session, MIB // 2) == 200


def test_a_chunk_weighs_as_often_as_an_array_names_it(door: Door) -> None:
    node = SuperNode(door)
    session = node.announce("folded")
    chunk = bytes(MIB * 2 // 5)
    once = folded(chunk, times=1)
    assert node.push_array(session, once) == [200, 200]
    assert node.push_array(session, folded(chunk, times=2)) == [200, 200]
    for _ in range(3):
        door.superlink.breaks = 1
        assert node.push(session, once) == 502
    assert node.push_array(session, folded(bytes(1000), times=100)) == [200, 200]
    assert node.push(session, once) == 200
    assert node.push(session, once) == 413
    assert "/v1/fleet/confirm-message-received" in door.superlink.paths()


def test_many_arrays_of_one_chunk_weigh_that_chunk_as_many_times(door: Door) -> None:
    node = SuperNode(door)
    session = node.announce("of-many-arrays")
    chunk = folded(bytes(MIB), times=1)
    codes = node.push_array(session, chunk)
    for rows in range(1, 4):
        array = folded(bytes(MIB), times=1)
        array.shape = (rows,)
        codes.append(node.push(session, array))
    assert codes == [200, 200, 413, 413, 413]


def test_a_chunk_that_nobody_saw_weighs_the_most_that_one_can(door: Door) -> None:
    node = SuperNode(door)
    assert node.push(node.announce("unseen"), folded(b"another", times=1)) == 413


def test_a_chunk_that_the_superlink_did_not_take_is_not_known(door: Door) -> None:
    node = SuperNode(door)
    door.superlink.stores = False  # as when its id is that of another object
    assert node.push_array(node.announce("forged"), folded(b"forged", times=1)) == [200, 413]


def test_a_chunk_that_was_pulled_is_known(door: Door) -> None:
    node = SuperNode(door)
    array = folded(b"from the server", times=1)
    (chunk,) = array.children or {}
    asked = PullObjectRequest(node=Node(node_id=1), run_id=1, object_id=chunk)
    door.superlink.pulled = b"x" * 100
    path = "/v1/fleet/pull-object"
    answer = door.post(path, asked.SerializeToString(), **node.headers())
    assert answer.content == b"x" * 100
    assert node.push(node.announce("of-the-server"), array) == 200


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"nothing", b'{"arraychunk_ids": [1]}', b'{"arraychunk_ids": 7}']
)
def test_an_array_that_does_not_say_what_it_is_made_of_is_refused(door: Door, body: bytes) -> None:
    content = b"Array  %d\x00%s" % (len(body), body)
    answer = door.post("/v1/fleet/push-object", pushed(content=content))
    assert answer.status_code == 400
    assert door.superlink.paths() == []


def folded(chunk: bytes, *, times: int) -> Array:
    """Return an array of one chunk that comes so many times."""
    array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=chunk)
    part = ArrayChunk(memoryview(chunk))
    array.__dict__["_chunks"] = [(part.object_id, part)] * times  # where Flower keeps them
    return array


@given(data=st.binary(min_size=1, max_size=60), size=st.integers(1, 20), cut=st.integers(1, 200))
def test_what_an_array_is_made_of_is_what_flower_unfolds(data: bytes, size: int, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", size)
        array = Array(dtype="uint8", shape=(len(data),), stype="numpy.ndarray", data=data)
        parts = {name: bytes(part.data) for name, part in (array.children or {}).items()}
        body = pushed(content=array.deflate())
    reader = PushedObject()
    for start in range(0, len(body), cut):
        reader.feed(body[start : start + cut])
    assert b"".join(parts[name] for name in reader.chunks()) == data
    assert not reader.is_chunk


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_chunk_is_told_from_an_array_and_names_none(cut: int) -> None:
    body = pushed(content=ArrayChunk(memoryview(bytes(500))).deflate())
    reader = PushedObject()
    for start in range(0, len(body), cut):
        reader.feed(body[start : start + cut])
    assert reader.is_chunk
    assert reader.chunks() == []


def test_of_two_sizes_of_a_chunk_the_larger_is_believed_and_the_oldest_is_forgotten() -> None:
    chunks = Chunks(kept=2)
    for name, num_bytes in (("a", 5), ("a", 3), ("b", 7)):
        chunks.came(name, num_bytes)
    assert asyncio.run(chunks.weigh("aab", patience_s=0)) == (17, True)
    chunks.came("c", 1)
    unknown, known = asyncio.run(chunks.weigh("ab", patience_s=0))
    assert (unknown, known) == (7 + 5 * MIB, False)


def test_the_gateway_holds_little_of_what_goes_through_it(door: Door) -> None:
    node = SuperNode(door)
    node.beat()
    before = door.memory_mib()
    # Refused at its very end, when all of it has gone by.
    assert node.push("session-of-a-large-object", 60 * MIB) == 413
    assert door.memory_mib() - before < 20


def test_health_is_the_superlinks(door: Door) -> None:
    assert httpx.get(f"{door.url}/health").status_code == 200
    assert door.superlink.paths() == ["/health"]
    assert httpx.get(f"{door.url}/health?x").status_code == 403


@given(
    content=st.binary(max_size=400),
    cuts=st.lists(st.integers(0, 600), max_size=12),
    run=st.integers(0, 2**64 - 1),
)
def test_a_pushed_object_reads_the_same_however_it_is_cut(
    content: bytes, cuts: list[int], run: int
) -> None:
    whole = PushObjectRequest(
        node=Node(node_id=1), run_id=run, object_content=content, session_id="s"
    )
    body = whole.SerializeToString(deterministic=True)
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    reader = PushedObject()
    for start, end in zip(places, places[1:], strict=False):
        reader.feed(body[start:end])
    whole.ClearField("object_content")
    assert reader.envelope() == whole


@pytest.mark.parametrize(
    "body",
    [
        pushed()[:-1],
        pushed()[:-20],
        pushed() + pushed(session="another"),
        pushed(session=""),
        b"\x2a\x01s\x22\x01c",  # the session before the object
        b"\x32\x01x" + pushed(),  # a field that there is not
        b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x1a\xff\xff\xff\x7f" + bytes(100),  # an id of 256 MiB
        b"",
        bytes(100),
    ],
)
def test_a_push_that_no_supernode_sends_is_refused(body: bytes) -> None:
    reader = PushedObject()
    with pytest.raises(MalformedError):
        for place in range(len(body)):
            reader.feed(body[place : place + 1])
        reader.envelope()
        raise AssertionError("it was taken")


def test_a_malformed_push_never_reaches_the_superlink_whole(door: Door) -> None:
    answer = door.post("/v1/fleet/push-object", pushed() + pushed(session="another"))
    assert answer.status_code == 400
    assert door.superlink.paths() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--superlink", "https://superlink:8000", "--insecure"],
            "must be HOST:PORT",
        ),
        (["--superlink", "superlink", "--insecure"], "must be HOST:PORT"),
        (["--superlink", "a:1", "--port", "{taken}", "--insecure"], "cannot be listened on"),
        (["--superlink", "a:1"], "--root-certificates, --certificate and --key are needed"),
        (["--superlink", "a:1", *["--certificate", "{pki}/superlink/tls.crt"]], "are needed"),
        (["--superlink", "a:1", *["{mixed}"]], "do not belong together"),
    ],
)
def test_bad_input_is_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    pki = tmp_path / "pki"
    make(pki, sites=1)
    mixed = f"--root-certificates {pki}/ca/ca.crt --certificate {pki}/gateway/tls.crt"
    mixed += f" --key {pki}/superlink/tls.key"
    with socket.create_server(("0.0.0.0", 0)) as taken:
        values = {"pki": pki, "mixed": mixed, "taken": taken.getsockname()[1]}
        given = [word for text in arguments for word in text.format(**values).split()]
        assert cli._main(["gateway", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("Error")]) == 1


def test_a_key_that_others_may_read_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, sites=1)
    os.chmod(tmp_path / "gateway/tls.key", 0o644)
    files = ["--root-certificates", f"{tmp_path}/ca/ca.crt", "--certificate"]
    files += [f"{tmp_path}/gateway/tls.crt", "--key", f"{tmp_path}/gateway/tls.key"]
    assert cli._main(["gateway", "--superlink", "a:1", *files]) == 2
    assert "is readable by others (mode 0644)" in capsys.readouterr().err


def test_without_a_superlink_calls_are_answered_at_once_so_that_they_come_again() -> None:
    port, nobody = free_port(), free_port()
    arguments = ["gateway", "--insecure", "--superlink", f"127.0.0.1:{nobody}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app", *arguments, "--host", "127.0.0.1", "--port", str(port)],
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
                break
            except httpx.TransportError:
                time.sleep(0.05)
        began = time.monotonic()
        path = f"http://127.0.0.1:{port}/v1/fleet/pull-messages"
        assert httpx.post(path, content=b"x").status_code == 503
        assert time.monotonic() - began < 2
    finally:
        process.terminate()
        process.wait(timeout=15)
