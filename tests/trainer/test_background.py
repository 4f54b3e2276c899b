"""The store's thread: whatever a job does, those after it are done and somebody hears of it."""

import logging
import queue
from collections.abc import Callable
from typing import Any

import pytest

from daruma_trainer.errors import StoreError
from daruma_trainer.server.background import Background


def test_a_job_that_breaks_is_heard_of_and_the_next_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    background = Background(posted.put)
    heard: list[tuple[Any, StoreError | None]] = []

    def breaks() -> None:
        raise KeyError("a bug")

    with caplog.at_level(logging.CRITICAL):
        background.submit(breaks, lambda result, error: heard.append((result, error)))
        background.submit(lambda: 7, lambda result, error: heard.append((result, error)))
        for _ in range(2):
            posted.get(timeout=30)()
    background.close(30)
    assert "KeyError" in str(heard[0][1])
    assert heard[1] == (7, None)
