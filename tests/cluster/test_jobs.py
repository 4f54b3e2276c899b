"""Whole jobs on a real cluster: they end well, whatever is done to their members.

A result that went through a failure is at most a tenth worse than the worst of five that did not.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from losses import loss_of, undisturbed
from members import check_recovered, incarnations, kill, restarts
from testjobs import JobNamespace

from daruma_trainer.contract import Role

Check = Callable[[str, dict[str, str], set[str], dict[str, Any]], None]


@pytest.fixture
def check(jobs: JobNamespace, run_folder: Path) -> Check:
    """What holds after every recovery, whoever was lost."""

    def run(name: str, before: dict[str, str], lost: set[str], status: dict[str, Any]) -> None:
        check_recovered(jobs, name, before, lost, status)
        loss = loss_of(jobs, status["result"]["uri"])
        assert math.isnan(loss) or loss <= 1.1 * undisturbed(run_folder)

    return run


def test_a_job_succeeds_and_says_where_its_result_is(jobs: JobNamespace) -> None:
    jobs.cluster.apply(jobs.manifest("plain", steps=60))
    status = jobs.ended("plain")
    assert restarts(status, "servers") == restarts(status, "workers") == 0
    assert status["result"]["uri"].startswith("file:///")
    assert status["workers"]["succeeded"] == 2


def test_kill_9_of_a_servers_process(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("killed"))
    jobs.at_step("killed", 60)
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
    jobs.at_step("deleted", 60)
    before = jobs.pods("deleted")
    number = incarnations(jobs.status("deleted"), Role.SERVER)[0]
    jobs.cluster.kubectl(
        "delete", "pod", f"deleted-server-0-{number}", "-n", jobs.name, "--grace-period=1"
    )
    check("deleted", before, {"server-0"}, jobs.ended("deleted"))


def test_kill_9_of_a_worker(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("worker"))
    jobs.at_step("worker", 60)
    before = jobs.pods("worker")
    kill(jobs, "worker", Role.WORKER, 1)
    status = jobs.ended("worker")
    check("worker", before, {"worker-1"}, status)
    assert restarts(status, "workers") == 1


def test_two_servers_at_once(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("two"))
    jobs.at_step("two", 60)
    before = jobs.pods("two")
    kill(jobs, "two", Role.SERVER, 0)
    kill(jobs, "two", Role.SERVER, 2)
    status = jobs.ended("two")
    check("two", before, {"server-0", "server-2"}, status)
    assert restarts(status, "servers") == 2


def test_a_server_and_a_worker_at_once(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("both"))
    jobs.at_step("both", 60)
    before = jobs.pods("both")
    kill(jobs, "both", Role.SERVER, 1)
    kill(jobs, "both", Role.WORKER, 0)
    check("both", before, {"server-1", "worker-0"}, jobs.ended("both"))


def test_a_second_server_while_the_first_is_restored(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("second"))
    jobs.at_step("second", 60)
    before = jobs.pods("second")
    kill(jobs, "second", Role.SERVER, 1)
    jobs.cluster.until(
        lambda: jobs.status("second").get("phase") == "Recovering", "the recovery begins", 30
    )
    kill(jobs, "second", Role.SERVER, 2)
    status = jobs.ended("second")
    check("second", before, {"server-1", "server-2"}, status)
    assert restarts(status, "servers") == 2
