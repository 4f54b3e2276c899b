"""Bring a recovery to its end: replace, restore, resume. Pure.

The stage is what the record's phases say: `replace` is filled in when every replacement was heard
of, `restore` when every slot is Ready, `resume` with the first new step.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from daruma_operator.api.status import DeltaNorm, MemberStatus, Phase
from daruma_operator.controller.adopting import adopt_instead, hands_over
from daruma_operator.controller.closing import finish
from daruma_operator.controller.damage import STORE_AWAY, store_away, tell_damage, unread_cut
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import all_left, fail
from daruma_operator.controller.losing import climb, roll_further
from daruma_operator.controller.observe import runs
from daruma_operator.controller.progress import goes_on
from daruma_operator.controller.replicating import promoted
from daruma_operator.controller.sourcing import (
    copies_of,
    delta_of,
    goes_back,
    plans_of,
    restoring,
    rework_of,
    serves,
    survivors,
    untold_of,
)
from daruma_operator.controller.telling import HAND_BACK
from daruma_operator.controller.verdicts import described, name_of
from daruma_operator.recovery.plan import Plan
from daruma_operator.recovery.strategies import preset_of
from daruma_trainer.contract import TRAINS, Role, SourceKind, indexes


def recover(d: Draft) -> None:
    """One look at the recovery in progress."""
    record = d.record
    if record.phases.replace is None:
        waited = _replacements(d)
        waiting = [m for m in waited if m.address is None]
        silent = [m for m in waited if d.seen.report(name_of(m)) is None]
        if (late := waiting or silent) and _replace_expired(d, late):
            return
        if waiting:
            _message(d, "waiting for replacements to run")
            return
        if not silent:
            _replaced(d)
    if record.phases.restore is None:
        # The plan is announced while the replacement still starts, so that it waits for nothing.
        if record.role is Role.SERVER and not _planned(d):
            return
        if d.record.phases.replace is None:
            _message(d, "waiting for replacements to start")
            return
        if not _restored(d):
            # An operator that hears nobody knows of nobody's failure.
            if record.role is Role.WORKER and d.seen.reached and _stage_expired(d):
                return
            _waits(d)
            return
    _resumed(d)


def _waits(d: Draft) -> None:
    """Say that slots are waited for; and why, where the store cannot be asked for them."""
    away = store_away(d)
    if away is None:
        _message(d, "waiting for the lost slots to be Ready")
        return
    limit = d.spec.recovery.timeouts.restore_seconds
    text = f"the store is asked again, for up to {limit:g} s: {away}"
    if d.seen.job.status.reason != STORE_AWAY:
        d.tell(STORE_AWAY, f"{d.record.strategy}: {text}", warning=True)
    _message(d, text, STORE_AWAY)


def _message(d: Draft, what: str, reason: str | None = None) -> None:
    names = ", ".join(sorted({f"{x.role.lower()}-{x.index}" for x in d.record.losses}))
    phase = d.status.phase
    if phase is Phase.PENDING and d.record.phases.replace is not None:
        phase = Phase.RECOVERING
    begun = "takes its slots back" if d.record.cause == HAND_BACK else "lost"
    if phase is not None:
        reason = reason or d.record.cause
        d.phase(phase, reason, f"{names} {begun}; {d.record.strategy}: {what}")


# Replace


def _replacements(d: Draft) -> list[MemberStatus]:
    """The new incarnations that the restore waits for."""
    seats = {(x.role, x.index) for x in d.record.losses}
    # A worker that comes late holds up the end, but not the servers' restore.
    waited = {s for s in seats if s[0] is Role.SERVER} or (set() if goes_on(d) else seats)
    return [m for m in d.status.members if (m.role, m.index) in waited]


def _replaced(d: Draft) -> None:
    record = d.record
    begun = record.started_at or d.now
    spent = (d.now - begun).total_seconds() - (record.phases.detect or 0.0)
    phases = record.phases.model_copy(update={"replace": round(max(0.0, spent), 6)})
    d.set_record(phases=phases, stage_since=d.now)


def _replace_expired(d: Draft, waiting: list[MemberStatus]) -> bool:
    """Climb, or fail, once no replacement came in time."""
    record, timeouts = d.record, d.spec.recovery.timeouts
    pending = d.status.phase is Phase.PENDING
    limit = timeouts.pending_seconds if pending else timeouts.replace_seconds
    if d.left_to_act(record.stage_since, limit) > 0:
        return False
    why = _waiting_reasons(d, waiting)
    if not pending and adopt_instead(d, waiting):
        return True
    if record.role is Role.SERVER and record.rung < len(d.spec.recovery.fallback):
        climb(d, record.rung + 1, f"no replacement ran within {limit:g} s ({why})")
    else:
        fail(d, "ReplaceTimeout", f"no replacement ran within {limit:g} s: {why}")
    return True


def _waiting_reasons(d: Draft, waiting: list[MemberStatus]) -> str:
    parts = []
    for member in waiting:
        pod = d.seen.pod(member.pod)
        state = "was not made" if pod is None else f"is {pod.state}"
        if runs(pod):
            # A guest may not have been started there; any other has not said a word yet.
            state = "was not heard of"
        detail = f" ({pod.reason}: {pod.message or ''})" if pod and pod.reason else ""
        parts.append(f"{described(member)} {state}{detail}")
    return "; ".join(parts)[:600]


# Restore


def _planned(d: Draft) -> bool:
    """Announce the plan; True once it is announced for the present epoch."""
    record = d.record
    if record.phases.replace is not None and _stage_expired(d):
        return False
    unread = unread_cut(d)
    if unread is not None and unread.older is not None:
        roll_further(d, unread.older)
        return False
    broken = _broken(d) if unread is None else unread.why
    if broken is not None:
        tell_damage(d)
        _next_rung(d, broken)
        return False
    if goes_back(d.status):
        return True
    silent = _silent(d)
    hears = silent and d.left_to_act(_fenced_at(d), d.policy.copies_seconds) > 0
    if record.planned_epoch == d.status.epoch:
        if not (hears and untold_of(d.seen, d.status)):
            return True
        # Another operator announced it, who had heard them: this one would hand out less.
        d.set_record(planned_epoch=0)
    # Only they know what they have: that they are told late is no loss.
    mute = ", ".join(_mute(d))
    if mute or hears:
        who = f"{mute} to say what they have" if mute else "the workers to say what they hold"
        _message(d, f"waiting for {who}")
        return False
    return _plan(d, silent)


def _plan(d: Draft, silent: tuple[str, ...]) -> bool:
    """Plan from what everybody said; `silent`: workers that did not. False: it has to wait."""
    plans = plans_of(d.seen, d.status, stored=d.policy.store is not None)
    unsourced = sum(p.unsourced for p in plans.values())
    if unsourced:
        # Others may hear them well, and what they hold is not lost because the operator does not.
        unheard = [m for m in silent if not _told(d, m)] + _nearly_back(d, plans)
        if unheard:
            who = f"{', '.join(unheard[:3])}{', …' * (len(unheard) > 3)}"
            _message(d, f"waiting to hear from {who}: nobody else holds {unsourced} lost slots")
        else:
            _next_rung(d, f"{unsourced} lost slots have no source")
        return False
    delta = delta_of(d, plans)
    d.set_record(
        planned_epoch=d.status.epoch,
        reason=_reason(d, plans.values()),
        delta_norm=DeltaNorm(value=delta.value, kind=delta.kind),
        rework=rework_of(d, delta),
        silent=silent,
    )
    return True


def _next_rung(d: Draft, why: str, *, expired: bool = False) -> None:
    """What was planned cannot work. A hand-back that failed is an ordinary loss from now on."""
    if d.spec.chained and hands_over(d) and not expired:
        # Nobody else has what is frozen there: it is asked again, until the deadline.
        d.raise_epoch()
        d.set_record(planned_epoch=0)
        _message(d, f"{why}; it is asked again")
        return
    if d.record.cause != HAND_BACK:
        climb(d, d.record.rung + 1, why)
        return
    d.set(handing=())
    epoch = d.raise_epoch()
    # Workers say what they hold in this epoch; that takes its time from now on.
    losses = tuple(x.model_copy(update={"at": d.now}) for x in d.record.losses)
    d.set_record(epoch=epoch, cause="ServerLost", losses=losses, stage_since=d.now, planned_epoch=0)
    climb(d, 0, why)


def _fenced_at(d: Draft) -> datetime | None:
    """When members were told to say what they hold."""
    begun = d.record.stage_since if d.record.phases.replace is None else None
    return max((at for at in (begun, *(x.at for x in d.record.losses)) if at), default=None)


def _nearly_back(d: Draft, plans: Mapping[str, Plan]) -> list[str]:
    """Servers that were restored for an earlier loss of this recovery, or nearly.

    Workers that have their slots from them already offer these no more, and may be heard first.
    """
    earlier = [m for m in restoring(d.status) if m.incarnation < d.record.epoch]
    names = [n for m in earlier if (n := name_of(m)) in plans and plans[n].unsourced]
    waits = d.left_to_act(_fenced_at(d), d.policy.copies_seconds) > 0
    return [n for n in names if d.seen.report(n) is not None and (waits or not _told(d, n))]


def _reason(d: Draft, plans: Iterable[Plan]) -> str:
    plans = list(plans)
    if not plans:
        promotion = any(promoted(d, m.index) for m in restoring(d.status))
        return "ReplicaPromoted" if promotion else d.record.reason
    plans = [p for p in plans if not p.nothing]
    if not plans:
        return "NothingLost"
    if all(p.handed for p in plans):
        return "HandedOver"
    peers = any(s.kind is SourceKind.PEER for p in plans for s in p.sources)
    return "PeerCopiesFound" if peers else "RunningCheckpointFound"


def _broken(d: Draft) -> str | None:
    """Why the present rung cannot work, as the servers found out, or None."""
    if goes_back(d.status):
        return None
    missing = _missing(d)
    return f"{missing} slots could not be had from any source" if missing else None


def _stage_expired(d: Draft) -> bool:
    limit = d.spec.recovery.timeouts.restore_seconds
    if d.left_to_act(d.record.stage_since, limit) > 0:
        return False
    away = store_away(d)
    what = "lost slots" if d.record.role is Role.SERVER else "servers"
    why = f"the {what} were not Ready within {limit:g} s{'' if away is None else f'; {away}'}"
    if d.record.role is Role.WORKER:
        # They lost nothing: no rung would bring them anything.
        fail(d, "RestoreTimeout", f"{why}: {', '.join(_unready(d))}")
    elif d.record.cause == HAND_BACK:
        _next_rung(d, f"the slots were not handed back within {limit:g} s", expired=True)
    elif d.record.rung < len(d.spec.recovery.fallback):
        climb(d, d.record.rung + 1, why)
    else:
        fail(d, "RestoreTimeout", why)
    return True


def _silent(d: Draft) -> tuple[str, ...]:
    """Survivors that did not say yet, in this recovery's epoch, what they hold."""
    if d.record.cause == HAND_BACK:
        return ()
    done = indexes(d.status.workers.succeeded_indexes)
    if SourceKind.PEER not in preset_of(d.record.strategy).sources or not _to_restore(d):
        return ()
    return tuple(
        name_of(m)
        for m in survivors(d.status)
        if m.address and m.index not in done and not copies_of(d.seen, d.record, m)
    )


def _mute(d: Draft) -> tuple[str, ...]:
    """Replicas that were promoted, and did not say yet what they have, or that they serve."""
    if d.record.cause == HAND_BACK:
        return ()
    # Who was made for a loss is as old as that, at most.
    lost = {x.index: x.epoch for x in d.record.losses if x.role is Role.SERVER}
    return tuple(
        name_of(m)
        for m in restoring(d.status)
        if m.guest and m.incarnation < lost.get(m.index, 0) and not _speaks(d, m)
    )


def _speaks(d: Draft, member: MemberStatus) -> bool:
    """Whether it said so itself: what others hand on is without its copies."""
    return _told(d, name_of(member)) or serves(d.seen, member)


def _told(d: Draft, member: str) -> bool:
    """Whether a member said itself, in this recovery's epoch, what it has, be it nothing."""
    heard = d.seen.heard.get(member)
    return heard is not None and heard.copies_epoch >= d.record.epoch


def _to_restore(d: Draft) -> bool:
    """Whether any server is to get slots."""
    return not all(serves(d.seen, m) for m in restoring(d.status))


def _missing(d: Draft) -> int:
    """Slots that a server could not get from the plan of the present epoch."""
    reports = (d.seen.report(name_of(m)) for m in restoring(d.status))
    restores = (r.restore for r in reports if r is not None and r.restore is not None)
    return sum(r.missing for r in restores if r.epoch == d.status.epoch)


def _restored(d: Draft) -> bool:
    return not _unready(d)


def _unready(d: Draft) -> list[str]:
    """Servers that do not serve all their slots in the present epoch, or were not heard."""
    return [
        name_of(member)
        for member in d.members(Role.SERVER)
        if (report := d.seen.report(name_of(member))) is None
        or report.state != "Ready"
        or report.epoch < d.status.epoch
        or report.generation != d.status.rollback.generation
    ]


# Resume


def _resumed(d: Draft) -> None:
    record = d.record
    spent = (record.phases.detect or 0.0) + (record.phases.replace or 0.0)
    replaced_at = (record.started_at or d.now) + timedelta(seconds=spent)
    stepped = _first_step(d)
    if record.phases.restore is None:
        seconds = (d.now - replaced_at).total_seconds()
        if stepped is not None:
            # Both were seen in one pass: the servers' own clocks tell them apart.
            whole = max(0.0, (d.now - replaced_at).total_seconds() - stepped)
            seconds = min(whole, _restore_seconds(d))
        phases = record.phases.model_copy(update={"restore": round(max(0.0, seconds), 6)})
        d.set_record(phases=phases)
        record = d.record
    if stepped is None:
        _message(d, "all slots are Ready; waiting for the first new step")
        return
    total = spent + (record.phases.restore or 0.0)
    ended = (d.now - (record.started_at or d.now)).total_seconds() - stepped
    resume = round(max(0.0, ended - total), 6)
    phases = record.phases.model_copy(update={"resume": resume})
    d.set_record(phases=phases, seconds=round(total + resume, 6))
    finish(d)


def _first_step(d: Draft) -> float | None:
    """Seconds since the first step after the recovery's last epoch; None: there is none yet."""
    done = indexes(d.status.workers.succeeded_indexes)
    ages = []
    for member in d.members(Role.WORKER):
        heard = d.seen.heard.get(name_of(member))
        if member.index in done:
            continue
        if heard is None or heard.report.state not in TRAINS:
            if goes_on(d):
                continue  # others make steps without it
            return None
        if heard.report.epoch < d.status.epoch:
            return None
        if heard.report.acked_epoch >= d.status.epoch:
            ages.append(heard.age + (heard.report.acked_age or 0.0))
    if ages:
        return max(ages)
    return 0.0 if all_left(d) else None


def _restore_seconds(d: Draft) -> float:
    found = [0.0]
    for member in restoring(d.status):
        report = d.seen.report(name_of(member))
        if report is not None and report.restore is not None:
            found.append(report.restore.seconds)
    return max(found)
