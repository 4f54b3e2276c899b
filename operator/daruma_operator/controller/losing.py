"""What a loss leads to: new incarnations in a new epoch, a recovery, or the job's end. Pure."""

from collections.abc import Sequence
from datetime import timedelta

from daruma_operator.api.spec import Placement
from daruma_operator.api.status import (
    CheckpointStatus,
    DeltaNorm,
    Loss,
    MemberStatus,
    Phase,
    Phases,
    Pushes,
    RecoveryRecord,
    Rework,
    RollbackStatus,
)
from daruma_operator.controller.adopting import adopt, successor
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import fail
from daruma_operator.controller.failures import MAX_COUNTED, count, over_limit, sentence
from daruma_operator.controller.membership import ladder_of
from daruma_operator.controller.observe import runs
from daruma_operator.controller.progress import gone_of, job_step, pushes_of
from daruma_operator.controller.replicating import promote, promoted
from daruma_operator.controller.sourcing import goes_back
from daruma_operator.controller.telling import CUT_NOT_LOADED, HAND_BACK, lost, started
from daruma_operator.controller.verdicts import PROCESS_ENDED, Verdict, name_of
from daruma_operator.names import seat
from daruma_operator.recovery.ladder import Means, Rung, find_rung
from daruma_operator.recovery.price import remember
from daruma_operator.recovery.strategies import PRESETS
from daruma_trainer.contract import SLOTS, Role, SavedState, SourceKind, place

ROLLED_BACK = "RolledBackToCut"
ROLLED_FURTHER = "RolledBackToOlderCut"
"""The newest cut was damaged: all went back to one before it."""


def lose(d: Draft, verdicts: Sequence[Verdict]) -> None:
    """Replace lost members, and begin a recovery or join the one in progress."""
    count(d, verdicts)
    if over_limit(d, verdicts):
        return
    before = d.status
    epoch = d.raise_epoch()
    gone = [v.member for v in verdicts]
    _remember(d, gone)
    if before.recovery is not None and before.recovery.planned_epoch:
        # Its successor may have served already: the frozen shard may be older than what it saved.
        # Under Chain there may be nothing else; and one that never was Ready has served nobody.
        seats = {
            m.index
            for m in gone
            if m.role is Role.SERVER
            and not (d.spec.chained and not d.seen.reported(name_of(m), "Ready"))
        }
        d.set(handing=tuple(h for h in d.status.handing if h.index not in seats))
    # How a process ended is told when its pod says so, or when the recovery is over.
    d.events += [
        lost(_loss(d, v, epoch), sentence(v)) for v in verdicts if v.reason != PROCESS_ENDED
    ]
    # Those that are to be adopted get their hosts below: who can be one follows from who is left.
    d.replace_members(successor(d, m.role, m.index, epoch) for m in gone)
    alone = not any(runs(d.seen.pod(m.pod)) for m in d.status.members)
    if not before.initialised:
        d.phase(Phase.PENDING, "MembersReplaced", f"{_names(verdicts)} ended before training began")
        d.set(phase_since=d.now)
        return
    if before.recovery is None:
        _begin(d, verdicts, epoch)
    else:
        _join(d, verdicts, epoch)
    # What was too large for its own pod is too large for another's, beside what that holds.
    large = any(v.reason == "OOMKilled" for v in verdicts)
    gone = promote(d, gone)
    if d.spec.recovery.placement is Placement.ADOPT and not large:
        adopt(d, gone, epoch)
    if any(v.member.role is Role.SERVER for v in verdicts):
        climb(d, d.record.rung, "a server was lost")
        if d.status.recovery is None:
            return  # nothing can bring it back: the job failed, or begins again
    if alone:
        d.set_record(cause="AllPodsLost")
        d.phase(Phase.PENDING, "AllPodsLost", "no pod is left; all are made anew and restored")
    else:
        d.phase(Phase.RECOVERING, d.record.cause, f"{_names(verdicts)} lost; {d.record.strategy}")


def _begin(d: Draft, verdicts: Sequence[Verdict], epoch: int) -> None:
    roles = {v.member.role for v in verdicts}
    role = Role.SERVER if Role.SERVER in roles else Role.WORKER
    ages = [v.age for v in verdicts if v.age is not None]
    age = max(ages, default=0.0)
    number = max((r.id for r in d.status.recoveries), default=0) + 1
    d.set(
        recovery=RecoveryRecord(
            id=number,
            epoch=epoch,
            cause=f"{role.value}Lost",
            role=role,
            indexes=_indexes(verdicts, role),
            strategy=d.spec.recovery.strategy,
            reason="WaitingForReplacement",
            started_at=d.now - timedelta(seconds=age),
            estimated=not ages,
            stage_since=d.now,
            step=job_step(d),
            phases=Phases(detect=age),
            base=_base(d),
            losses=tuple(_loss(d, v, epoch) for v in verdicts),
        )
    )
    d.events.append(started(d.record.losses))


def _base(d: Draft) -> Pushes:
    """Return what is counted with the records before: records add up to what the job counts.

    What was counted since the last pass is of this loss.
    """
    was = d.seen.job.status
    if was.phase is None:
        return pushes_of(d)
    return was.pushes if was.recoveries else Pushes()


def _remember(d: Draft, lost: Sequence[MemberStatus]) -> None:
    """Keep what lost workers counted: their replacements begin at zero."""
    for member in lost:
        report = d.seen.report(name_of(member))
        if member.role is Role.WORKER and report is not None:
            gone = remember(gone_of(d), str(member.index), report)
            d.set(gone=gone.pushes, gone_lost=gone.lost, gone_skipped=gone.skipped)


def _join(d: Draft, verdicts: Sequence[Verdict], epoch: int) -> None:
    """A loss during a recovery joins it; the plan is made anew."""
    record = d.record
    servers = any(v.member.role is Role.SERVER for v in verdicts)
    role = Role.SERVER if servers else record.role or Role.WORKER
    seats = {*record.indexes} if role is record.role else set()
    seats |= {*_indexes(verdicts, role)}
    d.set_record(
        epoch=epoch,
        role=role,
        cause=_joined_cause(record, role, servers=servers),
        indexes=tuple(sorted(seats)),
        stage_since=d.now,
        phases=Phases(detect=record.phases.detect),
        losses=(*record.losses, *(_loss(d, v, epoch) for v in verdicts))[-MAX_COUNTED:],
    )


def _joined_cause(record: RecoveryRecord, role: Role, *, servers: bool) -> str:
    if record.cause == "AllPodsLost" or (record.cause == HAND_BACK and not servers):
        return record.cause
    return f"{role.value}Lost"


def climb(d: Draft, start: int, why: str) -> None:
    """Take the first rung from `start` on that can work; none: initial values, or the end."""
    there = means(d)
    found = find_rung(ladder_of(d.spec), start, there)
    if isinstance(found, str):
        exhausted(d, why, found)
        return
    record = d.record
    if found.number != record.rung:
        text = "; ".join([why, *found.skipped])
        d.tell("RecoveryEscalated", f"{record.strategy} → {found.strategy}: {text}", warning=True)
    _take(d, found, nothing=there.nothing)


def _take(d: Draft, rung: Rung, *, nothing: bool) -> None:
    """Go on by a rung; `nothing`: nothing was lost, so nobody has to go back."""
    moved = rung.number != d.record.rung
    rollback = PRESETS[rung.strategy].rollback
    leaves_cuts = goes_back(d.status) and not rollback
    d.set_record(rung=rung.number, strategy=rung.strategy, planned_epoch=0)
    if moved:
        # The membership may change with the rung, and plans of the old one must not be taken.
        d.raise_epoch()
        d.set_record(stage_since=d.now)
    if leaves_cuts:
        _leave_cuts(d)
    if rollback and not nothing:
        redone = _roll_back(d)
        further = d.record.reason == ROLLED_FURTHER
        d.set_record(
            reason=ROLLED_FURTHER if further else ROLLED_BACK,
            rework=Rework(redone_steps=redone, counterfactual_steps=redone),
            delta_norm=DeltaNorm(value=None, kind="Unknown"),
        )


def _roll_back(d: Draft) -> int:
    """Send everybody to the newest cut that is known; returns how many steps are done again."""
    checkpoint, before = d.status.checkpoint or CheckpointStatus(), d.status.rollback
    d.set(rollback=RollbackStatus(generation=before.generation + 1, cut=checkpoint.cut))
    if d.status.progress is not None:
        d.set(progress=d.status.progress.model_copy(update={"step": checkpoint.step}))
    return max(0, d.record.step - checkpoint.step)


def roll_further(d: Draft, older: SavedState) -> None:
    """The cut that everybody goes back to is damaged: go back to one before it instead."""
    d.set(checkpoint=CheckpointStatus(cut=older.path, step=older.step, bytes=older.bytes))
    d.raise_epoch()
    # The same rung, whose deadline goes on: a job may have many cuts.
    redone = _roll_back(d)
    rework = d.record.rework.model_copy(update={"redone_steps": redone})
    d.set_record(reason=ROLLED_FURTHER, rework=rework)


def _leave_cuts(d: Draft) -> None:
    """No cut could be loaded by all: some servers are at it, others have nothing to go on with.

    All of them are made anew, and restored from what the next rung takes, in a generation without
    a cut.
    """
    epoch, servers = d.status.epoch, d.members(Role.SERVER)
    gone = [Verdict(m, CUT_NOT_LOADED, False, None, None) for m in servers]
    d.replace_members(successor(d, m.role, m.index, epoch) for m in servers)
    d.set(
        handing=(),
        returning=(),
        rollback=RollbackStatus(generation=d.status.rollback.generation + 1),
    )
    d.set_record(
        epoch=epoch,
        reason="WaitingForReplacement",
        rework=Rework(),
        phases=Phases(detect=d.record.phases.detect),
        losses=(*d.record.losses, *(_loss(d, v, epoch) for v in gone))[-MAX_COUNTED:],
    )


def means(d: Draft) -> Means:
    """Return what there is to recover from."""
    lost = {(x.role, x.index) for x in d.record.losses}
    peers = any(
        m.role is Role.WORKER and (m.role, m.index) not in lost and runs(d.seen.pod(m.pod))
        for m in d.status.members
    )
    checkpoint = d.status.checkpoint
    cut = checkpoint is not None and checkpoint.cut is not None
    seats = {x.index for x in d.record.losses if x.role is Role.SERVER}
    replicas = bool(seats) and all(promoted(d, index) for index in seats)
    frozen = {m.index for m in d.status.handing if d.seen.reported(name_of(m), "Frozen")}
    predecessors = bool(seats) and seats <= frozen
    owners = set(place(d.seen.job.uid, d.spec.servers.replicas))
    nothing = bool(seats) and not seats & owners
    return Means(d.policy.store is not None, cut, peers, replicas, predecessors, nothing)


def exhausted(d: Draft, why: str, reasons: str) -> None:
    """No rung is left."""
    d.condition("StateLost", true=True, reason="NoSource", message=f"{why}; {reasons}"[:1024])
    d.tell("StateLost", f"{why}; {reasons}", warning=True)
    if not d.spec.recovery.allow_reset:
        fail(
            d,
            "StateLost",
            f"{why}, and nothing can bring the lost parameters back ({reasons}). {_advice(d)}",
        )
        return
    d.close("Reset", {SourceKind.INITIAL.value: SLOTS})
    epoch = d.raise_epoch()
    d.replace_members(successor(d, m.role, m.index, epoch) for m in d.status.members)
    restarts = d.status.restarts
    d.set(
        initialised=False,
        handing=(),
        returning=(),
        rollback=RollbackStatus(),
        progress=None,
        restarts=restarts.model_copy(update={"jobs": restarts.jobs + 1}),
        workers=d.status.workers.model_copy(update={"succeeded": 0, "succeeded_indexes": ""}),
    )
    d.phase(Phase.PENDING, "StateLost", "the job begins again from initial values (allowReset)")


def _advice(d: Draft) -> str:
    """Say what would have brought them back."""
    ways = []
    if d.policy.store is None:
        ways.append("give the job a checkpoint.store")
    sources = {source for name in ladder_of(d.spec) for source in PRESETS[name].sources}
    if SourceKind.PEER not in sources:
        ways.append("add Stateless to recovery.fallback, which takes what workers pulled last")
    if d.spec.replicas == 1:
        ways.append("keep replicas (strategy: Chain, or recovery.copies)")
    ways.append("set recovery.allowReset to begin again from initial values")
    return f"For the next time: {', or '.join(ways)}"


def _loss(d: Draft, v: Verdict, epoch: int) -> Loss:
    m = v.member
    return Loss(
        role=m.role, index=m.index, incarnation=m.incarnation, pod=m.pod, epoch=epoch, at=d.now,
        reason=v.reason,
    )  # fmt: skip


def _indexes(verdicts: Sequence[Verdict], role: Role) -> tuple[int, ...]:
    return tuple(sorted({v.member.index for v in verdicts if v.member.role is role}))


def _names(verdicts: Sequence[Verdict]) -> str:
    return ", ".join(seat(v.member.role, v.member.index) for v in verdicts)
