"""Chains of replicas, and copies: real processes, one membership, no operator."""

import itertools
import os
import random
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softmax
from chains import (
    CHAIN,
    add_replica,
    counting,
    go_on,
    joined,
    lose_at,
    lost_by,
    pid_of,
    promote,
)
from daruma_trainer.contract import Role, Settings, place
from daruma_trainer.layout import TableLayout, TableSpec, choose_block_rows
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.worker.batches import batch_indices
from local_cluster import local_cluster, stepped

pytestmark = pytest.mark.faults


def program(steps: int, rule: str) -> tuple[str, ...]:
    rate = "0.01" if rule == "adam" else "0.1"
    return (softmax.__file__, str(steps), "digits", rate, "10", rule)


def trained(
    folder: Path, config: Settings, rule: str, *, disturb: bool
) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir()
    config = replace(config, store=f"file://{folder}/store", every=20)
    with local_cluster(folder, settings=config, program=program(120, rule)) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 10, "10 steps")
        if disturb:
            made = add_replica(cluster, 0, host=1)
            joined(cluster, made)
            # What it gets from now on are updates alone.
            step = cluster.report(Role.WORKER, 0).step + 20
            cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= step, "20 steps more")
            promote(cluster, made)
            epoch = cluster.membership.epoch
            cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
            found = cluster.report(Role.SERVER, 0)
            assert found.restore is not None
            assert found.restore.sources == {"replica": found.ready}
            cluster.tell(raise_epoch=True, recovery=None)
        cluster.finish()
        reports = [cluster.report(Role.SERVER, i) for i in (0, 1)]
        assert [r.lost for r in reports] == [0, 0]
        return cluster.result(folder / "store")


@pytest.mark.parametrize(("rule", "reads"), [("sgd", False), ("momentum", True), ("adam", False)])
def test_sync_with_a_promoted_replica_ends_bit_for_bit_like_without(
    tmp_path: Path, rule: str, reads: bool
) -> None:
    """`reads`: workers pull from the replica, too."""
    config = replace(CHAIN, consistency="Sync", pulls_from_replicas=reads)
    plain = trained(tmp_path / "plain", config, rule, disturb=False)
    disturbed = trained(tmp_path / "disturbed", config, rule, disturb=True)
    for name, values in plain.items():
        assert values.tobytes() == disturbed[name].tobytes(), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [
        replace(CHAIN, ack="Tail", replicas=3),
        CHAIN,
        replace(CHAIN, ack="Tail", consistency="Sync"),
        Settings(replicas=2, copies=2),
        Settings(replicas=2, copies=2, consistency="Sync"),
    ],
    ids=["tail-of-3", "next", "tail-sync", "copies", "copies-sync"],
)
def test_no_covered_push_is_lost_and_none_applied_twice(
    tmp_path: Path, config: Settings, seed: int
) -> None:
    step = random.Random(seed).randrange(12, 40)
    with counting(tmp_path, config) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 3, "3 steps")
        made = [add_replica(cluster, 0, host=1 + n) for n in range(config.replicas - 1)]
        if config.chain:
            joined(cluster, made[-1])
        go_on(cluster)
        lose_at(cluster, made[0], step)
        assert lost_by(cluster) == [0, 0]
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 10)


@pytest.mark.parametrize("mode", ["Async", "Sync"])
def test_what_a_lazy_replica_lacks_is_counted(tmp_path: Path, mode: str) -> None:
    """The last of `every: 100`'s updates are lost, each counted with every worker whose it was.

    An update is one push under `Async`, so at most 100 batches of all workers together. Under
    `Sync` it is one step, of a batch of each: at most 100 of every worker.
    """
    every, steps, workers = 100, 150, 2
    config = replace(CHAIN, ack="None", every_updates=every, replicas=3, consistency=mode)
    with counting(tmp_path, config, "gated_count_long") as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 3, "3 steps")
        made = add_replica(cluster, 0, host=1)
        joined(cluster, add_replica(cluster, 0, host=2))
        go_on(cluster)
        # More updates than may be lost: the replica was told once (Sync) or twice on the way.
        lose_at(cluster, made, 130)
        lost = lost_by(cluster)
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    updates = max(lost) if mode == "Sync" else sum(lost)
    assert 0 < updates <= every
    # What each worker lost are its batches one after the other, up to some batch.
    ends = itertools.product(*(range(count, steps + 1) for count in lost))
    of_0 = rows_of(0)
    lacks = (
        sum(added(w, b - n, b) for w, (b, n) in enumerate(zip(end, lost, strict=True))) * of_0
        for end in ends
    )
    whole = steps * 5 * workers / 60
    assert any(np.array_equal(whole - seen, lack) for lack in lacks), "exactly what was counted"


def rows_of(server: int) -> np.ndarray[Any, Any]:
    """Which rows of the counting job's table a server has; (60,), 1 or 0."""
    block_rows = choose_block_rows(60, 1, 3)
    spec = TableSpec(0, "seen", (60,), block_rows, rule_to_json(Add()))
    slots = np.flatnonzero(np.array(place("uid-of-the-test", 3)) == server)
    return np.bincount(TableLayout("uid-of-the-test", spec, slots).rows, minlength=60)


@cache
def added(worker: int, after: int, until: int) -> np.ndarray[Any, Any]:
    """What a worker's batches after one, up to another, add to each row; (60,)."""
    rows = [batch_indices(60, 5, b, 0, (worker, 2)) for b in range(after + 1, until + 1)]
    return np.bincount(np.concatenate([*rows, np.empty(0, np.int64)]), minlength=60)


def test_a_replica_that_hangs_holds_the_workers_until_it_is_dropped(tmp_path: Path) -> None:
    config = replace(CHAIN, ack="Tail")
    with counting(tmp_path, config) as cluster:
        made = add_replica(cluster, 0, host=1)
        joined(cluster, made)
        os.kill(pid_of(made), signal.SIGSTOP)
        go_on(cluster)

        def doubted() -> int | None:
            found = cluster.report(Role.SERVER, 0).suspects
            steps = [cluster.report(Role.WORKER, w).step for w in (0, 1)]
            return max(steps) if [s.id for s in found] == [made.id] else None

        reached = cluster.until(doubted, "its server says so")
        assert [cluster.report(Role.WORKER, w).state for w in (0, 1)] == ["Training"] * 2
        cluster.tell(raise_epoch=True, replicas=())
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step > reached + 5, "they go on")
        assert lost_by(cluster) == [0, 0]
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 10)


@pytest.mark.parametrize("heard", [True, False])
def test_the_last_of_three_takes_over_when_the_middle_goes_while_it_is_promoted(
    tmp_path: Path, heard: bool
) -> None:
    """`heard`: it serves already; else it goes before it is told, and the seat is empty."""
    config = replace(CHAIN, ack="Tail", replicas=3)
    with counting(tmp_path, config) as cluster:
        first = add_replica(cluster, 0, host=1)
        last = add_replica(cluster, 0, host=2)
        joined(cluster, last)
        go_on(cluster)
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 15, "15 steps")
        process = pid_of(first)
        if not heard:
            os.kill(process, signal.SIGKILL)
        promote(cluster, first, heard=heard)
        if heard:
            os.kill(process, signal.SIGKILL)
        members = tuple(m for m in cluster.membership.members if m is not first)
        # Nobody hears that of the first before it is told of the last.
        cluster.membership = replace(cluster.membership, members=(*members, last), replicas=())
        cluster.tell(raise_epoch=True)
        epoch = cluster.membership.epoch
        cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
        cluster.tell(raise_epoch=True, recovery=None)
        assert lost_by(cluster) == [0, 0]
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 10)
