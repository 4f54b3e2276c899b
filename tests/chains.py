"""Members with replicas, for tests without an operator: who is made, joins, and is promoted."""

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from daruma_trainer.contract import Member, Report, Restore, Role, Settings, Source, SourceKind
from local_cluster import LocalCluster, freshest, local_cluster, stepped

PROGRAMS = str(Path(__file__).parent / "faults" / "worker_programs.py")
CHAIN = Settings(replicas=2, chain=True, ack="Next")


def add_replica(
    cluster: LocalCluster, index: int, host: int, via: Callable[[str], str] = str
) -> Member:
    """Have a replica of a server made in another one's pod.

    `via`: the address at which all others find it, of its own.
    """
    pod = cluster.membership.of(Role.SERVER)[host].pod
    epoch = cluster.membership.epoch + 1
    made = Member(Role.SERVER, index, epoch, pod)
    others = cluster.membership.replicas
    cluster.tell(raise_epoch=True, initialised=True, replicas=(*others, made))

    def address() -> str | None:
        found = cluster.report(Role.SERVER, host).guests
        return next((g.address for g in found if g.id == made.id), None)

    made = replace(made, address=via(cluster.until(address, "the replica has a port")))
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


def promote(cluster: LocalCluster, made: Member, *, heard: bool = True) -> None:
    """Kill a server, and let its replica be the one; not `heard`: so far the seat is empty."""
    gone = cluster.membership.member(Role.SERVER, made.index)
    assert gone is not None
    cluster.kill(gone.id)
    members = tuple(m for m in cluster.membership.members if m is not gone)
    replicas = tuple(m for m in cluster.membership.replicas if m is not made)
    epoch = cluster.membership.epoch + 1
    told = (*members, made) if heard else members
    cluster.tell(raise_epoch=True, members=told, replicas=replicas, recovery=epoch)


def counting(
    folder: Path, config: Settings, name: str = "gated_count"
) -> AbstractContextManager[LocalCluster]:
    """A job whose samples each add one to their row: what was done twice or not at all is seen.

    It makes 5 steps, and the other 55 after `go_on` (`gated_count_long`: 145).
    """
    config = replace(config, store=f"file://{folder}/store")
    program = (PROGRAMS, name, str(folder / "gate"))
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


def pid_of(made: Member) -> int:
    """The process of a guest, by its port."""
    mark = f"DARUMA_LISTEN={made.address}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"{made.id} does not run")
