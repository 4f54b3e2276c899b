"""Close a recovery that has come to its end: what it cost, from which sources. Pure."""

from collections import Counter

from daruma_operator.api.status import DeltaNorm, Phase, RollbackStatus
from daruma_operator.controller.damage import tell_damage
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.losing import ROLLED_FURTHER
from daruma_operator.controller.progress import pushes_of, working
from daruma_operator.controller.sourcing import goes_back, meanwhile_of, restoring, rework_of
from daruma_operator.controller.telling import HAND_BACK, over
from daruma_operator.controller.verdicts import name_of
from daruma_operator.recovery.price import EXACT
from daruma_trainer.contract import SLOTS, Role, SourceKind


def finish(d: Draft) -> None:
    """Price the recovery, and tell everybody that it is over (a last epoch)."""
    record = d.record
    sources, moments = Counter[str](), Counter[str]()
    size = 0
    for member in restoring(d.status):
        report = d.seen.report(name_of(member))
        if report is not None and report.restore is not None:
            size += report.restore.bytes
            sources.update(report.restore.sources)
            moments.update(report.restore.moments)
    if goes_back(d.status):
        sources = Counter({SourceKind.FULL_CHECKPOINT.value: SLOTS})
        size = d.status.checkpoint.bytes if d.status.checkpoint else 0
    elif record.role is Role.SERVER:
        _correct(d, sources)
    if record.role is Role.WORKER:
        _price_worker(d)
    damaged = tell_damage(d) or record.reason == ROLLED_FURTHER
    if damaged and sources.get(SourceKind.RUNNING_CHECKPOINT.value):
        # What the older copies of those blocks lack, nobody measured.
        _forget_delta(d)
    pushes = pushes_of(d).since(record.base)
    d.set_record(sources=dict(sources), moments=dict(moments), bytes=size, pushes=pushes)
    d.set_record(**meanwhile_of(d))
    d.close("Succeeded")
    closed = d.status.recoveries[-1]
    d.raise_epoch()
    if d.status.rollback.cut is not None:
        # Who comes later restores from the survivors; nobody goes back to this cut again.
        d.set(rollback=RollbackStatus(generation=d.status.rollback.generation))
    d.set(handing=())
    if closed.cause == HAND_BACK:
        event, reason = over(closed), "HandedBack"
    else:
        more = "; what the store had was damaged in places, see SourceDamaged" if damaged else ""
        event, reason = over(closed, more), "Recovered"
    d.phase(Phase.RUNNING, reason, event.message)
    d.events.append(event)


def _correct(d: Draft, sources: dict[str, int]) -> None:
    """Where slots came from other sources than those that stood first, say what is true."""
    hoped = {"PeerCopiesFound": SourceKind.PEER, "HandedOver": SourceKind.PREDECESSOR}
    planned = hoped.get(d.record.reason)
    if planned is None:
        return
    others = sources.keys() - {planned.value}
    exact = others <= {SourceKind.PREDECESSOR.value, SourceKind.REPLICA.value}
    if not exact:
        # How stale each block of the running checkpoint was, only its reader could have told.
        _forget_delta(d)
    if others and not sources.get(planned.value):
        failed = "PeerCopiesFailed" if planned is SourceKind.PEER else "HandOverFailed"
        promoted = others == {SourceKind.REPLICA.value}
        d.set_record(reason="ReplicaPromoted" if promoted else failed)


def _forget_delta(d: Draft) -> None:
    rework = d.record.rework.model_copy(update={"estimated": None})
    d.set_record(delta_norm=DeltaNorm(value=None, kind="Unknown"), rework=rework)


def _price_worker(d: Draft) -> None:
    """The servers keep what they have: a lost worker costs nothing but what is counted."""
    whole = working(d) == d.spec.workers.replicas
    d.set_record(
        delta_norm=DeltaNorm(value=EXACT.value, kind=EXACT.kind),
        rework=rework_of(d, EXACT),
        reason="WorkerReplaced" if whole else "WentOnWithout",
    )
    if pushes_of(d).since(d.record.base).mixed:
        _forget_delta(d)
