"""What a program may say of itself: it is in every server's view."""

import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from daruma_operator.controller.agents import MEMBER_BYTES
from daruma_trainer.contract import Report
from daruma_trainer.errors import ConfigurationError
from daruma_trainer.worker import evaluating as module
from daruma_trainer.worker.job import MAX_METRICS_BYTES, Job


def job_of(**client_has: object) -> tuple[Job, Any]:
    client = SimpleNamespace(lock=threading.Lock(), values={}, loss=None, **client_has)
    return Job(cast("Any", client)), client


def test_the_newest_of_each_name_is_reported() -> None:
    job, client = job_of()
    job.report(loss=2.0, accuracy=0.1)
    job.report(accuracy=0.2, norm=3)
    assert (client.loss, client.values) == (2.0, {"accuracy": 0.2, "norm": 3.0})


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f38e"])
def test_more_than_a_view_has_room_for_is_refused(letter: str) -> None:
    """A name a step, say: nobody would hear of the job any more."""
    job, client = job_of()

    def a_name_a_step() -> None:
        for n in range(100_000):
            job.report(loss=1.0, **{f"{letter * 20}_{n}": -1.2345678901234567e-100})

    with pytest.raises(ConfigurationError, match=f"{MAX_METRICS_BYTES} are the most: .*fewer"):
        a_name_a_step()
    taken = len(client.values)
    assert taken > 20
    job.report(**dict.fromkeys(client.values, 0.0))
    with pytest.raises(ConfigurationError):
        job.report(loss=7.0, another=1.0, more=2.0, **{letter * 300: 3.0})
    assert (client.loss, len(client.values)) == (1.0, taken)
    report = Report("worker-0-1", 1, "Training", metrics=client.values)
    assert len(json.dumps(report.to_json())) < MAX_METRICS_BYTES + 1024 < MEMBER_BYTES


@pytest.mark.parametrize(("metrics", "reported"), [(3, 3), (1000, 0)])
def test_a_result_is_not_lost_for_its_evaluation(
    metrics: int, reported: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "pull_all", lambda _client, _seconds: None)
    said: list[int] = []
    job, client = job_of(
        me=SimpleNamespace(index=0), say=lambda: said.append(1), wait=lambda *_: None
    )
    job._specs.append(cast("Any", None))
    job.evaluate(lambda: dict.fromkeys(map(str, range(metrics)), 0.5))
    job.evaluate_result()
    assert (len(client.values), said) == (reported, [1])
    assert bool(caplog.records) == (reported == 0)
