"""Replicas: made in the pods of the next servers, dropped when lost, promoted when needed. Pure.

A replica is a guest of another server's pod that is no member yet. Its incarnation is above its
server's, so that what it serves once it is promoted is newer than all that came before; a server
that was made anew gets new replicas.
"""

from collections.abc import Collection

from daruma_operator.api.status import MemberStatus
from daruma_operator.controller.adopting import AGAIN_SECONDS, guest_report, successor
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.observe import runs
from daruma_operator.controller.verdicts import Verdict, described, losses, name_of
from daruma_operator.names import seat
from daruma_trainer.contract import Role

PARTED = "Parted"
"""Why a replica is dropped that only the one before it cannot reach."""
PROMOTE = "Promote"
"""status.recoveries[].placement where every lost server lives on in its replica."""


def chain_of(d: Draft, index: int) -> list[MemberStatus]:
    """A server and its replicas, in the order in which updates go."""
    heads = [m for m in d.members(Role.SERVER) if m.index == index]
    after = [m for m in d.status.replicas if m.index == index]
    return heads + sorted(after, key=lambda m: m.incarnation)


def keep_up(d: Draft) -> None:
    """Drop replicas that are lost or of a server's past; write down where new ones listen."""
    kept, timeouts = d.status.replicas, d.spec.recovery.timeouts
    if not kept:
        return
    lost = losses(d.seen, kept, timeouts, frozenset())
    known = {name_of(v.member) for v in lost}
    parted = [m for m in kept if name_of(m) not in known and _is_parted(d, m)]
    lost += tuple(Verdict(m, PARTED, False, None, None) for m in parted)
    gone = {name_of(v.member) for v in lost}
    for verdict in lost:
        member = verdict.member
        if runs(d.seen.pod(member.pod)):
            d.set(replica_ended_at=d.now)
            its = seat(member.role, member.index)
            text = f"{described(member)} was lost ({verdict.reason}); {its} gets another replica"
            d.tell("ReplicaLost", text, warning=True, member=its)
    heads = {m.index: m.incarnation for m in d.members(Role.SERVER)}
    kept = tuple(
        m for m in kept if name_of(m) not in gone and m.incarnation > heads.get(m.index, 0)
    )
    found = {name_of(m): guest_report(d, m) for m in kept if m.address is None}
    # All at once, for one epoch; but not for a host that does not answer anyway.
    hosts = {m.pod: name_of(m) for m in d.members(Role.SERVER) if not m.guest}
    awaited = {hosts.get(m.pod) for m in kept if m.address is None and not found[name_of(m)]}
    if not awaited & d.seen.reached:
        kept = tuple(
            m.model_copy(update={"address": guest.address, "node": _node(d, m.pod)}) if guest else m
            for m in kept
            for guest in [found.get(name_of(m))]
        )
    if kept != d.status.replicas:
        d.set(replicas=kept)
        d.raise_epoch()


def _is_parted(d: Draft, member: MemberStatus) -> bool:
    """Whether the one before a replica lost its connection to it detectSeconds ago.

    Workers wait for it, however well the operator reaches both. For one that never was connected
    nobody waits; and where workers do not reach the one before it either, it may soon be needed.
    """
    chain = chain_of(d, member.index)
    before = name_of(chain[chain.index(member) - 1])
    limit = d.spec.recovery.timeouts.detect_seconds
    workers = [name_of(m) for m in d.members(Role.WORKER)]
    return (
        before in d.seen.reached
        and _disconnected(d, before, name_of(member)) >= limit
        and not any(_disconnected(d, worker, name_of(chain[0])) for worker in workers)
    )


def _disconnected(d: Draft, member: str, other: str) -> float:
    """Seconds since a member lost its connection to another one; 0 if it did not."""
    heard = d.seen.heard.get(member)
    suspects = () if heard is None else heard.report.suspects
    ages = [s.age for s in suspects if s.id == other and s.reason == "Disconnected"]
    return 0.0 if heard is None or not ages else heard.age + max(ages)


def unheard(d: Draft, index: int) -> bool:
    """Whether this operator may just not have heard a replica of this seat yet.

    It began a moment ago: whom to promote, if anybody, it does not know.
    """
    began = d.seen.began
    return (
        any(
            m.address is not None and runs(d.seen.pod(m.pod)) and d.seen.report(name_of(m)) is None
            for m in d.status.replicas
            if m.index == index
        )
        and began is not None
        and d.left(began, d.policy.copies_seconds) > 0
    )


def promote(d: Draft, lost: Collection[MemberStatus]) -> list[MemberStatus]:
    """Let replicas of lost servers be the ones, where there are any; returns who was not helped."""
    helped = []
    down = {m.pod for m in lost if not m.guest}
    for member in [m for m in lost if m.role is Role.SERVER]:
        chosen = _candidate(d, member, down)
        if chosen is None:
            continue
        helped.append(member)
        d.replace_members([chosen])
        d.set(replicas=tuple(m for m in d.status.replicas if m != chosen))
        text = f"{seat(Role.SERVER, member.index)} lives on in its replica in the pod {chosen.pod}"
        d.tell("Promoted", text, member=seat(Role.SERVER, member.index))
    if helped and len(helped) == sum(m.role is Role.SERVER for m in lost):
        d.set_record(placement=PROMOTE)
    return [m for m in lost if m not in helped]


def promoted(d: Draft, index: int) -> bool:
    """Whether a seat's present incarnation was its replica, and serves what it had."""
    member = next(m for m in d.members(Role.SERVER) if m.index == index)
    report = d.seen.report(name_of(member))
    return report is not None and report.follows is not None


def _candidate(d: Draft, lost: MemberStatus, down: Collection[str]) -> MemberStatus | None:
    """The first replica that is there; under Chain, that was counted on.

    `down`: pods that are lost, too, whatever their containers say so far.
    """
    for member in chain_of(d, lost.index):
        report = d.seen.report(name_of(member))
        alive = member.pod not in down and runs(d.seen.pod(member.pod))
        there = member.address is not None and alive
        if member.incarnation <= lost.incarnation or report is None or not there:
            continue
        if report.follows is not None or not d.spec.chained:
            return member
    return None


def _node(d: Draft, name: str) -> str | None:
    pod = d.seen.pod(name)
    return None if pod is None else pod.node


def replicate(d: Draft) -> None:
    """Announce the replicas that are missing."""
    wanted, ended = d.spec.replicas, d.status.replica_ended_at
    short = [m for m in d.members(Role.SERVER) if len(chain_of(d, m.index)) < wanted]
    if wanted < 2 or not short or (ended is not None and d.left(ended, AGAIN_SECONDS) > 0):
        return
    # One that was promoted gets replicas in its own pod, if that comes soon.
    moving = any(m.guest for m in short) and d.left(d.status.phase_since, AGAIN_SECONDS) > 0
    seats = [m.index for m in short if not (moving and m.guest)]
    # Two of one seat must not have one incarnation: an epoch for each place in the chain.
    for _ in range(1, wanted):
        places = [(i, host) for i in seats if (host := _host(d, i)) is not None]
        places = [(i, host) for i, host in places if len(chain_of(d, i)) < wanted]
        if not places:
            return
        epoch = d.raise_epoch()
        d.set(
            replicas=(
                *d.status.replicas,
                *(
                    successor(d, Role.SERVER, i, epoch).model_copy(update={"pod": host})
                    for i, host in places
                ),
            )
        )


def _host(d: Draft, index: int) -> str | None:
    """The pod of the next server that has nothing of this one's chain; on another node first."""
    used = {m.pod for m in chain_of(d, index)}
    nodes = {_node(d, name) for name in used}
    servers = [m for m in d.members(Role.SERVER) if not m.guest and m.address is not None]
    after = sorted(servers, key=lambda m: (m.index <= index, m.index))
    free = [m.pod for m in after if m.pod not in used and runs(d.seen.pod(m.pod))]
    apart = [name for name in free if _node(d, name) is None or _node(d, name) not in nodes]
    return next(iter([*apart, *free]), None)


def show_replicas(d: Draft) -> None:
    """Say whether every shard has the replicas that were asked for, up to date."""
    wanted = d.spec.replicas
    if wanted < 2:
        return
    whole, together = 0, []
    for member in d.members(Role.SERVER):
        chain = chain_of(d, member.index)
        reports = [d.seen.report(name_of(m)) for m in chain[1:]]
        joined = [r for r in reports if r and (r.follows is not None or not d.spec.chained)]
        whole += len(joined) >= wanted - 1
        nodes = [node for m in chain if (node := _node(d, m.pod)) is not None]
        if len(set(nodes)) < len(nodes):
            together.append(seat(Role.SERVER, member.index))
    total = d.spec.servers.replicas
    message, reason = f"{whole} of {total} shards have all their replicas", "AllReplicas"
    if whole < total:
        reason = "ReplicasMissing"
    elif together:
        reason = "SameNode"
        message += f"; one node's loss takes more than one of {', '.join(together)}"
    d.condition("Replicated", true=whole == total, reason=reason, message=message)
