"""A network cable that a test can cut: relays TCP on loopback, or lets nothing through."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress


class Link:
    """Relays connections from a port of its own to another until it is cut.

    Cut, it is as silent as a pulled cable: connections stay open, new ones are taken by nobody's
    answer, and no byte gets through until it is healed.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def heal(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._closed = True
        self._whole.set()
        with suppress(OSError):
            self._server.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        self._whole.wait()
        with near, suppress(OSError):
            far = socket.create_connection(("127.0.0.1", self.target))
            with far, selectors.DefaultSelector() as ready:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in ready.select():
                        content = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        self._whole.wait()
                        if not content:
                            return
                        key.data.sendall(content)
