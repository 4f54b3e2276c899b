"""Whole jobs on a real cluster that lose two members, at once or one after the other."""

from members import Check, kill, restarts
from testjobs import JobNamespace

from daruma_trainer.contract import Role


def test_two_servers_at_once(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("two"))
    jobs.at_step("two", 20)
    before = jobs.pods("two")
    kill(jobs, "two", Role.SERVER, 0)
    kill(jobs, "two", Role.SERVER, 2)
    status = jobs.ended("two")
    check("two", before, {"server-0", "server-2"}, status)
    assert restarts(status, "servers") == 2


def test_a_server_and_a_worker_at_once(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("both"))
    jobs.at_step("both", 20)
    before = jobs.pods("both")
    kill(jobs, "both", Role.SERVER, 1)
    kill(jobs, "both", Role.WORKER, 0)
    check("both", before, {"server-1", "worker-0"}, jobs.ended("both"))


def test_a_second_server_while_the_first_is_restored(jobs: JobNamespace, check: Check) -> None:
    jobs.cluster.apply(jobs.manifest("second"))
    jobs.at_step("second", 20)
    before = jobs.pods("second")
    kill(jobs, "second", Role.SERVER, 1)
    jobs.cluster.until(
        lambda: jobs.status("second").get("phase") == "Recovering", "the recovery begins", 30
    )
    kill(jobs, "second", Role.SERVER, 2)
    status = jobs.ended("second")
    check("second", before, {"server-1", "server-2"}, status)
    assert restarts(status, "servers") == 2
