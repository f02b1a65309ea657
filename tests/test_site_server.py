"""The socket of a site's worker: whoever connects gets one bounded request, and nobody stops it."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.common.serde import recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fl_app import client_app, site_protocol
from fl_app.codec import query_messages
from fl_app.engines.local import adopt_identity
from fl_app.failures import failure_of
from fl_app.site_protocol import SOCKET, Kind, ProtocolError, Reply, Request, ask
from fl_app.site_server import MOST_CONNECTIONS, SiteServer
from fl_app.types import ConfigError

HEALTH = Request(kind=Kind.HEALTH, node={}, patience_s=1.0)
QUERY = Request(kind=Kind.QUERY, node={"partition-id": 0}, patience_s=5.0)
PREFIX = struct.Struct(">4sHIQ")


def echo(request: Request, body: bytes) -> tuple[Reply, bytes]:
    return Reply(), body


@contextmanager
def serving(path: Path, answer=echo, *, most_body_bytes: int = 1 << 20) -> Generator[Path]:
    server = SiteServer(path, answer, most_body_bytes=most_body_bytes)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.close()
        thread.join(5)
        assert not thread.is_alive()
        assert not path.exists()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def asked(path: Path, body: bytes = b"", *, request: Request = QUERY) -> tuple[Reply, bytes]:
    return ask(str(path), request, body, patience_s=5.0, most_body_bytes=1 << 20)


def sent_raw(path: Path, data: bytes, *, wait: bool = True) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(5)
        peer.connect(str(path))
        peer.sendall(data)
        return peer.recv(1 << 16) if wait else b""


def header(**changes: object) -> bytes:
    told = {"kind": "query", "config_json": "", "overrides": "", "node": {}, "patience_s": 1.0}
    return json.dumps({**told, **changes}).encode()


def frame(head: bytes, body: bytes = b"", *, protocol: int = 1, magic: bytes = b"FLAP") -> bytes:
    return PREFIX.pack(magic, protocol, len(head), len(body)) + head + body


# What comes through ------------------------------------------------------------------------------


@given(body=st.binary(max_size=5000), text=st.text(max_size=50), number=st.integers(0, 9))
def test_a_request_and_its_answer_survive_the_socket(body: bytes, text: str, number: int) -> None:
    left, right = socket.socketpair()
    told = Request(
        kind=Kind.TRAIN,
        config_json=text,
        overrides=text[::-1],
        node={"partition-id": number, "client-id": text},
        patience_s=1.5,
    )
    with left, right:
        site_protocol.send(left, told, body, within_s=5)
        got, length = site_protocol.receive_header(right, deadline=time.monotonic() + 5)
        assert Request.checked(got) == told
        deadline = time.monotonic() + 5
        assert site_protocol.receive(right, length, deadline=deadline) == body


def test_requests_are_answered_one_at_a_time_and_none_is_lost(path: Path) -> None:
    busy, overlaps, answers = threading.Lock(), [], []

    def slow(request: Request, body: bytes) -> tuple[Reply, bytes]:
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.02)
        busy.release()
        return Reply(), body

    with serving(path, slow):
        bodies = [bytes([n]) * 100 for n in range(8)]
        threads = [
            threading.Thread(target=lambda b=b: answers.append(asked(path, b)[1])) for b in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == bodies
    assert not any(overlaps)


def test_whether_a_worker_is_there_is_told_even_while_it_trains(path: Path) -> None:
    training = threading.Event()

    def long(request: Request, body: bytes) -> tuple[Reply, bytes]:
        training.wait(5)
        return Reply(), b""

    with serving(path, long):
        thread = threading.Thread(target=asked, args=(path,))
        thread.start()
        assert asked(path, request=HEALTH) == (Reply(), b"")
        training.set()
        thread.join()


def test_the_socket_is_for_its_user_and_group_alone(path: Path) -> None:
    with serving(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


# What does not -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame(header(), magic=b"GET "), "no frame of fl-app"),
        (frame(header(), protocol=2), "the bundle speaks protocol 2 and this site 1"),
        (PREFIX.pack(b"FLAP", 1, 1 << 31, 0), "a header of 2147483648 bytes; 1048576"),
        (frame(b"nothing"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame(b"[]"), "no JSON object"),
        (frame(header(more=1)), "has the keys kind, config_json"),
        (frame(b"{}"), "has the keys kind, config_json"),
        (frame(header(kind="raw-data")), "kind='raw-data' is not known"),
        (frame(header(kind=3)), "kind must be a str"),
        (frame(header(patience_s=True)), "patience_s must be a float"),
        (frame(header(patience_s=0)), "patience_s must lie in"),
        (frame(header().replace(b"1.0", b"NaN")), "patience_s must lie in"),
        (frame(header().replace(b"1.0", b"1e300")), "patience_s must lie in"),
        (frame(header(node={"a": [1]})), "node must hold a few texts and numbers"),
        (frame(header(node={str(n): n for n in range(99)})), "node must hold a few texts"),
        (PREFIX.pack(b"FLAP", 1, len(header()), 1 << 40) + header(), "a body of 1099511627776"),
    ],
)
def test_what_is_no_request_is_refused_in_words_and_the_next_one_served(
    path: Path, data: bytes, words: str
) -> None:
    with serving(path):
        assert words in sent_raw(path, data).decode(errors="replace")
        assert asked(path, b"next") == (Reply(), b"next")


def test_a_body_that_is_too_long_is_refused_in_words_before_it_is_sent_whole(path: Path) -> None:
    with serving(path, most_body_bytes=1000):
        reply, _ = asked(path, bytes(1 << 20))
    assert reply.code
    assert "a body of 1048576 bytes; this site allows 1000" in reply.reason


def test_a_request_that_is_cut_short_costs_nobody_else_anything(path: Path) -> None:
    with serving(path):
        for cut in (1, PREFIX.size, PREFIX.size + 5, len(frame(header(), b"body")) - 1):
            sent_raw(path, frame(header(), b"body")[:cut], wait=False)
        assert asked(path, b"next") == (Reply(), b"next")


def test_a_flood_of_connections_is_turned_away_and_passes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_app.site_server._HEADER_S", 0.5)
    with serving(path):
        flood = []
        for _ in range(3 * MOST_CONNECTIONS):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.setblocking(False)
            try:
                peer.connect(str(path))
            except BlockingIOError:
                peer.close()
                continue
            flood.append(peer)
        before = threading.active_count()
        assert before <= MOST_CONNECTIONS + 10
        deadline = time.monotonic() + 10
        while True:  # a bundle asks again, too
            try:
                assert asked(path, b"next") == (Reply(), b"next")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        for peer in flood:
            peer.close()


def test_no_more_than_one_announced_body_is_read_at_a_time(path: Path) -> None:
    head, size = header(), 8 << 20  # more than a socket buffers
    announced = PREFIX.pack(b"FLAP", 1, len(head), size) + head
    with (
        serving(path, most_body_bytes=size),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as eager,
    ):
        silent.connect(str(path))
        silent.sendall(announced)
        time.sleep(0.2)
        eager.connect(str(path))
        eager.settimeout(0.5)
        eager.sendall(announced)
        with pytest.raises(TimeoutError):
            eager.sendall(bytes(size))  # nobody reads it
        assert asked(path, request=HEALTH)[0] == Reply()
        silent.close()
        eager.close()
        assert asked(path, b"next") == (Reply(), b"next")


def test_who_announces_and_sends_nothing_is_waited_for_no_longer_than_a_silence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_app.site_server.SILENCE_S", 0.3)
    head = header()
    with serving(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(path))
        silent.sendall(PREFIX.pack(b"FLAP", 1, len(head), 1 << 20) + head)
        time.sleep(0.1)
        began = time.monotonic()
        assert asked(path, b"next") == (Reply(), b"next")
        assert time.monotonic() - began < 3.0


# Starting ----------------------------------------------------------------------------------------


def test_a_second_worker_is_refused_and_a_dead_ones_socket_replaced(path: Path) -> None:
    with serving(path), pytest.raises(ConfigError, match="another worker serves it"):
        SiteServer(path, echo, most_body_bytes=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with serving(path):
        assert asked(path, b"x") == (Reply(), b"x")


@pytest.mark.parametrize(
    ("name", "words"),
    [("none/socket", "cannot be made.*No such file"), ("x" * 120, "longer than the 107 bytes")],
)
def test_a_path_that_cannot_be_is_refused_in_words(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SiteServer(tmp_path / name, echo, most_body_bytes=1)


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there and no socket"):
        SiteServer(path, echo, most_body_bytes=1)
    assert path.read_text() == "mine"


# The bundle's side -------------------------------------------------------------------------------


def relayed(path: Path, monkeypatch: pytest.MonkeyPatch, *, ttl: float = 5.0) -> Message:
    adopt_identity()
    monkeypatch.setenv(SOCKET, str(path))
    (message,) = query_messages([1], ttl=ttl)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 2},
        state=RecordDict(),
        run_config={"config-json": "{}"},
    )
    return client_app.app(message, context)


def test_a_bundle_passes_on_what_it_is_asked_and_what_the_site_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []

    def answer(request: Request, body: bytes) -> tuple[Reply, bytes]:
        seen.append(request)
        return Reply(), recorddict_to_proto(RecordDict()).SerializeToString()

    with serving(path, answer):
        reply = relayed(path, monkeypatch)
    assert not reply.has_error()
    assert seen[0].kind == MessageType.QUERY
    assert (seen[0].config_json, dict(seen[0].node)) == ("{}", {"partition-id": 2})


def test_a_bundle_hands_on_a_sites_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(path, lambda *_: (Reply(code=9001, reason="PolicyError: no"), b"")):
        assert failure_of(relayed(path, monkeypatch))[1] == "PolicyError: no"  # type: ignore[index]


def test_a_bundle_waits_for_a_worker_that_is_being_restarted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[Message] = []
    thread = threading.Thread(target=lambda: replies.append(relayed(path, monkeypatch)))
    thread.start()
    time.sleep(0.5)
    with serving(path, lambda *_: (Reply(code=1, reason="here"), b"")):
        thread.join(10)
    assert failure_of(replies[0])[1] == "here"  # type: ignore[index]


def test_a_bundle_without_a_worker_fails_in_words(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = failure_of(relayed(path, monkeypatch, ttl=0.5))
    assert failure is not None
    assert failure[1] == "SiteError: the worker of this site does not answer (FileNotFoundError)"


def test_a_frame_is_what_an_answer_must_be(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def hostile() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1 << 16)
            peer.sendall(PREFIX.pack(b"FLAP", 1, 24, 1 << 40) + b'{"code": 0, "reason": ""}')

    thread = threading.Thread(target=hostile, daemon=True)
    thread.start()
    with pytest.raises(ProtocolError):
        asked(path)
    listener.close()
    thread.join(5)


def test_the_bundles_side_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fl_app.client_app; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == 0
