"""A server is away for a while: workers go on, within their limits, and say what it cost them."""

import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from daruma_trainer.contract import Outage, Replay, Role, Settings
from expositions import sample
from local_cluster import LocalCluster, freshest, local_cluster, lose

pytestmark = pytest.mark.faults
PROGRAMS = str(Path(__file__).with_name("worker_programs.py"))
OUTAGE_SECONDS = 5.0


def both(cluster: LocalCluster) -> list[int]:
    return [w.index for w in cluster.membership.of(Role.WORKER)]


def scraped(cluster: LocalCluster, role: Role, index: int) -> str:
    """What a member's metrics are."""
    member = cluster.membership.member(role, index)
    assert member is not None
    with urllib.request.urlopen(f"http://{member.agent}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def ended(cluster: LocalCluster, worker: int, epoch: int) -> Outage | None:
    """What a worker says of an outage that was over in this epoch."""
    outage = cluster.report(Role.WORKER, worker).outage
    return outage if outage is not None and outage.over and outage.epoch >= epoch else None


def test_workers_compute_through_an_outage_and_say_how_far_they_are_off(tmp_path: Path) -> None:
    program = (PROGRAMS, "descend", "15")
    config = Settings(replay=Replay(max_pending=100_000))
    with local_cluster(tmp_path, servers=2, workers=2, settings=config, program=program) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 20, "20 steps")
        assert cluster.report(Role.WORKER, 0).outage is None
        text = scraped(cluster, Role.SERVER, 0)
        updates = sample(text, "daruma_update_seconds_count")
        assert updates >= 20
        # Each update of one worker lies between one pull and push of the other.
        assert 0 < sample(text, "daruma_staleness_steps_sum") < 2 * updates
        lose(cluster, 1)
        end = time.monotonic() + OUTAGE_SECONDS
        cluster.until(lambda: time.monotonic() > end, "the outage", OUTAGE_SECONDS + 60)
        away = [cluster.report(Role.WORKER, w) for w in both(cluster)]
        for report in away:
            assert report.pending > 50
            assert report.gap > 0
            assert report.outage is not None
            # What the others have pending came to each over the server that is left.
            assert report.outage.gap > 1.5 * report.gap
            assert not report.outage.over
        cluster.replace_server(1, freshest(cluster, 1))
        epoch = cluster.membership.epoch
        for w in both(cluster):
            outage = cluster.until(partial(ended, cluster, w, epoch), "a step with all servers")
            assert outage.seconds >= OUTAGE_SECONDS
            # How little that is on a quiet machine `daruma bench availability` says.
            assert 0 < outage.blocked < outage.seconds
        cluster.until(
            lambda: all(cluster.report(Role.WORKER, w).gap == 0 for w in both(cluster)),
            "all has come to the server",
        )
        assert all(cluster.report(Role.WORKER, w).replayed > 50 for w in both(cluster))
        for w in both(cluster):
            text = scraped(cluster, Role.WORKER, w)
            assert sample(text, "daruma_blocked_seconds_total") > 0
            count = partial(sample, text, "daruma_push_latency_seconds_bucket")
            assert count(le="+Inf") - count(le="5.0") >= 1, "the first waited all the time"
            assert count(le="+Inf") - count(le="1.0") > 50, "many were made meanwhile"
            assert count(le="1.0") >= 20, "before it they did not wait"
        # The kill may take what was acknowledged and pulled by nobody, nothing that waited.
        assert all(cluster.report(Role.WORKER, w).lost <= 1 for w in both(cluster))


def test_at_the_largest_gap_a_worker_waits(tmp_path: Path) -> None:
    program = (PROGRAMS, "descend", "5")
    config = Settings(replay=Replay(max_pending=100_000, max_gap=0.2))
    with local_cluster(tmp_path, servers=2, workers=1, settings=config, program=program) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 20, "20 steps")
        lose(cluster, 1)
        cluster.until(lambda: cluster.report(Role.WORKER, 0).gap >= 0.2, "the limit")
        before = cluster.report(Role.WORKER, 0)
        end = time.monotonic() + 1.0
        cluster.until(lambda: time.monotonic() > end, "a second")
        after = cluster.report(Role.WORKER, 0)
        assert (after.pending, after.gap) == (before.pending, before.gap)
        # A step of this program moves the lost half by 0.0128 at most.
        assert after.gap < 0.2 + 0.013
        assert after.outage is not None
        assert after.outage.blocked < after.outage.seconds - 0.5, "the wait is not over yet"
        cluster.replace_server(1, freshest(cluster, 1))
        epoch = cluster.membership.epoch
        outage = cluster.until(partial(ended, cluster, 0, epoch), "a step with all servers")
        assert outage.blocked > 0.9
        assert cluster.report(Role.WORKER, 0).lost <= 1, "what the kill took"
