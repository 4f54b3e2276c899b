"""Workers killed while steps wait for each other: exact where all wait, else counted."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import Role, Rollback, SavedState, Settings
from elastic_cluster import PROGRAMS, check_marks, fence, last_words, take_seat, wait_for
from local_cluster import LocalCluster, local_cluster, lose_and_replace, replace_worker
from soak import counted

pytestmark = pytest.mark.faults
SEEDS, COUNTED = counted("jobs whose workers are killed at random moments, in each mode", 1, 20)
MODES = {
    "Async": Settings(),
    "Sync": Settings(consistency="Sync"),
    "Sync, elastic": Settings(consistency="Sync", min_replicas=1),
    "Bounded": Settings(consistency="Bounded", max_staleness=2),
    "Bounded, elastic": Settings(consistency="Bounded", max_staleness=2, min_replicas=1),
}


def settings(folder: Path, mode: str, **more: Any) -> Settings:
    return replace(MODES[mode], store=f"file://{folder}/store", **more)


# Exact


def exact(
    folder: Path, rule: str, *, withheld: int | None, workers: int = 3, server: int | None = None
) -> Mapping[str, Any]:
    """Train; where a server is named, kill the worker that gave its twelfth batch to the other.

    `server`: is killed with it.
    """
    folder.mkdir()
    program = (PROGRAMS, "withheld", rule, "12", str(-1 if withheld is None else withheld))
    config = settings(folder, "Sync")
    with local_cluster(folder, workers=workers, settings=config, program=program) as cluster:
        if withheld is not None:
            apart = {withheld: 11, 1 - withheld: 12}
            cluster.until(
                lambda: all(cluster.report(Role.SERVER, s).step == t for s, t in apart.items()),
                "one server made the step, the other waits",
            )
            if server is None:
                replace_worker(cluster, min(1, workers - 1))
            else:
                lose_both(cluster, 1, server)
        cluster.finish()
        mixed = sum(report.mixed for report in last_words(cluster).values())
        return {**cluster.result(folder / "store"), "mixed": mixed}


def lose_both(cluster: LocalCluster, worker: int, server: int) -> None:
    """Lose a worker and a server at once: their replacements are of one epoch."""
    gone = cluster.membership.member(Role.WORKER, worker)
    assert gone is not None
    cluster.kill(gone.id)
    members = tuple(m for m in cluster.membership.members if m is not gone)
    cluster.tell(raise_epoch=True, members=members, initialised=True)
    fresh = lose_and_replace(cluster, server)
    cluster.start(Role.WORKER, worker, fresh.incarnation)
    cluster.tell(raise_epoch=True)


@pytest.mark.parametrize("withheld", [0, 1])
@pytest.mark.parametrize("server", [0, 1])
def test_so_it_is_where_a_server_dies_with_it(tmp_path: Path, withheld: int, server: int) -> None:
    """Plain SGD: what workers pulled is all there is to know of a slot."""
    plain = exact(tmp_path / "plain", "sgd", withheld=None)
    killed = exact(tmp_path / "killed", "sgd", withheld=withheld, server=server)
    assert killed["mixed"] == 0
    assert killed["weight"].tobytes() == plain["weight"].tobytes()


@pytest.mark.parametrize("rule", ["momentum", "adam", "add"])
def test_a_worker_killed_between_its_pushes_is_bit_for_bit_as_if_it_had_not(
    tmp_path: Path, rule: str
) -> None:
    plain = exact(tmp_path / "plain", rule, withheld=None)
    for server in (0, 1):
        killed = exact(tmp_path / f"killed{server}", rule, withheld=server)
        assert killed["mixed"] == 0
        assert killed["weight"].tobytes() == plain["weight"].tobytes(), server


def test_a_worker_alone_makes_that_batch_of_what_there_is_and_counts_it(tmp_path: Path) -> None:
    killed = exact(tmp_path / "alone", "momentum", withheld=0, workers=1)
    assert killed["mixed"] == 1
    assert np.isfinite(killed["weight"]).all()


def test_with_all_workers_lost_nobody_has_it_and_that_is_counted(tmp_path: Path) -> None:
    program = (PROGRAMS, "withheld", "momentum", "12", "0")
    with local_cluster(tmp_path, settings=settings(tmp_path, "Sync"), program=program) as cluster:
        cluster.until(lambda: cluster.report(Role.SERVER, 1).step == 12, "server 1 made the step")
        for worker in (0, 1):
            cluster.kill(f"worker-{worker}-1")
        for worker in (0, 1):
            replace_worker(cluster, worker)
        cluster.finish()
        assert sum(report.mixed for report in last_words(cluster).values()) >= 1


# Elastic


@pytest.mark.parametrize("mode", ["Sync, elastic", "Bounded, elastic"])
def test_the_others_go_on_at_once_and_the_replacement_joins_them(tmp_path: Path, mode: str) -> None:
    gate = tmp_path / "gate"
    program = (PROGRAMS, "marks", "100", "5", str(gate))
    with local_cluster(
        tmp_path, workers=3, settings=settings(tmp_path, mode), program=program
    ) as cluster:
        wait_for(cluster, 1, 10)
        fence(cluster, 2)
        take_seat(cluster, 2)
        reached = cluster.report(Role.WORKER, 0).step
        # Its program has begun and waits: nobody waits for it.
        wait_for(cluster, 0, reached + 10)
        wait_for(cluster, 1, reached + 10)
        gate.touch()
        cluster.until(lambda: cluster.report(Role.WORKER, 2).step >= reached + 12, "it is back")
        cluster.finish()
        check_marks(cluster, tmp_path / "store", 100)
        assert max(report.skipped for report in last_words(cluster).values()) >= 8


@pytest.mark.parametrize("mode", ["Sync", "Bounded"])
def test_where_all_are_needed_the_others_wait(tmp_path: Path, mode: str) -> None:
    program = (PROGRAMS, "marks", "60", "2")
    with local_cluster(tmp_path, settings=settings(tmp_path, mode), program=program) as cluster:
        wait_for(cluster, 1, 10)
        fence(cluster, 1)

        def lead() -> int:
            """Steps are as of the slowest: were the lost one not waited for, of the other."""
            step = cluster.report(Role.WORKER, 0).step
            return step - min(cluster.report(Role.SERVER, s).step for s in (0, 1))

        # Under Sync what a step waits for does not show in the reports.
        if mode == "Bounded":
            ahead = 1 + MODES[mode].max_staleness
            cluster.until(lambda: lead() == ahead, "the other is as far ahead as it may be")
        take_seat(cluster, 1)
        cluster.finish()
        assert check_marks(cluster, tmp_path / "store", 60) == 0


def test_what_reached_some_servers_is_not_made_one_with_what_reached_none(tmp_path: Path) -> None:
    program = (PROGRAMS, "apart", "12", "0", "60")
    with local_cluster(tmp_path, settings=settings(tmp_path, "Async"), program=program) as cluster:
        wait_for(cluster, 1, 20)
        fence(cluster, 1)
        take_seat(cluster, 1)
        cluster.finish()
        assert check_marks(cluster, tmp_path / "store", 60) == 0


@COUNTED
@pytest.mark.parametrize("mode", list(MODES))
def test_every_batch_is_applied_once_or_counted(tmp_path: Path, mode: str) -> None:
    for seed in range(SEEDS):
        chance = random.Random(f"{mode} {seed}")
        folder = tmp_path / str(seed)
        folder.mkdir()
        program = (PROGRAMS, "marks", "60", "2")
        with local_cluster(
            folder, workers=3, settings=settings(folder, mode), program=program
        ) as cluster:
            for _ in range(3):
                step = cluster.report(Role.SERVER, 0).step
                at = min(step + chance.randint(0, 12), 50)
                cluster.until(lambda t=at: cluster.report(Role.SERVER, 0).step >= t, f"step {at}")  # type: ignore[misc]
                worker = chance.randrange(3)
                if cluster.report(Role.WORKER, worker).state == "Training":
                    fence(cluster, worker)
                    take_seat(cluster, worker)
            cluster.finish()
            missing = check_marks(cluster, folder / "store", 60)
            assert missing == 0 or "elastic" in mode, (mode, seed, missing)


@pytest.mark.parametrize("mode", ["Sync, elastic", "Bounded, elastic"])
def test_a_rollback_while_a_seat_is_vacant_leaves_every_batch_counted(
    tmp_path: Path, mode: str
) -> None:
    gate = tmp_path / "gate"
    program = (PROGRAMS, "marks", "80", "4", str(gate))
    config = settings(tmp_path, mode, cuts=True, every=10)
    with local_cluster(tmp_path, workers=3, settings=config, program=program) as cluster:
        wait_for(cluster, 1, 5)
        fence(cluster, 2)
        take_seat(cluster, 2)
        reached = cluster.report(Role.WORKER, 0).step

        def newer() -> SavedState | None:
            cut = cluster.report(Role.SERVER, 0).cut
            return cut if cut is not None and cut.step > reached else None

        cut = cluster.until(newer, "a cut without it")
        wait_for(cluster, 0, cut.step + 3)
        cluster.tell(raise_epoch=True, initialised=True, rollback=Rollback(1, cut.path))
        cluster.until(lambda: cluster.report(Role.WORKER, 0).generation == 1, "it goes back")
        wait_for(cluster, 0, cut.step + 3)
        gate.touch()
        cluster.finish()
        assert check_marks(cluster, tmp_path / "store", 80) >= cut.step - reached
