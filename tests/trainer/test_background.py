"""The store's thread: whatever a job does, those after it are done and somebody hears of it."""

import logging
import queue
from collections.abc import Callable
from typing import Any

import pytest

from daruma_trainer.errors import MissingError, StoreError
from daruma_trainer.server import background as background_module
from daruma_trainer.server.background import Background, ByHand

Heard = list[tuple[Any, StoreError | None]]


def breaks() -> None:
    raise KeyError("a bug")


def without_a_library() -> None:
    raise MissingError("obstore is not installed")


def submit_all(background: Background) -> Heard:
    heard: Heard = []
    for job in (breaks, without_a_library, lambda: 7):
        background.submit(job, lambda result, error: heard.append((result, error)))
    return heard


def check(heard: Heard) -> None:
    assert "KeyError" in str(heard[0][1])
    assert "a bug" not in str(heard[0][1]), "what a library says stays out of reports"
    assert str(heard[1][1]) == "obstore is not installed"
    assert heard[2:] == [(7, None)]


def test_a_job_that_breaks_is_heard_of_and_the_next_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    background = Background(posted.put)
    with caplog.at_level(logging.CRITICAL):
        heard = submit_all(background)
        for _ in range(3):
            posted.get(timeout=30)()
    background.close(30)
    check(heard)


def test_by_hand_it_goes_the_same_way_when_it_is_told_to(caplog: pytest.LogCaptureFixture) -> None:
    background = ByHand()
    with caplog.at_level(logging.CRITICAL):
        heard = submit_all(background)
        assert heard == []
        background.run()
    check(heard)


def test_a_job_that_always_submits_another_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "MAX_BY_HAND", 10)
    background = ByHand()

    def again(_result: object, _error: object) -> None:
        background.submit(lambda: None, again)

    again(None, None)
    with pytest.raises(RuntimeError, match="does one submit itself"):
        background.run()
