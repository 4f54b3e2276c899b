"""Chains of replicas, and copies: real processes, one membership, no operator."""

import contextlib
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softmax
from daruma_trainer.contract import Member, Report, Restore, Role, Settings, Source, SourceKind
from local_cluster import LocalCluster, freshest, local_cluster

pytestmark = pytest.mark.faults
PROGRAMS = str(Path(__file__).with_name("worker_programs.py"))
CHAIN = Settings(replicas=2, chain=True, ack="Next")


def program(steps: int, rule: str) -> tuple[str, ...]:
    rate = "0.01" if rule == "adam" else "0.1"
    return (softmax.__file__, str(steps), "digits", rate, "10", rule)


def add_replica(cluster: LocalCluster, index: int, host: int) -> Member:
    """Have a replica of a server made in another one's pod."""
    pod = cluster.membership.of(Role.SERVER)[host].pod
    epoch = cluster.membership.epoch + 1
    made = Member(Role.SERVER, index, epoch, pod)
    others = cluster.membership.replicas
    cluster.tell(raise_epoch=True, initialised=True, replicas=(*others, made))

    def address() -> str | None:
        found = cluster.report(Role.SERVER, host).guests
        return next((g.address for g in found if g.id == made.id), None)

    made = replace(made, address=cluster.until(address, "the replica has a port"))
    cluster.until(lambda: cluster.call(made, "GET", "/healthz"), "the replica runs")
    cluster.tell(raise_epoch=True, replicas=(*others, made))
    return made


def said(cluster: LocalCluster, member: Member) -> Report:
    view = cluster.view(member)
    return Report("", 0, "Away") if view is None else view.own


def joined(cluster: LocalCluster, made: Member) -> None:
    before = cluster.membership.chain(made.index)
    previous = before[before.index(made) - 1].id
    cluster.until(lambda: said(cluster, made).follows == previous, f"{made.id} joins")


def stepped(cluster: LocalCluster, epoch: int) -> bool:
    """Whether worker 0 made a step in this epoch, or has none left to make."""
    report = cluster.report(Role.WORKER, 0)
    return report.acked_epoch >= epoch or report.state == "Left"


def promote(cluster: LocalCluster, made: Member) -> None:
    """Kill a server, and let its replica be the one."""
    gone = cluster.membership.member(Role.SERVER, made.index)
    assert gone is not None
    cluster.kill(gone.id)
    members = tuple(m for m in cluster.membership.members if m is not gone)
    replicas = tuple(m for m in cluster.membership.replicas if m is not made)
    epoch = cluster.membership.epoch + 1
    cluster.tell(raise_epoch=True, members=(*members, made), replicas=replicas, recovery=epoch)


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


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_sync_with_a_promoted_replica_ends_bit_for_bit_like_without(
    tmp_path: Path, rule: str
) -> None:
    config = replace(CHAIN, consistency="Sync")
    plain = trained(tmp_path / "plain", config, rule, disturb=False)
    disturbed = trained(tmp_path / "disturbed", config, rule, disturb=True)
    for name, values in plain.items():
        assert values.tobytes() == disturbed[name].tobytes(), name


def counting(folder: Path, config: Settings) -> Any:
    """A job whose samples each add one to their row: what was done twice or not at all is seen.

    It makes 5 steps, and the other 55 after `go_on`.
    """
    config = replace(config, store=f"file://{folder}/store")
    program = (PROGRAMS, "gated_count", str(folder / "gate"))
    return local_cluster(folder, servers=3, settings=config, program=program)


def go_on(cluster: LocalCluster) -> None:
    (cluster.folder / "gate").touch()


def lost_by(cluster: LocalCluster) -> list[int]:
    """Of each worker how many of its pushes were lost, once it is done."""
    workers = cluster.membership.of(Role.WORKER)

    def left() -> list[Report] | None:
        reports = [cluster.report(Role.WORKER, w.index) for w in workers]
        return reports if all(r.state == "Left" for r in reports) else None

    return [report.lost for report in cluster.until(left, "all workers leave")]


def lose_at(cluster: LocalCluster, made: Member, step: int) -> None:
    """Lose a server at a step, and bring its slots back from its replica and what is fresher."""
    cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= step, f"step {step}")
    promote(cluster, made)
    epoch = cluster.membership.epoch
    workers = cluster.membership.of(Role.WORKER)

    def stands() -> bool:
        found = cluster.report(Role.SERVER, made.index)
        heard = all(cluster.report(Role.WORKER, w.index).epoch >= epoch for w in workers)
        return heard and found.epoch >= epoch and found.state in ("Ready", "Restoring")

    cluster.until(stands, "the replica says what it has")
    found = cluster.report(Role.SERVER, made.index)
    if found.state != "Ready":
        sources = freshest(cluster, made.index)
        sources += [Source(SourceKind.REPLICA, c.slots, made.id) for c in found.copies]
        plan = Restore(epoch, epoch, made.id, tuple(sources))
        body = json.dumps(plan.to_json()).encode()
        assert cluster.call(made, "POST", "/v1/restore", body) == 204
    cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
    cluster.tell(raise_epoch=True, recovery=None)


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


def test_what_a_lazy_replica_lacks_is_counted(tmp_path: Path) -> None:
    config = replace(CHAIN, ack="None", every_updates=100)
    with counting(tmp_path, config) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 3, "3 steps")
        made = add_replica(cluster, 0, host=1)
        joined(cluster, made)
        go_on(cluster)
        lose_at(cluster, made, 17)
        lost = sum(lost_by(cluster))
        cluster.finish()
        seen = cluster.result(tmp_path / "store")["seen"].ravel()
    missing = 600 - int(seen.sum())
    assert seen.max() <= 10
    assert 0 < missing <= 5 * lost, "what is missing was counted"
    assert lost <= 100 + 4, "and is no more than it was behind, and what was under way"


def pid_of(made: Member) -> int:
    """The process of a guest, by its port."""
    mark = f"DARUMA_LISTEN={made.address}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"{made.id} does not run")


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


def test_the_last_of_three_takes_over_when_the_middle_goes_while_it_is_promoted(
    tmp_path: Path,
) -> None:
    config = replace(CHAIN, ack="Tail", replicas=3)
    with counting(tmp_path, config) as cluster:
        first = add_replica(cluster, 0, host=1)
        last = add_replica(cluster, 0, host=2)
        joined(cluster, last)
        go_on(cluster)
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 15, "15 steps")
        promote(cluster, first)
        os.kill(pid_of(first), signal.SIGKILL)
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
