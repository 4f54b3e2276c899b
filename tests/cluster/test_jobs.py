"""Whole jobs on a real cluster: one that nobody disturbs, and one that loses one member at a time.

Its result is at most a tenth worse than the worst of five jobs that went undisturbed.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from longjob import LongJob, recoveries
from losses import check_loss
from members import incarnations, kill, restarts
from testcluster import Cluster, operator_stays
from testjobs import JobNamespace, job_namespace, mlr

from daruma_trainer.contract import Role, place


@pytest.fixture(scope="module")
def long(operated: Cluster, run_folder: Path) -> Iterator[LongJob]:
    """The job of this file."""
    with job_namespace(operated, "jobs") as jobs:
        yield LongJob(jobs, "long", partial(operator_stays, run_folder))


def test_a_job_succeeds_and_says_where_its_result_is(jobs: JobNamespace) -> None:
    jobs.cluster.apply(jobs.manifest("plain", program=mlr(30)))
    status = jobs.ended("plain")
    assert restarts(status, "servers") == restarts(status, "workers") == 0
    assert status["result"]["uri"].startswith("file:///")
    assert status["workers"]["succeeded"] == 2


def test_kill_9_of_a_servers_process(long: LongJob) -> None:
    with long.losing("server-1") as name:
        kill(long.jobs, name, Role.SERVER, 1)
    (record,) = recoveries(long.status())
    owners = place(long.jobs.job(name)["metadata"]["uid"], 3)
    assert record["sources"] == {"peer": owners.count(1)}
    (loss,) = record["losses"]
    assert long.status()["restarts"]["servers"] == 1
    assert loss["reason"] in ("Error", "ProcessEnded"), "its container's end, if that was seen"
    told = {"PodFailed", "RecoveryStarted", "RecoverySucceeded"}
    long.jobs.cluster.until(lambda: told <= long.jobs.events(), f"events {told}")


def test_a_deleted_server_pod(long: LongJob) -> None:
    with long.losing("server-0") as name:
        number = incarnations(long.status(), Role.SERVER)[0]
        long.jobs.cluster.kubectl(
            "delete", "pod", f"{name}-server-0-{number}", "-n", long.jobs.name, "--grace-period=1"
        )


def test_kill_9_of_a_worker(long: LongJob) -> None:
    with long.losing("worker-1") as name:
        kill(long.jobs, name, Role.WORKER, 1)


def test_the_job_that_went_through_this_succeeds(long: LongJob, run_folder: Path) -> None:
    status = long.ended()
    assert status["workers"]["succeeded"] == 2
    long.jobs.cluster.until(lambda: "Succeeded" in long.jobs.events(), "the event Succeeded")
    check_loss(long.jobs, status, run_folder)
