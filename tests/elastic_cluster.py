"""A local cluster whose workers come and go, and the marks that their batches leave."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from daruma_trainer.contract import Report, Role
from local_cluster import LocalCluster

PROGRAMS = str(Path(__file__).with_name("faults") / "elastic_programs.py")


def fence(cluster: LocalCluster, index: int) -> None:
    """Kill a worker, and tell everybody at once: it is lost, and nobody has its seat yet."""
    gone = cluster.membership.member(Role.WORKER, index)
    assert gone is not None
    cluster.kill(gone.id)
    epoch = cluster.membership.epoch + 1
    vacant = replace(gone, incarnation=epoch, pod=f"job-worker-{index}-{epoch}", address=None)
    members = tuple(vacant if m is gone else m for m in cluster.membership.members)
    cluster.processes[vacant.id] = cluster.processes[gone.id]
    cluster.tell(raise_epoch=True, members=members, initialised=True)


def take_seat(cluster: LocalCluster, index: int) -> None:
    """Start the replacement that the membership announced."""
    vacant = cluster.membership.member(Role.WORKER, index)
    assert vacant is not None
    cluster.start(Role.WORKER, index, vacant.incarnation)
    cluster.tell(raise_epoch=True)


def last_words(cluster: LocalCluster) -> Mapping[str, Report]:
    """The newest report of every worker that ever was."""
    found: dict[str, Report] = {}
    for server in cluster.membership.of(Role.SERVER):
        view = cluster.view(server)
        for member, (_, report) in (view.others if view else {}).items():
            if member.startswith("worker-") and report.step >= found.get(member, report).step:
                found[member] = report
    return found


def wait_for(cluster: LocalCluster, worker: int, step: int) -> None:
    cluster.until(lambda: cluster.report(Role.WORKER, worker).step >= step, f"step {step}")


def check_marks(cluster: LocalCluster, store: Path, steps: int) -> int:
    """See that each batch is applied once or counted; returns how many were not applied."""
    marks = cluster.result(store)["marks"]
    assert set(np.unique(marks)) <= {0.0, 1.0}, "a batch was applied twice"
    missing = int((marks.min(axis=0) == 0).sum())
    words = last_words(cluster).values()
    counted = sum(report.lost + report.skipped for report in words)
    assert missing == counted, (missing, {r.id: (r.lost, r.skipped) for r in words})
    assert marks.shape[1] == cluster.membership.workers * steps
    return missing
