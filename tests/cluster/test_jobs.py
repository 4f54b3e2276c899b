"""Whole jobs on a real cluster: they end well, whatever is done to one of their members.

A result that went through a failure is at most a tenth worse than the worst of five that did not.
"""

import pytest
from members import Check, incarnations, kill, restarts
from testjobs import JobNamespace, mlr

from daruma_trainer.contract import Role


def test_a_job_succeeds_and_says_where_its_result_is(jobs: JobNamespace) -> None:
    jobs.cluster.apply(jobs.manifest("plain", program=mlr(30)))
    status = jobs.ended("plain")
    assert restarts(status, "servers") == restarts(status, "workers") == 0
    assert status["result"]["uri"].startswith("file:///")
    assert status["workers"]["succeeded"] == 2


def test_kill_9_of_a_servers_process(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("killed"))
    jobs.at_step("killed", 20)
    before = jobs.pods("killed")
    kill(jobs, "killed", Role.SERVER, 1)
    status = jobs.ended("killed")
    check("killed", before, {"server-1"}, status)
    assert restarts(status, "servers") == 1
    assert status["recoveries"][-1]["sources"] == {"peer": pytest.approx(341, abs=20)}
    events = jobs.cluster.get("events", namespace=jobs.name)["items"]
    assert {"RecoveryStarted", "RecoverySucceeded", "Succeeded"} <= {e["reason"] for e in events}


def test_a_deleted_server_pod(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("deleted"))
    jobs.at_step("deleted", 20)
    before = jobs.pods("deleted")
    number = incarnations(jobs.status("deleted"), Role.SERVER)[0]
    jobs.cluster.kubectl(
        "delete", "pod", f"deleted-server-0-{number}", "-n", jobs.name, "--grace-period=1"
    )
    check("deleted", before, {"server-0"}, jobs.ended("deleted"))


def test_kill_9_of_a_worker(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("worker"))
    jobs.at_step("worker", 20)
    before = jobs.pods("worker")
    kill(jobs, "worker", Role.WORKER, 1)
    status = jobs.ended("worker")
    check("worker", before, {"worker-1"}, status)
    assert restarts(status, "workers") == 1
