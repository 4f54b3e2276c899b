"""Links between replicas that part, are slow, and heal, while all processes live."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chains import (
    CHAIN,
    add_replica,
    counting,
    go_on,
    joined,
    lost_by,
    promote,
)
from daruma_trainer.contract import ExitCode, Member, Role
from daruma_trainer.server.serve import HEARTBEAT_SECONDS
from link_proxy import LinkProxy, link_proxy
from local_cluster import DEADLINE, LocalCluster, stepped

pytestmark = pytest.mark.faults
TAIL = replace(CHAIN, ack="Tail")


def steps(cluster: LocalCluster) -> list[int]:
    return [cluster.report(Role.WORKER, w).step for w in (0, 1)]


def made_by(cluster: LocalCluster) -> int:
    """How many batches a worker has made, on the mean: as the head has them."""
    return cluster.report(Role.SERVER, 0).step


def stood(cluster: LocalCluster) -> int:
    """Wait until the head takes no pushes any more, and return how many it took."""
    last, since = made_by(cluster), time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if (now := made_by(cluster)) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 4 * HEARTBEAT_SECONDS

    cluster.until(still, "the workers wait")
    return last


def linked(cluster: LocalCluster, proxy: LinkProxy) -> Member:
    """A replica of server 0 that is up to date, behind the proxy; training goes on."""
    made = add_replica(cluster, 0, host=1, via=proxy.before)
    joined(cluster, made)
    go_on(cluster)
    cluster.until(lambda: min(steps(cluster)) >= 10, "10 steps")
    return made


def doubted(cluster: LocalCluster, made: Member, reason: str) -> None:
    """Wait until the server says why it does not reach its replica."""

    def says() -> bool:
        found = cluster.report(Role.SERVER, 0).suspects
        return [(s.id, s.reason) for s in found] == [(made.id, reason)]

    cluster.until(says, f"{made.id} is {reason}")


def ends_exactly(cluster: LocalCluster, folder: Path) -> None:
    assert lost_by(cluster) == [0, 0]
    cluster.finish()
    seen = cluster.result(folder / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 10)


def goes_on(cluster: LocalCluster) -> None:
    epoch = cluster.membership.epoch
    cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
    cluster.tell(raise_epoch=True, recovery=None)


@pytest.mark.parametrize("reason", ["Unanswered", "Disconnected"])
def test_a_parted_replica_holds_the_workers_and_has_everything_once_it_is_reached(
    tmp_path: Path, reason: str
) -> None:
    """Short of the connection's end, or beyond it: then what was on its way comes late, too."""
    with counting(tmp_path, TAIL) as cluster, link_proxy() as proxy:
        made = linked(cluster, proxy)
        proxy.part()
        doubted(cluster, made, reason)
        held = stood(cluster)
        assert held < 60, "nobody waited, to the end"
        proxy.heal()
        cluster.until(lambda: made_by(cluster) > held, "they go on")
        promote(cluster, made)
        goes_on(cluster)
        ends_exactly(cluster, tmp_path)


def test_a_parted_replica_that_is_dropped_is_not_waited_for_and_not_heard(tmp_path: Path) -> None:
    with counting(tmp_path, TAIL) as cluster, link_proxy() as proxy:
        made = linked(cluster, proxy)
        proxy.part()
        doubted(cluster, made, "Unanswered")
        reached = max(steps(cluster))
        cluster.tell(raise_epoch=True, replicas=())
        cluster.until(lambda: min(steps(cluster)) > reached + 5, "they go on")
        proxy.heal()
        other = add_replica(cluster, 0, host=2)
        joined(cluster, other)
        promote(cluster, other)
        goes_on(cluster)
        ends_exactly(cluster, tmp_path)


def test_nothing_of_a_deposed_head_reaches_its_promoted_replica(tmp_path: Path) -> None:
    """Both live; the head is cut off and stands still, and what it had sent comes afterwards."""
    with counting(tmp_path, TAIL) as cluster, link_proxy() as proxy:
        made = linked(cluster, proxy)
        head = cluster.membership.member(Role.SERVER, 0)
        assert head is not None
        proxy.part(later=False)
        doubted(cluster, made, "Unanswered")
        cluster.kill(head.id, signal.SIGSTOP)
        members = tuple(m for m in cluster.membership.members if m is not head)
        epoch = cluster.membership.epoch + 1
        cluster.tell(raise_epoch=True, members=(*members, made), replicas=(), recovery=epoch)
        goes_on(cluster)
        proxy.heal()
        cluster.kill(head.id, signal.SIGCONT)
        assert cluster.processes[head.id].wait(DEADLINE) == ExitCode.STALE
        ends_exactly(cluster, tmp_path)


def test_workers_go_on_at_a_slow_replicas_pace(tmp_path: Path) -> None:
    with counting(tmp_path, CHAIN) as cluster, link_proxy() as proxy:
        made = linked(cluster, proxy)
        least = 400  # bytes of an update of five rows
        proxy.rate = 4000.0
        # What is said is older than that: until it is all of the slow link.
        reached = made_by(cluster)
        cluster.until(lambda: min(steps(cluster)) >= reached + 3, "the workers wait for it")
        before, since = made_by(cluster), time.monotonic()
        cluster.until(lambda: min(steps(cluster)) >= before + 10, "10 steps more")
        made_since = 2 * (made_by(cluster) - before)
        covered = (time.monotonic() - since) * proxy.rate / least
        # Of each worker some may be uncovered, and what was said last is older.
        assert made_since <= covered + 2 * (CHAIN.max_uncovered + 2)
        proxy.rate = None
        promote(cluster, made)
        goes_on(cluster)
        ends_exactly(cluster, tmp_path)


def test_under_sync_no_step_is_taken_in_before_the_last_but_one_is_covered(tmp_path: Path) -> None:
    with counting(tmp_path, replace(CHAIN, consistency="Sync")) as cluster, link_proxy() as proxy:
        linked(cluster, proxy)
        proxy.part()
        at = stood(cluster)
        # Of each worker one is uncovered that it has taken in, and one it has pushed since.
        assert at <= min(steps(cluster)) + 2
        cluster.tell(raise_epoch=True, replicas=())
        proxy.heal()
        goes_on(cluster)
        ends_exactly(cluster, tmp_path)


def test_nobody_waits_for_a_parted_replica_that_acknowledges_nothing(tmp_path: Path) -> None:
    with counting(tmp_path, replace(CHAIN, ack="None")) as cluster, link_proxy() as proxy:
        linked(cluster, proxy)
        proxy.part()
        ends_exactly(cluster, tmp_path)
