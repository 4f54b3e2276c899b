"""A server that stands still is replaced; when it goes on, nothing it accepts counts."""

import signal

from members import check_recovered, incarnations, restarts
from testjobs import STEPS, JobNamespace

from daruma_trainer.contract import Role


def test_a_frozen_server_that_goes_on_after_it_was_replaced(jobs: JobNamespace) -> None:
    manifest = jobs.manifest("frozen", steps=STEPS, recovery={"timeouts": {"detectSeconds": 5}})
    jobs.cluster.apply(manifest)
    jobs.at_step("frozen", 20)
    before = jobs.pods("frozen")
    number = incarnations(jobs.status("frozen"), Role.SERVER)[1]
    seat = {"JOB": "frozen", "ROLE": Role.SERVER.value, "INDEX": "1", "INCARNATION": str(number)}
    pid = jobs.cluster.kill(signal.SIGSTOP, **seat)

    def recovered() -> bool:
        return len(jobs.status("frozen").get("recoveries", [])) == 1

    jobs.cluster.until(recovered, "the frozen server is replaced", 120)
    assert jobs.cluster.pids(**seat)[:1] == [pid], "it goes on within its grace period"
    jobs.cluster.kill(signal.SIGCONT, **seat)

    status = jobs.ended("frozen")
    check_recovered(jobs, "frozen", before, {"server-1"}, status, steps=STEPS)
    assert len(status["recoveries"]) == 1
    assert restarts(status, "servers") == 1
    assert [x["reason"] for x in status["recoveries"][0]["losses"]] == ["Unresponsive"]
    jobs.cluster.until(lambda: not jobs.cluster.pids(**seat), "the old process ends", 60)
