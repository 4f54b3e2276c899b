"""A TCP proxy before a member, whose link to it can be parted, throttled and healed.

Nothing is lost and no connection is closed by it: what is sent while the link is parted arrives
when it is healed, however late, unless its sender has given the connection up meanwhile.
"""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from local_cluster import free_ports

CHUNK = 65536
LOOK_SECONDS = 0.01


class LinkProxy:
    """Before the data port and the agent's port above it; only the former is ever disturbed."""

    def __init__(self) -> None:
        self.port = free_ports()
        self._parted = 0.0
        """Connections that were opened before this moment are parted."""
        self.rate: float | None = None
        """Bytes a second and direction; None: no limit."""
        self.passed = 0
        """Bytes of data that went through to the member."""
        self._upstream = 0
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._listeners = [socket.create_server(("127.0.0.1", self.port + n)) for n in (0, 1)]
        for n, listener in enumerate(self._listeners):
            self._begin(self._accept, listener, n)

    def before(self, address: str) -> str:
        """Stand before this member; returns the address to use instead."""
        self._upstream = int(address.rpartition(":")[2])
        return f"127.0.0.1:{self.port}"

    def part(self, *, later: bool = True) -> None:
        """Let nothing through; not `later`: on the connections that there are, until `heal`."""
        self._parted = math.inf if later else time.monotonic()

    def heal(self) -> None:
        """Let through what waits, and all that comes."""
        self._parted = 0.0

    def close(self) -> None:
        """Let nothing through any more."""
        self._closing.set()
        # A call that waits in another thread ends by this, and not by a socket's being closed.
        for opened in (*self._listeners, *self._sockets):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)
        for opened in (*self._listeners, *self._sockets):
            opened.close()

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, agent: int) -> None:
        while not self._closing.is_set():
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._upstream + agent), timeout=5)
            except OSError:
                near.shutdown(socket.SHUT_RDWR)
                continue
            far.settimeout(None)
            self._sockets.append(far)
            self._begin(self._pump, near, far, not agent, True)
            self._begin(self._pump, far, near, not agent, False)

    def _pump(self, source: socket.socket, target: socket.socket, data: bool, inward: bool) -> None:
        opened = time.monotonic()
        with contextlib.suppress(OSError):
            while not self._closing.is_set():
                rate = self.rate if data else None
                size = CHUNK if rate is None else max(1, int(rate * LOOK_SECONDS))
                chunk = source.recv(size)
                if not chunk:
                    target.shutdown(socket.SHUT_WR)
                    return
                while data and opened < self._parted:
                    if self._closing.wait(LOOK_SECONDS):
                        return
                if rate is not None:
                    time.sleep(len(chunk) / rate)
                target.sendall(chunk)
                self.passed += len(chunk) if data and inward else 0


@contextmanager
def link_proxy() -> Iterator[LinkProxy]:
    """Run one on this machine."""
    proxy = LinkProxy()
    try:
        yield proxy
    finally:
        proxy.close()
