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


class Away(Crowded):
    """A worker under `Async` whose server 1 is away or was; server 0 owes the last answer."""

    def __init__(self, *, ahead: bool) -> None:
        super().__init__(repeats=False)
        self.membership.settings.consistency = "Async"
        self.lost = np.arange(1024) % 2 == 1
        self.meanwhile = SimpleNamespace(
            crowded=False, away=lambda _: self.lost & ahead, runs_ahead=lambda: ahead
        )
        self.wanted = Wanted(0, all_workers=False, missing=np.ones(1024, np.bool_))

    def pull(self, min_step: int, *, all_workers: bool = False) -> Wanted:
        self.wanted = super().pull(min_step, all_workers=all_workers)
        self.wanted.missing[:] = True
        return self.wanted

    def push(self, _updates: object, _generation: int) -> None:
        self.done.append("push")

    def wait(self, ready: Callable[[], bool], _seconds: float, what: str) -> None:
        if not ready():
            self.done.append("wait")
            self.wanted.missing[~self.lost] = False  # what server 0 answers
            if not ready():
                self.done.append("wait for the lost server")
                self.wanted.missing[:] = False
        assert ready(), what


@pytest.mark.parametrize(
    ("ahead", "done"),
    [
        (True, ["wait", "step", "push", "pull", "step"]),
        (False, ["push", "pull", "wait", "wait for the lost server", "step"]),
    ],
)
def test_while_a_server_is_away_it_waits_for_the_others_last_answer_alone(
    ahead: bool, done: list[str]
) -> None:
    """And computes on before the next one is there, so hardly any of its time is lost."""
    client: Any = Away(ahead=ahead)
    job = Job.__new__(Job)
    job._client, job._generation, job._writers, job._rebuilders = client, 0, [], client
    job._specs, job._begun, job._batches_open = [], 0, False
    evaluation: Any = SimpleNamespace(after_batch=lambda: None)
    job._evaluation = evaluation
    job.exchange(())
    assert client.done == done
