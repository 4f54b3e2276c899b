"""A job on a real cluster that loses two members, at once or one after the other, or one that is
not quite dead.
"""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from longjob import LongJob, recoveries
from losses import check_loss
from members import incarnations, kill, seat
from testcluster import Cluster, operator_stays
from testjobs import job_namespace

from daruma_trainer.contract import Role


@pytest.fixture(scope="module")
def long(operated: Cluster, run_folder: Path) -> Iterator[LongJob]:
    """The job of this file; a member that stands still is noticed soon."""
    with job_namespace(operated, "jobs-twice") as jobs:
        calm = partial(operator_stays, run_folder)
        yield LongJob(jobs, "long", calm, recovery={"timeouts": {"detectSeconds": 8}})


def test_two_servers_at_once(long: LongJob) -> None:
    with long.losing("server-0", "server-2") as name:
        kill(long.jobs, name, Role.SERVER, 0)
        kill(long.jobs, name, Role.SERVER, 2)


def test_a_server_and_a_worker_at_once(long: LongJob) -> None:
    with long.losing("server-1", "worker-0") as name:
        kill(long.jobs, name, Role.SERVER, 1)
        kill(long.jobs, name, Role.WORKER, 0)


def test_a_second_server_while_the_first_is_restored(long: LongJob) -> None:
    with long.losing("server-1", "server-2") as name:
        number = incarnations(long.status(), Role.SERVER)[1]
        kill(long.jobs, name, Role.SERVER, 1)
        long.replaced(1, number)
        kill(long.jobs, name, Role.SERVER, 2)


def test_the_job_that_went_through_this_succeeds(long: LongJob, run_folder: Path) -> None:
    check_loss(long.jobs, long.ended(), run_folder)


def test_a_frozen_server_that_goes_on_after_it_was_replaced(long: LongJob) -> None:
    """Nothing that it accepts counts, and it ends by itself.

    Of another job, which trains a third of its steps without that server, and so ends elsewhere.
    """
    with long.losing("server-1") as name:
        known = len(recoveries(long.status()))
        frozen, cluster = seat(long.jobs, name, Role.SERVER, 1), long.jobs.cluster
        pid = cluster.kill(signal.SIGSTOP, **frozen)
        long.replaced(1, int(frozen["INCARNATION"]))
        assert cluster.pids(**frozen)[:1] == [pid], "it goes on within its grace period"
        cluster.kill(signal.SIGCONT, **frozen)
        cluster.until(lambda: not cluster.pids(**frozen), "the old process ends", 60)
    (record,) = recoveries(long.status())[known:]
    assert [x["reason"] for x in record["losses"]] == ["Unresponsive"]
