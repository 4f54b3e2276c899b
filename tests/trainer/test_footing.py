"""How a worker comes to a position, where it is told to end meanwhile."""

from collections.abc import Callable
from typing import Any, cast

import pytest

from daruma_trainer.errors import DarumaError, GaveUpError, ReplacedError
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.footing import align
from daruma_trainer.worker.position import Position
from daruma_trainer.worker.pulling import Wanted


class Waiting:
    """A worker whose question to the others nobody answers."""

    def __init__(self, failure: DarumaError | None = None) -> None:
        self.generation, self.batch = 0, 4
        self.position = Position()
        self.failure = failure
        self.asked = 0

    def pull_before(self) -> Wanted:
        self.asked += 1
        return Wanted(self.batch, before=True, unkept=self.asked > 2)

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        raise self.failure or GaveUpError(f"{what} did not come within {seconds:g} s")


@pytest.mark.parametrize("failure", [ReplacedError("replaced"), GaveUpError("its thread broke")])
def test_who_looks_for_values_and_is_replaced_ends_at_once(failure: DarumaError) -> None:
    client: Any = Waiting(failure)
    with pytest.raises(type(failure), match=str(failure)):
        align(cast("Client", client), 0)
    assert client.asked == 1


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    client: Any = Waiting()
    align(cast("Client", client), 0)
    assert (client.asked, client.position.mixed) == (3, {5})
