"""The worker's I/O thread: when it turns, and its end."""

import queue
import threading
from collections.abc import Callable, Container

import pytest

from daruma_trainer.worker.loop import Loop

DEADLINE = 30.0
FOR_EVER = 3_600_000
"""Milliseconds, of a thread that only `wake` or `close` gets on."""


class Turns:
    """What a loop does: what it is told for its turns, one after the other; then nothing more."""

    def __init__(self, *turns: Callable[[], int]) -> None:
        self._left = list(turns)
        self.turned: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """By whether the loop was closed."""
        self.loop = Loop(self.turn, self.end)
        self.loop.start()

    def turn(self, _ready: Container[object]) -> int:
        self.turned.put(threading.get_ident())
        return self._left.pop(0)() if self._left else FOR_EVER

    def end(self) -> None:
        self.ended.put(self.loop.closing)


def test_it_turns_at_once_then_when_it_is_time_and_when_it_is_woken() -> None:
    turns = Turns(lambda: 1)
    threads = {turns.turned.get(timeout=DEADLINE) for _ in range(2)}
    turns.loop.wake()
    threads.add(turns.turned.get(timeout=DEADLINE))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    turns.loop.close()
    assert turns.ended.get(timeout=DEADLINE)
    assert turns.loop.context.closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_breaks_says_so_and_leaves_no_socket() -> None:
    def breaks() -> int:
        raise RuntimeError("a mistake")

    turns = Turns(breaks)
    assert not turns.ended.get(timeout=DEADLINE), "nobody told it to end"
    turns.loop.close()
    assert turns.loop.context.closed
