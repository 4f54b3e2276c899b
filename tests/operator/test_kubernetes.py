"""Tests of the substrate of pods: what it reads of objects that another version wrote."""

import logging
from typing import Any

import pytest

from bad_manifests import PROGRAM, manifest
from daruma_operator.api.status import Phase, TrainingJobStatus
from daruma_operator.errors import UnreadableJobError
from daruma_operator.substrate.kubernetes import KubernetesSubstrate
from daruma_operator.substrate.protocol import JobKey
from fake_api import FakeApi, with_substrate

KEY = JobKey("n", "j")


def stored(spec: dict[str, Any], generation: int = 1, uid: str = "12345678-uid") -> dict[str, Any]:
    meta = {
        "name": "j", "namespace": "n", "uid": uid, "generation": generation,
        "resourceVersion": str(generation),
    }  # fmt: skip
    return manifest({"program": PROGRAM, **spec}) | {"metadata": meta}


NEW_FIELDS = {
    "program": {**PROGRAM, "env": [{"name": "A", "ofALaterVersion": 1}], "later": {"a": 1}},
    "recovery": {"replay": {"later": 1}},
    "later": [],
}
NEW_VALUE = {"recovery": {"strategy": "Auto"}}


def test_fields_of_a_newer_definition_are_passed_over() -> None:
    api = FakeApi()

    async def story(substrate: KubernetesSubstrate) -> None:
        api.jobs["j"] = stored(NEW_FIELDS)
        job = await substrate.read_job(KEY)
        assert job is not None
        assert job.spec.program.env[0].name == "A"
        written = await substrate.write_status(job, TrainingJobStatus(phase=Phase.PENDING))
        assert written.status.phase is Phase.PENDING

    with_substrate(api, story)
    assert api.events == []


def test_a_spec_that_cannot_be_read_is_told_once_and_the_one_before_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = FakeApi()

    async def story(substrate: KubernetesSubstrate) -> None:
        api.jobs["j"] = stored({"workers": {"replicas": 3}}, generation=1)
        assert await substrate.read_job(KEY) is not None
        for _ in range(3):
            api.jobs["j"] |= stored({**NEW_VALUE, "workers": {"replicas": 5}}, generation=2)
            job = await substrate.read_job(KEY)
            assert job is not None
            assert (job.spec.workers.replicas, job.generation) == (3, 1)
            assert job.resource_version == "2", "or no status could be written"
            job = await substrate.write_status(job, TrainingJobStatus(phase=Phase.RUNNING))
            assert job.spec.workers.replicas == 3
            assert job.status.phase is Phase.RUNNING
        assert len(api.events) == 1
        api.jobs["j"] |= stored({"recovery": {"strategy": "Stateless"}}, generation=3)
        job = await substrate.read_job(KEY)
        assert job is not None
        assert (job.spec.recovery.strategy, job.generation) == ("Stateless", 3)

    with caplog.at_level(logging.ERROR, "daruma.operator"):
        with_substrate(api, story)
    assert len(caplog.records) == 1
    (event,) = api.events
    assert event["metadata"]["name"] == "j.editnotread.2.12345678"
    assert (event["reason"], event["type"]) == ("EditNotRead", "Warning")
    assert event["involvedObject"]["uid"] == "12345678-uid"
    for part in ("spec.recovery.strategy", '"Auto"', "run the version", "generation 1 holds"):
        assert part in event["message"]


@pytest.mark.parametrize("uid", ["12345678-uid", "another"])
def test_a_job_that_could_never_be_read_is_not_gone(uid: str) -> None:
    api = FakeApi()

    async def story(substrate: KubernetesSubstrate) -> None:
        if uid == "another":  # an earlier job of this name
            api.jobs["j"] = stored({}, uid=uid)
            assert await substrate.read_job(KEY) is not None
        api.jobs["j"] = stored(NEW_VALUE)
        for _ in range(2):
            with pytest.raises(UnreadableJobError, match="strategy"):
                await substrate.read_job(KEY)
        api.jobs["j"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        assert await substrate.read_job(KEY) is None
        api.jobs.clear()
        assert await substrate.read_job(KEY) is None

    with_substrate(api, story)
    (event,) = api.events
    assert event["reason"] == "JobNotRead"
    assert "nobody looks after the job" in event["message"]


def test_a_status_that_cannot_be_read_is_told() -> None:
    api = FakeApi()

    async def story(substrate: KubernetesSubstrate) -> None:
        api.jobs["j"] = stored({})
        assert await substrate.read_job(KEY) is not None
        for spec in ({}, NEW_VALUE):
            api.jobs["j"] = stored(spec) | {"status": {"phase": "Napping"}}
            with pytest.raises(UnreadableJobError, match=r"status\.phase"):
                await substrate.read_job(KEY)

    with_substrate(api, story)
    (event,) = api.events
    assert event["message"].startswith("status.phase: ")


def test_a_job_of_the_same_name_is_told_of_anew() -> None:
    api = FakeApi()

    async def story(substrate: KubernetesSubstrate) -> None:
        for _ in range(2):
            api.jobs["j"] = stored(NEW_VALUE)
            with pytest.raises(UnreadableJobError):
                await substrate.read_job(KEY)
            api.jobs.clear()
            assert await substrate.read_job(KEY) is None

    with_substrate(api, story)
    assert len(api.events) == 2
