"""Phases and barriers while servers and workers come and go."""

from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.contract import Role, Rollback, Settings
from local_cluster import LocalCluster, local_cluster, lose_and_replace, replace_worker

pytestmark = pytest.mark.faults
PROGRAMS = str(Path(__file__).with_name("worker_programs.py"))


def roll_back(cluster: LocalCluster, _: int) -> None:
    """Send all members back to the newest cut."""
    cluster.until(lambda: cluster.report(Role.SERVER, 0).cut is not None, "a cut")
    cut = cluster.report(Role.SERVER, 0).cut
    assert cut is not None
    assert cut.step < 6, "worker 1 is not that far"
    cluster.tell(raise_epoch=True, initialised=True, rollback=Rollback(1, cut.path))
    cluster.until(lambda: cluster.report(Role.WORKER, 0).generation == 1, "it goes back")


@pytest.mark.parametrize("consistency", ["Async", "Sync"])
@pytest.mark.parametrize("happens", [None, lose_and_replace, replace_worker, roll_back])
def test_a_phase_ends_when_everybody_ended_it_whatever_happens_meanwhile(
    tmp_path: Path, consistency: str, happens: object
) -> None:
    cuts = happens is roll_back
    config = Settings(
        consistency=consistency, store=f"file://{tmp_path}/store", every=2 * cuts, cuts=cuts
    )
    gate = tmp_path / "gate"
    program = (PROGRAMS, "gated", str(gate))
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        # Under Sync nobody's step counts before all of them made it.
        reached = 6 if consistency == "Async" else 5
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
