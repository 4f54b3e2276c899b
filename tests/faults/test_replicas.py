"""Chains of replicas, and copies: real processes, one membership, no operator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softmax
from daruma_trainer.contract import Member, Report, Role, Settings
from local_cluster import LocalCluster, local_cluster

pytestmark = pytest.mark.faults
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
            cluster.until(
                lambda: cluster.report(Role.WORKER, 0).acked_epoch >= epoch, "a step afterwards"
            )
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
