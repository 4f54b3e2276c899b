"""`Bounded`: how far ahead workers get, with and without failures. Programs check what they see."""

from dataclasses import replace
from pathlib import Path

import pytest

from daruma_trainer.contract import Role, Rollback, Settings
from elastic_cluster import PROGRAMS, check_marks, last_words, wait_for
from local_cluster import fence, freshest, local_cluster

pytestmark = pytest.mark.faults


def settings(folder: Path, staleness: int, **more: object) -> Settings:
    made = Settings(consistency="Bounded", max_staleness=staleness, store=f"file://{folder}/store")
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("staleness", [0, 3])
def test_the_fast_one_gets_as_far_ahead_as_it_may(tmp_path: Path, staleness: int) -> None:
    config = settings(tmp_path, staleness)
    program = (PROGRAMS, "marks", "40", "4")
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        cluster.finish()
        leads = [w.metrics["lead"] for w in last_words(cluster).values()]
        assert max(leads) == staleness, leads
        assert check_marks(cluster, tmp_path / "store", 40) == 0


def test_while_a_server_is_away_workers_go_on_until_so_many_steps_are_pending(
    tmp_path: Path,
) -> None:
    config = settings(tmp_path, 4)
    program = (PROGRAMS, "marks", "60", "4")
    with local_cluster(tmp_path, settings=config, program=program) as cluster:
        wait_for(cluster, 1, 10)
        fence(cluster, 1)
        workers = cluster.membership.of(Role.WORKER)

        def pending() -> list[int]:
            return [cluster.report(Role.WORKER, w.index).pending for w in workers]

        def copied() -> bool:
            return all(cluster.report(Role.WORKER, w.index).copies for w in workers)

        # The slower one may go the whole way; the faster one's copy lacks the slower's batches.
        cluster.until(lambda: max(pending()) >= 3, "they go on")
        cluster.until(copied, "copies")
        before = pending()
        assert max(before) <= 4
        cluster.replace_server(1, freshest(cluster, 1))
        cluster.finish()
        check_marks(cluster, tmp_path / "store", 60)
        assert sum(w.replayed for w in last_words(cluster).values()) >= sum(before)


def test_a_rollback_brings_all_back_to_where_each_was(tmp_path: Path) -> None:
    config = settings(tmp_path, 2, cuts=True, every=10, min_replicas=1)
    program = (PROGRAMS, "marks", "60", "3")
    with local_cluster(tmp_path, workers=3, settings=config, program=program) as cluster:
        cluster.until(
            lambda: (cut := cluster.report(Role.SERVER, 0).cut) is not None and cut.step >= 10,
            "a cut",
        )
        cut = cluster.report(Role.SERVER, 0).cut
        assert cut is not None
        wait_for(cluster, 0, cut.step + 5)
        cluster.tell(raise_epoch=True, initialised=True, rollback=Rollback(1, cut.path))
        cluster.finish()
        assert check_marks(cluster, tmp_path / "store", 60) == 0
