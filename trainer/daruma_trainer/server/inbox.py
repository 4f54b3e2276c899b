"""Calls that other threads have for the serve loop: it runs them between requests."""

import contextlib
import os
import queue
from collections.abc import Callable, Container
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from http import HTTPStatus

import zmq

from daruma_trainer.agent import COMMAND_SECONDS, Outcome


class Inbox:
    """Put calls in from any thread; the loop's takes its turn."""

    def __init__(self, poller: zmq.Poller) -> None:
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        poller.register(self._wake, zmq.POLLIN)

    def wake(self) -> None:
        """Let the loop look again. Safe to call from a signal handler."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def put(self, call: Callable[[], None]) -> None:
        """Run something on the loop's thread."""
        self._calls.put(call)
        self.wake()

    def ask(self, call: Callable[[], Outcome]) -> Outcome:
        """Run something on the loop's thread and wait for what became of it."""
        future: Future[Outcome] = Future()

        def obey() -> None:
            future.set_result(call())

        self.put(obey)
        try:
            return future.result(COMMAND_SECONDS)
        except FutureTimeoutError:
            return Outcome(HTTPStatus.SERVICE_UNAVAILABLE, "the serve loop is busy: try again")

    def turn(self, ready: Container[object]) -> None:
        """Run what was put in, if the poller saw something of it in `ready`."""
        if self._wake not in ready:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()

    def close(self) -> None:
        """Wake nobody any more; what is put in later is never run."""
        os.close(self._wake)
