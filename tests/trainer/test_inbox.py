"""Calls from other threads: run in turn, by the thread that owns the poller."""

import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus

import pytest
import zmq

from daruma_trainer.agent import Outcome
from daruma_trainer.server import inbox as module
from daruma_trainer.server.inbox import Inbox

DEADLINE = 30.0


class Owner:
    """The thread that turns it."""

    def __init__(self) -> None:
        self.poller = zmq.Poller()
        self.inbox = Inbox(self.poller)

    def turn(self, wait_ms: int = int(1000 * DEADLINE)) -> None:
        self.inbox.turn(dict(self.poller.poll(wait_ms)))


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.inbox.close()


def test_calls_are_run_in_their_order_and_here(owner: Owner) -> None:
    ran: list[tuple[int, str]] = []

    def run(number: int) -> None:
        ran.append((number, threading.current_thread().name))

    def put() -> None:
        for number in range(3):
            owner.inbox.put(partial(run, number))

    other = threading.Thread(target=put)
    other.start()
    other.join(DEADLINE)
    owner.turn()
    here = threading.current_thread().name
    assert ran == [(0, here), (1, here), (2, here)]
    owner.turn(0)
    assert len(ran) == 3, "each once"


def test_who_asks_is_told_what_became_of_it(owner: Owner) -> None:
    told: list[Outcome] = []
    answer = Outcome(HTTPStatus.CONFLICT, "no")
    other = threading.Thread(target=lambda: told.append(owner.inbox.ask(lambda: answer)))
    other.start()
    owner.turn()
    other.join(DEADLINE)
    assert told == [answer]


def test_who_asks_a_loop_that_stands_still_is_sent_away(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.01)
    ran: list[bool] = []

    def late() -> Outcome:
        ran.append(True)
        return Outcome()

    assert owner.inbox.ask(late).status == HTTPStatus.SERVICE_UNAVAILABLE
    owner.turn()
    assert ran == [True], "what was asked for is done all the same: commands come again, too"


def test_a_wake_alone_runs_nothing_and_is_over(owner: Owner) -> None:
    owner.inbox.wake()
    assert owner.poller.poll(0)
    owner.turn()
    assert not owner.poller.poll(0)
