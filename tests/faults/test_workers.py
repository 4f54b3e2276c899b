"""Workers: what a program sees, how it ends, and what becomes of a worker that is killed."""

import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.contract import ExitCode, Report, Role, Rollback, SavedState, Settings
from local_cluster import DEADLINE, LocalCluster, local_cluster, replace_worker

pytestmark = pytest.mark.faults
PROGRAMS = str(Path(__file__).with_name("worker_programs.py"))


def running(
    folder: Path, *program: str, workers: int = 2, consistency: str = "Async", every: int = 0
) -> AbstractContextManager[LocalCluster]:
    """A job of two servers whose result lies in `folder`/store; with cuts if `every` is given."""
    store = f"file://{folder}/store"
    config = Settings(consistency=consistency, store=store, every=every, cuts=every > 0)
    return local_cluster(
        folder, servers=2, workers=workers, settings=config, program=(PROGRAMS, *program)
    )


def metrics(cluster: LocalCluster, worker: int) -> Mapping[str, float]:
    """What a worker reported, once it has left."""

    def left() -> Report | None:
        report = cluster.report(Role.WORKER, worker)
        return report if report.state == "Left" else None

    return cluster.until(left, "it leaves").metrics


def test_tables_made_one_after_the_other_have_their_own_initial_values(tmp_path: Path) -> None:
    with running(tmp_path, "tables") as cluster:
        assert metrics(cluster, 0)["second"] == 30
        assert metrics(cluster, 1)["batch"] == 1
        cluster.finish()
        result = cluster.result(tmp_path / "store")
    np.testing.assert_array_equal(result["second"].ravel(), [10, 1, 2, 30, 4])
    expected = np.ones((6, 2))
    expected[2] += [2, 4]
    np.testing.assert_array_equal(result["first"], expected)


def test_groups_schedules_and_clipping_are_those_of_torch(tmp_path: Path) -> None:
    with running(tmp_path, "optimizer", workers=1, consistency="Sync") as cluster:
        assert metrics(cluster, 0)["apart"] < 1e-6
        cluster.finish()


@pytest.mark.parametrize("consistency", ["Async", "Sync"])
def test_a_killed_worker_goes_on_where_it_was_and_no_batch_counts_twice(
    tmp_path: Path, consistency: str
) -> None:
    with running(tmp_path, "count", "60", consistency=consistency) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 1).step >= 15, "15 steps")
        replace_worker(cluster, 1)
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    # Each worker has 30 samples and 6 batches an epoch: 60 steps are ten epochs of either.
    np.testing.assert_array_equal(seen, 10)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_rollback_brings_back_a_worker_that_was_done(tmp_path: Path, all_of_it: bool) -> None:
    """The cut may lack some of its batches, or have them all."""
    with running(tmp_path, "lag", "30", every=10) as cluster:
        cluster.until(lambda: cluster.report(Role.SERVER, 0).cut is not None, "a cut")
        cluster.until(lambda: cluster.report(Role.WORKER, 0).state == "Finished", "it is done")
        cut = cluster.report(Role.SERVER, 0).cut
        assert cut is not None
        if all_of_it:
            known = cut.path

            def newer() -> SavedState | None:
                found = cluster.report(Role.SERVER, 0).cut
                return found if found is not None and found.path != known else None

            cut = cluster.until(newer, "a cut after it")
        assert cluster.report(Role.WORKER, 1).state not in ("Finished", "Left"), "it comes late"
        cluster.tell(raise_epoch=True, initialised=True, rollback=Rollback(1, cut.path))
        cluster.until(lambda: cluster.report(Role.WORKER, 0).generation == 1, "it came back")
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 5)


def test_stop_ends_all_workers_after_their_step(tmp_path: Path) -> None:
    with running(tmp_path, "stops") as cluster:
        assert metrics(cluster, 0)["ended"] == 1
        assert metrics(cluster, 1)["ended"] == 1
        cluster.finish()


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("mismatch", ExitCode.USAGE, "every worker has to make the same tables"),
        ("raises", ExitCode.FAILED, "RuntimeError: a mistake of the program"),
        ("pushes_nothing", ExitCode.USAGE, "call optimizer.step()"),
    ],
)
def test_a_program_that_cannot_go_on_ends_with_its_reason(
    tmp_path: Path, program: str, code: ExitCode, message: str
) -> None:
    with running(tmp_path, program) as cluster:
        workers = [m.id for m in cluster.membership.of(Role.WORKER)]
        cluster.until(lambda: any(not cluster.alive(w) for w in workers), "one ends")
        ended = {cluster.processes[w].poll() for w in workers} - {None}
        assert ended == {int(code)}, cluster.logs()
        assert message in cluster.logs()


def test_a_worker_that_is_told_to_end_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "count", "100000") as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 3, "3 steps")
        cluster.kill("worker-0-1", signal.SIGTERM)
        code = cluster.processes["worker-0-1"].wait(DEADLINE)
        assert code == 128 + signal.SIGTERM, "its program is not done"


def test_a_worker_that_was_replaced_says_so_and_stops(tmp_path: Path) -> None:
    with running(tmp_path, "count", "100000") as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 1).step >= 3, "3 steps")
        cluster.kill("worker-1-1", signal.SIGSTOP)
        epoch = cluster.membership.epoch + 1
        cluster.start(Role.WORKER, 1, epoch)
        cluster.tell(raise_epoch=True, initialised=True)
        cluster.kill("worker-1-1", signal.SIGCONT)
        assert cluster.processes["worker-1-1"].wait(DEADLINE) == ExitCode.STALE, cluster.logs()
        reached = cluster.report(Role.WORKER, 1).step
        cluster.until(lambda: cluster.report(Role.WORKER, 1).step > reached, "the new one works")
