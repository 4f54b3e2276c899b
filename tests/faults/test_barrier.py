"""Phases and barriers while servers and workers come and go."""

from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.contract import (
    ExitCode,
    Role,
    Rollback,
    Settings,
    Source,
    SourceKind,
)
from local_cluster import LocalCluster, local_cluster, lose_and_replace, replace_worker

pytestmark = pytest.mark.faults
PROGRAMS = str(Path(__file__).with_name("worker_programs.py"))


def roll_back(cluster: LocalCluster, _: int) -> None:
    """Send all members back to a cut; none is removed here, though newer ones may be taken."""
    cut = cluster.until(lambda: cluster.report(Role.SERVER, 0).cut, "a cut")
    assert cut.step < 6, "worker 1 is not that far"
    cluster.tell(raise_epoch=True, initialised=True, rollback=Rollback(1, cut.path))
    cluster.until(lambda: cluster.report(Role.WORKER, 0).generation == 1, "it goes back")


@pytest.mark.parametrize("consistency", ["Async", "Sync", "Bounded"])
@pytest.mark.parametrize("happens", [None, lose_and_replace, replace_worker, roll_back])
def test_a_phase_ends_when_everybody_ended_it_whatever_happens_meanwhile(
    tmp_path: Path, consistency: str, happens: object
) -> None:
    cuts = happens is roll_back
    config = Settings(
        consistency=consistency,
        store=f"file://{tmp_path}/store",
        every=2 * cuts,
        cuts=cuts,
        keep=100,
    )
    gate = tmp_path / "gate"
    program = (PROGRAMS, "gated", str(gate))
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        # Under Sync nobody's step counts before all of them made it.
        reached = 5 if consistency == "Sync" else 6
        steps = (reached, 5)
        cluster.until(
            lambda: tuple(cluster.report(Role.WORKER, w).step for w in (0, 1)) == steps,
            "worker 0 stands in the barrier",
        )
        if callable(happens):
            happens(cluster, 0)
            assert cluster.report(Role.WORKER, 1).step <= 5
        gate.touch()
        cluster.finish()
        np.testing.assert_array_equal(cluster.result(tmp_path / "store")["seen"].ravel(), 10)


@pytest.mark.parametrize("consistency", ["Async", "Sync"])
def test_a_batch_may_hold_several_tables_or_nothing(tmp_path: Path, consistency: str) -> None:
    config = Settings(consistency=consistency, store=f"file://{tmp_path}/store")
    program = (PROGRAMS, "two_tables")
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        for worker in (0, 1):
            cluster.until(
                lambda w=worker: cluster.report(Role.WORKER, w).state == "Left",  # type: ignore[misc]
                "it leaves",
            )
            metrics = cluster.report(Role.WORKER, worker).metrics
            assert metrics == {"batch": 2.0, "sum": 7.0}
        cluster.finish()


def restore_from_the_beginning(cluster: LocalCluster, index: int) -> None:
    """Replace a server by one that takes the running checkpoint, which is older than it."""
    gone = cluster.membership.member(Role.SERVER, index)
    assert gone is not None
    # Six steps may be made before the first save is durable.
    cluster.until(lambda: cluster.report(Role.SERVER, index).initialised, "there is a checkpoint")
    cluster.kill(gone.id)
    cluster.replace_server(index, [Source(SourceKind.RUNNING_CHECKPOINT, cluster.slots(index))])
    cluster.until(lambda: cluster.report(Role.SERVER, index).state == "Ready", "it is back")
    cluster.tell(raise_epoch=True, recovery=None)


@pytest.mark.parametrize(
    "happens",
    [
        "one server", "it is lost again", "both", "a worker too", "a rollback after it",
        "after all have left",
    ],
)  # fmt: skip
def test_sums_are_made_again_exactly_once(tmp_path: Path, happens: str) -> None:
    """Restored as at the beginning, each row has ten additions of each worker in the end."""
    cuts = happens == "a rollback after it"
    config = Settings(
        store=f"file://{tmp_path}/store", every=2 if cuts else 0, cuts=cuts, inexact=True
    )
    program = (PROGRAMS, "sums", str(tmp_path / "gate"))
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        cluster.until(
            lambda: tuple(cluster.report(Role.WORKER, w).step for w in (0, 1)) == (6, 5),
            "worker 0 stands in the barrier",
        )
        if happens == "after all have left":
            (tmp_path / "gate").touch()
            workers = cluster.membership.of(Role.WORKER)
            cluster.until(
                lambda: all(cluster.report(Role.WORKER, w.index).state == "Left" for w in workers),
                "all leave",
            )
            (tmp_path / "hold").touch()
        restore_from_the_beginning(cluster, 1)
        if happens == "it is lost again":
            restore_from_the_beginning(cluster, 1)
        elif happens == "both":
            restore_from_the_beginning(cluster, 0)
        elif happens == "a worker too":
            replace_worker(cluster, 0)
        elif cuts:
            roll_back(cluster, 0)
        (tmp_path / "gate").touch()
        if happens == "after all have left":
            # The result is asked for before any part has come: it waits for them.
            cluster.order_result()
            (tmp_path / "hold").unlink()
            cluster.released()
        else:
            cluster.finish()
        result = cluster.result(tmp_path / "store")
    np.testing.assert_array_equal(result["sums"], 20)
    if happens != "after all have left":  # rows that nobody writes again stay as they came back
        np.testing.assert_array_equal(result["state"].ravel(), 10)


@pytest.mark.parametrize("consistency", ["Async", "Sync"])
def test_a_sum_that_a_recovery_would_leave_wrong_is_refused(
    tmp_path: Path, consistency: str
) -> None:
    config = Settings(consistency=consistency, inexact=True)
    with local_cluster(tmp_path, settings=config, program=(PROGRAMS, "careless")) as cluster:
        for worker in cluster.membership.of(Role.WORKER):
            assert cluster.processes[worker.id].wait(60) == ExitCode.USAGE
        assert "call table.on_restored(fn) before its first push" in cluster.logs()
