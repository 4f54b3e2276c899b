"""The I/O thread of a worker: it waits for messages, for `wake` and for the time.

What is done at each turn is its owner's.
"""

import os
import threading
from collections.abc import Callable, Container

import zmq


class Loop:
    """The thread, and what it waits at. Sockets of its context belong to it alone."""

    def __init__(self, turn: Callable[[Container[object]], int], ended: Callable[[], None]) -> None:
        """`turn`: take in what came, and return for how many ms to wait for more.

        `ended`: the thread was told to end, or `turn` broke.
        """
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.poller = zmq.Poller()
        self._turn, self._ended = turn, ended
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.poller.register(self._wake, zmq.POLLIN)
        self.closing = False
        """Whether it is told to end."""
        self._thread = threading.Thread(target=self._run, name="daruma-io", daemon=True)

    def start(self) -> None:
        """Begin to turn."""
        self._thread.start()

    def wake(self) -> None:
        """Let the thread look again."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Stop the thread."""
        self.closing = True
        self.wake()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            wait = 0
            while not self.closing:
                ready = dict(self.poller.poll(wait))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                wait = self._turn(ready)
        finally:
            self._ended()
            self.context.destroy(linger=0)
