"""When a worker's program pulls what follows from its batch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daruma_trainer.worker.job import Job
from daruma_trainer.worker.pulling import Wanted


class Crowded:
    """A worker whose last push but one is not covered, until it has waited once."""

    def __init__(self, *, repeats: bool) -> None:
        self.membership = SimpleNamespace(
            repeats=repeats, settings=SimpleNamespace(progress_seconds=60.0)
        )
        self.meanwhile = SimpleNamespace(crowded=True, away=lambda _: np.zeros(1024, np.bool_))
        self.position = SimpleNamespace(mixed=set())
        self.batch, self.generation, self.stopped = 5, 0, None
        self.done: list[str] = []

    def pull(self, min_step: int, *, all_workers: bool = False) -> Wanted:
        self.done.append("pull")
        return Wanted(min_step, all_workers, missing=np.zeros(1024, np.bool_))

    def pull_before(self) -> None:
        return None

    def stepped(self, **_: Any) -> None:
        self.done.append("step")

    def wait(self, ready: Callable[[], bool], _seconds: float, _what: str) -> None:
        if not ready():
            self.done.append("wait")
            self.meanwhile.crowded = False
        assert ready()


@pytest.mark.parametrize(
    ("repeats", "done"), [(True, ["wait", "pull", "step"]), (False, ["pull", "wait", "step"])]
)
def test_it_takes_no_step_in_before_the_one_it_keeps_is_covered(
    repeats: bool, done: list[str]
) -> None:
    client: Any = Crowded(repeats=repeats)
    job = Job.__new__(Job)
    job._client, job._generation, job._writers = client, 0, []
    job._rebuilders = client
    job._settle(5)
    assert client.done == done
