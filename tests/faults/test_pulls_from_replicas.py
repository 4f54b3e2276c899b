"""Workers that pull from replicas find all of their own pushes, whatever happens to the chain."""

import os
import signal
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chains import (
    CHAIN,
    PROGRAMS,
    add_replica,
    go_on,
    joined,
    lost_by,
    pid_of,
    promote,
)
from daruma_trainer.contract import Member, Role, Settings, WorkersMeanwhile
from local_cluster import LocalCluster, local_cluster, stepped

pytestmark = pytest.mark.faults
ANY = replace(CHAIN, pulls_from_replicas=True, meanwhile=WorkersMeanwhile.WAIT)
MODES = pytest.mark.parametrize(
    "config",
    [
        replace(ANY, ack="Tail"),
        ANY,
        replace(ANY, ack="None"),
        replace(ANY, ack="Tail", consistency="Sync"),
    ],
    ids=["tail", "next", "none", "tail-sync"],
)


def reading(folder: Path, config: Settings) -> AbstractContextManager[LocalCluster]:
    """Workers that fail unless a pull has exactly what they pushed; 5 steps, then 55.

    From the 30th on they are slow until `done`: what is to come is not over before it comes.
    """
    config = replace(config, store=f"file://{folder}/store")
    program = (PROGRAMS, "own", str(folder / "gate"))
    return local_cluster(folder, servers=3, settings=config, program=program)


def answered(made: Member) -> float:
    """Bytes that a member has answered pulls with."""
    with urllib.request.urlopen(f"http://{made.agent}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("daruma_pull_bytes_total"))


def done(cluster: LocalCluster, folder: Path) -> None:
    (folder / "gate.end").touch()
    assert lost_by(cluster) == [0, 0]
    cluster.finish()
    seen = cluster.result(folder / "store")["seen"].ravel()
    np.testing.assert_array_equal(seen, 60)


def step_past(cluster: LocalCluster, more: int) -> None:
    goal = max(cluster.report(Role.WORKER, w).step for w in (0, 1)) + more
    cluster.until(
        lambda: all(cluster.report(Role.WORKER, w).step >= min(goal, 60) for w in (0, 1)),
        f"step {goal}",
    )


@MODES
def test_a_replica_answers_pulls_and_is_promoted(tmp_path: Path, config: Settings) -> None:
    with reading(tmp_path, config) as cluster:
        made = add_replica(cluster, 0, host=1)
        joined(cluster, made)
        go_on(cluster)
        cluster.until(lambda: answered(made), "the replica answers a pull")
        if config.covers:  # else what the head alone had may be lost
            promote(cluster, made)
            epoch = cluster.membership.epoch
            cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
            cluster.tell(raise_epoch=True, recovery=None)
        done(cluster, tmp_path)


@MODES
def test_a_replica_that_is_killed_leaves_its_pulls_to_the_head(
    tmp_path: Path, config: Settings
) -> None:
    with reading(tmp_path, config) as cluster:
        made = add_replica(cluster, 0, host=1)
        joined(cluster, made)
        go_on(cluster)
        cluster.until(lambda: answered(made), "the replica answers a pull")
        os.kill(pid_of(made), signal.SIGKILL)
        cluster.tell(raise_epoch=True, replicas=())
        done(cluster, tmp_path)


def test_a_replica_that_hangs_costs_a_pull_its_deadline(tmp_path: Path) -> None:
    with reading(tmp_path, replace(ANY, ack="None")) as cluster:
        made = add_replica(cluster, 0, host=1)
        joined(cluster, made)
        go_on(cluster)
        cluster.until(lambda: answered(made), "the replica answers a pull")
        os.kill(pid_of(made), signal.SIGSTOP)
        step_past(cluster, 5)
        os.kill(pid_of(made), signal.SIGCONT)
        done(cluster, tmp_path)


def test_a_second_replica_is_read_after_the_first_was_promoted(tmp_path: Path) -> None:
    with reading(tmp_path, replace(ANY, ack="Tail", replicas=3)) as cluster:
        first = add_replica(cluster, 0, host=1)
        last = add_replica(cluster, 0, host=2)
        joined(cluster, last)
        go_on(cluster)
        cluster.until(lambda: answered(first) and not answered(last), "the first answers")
        promote(cluster, first)
        epoch = cluster.membership.epoch
        cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
        cluster.tell(raise_epoch=True, recovery=None)
        cluster.until(lambda: answered(last), "then the last does")
        done(cluster, tmp_path)
