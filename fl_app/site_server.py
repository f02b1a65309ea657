"""Listens for bundles on a local socket, on behalf of a site's worker.

Who connects is not trusted: it may be any code that the server sent. It gets one request a
connection, of bounded size and within bounded time, and one at a time is read or answered; what
comes beyond that waits in a short queue or is turned away.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fl_app.errors import ConfigError
from fl_app.site_protocol import (
    SILENCE_S,
    Kind,
    ProtocolError,
    Reply,
    Request,
    receive,
    receive_header,
    send,
)

log = logging.getLogger(__name__)

Answerer: TypeAlias = Callable[[Request, bytes], tuple[Reply, bytes]]

MOST_CONNECTIONS = 16
"""Connections that are waited for at a time; one more is closed at once."""
_HEADER_S = 10.0
_SEND_S = 60.0
_SLOWEST_BYTES_S = 1 << 20
_LONGEST_PATH = 107  # of a socket, by Linux
_FAILED = 1  # Flower's ErrorCode for what has no other; a server knows no better


class SiteServer:
    """Serves one worker.

    Args:
        path: Of the socket. Its folder must exist; who may enter that folder may ask.
        answer: The worker. Called in one thread at a time.
        most_body_bytes: Of a request.

    Raises:
        ConfigError: The socket cannot be made, or another worker listens there.
    """

    def __init__(self, path: Path, answer: Answerer, *, most_body_bytes: int) -> None:
        self._answer = answer
        self._most_body_bytes = most_body_bytes
        self._turn = threading.Lock()
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._closing = threading.Event()
        self._path = path
        self._listener = _listener(path)

    def serve(self) -> None:
        """Answer until `close` is called, in another thread or by a signal."""
        while not self._closing.is_set():
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._closing.is_set():
                    return
                time.sleep(0.1)  # such as out of file descriptors: others may be given back
                continue
            if not self._slots.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self._serve_one, args=(peer,), daemon=True).start()

    def close(self, *, within_s: float = 8.0) -> None:
        """Listen no more; let what is being answered come to its end, but not for long."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if self._turn.acquire(timeout=within_s):
            self._turn.release()

    def _serve_one(self, peer: socket.socket) -> None:
        try:
            with peer:
                self._exchange(peer)
        except (OSError, ProtocolError) as error:
            log.warning("A request came to nothing: %s.", str(error).rstrip("."))
        finally:
            self._slots.release()

    def _exchange(self, peer: socket.socket) -> None:
        try:
            header, body_bytes = receive_header(peer, deadline=time.monotonic() + _HEADER_S)
            request = Request.checked(header)
            if body_bytes > self._most_body_bytes:
                raise ProtocolError(
                    f"a body of {body_bytes} bytes; this site allows {self._most_body_bytes}."
                )
        except ProtocolError as error:
            send(peer, _refusal(error), b"", within_s=_HEADER_S)
            raise
        if request.kind is Kind.HEALTH:
            send(peer, Reply(), b"", within_s=_HEADER_S)
            return
        with self._turn:
            # Read only now: no more than one body is in memory, however many are announced.
            patience_s = _HEADER_S + body_bytes / _SLOWEST_BYTES_S
            deadline = time.monotonic() + patience_s
            body = receive(peer, body_bytes, deadline=deadline, silence_s=SILENCE_S)
            reply, answer = self._answer(request, body)
            send(peer, reply, answer, within_s=_SEND_S)


def _refusal(error: ProtocolError) -> Reply:
    return Reply(code=_FAILED, reason=f"ProtocolError: {error}")


def _listener(path: Path) -> socket.socket:
    """Return a socket that listens at a path; one that a dead worker left there is replaced."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"socket={path} is longer than the {_LONGEST_PATH} bytes that a socket's path may "
            "have: choose a shorter one."
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise ConfigError(f"socket={path} is there and no socket: choose another path.")
            _refuse_if_served(path)
            path.unlink()
        before = os.umask(0o117)  # 0660 from the first moment: for the group, which bundles are in
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"socket={path} cannot be made ({error.strerror}): name a path in a folder that is "
            "there and that this user may write."
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _refuse_if_served(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        with suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise ConfigError(
                f"socket={path}: another worker serves it. End that one, or choose another path."
            )
