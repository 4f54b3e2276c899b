"""Adoption: a lost server's next incarnation lives in the pod of a server that is there, at once.

Later a pod of its own takes its slots back: the adopted incarnation freezes and hands its shard
over, exact to the last update. That is no loss, but it is brought to its end as a recovery is, and
recorded as one, with the cause HandBack. Pure.
"""

from collections.abc import Collection

from daruma_operator.api.spec import Placement, StrategyName
from daruma_operator.api.status import (
    DeltaNorm,
    Loss,
    MemberStatus,
    Phase,
    Phases,
    RecoveryRecord,
    Rework,
)
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.observe import runs
from daruma_operator.controller.progress import job_step, pushes_of
from daruma_operator.controller.telling import HAND_BACK
from daruma_operator.controller.verdicts import name_of
from daruma_operator.names import pod_name, seat
from daruma_operator.recovery.strategies import PRESETS
from daruma_operator.substrate.protocol import PodFacts, PodState
from daruma_trainer.contract import Guest, Role

AGAIN_SECONDS = 5.0
"""After a pod that was to take slots back, or a replica, ended by itself: others are made then."""

_PORTS = (1 << 16) - 1
"""The agent's is the one above."""


def successor(d: Draft, role: Role, index: int, epoch: int) -> MemberStatus:
    """Return the next incarnation of a seat, in a pod of its own."""
    name = pod_name(d.seen.job.name, role, index, epoch)
    return MemberStatus(role=role, index=index, incarnation=epoch, pod=name)


def adopt(d: Draft, lost: Collection[MemberStatus], epoch: int) -> None:
    """Put the next incarnations of lost servers into the pods of those that live, if any do."""
    hosts = _hosts(d, lost)
    made = []
    for index in [m.index for m in lost if m.role is Role.SERVER and hosts]:
        # The one with the fewest guests; among equals the lowest index.
        pod = min(hosts, key=lambda name: hosts[name])
        guests, host = hosts[pod]
        hosts[pod] = (guests + 1, host)
        made.append(successor(d, Role.SERVER, index, epoch).model_copy(update={"pod": pod}))
        text = f"{seat(Role.SERVER, host)} takes in the slots of {seat(Role.SERVER, index)}"
        d.tell("Adopted", text, member=seat(Role.SERVER, index))
    if made:
        d.replace_members(made)
        d.set_record(placement=Placement.ADOPT.value)


def _hosts(d: Draft, lost: Collection[MemberStatus]) -> dict[str, tuple[int, int]]:
    """Pods of servers that live, with (guests, index)."""
    servers = d.members(Role.SERVER)
    # A host that lost its guest is still there; one that does not answer may seem so.
    lost_pods = {m.pod for m in lost if not m.guest}
    return {
        m.pod: (sum(g.pod == m.pod and g.guest for g in servers), m.index)
        for m in servers
        if not m.guest and m.pod not in lost_pods and runs(d.seen.pod(m.pod)) and m.address
    }


def adopt_instead(d: Draft, waiting: Collection[MemberStatus]) -> bool:
    """Adopt the seats of servers whose pods do not come; False if nobody can take them in."""
    servers = [m for m in waiting if m.role is Role.SERVER and not m.guest]
    if not servers or not _hosts(d, waiting):
        return False
    epoch = d.raise_epoch()
    adopt(d, servers, epoch)
    d.set_record(epoch=epoch, stage_since=d.now, planned_epoch=0)
    return True


def guest_report(d: Draft, member: MemberStatus) -> Guest | None:
    """What a guest's host says of it.

    It is spoken to where its host says that it listens, with the job's token: nowhere but there.
    """
    pod = d.seen.pod(member.pod)
    for host in d.members(Role.SERVER):
        if host.pod == member.pod and not host.guest:
            report = d.seen.report(name_of(host))
            guests = () if report is None else report.guests
            found = next((g for g in guests if g.id == name_of(member)), None)
            here = found is not None and pod is not None and _is_in(found, pod)
            return found if here else None
    return None


def _is_in(guest: Guest, pod: PodFacts) -> bool:
    """Whether a guest's address is a port of its host's."""
    host, _, port = guest.address.rpartition(":")
    its = (pod.address or "").rpartition(":")[0]
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else _PORTS
    return bool(host) and host == its and number < _PORTS


def hands_over(d: Draft) -> bool:
    """Whether servers that are frozen, and live, have all slots that the recovery brings back."""
    live = {
        m.index
        for m in d.status.handing
        if d.seen.reported(name_of(m), "Frozen")
        and (guest := guest_report(d, m)) is not None
        and guest.exit_code is None
    }
    seats = {x.index for x in d.record.losses if x.role is Role.SERVER}
    return bool(seats) and seats <= live


def hand_back(d: Draft) -> None:
    """Make a pod for each adopted server; when it is there, let it take its slots back."""
    guests = {m.index: m for m in d.members(Role.SERVER) if m.guest}
    # Incarnations never go back: one that was announced before its guest is of no use.
    kept = [
        m
        for m in d.status.returning
        if m.index in guests and m.incarnation > guests[m.index].incarnation and not _spent(d, m)
    ]
    if missing := [i for i in guests if i not in {m.index for m in kept}]:
        epoch = d.raise_epoch()
        kept += [successor(d, Role.SERVER, i, epoch) for i in missing]
    if tuple(kept) != d.status.returning:
        d.set(returning=tuple(kept))
    ready = [m for m in kept if _joins(d, m)]
    if ready:
        _begin(d, ready, [guests[m.index] for m in ready])


def _joins(d: Draft, member: MemberStatus) -> bool:
    return runs(d.seen.pod(member.pod)) and d.seen.report(name_of(member)) is not None


def _spent(d: Draft, member: MemberStatus) -> bool:
    """Whether a pod ended, or stays mute, and was made long enough ago to try another."""
    pod = d.seen.pod(member.pod)
    if pod is None or pod.created_at is None:
        return False
    ended = pod.state is PodState.TERMINATED or pod.deleting
    mute = runs(pod) and d.seen.report(name_of(member)) is None
    limit = AGAIN_SECONDS if ended else d.spec.recovery.timeouts.replace_seconds
    return (ended or mute) and d.left(pod.created_at, limit) <= 0


def _begin(d: Draft, ready: list[MemberStatus], guests: list[MemberStatus]) -> None:
    """Freeze the adopted incarnations, and let the new ones take over."""
    epoch = d.raise_epoch()
    owners = []
    for member in ready:
        pod = d.seen.pod(member.pod)
        place = {"address": pod.address, "node": pod.node} if pod else {"address": None}
        owners.append(member.model_copy(update=place))
    d.replace_members(owners)
    back = {m.index for m in ready}
    d.set(
        # Of those that hand over: their successors get replicas of their own.
        replicas=tuple(m for m in d.status.replicas if m.index not in back),
        handing=tuple(guests),
        returning=tuple(m for m in d.status.returning if m not in ready),
    )
    strategy = d.spec.recovery.strategy
    if PRESETS[strategy].rollback:
        # What is handed over is exact: nobody has to go back.
        strategy = StrategyName.FRESHEST
    d.set(
        recovery=RecoveryRecord(
            id=max((r.id for r in d.status.recoveries), default=0) + 1,
            epoch=epoch,
            cause=HAND_BACK,
            role=Role.SERVER,
            indexes=tuple(sorted(m.index for m in ready)),
            strategy=strategy,
            reason="OwnPodReady",
            started_at=d.now,
            stage_since=d.now,
            step=job_step(d),
            phases=Phases(detect=0.0),
            base=pushes_of(d),
            delta_norm=DeltaNorm(),
            rework=Rework(),
            losses=tuple(
                Loss(
                    role=m.role, index=m.index, incarnation=m.incarnation, pod=m.pod, epoch=epoch,
                    at=d.now, reason=HAND_BACK,
                )
                for m in guests
            ),
        )
    )  # fmt: skip
    names = ", ".join(seat(Role.SERVER, m.index) for m in ready)
    d.phase(Phase.RECOVERING, HAND_BACK, f"{names} takes its slots back")
