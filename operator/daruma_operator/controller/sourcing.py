"""Where the slots of the recovery in progress come from, as status and reports say. Pure."""

from math import isfinite

from daruma_operator.api.spec import Ack, ConsistencyMode
from daruma_operator.api.status import MemberStatus, RecoveryRecord, Rework, TrainingJobStatus
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.observe import Heard, Seen, agent_of
from daruma_operator.controller.progress import steps_of
from daruma_operator.controller.telling import HAND_BACK
from daruma_operator.controller.verdicts import name_of
from daruma_operator.recovery.plan import Plan, plan_slots
from daruma_operator.recovery.price import UNKNOWN, Delta, LostShard, bound
from daruma_operator.recovery.rework import estimate, fit
from daruma_operator.recovery.strategies import preset_of
from daruma_trainer.contract import SLOTS, Copies, Restore, Role, SourceKind, member_id, place


def lost_seats(record: RecoveryRecord, role: Role) -> tuple[int, ...]:
    """Indexes of a role that the recovery brings back."""
    return tuple(sorted({x.index for x in record.losses if x.role is role}))


def goes_back(status: TrainingJobStatus) -> bool:
    """Whether the recovery in progress sends everybody back to a cut.

    What its strategy is does not tell: where nothing was lost, nobody goes back.
    """
    return status.recovery is not None and status.rollback.cut is not None


def restoring(status: TrainingJobStatus) -> tuple[MemberStatus, ...]:
    """Servers whose slots the recovery in progress restores, as far as they have an address."""
    if status.recovery is None or goes_back(status):
        return ()
    seats = lost_seats(status.recovery, Role.SERVER)
    return tuple(
        m
        for m in status.members
        if m.role is Role.SERVER and m.index in seats and m.address is not None
    )


def survivors(status: TrainingJobStatus) -> tuple[MemberStatus, ...]:
    """Workers that were not lost in this recovery: they may hold copies."""
    if status.recovery is None:
        return ()
    lost = lost_seats(status.recovery, Role.WORKER)
    return tuple(m for m in status.members if m.role is Role.WORKER and m.index not in lost)


def copies_of(seen: Seen, record: RecoveryRecord, member: MemberStatus) -> tuple[Copies, ...]:
    """Return what a worker said it holds, in this recovery's epoch or later."""
    heard = seen.heard.get(name_of(member))
    return () if heard is None or heard.copies_epoch < record.epoch else heard.report.copies


def plans_of(seen: Seen, status: TrainingJobStatus, *, stored: bool) -> dict[str, Plan]:
    """Plan every server that is restored, from what the survivors say now."""
    record = status.recovery
    if record is None:
        return {}
    owners = place(seen.job.uid, seen.job.spec.servers.replicas)
    copies = {name_of(m): copies_of(seen, record, m) for m in survivors(status)}
    copies |= {name_of(m): copies_of(seen, record, m) for m in restoring(status)}
    # What is handed back comes from who has it; if that fails, it is an ordinary loss.
    back = record.cause == HAND_BACK
    return {
        name_of(m): plan_slots(
            [s for s in range(SLOTS) if owners[s] == m.index],
            frozenset() if back else _kinds(seen, record),
            copies,
            stored=stored and not back,
            predecessor=_predecessor(seen, status, m),
            replica=name_of(m),
        )
        for m in restoring(status)
        if not (m.index in owners and serves(seen, m))
    }


def _kinds(seen: Seen, record: RecoveryRecord) -> frozenset[SourceKind]:
    """Return which sources there are: with `copies` also what a promoted replica has itself."""
    kinds = preset_of(record.strategy).sources
    covers = seen.job.spec.recovery.copies > 1 and SourceKind.PEER in kinds
    return kinds | {SourceKind.REPLICA} if covers else kinds


def serves(seen: Seen, member: MemberStatus) -> bool:
    """Whether a server of this recovery has all: a promoted replica, or one that was restored
    before another loss joined. Nobody offers its slots any more.

    It stays so but for a rollback, in which nothing is planned.
    """
    return seen.reported(name_of(member), "Ready")


def _predecessor(
    seen: Seen, status: TrainingJobStatus, member: MemberStatus
) -> tuple[str, str] | None:
    """Who hands a member its slots over, with its agent, if it can be reached."""
    for old in status.handing:
        if old.index == member.index and (agent := agent_of(seen, old)) is not None:
            return name_of(old), agent
    return None


def restores_of(seen: Seen, status: TrainingJobStatus, *, stored: bool) -> dict[str, Restore]:
    """Return the restore orders that status announces and nobody gave yet, by member."""
    record = status.recovery
    if record is None or record.planned_epoch != status.epoch or record.phases.restore is not None:
        return {}
    if not (untold := frozenset(untold_of(seen, status))):
        return {}
    # What an operator announced and another one hands out need not be the same.
    plans = plans_of(seen, status, stored=stored)
    return {
        name: Restore(record.id, status.epoch, name, plan.sources)
        for name, plan in plans.items()
        if name in untold and not plan.unsourced
    }


def untold_of(seen: Seen, status: TrainingJobStatus) -> list[str]:
    """Return the servers that this operator has yet to give a restore order of this epoch."""
    told = {m for m, planned in seen.planned.items() if planned.epoch == status.epoch}
    return [
        name for m in restoring(status) if (name := name_of(m)) not in told and not serves(seen, m)
    ]


def delta_of(d: Draft, plans: dict[str, Plan]) -> Delta:
    """Bound the perturbation by what was acknowledged since the version that comes back."""
    if d.spec.consistency.mode is ConsistencyMode.SYNC:
        updates = max([d.record.step, *steps_of(d).values()])
    else:
        updates = sum(steps_of(d).values())
    shards = []
    unacknowledged = d.spec.chained and d.spec.recovery.chain.ack is Ack.NONE
    if unacknowledged and len(plans) < len(restoring(d.status)):
        return UNKNOWN  # how many updates the replica lacked, nobody counted
    for member, plan in plans.items():
        last = _last_words(d, int(member.split("-")[1]))
        if plan.handed or plan.nothing:
            continue
        if last is None:
            return UNKNOWN
        report, norm = last.report, last.report.update_norm
        if plan.exact_peers and plan.oldest is not None:
            shards.append(LostShard(max(0, updates - plan.oldest.position), norm))
        elif report.running is None:
            return UNKNOWN
        else:
            per_step = d.spec.workers.replicas
            if d.spec.consistency.mode is ConsistencyMode.SYNC:
                per_step = 1
            since = max(0, updates - report.running.step * per_step)
            shards.append(LostShard(since, norm, report.running.distance))
    back = (d.seen.report(n) for m in restoring(d.status) if (n := name_of(m)) not in plans)
    if any(server is not None and server.follows is None for server in back):
        # They were restored before another loss joined, and priced then.
        before = d.record.delta_norm.value
        shards.append(LostShard(0 if before is not None else None, None, before))
    return bound(shards)


def rework_of(d: Draft, delta: Delta) -> Rework:
    """Estimate what the perturbation costs, beside what a full checkpoint would have redone."""
    moves = []
    for index in range(d.spec.servers.replicas):
        lost = _last_words(d, index)
        live = next((m for m in d.members(Role.SERVER) if m.index == index), None)
        report = lost.report if lost else d.seen.report(name_of(live)) if live else None
        if report is not None:
            moves.append(report.moves)
    decay = fit(moves, d.spec.servers.replicas, d.record.step)
    # Nothing is lost when adopted slots return.
    every = d.spec.checkpoint.every if d.record.cause != HAND_BACK else 0
    return d.record.rework.model_copy(
        update={
            "estimated": estimate(delta, decay),
            "counterfactual_steps": d.record.step % every if every else None,
        }
    )


def meanwhile_of(d: Draft) -> dict[str, float]:
    """What the workers say that the time without a server was to them."""
    reports = [d.seen.report(name_of(m)) for m in survivors(d.status)]
    outages = [r.outage for r in reports if r is not None and r.outage is not None]
    # One that ended before this recovery began is another one's.
    outages = [o for o in outages if o.epoch >= d.record.losses[0].epoch]
    used = [1 - min(1.0, o.blocked / o.seconds) for o in outages if o.seconds > 0]
    gaps = [o.gap for o in outages if isfinite(o.gap)]
    found = {}
    if d.record.role is Role.SERVER and used:
        found["utilisation"] = round(min(used), 4)
    if d.record.role is Role.SERVER and len(gaps) == len(outages) > 0:
        found["gap"] = float(f"{max(gaps):.6g}")
    return found


def _last_words(d: Draft, index: int) -> Heard | None:
    """What the newest lost incarnation of a server said last."""
    for loss in reversed(d.record.losses):
        if loss.role is Role.SERVER and loss.index == index:
            heard = d.seen.heard.get(member_id(loss.role, loss.index, loss.incarnation))
            if heard is not None:
                return heard
    return None
