"""How far a job is, as its members say: steps, loss, saves, who is ready. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from math import exp, isfinite

from daruma_operator.api.spec import ConsistencyMode
from daruma_operator.api.status import CheckpointStatus, Phase, Progress, Pushes
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import save_errors
from daruma_operator.controller.telling import HAND_BACK
from daruma_operator.controller.verdicts import denying, finished, name_of, unreachable
from daruma_operator.names import KEY_SECRET
from daruma_operator.recovery.price import Gone, counters
from daruma_trainer.contract import TRAINS, Report, Role, index_text, indexes

TOKEN_REFUSED = "TokenRefused"  # noqa: S105 - a reason
_MOST_NAMED = 5
SPEED_SECONDS = 5.0
"""Steps per second are averaged over about this long."""


def worker_reports(d: Draft) -> dict[int, Report]:
    """Of each worker index what its newest incarnation that was heard of said."""
    found: dict[int, tuple[int, Report]] = {}
    for member, heard in d.seen.heard.items():
        role, index, incarnation = member.rsplit("-", 2)
        known = found.get(int(index))
        if role == "worker" and (known is None or known[0] < int(incarnation)):
            found[int(index)] = int(incarnation), heard.report
    return {index: report for index, (_, report) in found.items()}


def steps_of(d: Draft) -> dict[int, int]:
    """Of each worker index the last batch that all slots acknowledged, in this generation."""
    steps: dict[int, int] = {}
    for member, heard in d.seen.heard.items():
        report = heard.report
        if member.startswith("worker-") and report.generation == d.status.rollback.generation:
            index = int(member.rsplit("-", 2)[1])
            steps[index] = max(steps.get(index, 0), report.step)
    return steps


def job_step(d: Draft) -> int:
    """Return the job's step: it never goes back, but by a rollback."""
    steps, workers = steps_of(d), d.spec.workers.replicas
    known = 0 if d.status.progress is None else d.status.progress.step
    if d.spec.consistency.mode is ConsistencyMode.ASYNC:
        return max(known, sum(steps.values()) // workers)
    # The slowest clock of those that go on; at the end nobody does.
    live = [m.index for m in d.members(Role.WORKER) if _is(d, name_of(m), "Training")]
    clocks = [steps[w] for w in live if w in steps]
    return max(known, min(clocks) if clocks else max(steps.values(), default=0))


def working(d: Draft) -> int:
    """How many workers train, or are done with it."""
    done = indexes(d.status.workers.succeeded_indexes)
    return sum(m.index in done or _is(d, name_of(m), *TRAINS) for m in d.members(Role.WORKER))


def goes_on(d: Draft) -> bool:
    """Whether there are workers enough to go on without those that were lost."""
    return working(d) >= d.spec.workers.min_replicas


def gone_of(d: Draft) -> Gone:
    """Return what workers had counted that are gone."""
    return Gone(d.status.gone, d.status.gone_lost, d.status.gone_skipped)


def pushes_of(d: Draft) -> Pushes:
    """Return what became of the job's pushes so far."""
    reports = {i: heard.report for i, heard in d.seen.heard.items()}
    live = [name_of(m) for m in d.status.members]
    return counters(reports, live, gone_of(d))


def attribute(d: Draft) -> None:
    """Count what became of pushes since the last loss with its record.

    Much of it is known only after the recovery: gradients ride on later batches, and what a vacant
    seat skipped is counted when its replacement enters.
    """
    records = list(d.status.recoveries)
    of_losses = [i for i, record in enumerate(records) if record.cause != HAND_BACK]
    if d.status.recovery is not None or not of_losses:
        return
    at = of_losses[-1]
    pushes = d.status.pushes.since(records[at].base)
    for later in records[at + 1 :]:
        pushes = pushes.since(later.pushes)
    if pushes != records[at].pushes:
        records[at] = records[at].model_copy(update={"pushes": pushes})
        d.set(recoveries=tuple(records))


def fold(d: Draft) -> None:
    """Take what members say into the status."""
    _succeeded(d)
    _checkpoint(d)
    _initialised(d)
    _progress(d)
    _pushes(d)


def _pushes(d: Draft) -> None:
    """Not while somebody is yet to be heard: what is counted never seems to be less."""
    there = [m for m in d.members(Role.WORKER) if m.address is not None]
    if all(d.seen.report(name_of(m)) is not None for m in there):
        d.set(pushes=pushes_of(d))


def _succeeded(d: Draft) -> None:
    done = set(indexes(d.status.workers.succeeded_indexes))
    done |= {m.index for m in d.members(Role.WORKER) if finished(d.seen.pod(m.pod))}
    update = {"succeeded": len(done), "succeeded_indexes": index_text(done)}
    d.set(workers=d.status.workers.model_copy(update=update))


def _initialised(d: Draft) -> None:
    """From the first acknowledged batch on, lost state has to be restored instead of made."""
    if d.status.initialised:
        return
    servers = [d.seen.report(name_of(m)) for m in d.members(Role.SERVER)]
    workers = [d.seen.report(name_of(m)) for m in d.members(Role.WORKER)]
    all_saved = bool(servers) and all(r is not None and r.initialised for r in servers)
    if all_saved or any(r is not None and r.step > 0 for r in workers):
        d.set(initialised=True)
        d.raise_epoch()


def _progress(d: Draft) -> None:
    reports = worker_reports(d)
    if not reports or not d.status.initialised:
        return
    old, step = d.status.progress, job_step(d)
    # JSON has no NaN: the API server would refuse the whole status of a job that diverged.
    losses = [r.loss for r in reports.values() if r.loss is not None and isfinite(r.loss)]
    totals = [r.total_steps for r in reports.values() if r.total_steps is not None]
    total = max(totals, default=None)
    loss = round(sum(losses) / len(losses), 6) if losses else None
    if old is not None and (old.step, old.loss, old.total_steps) == (step, loss, total):
        return
    speed = None if old is None else _speed(old, step, d.now)
    left = None if total is None or not speed else round(max(0, total - step) / speed, 1)
    d.set(
        progress=Progress(
            step=step,
            total_steps=total,
            loss=loss,
            steps_per_second=speed,
            eta_seconds=left,
            goodput=_goodput(d),
            updated_at=d.now,
        )
    )


def _speed(old: Progress, step: int, now: datetime) -> float | None:
    """Return steps per second, averaged over the last seconds: passes come at any distance."""
    seconds = 0.0 if old.updated_at is None else (now - old.updated_at).total_seconds()
    if seconds <= 0 or (step == old.step and old.steps_per_second is None):
        return old.steps_per_second
    newest = max(0, step - old.step) / seconds
    if old.steps_per_second is None:
        return round(newest, 3)
    weight = 1.0 - exp(-seconds / SPEED_SECONDS)
    return round(old.steps_per_second + weight * (newest - old.steps_per_second), 3)


def _goodput(d: Draft) -> float | None:
    """Seconds without an outage ÷ seconds since the job began."""
    if d.status.start_time is None:
        return None
    total = (d.now - d.status.start_time).total_seconds()
    return round(max(0.0, 1.0 - d.status.outage_seconds / total), 4) if total > 0 else None


def _checkpoint(d: Draft) -> None:
    servers = [d.seen.report(name_of(m)) for m in d.members(Role.SERVER)]
    # What a rollback left behind is no cut of this job any more: it may be damaged.
    generation = d.status.rollback.generation
    current = [r for r in servers if r is not None and r.generation == generation]
    cuts = [r.cut for r in current if r.cut is not None]
    saves = [r.running for r in servers if r is not None and r.running is not None]
    old = d.status.checkpoint
    if cuts:
        cut = max(cuts, key=lambda c: c.path)
        new = _saved(d.now, cut.path, cut.step, cut.bytes, cut.age)
    elif len(saves) == len(servers) and saves:
        slowest = min(saves, key=lambda s: s.step)
        total = sum(s.bytes for s in saves)
        new = _saved(d.now, None, slowest.step, total, max(s.age for s in saves))
    else:
        return
    distances = [s.distance for s in saves if s.distance is not None]
    if distances:
        norm = sum(x * x for x in distances) ** 0.5
        new = new.model_copy(update={"distance": round(norm, 6)})
    if old is not None and old.cut is not None and (new.cut or "") < old.cut:
        return
    if old is None or (old.cut, old.step) != (new.cut, new.step):
        d.set(checkpoint=new)
    if old is None and d.status.initialised:
        d.raise_epoch()  # members are told that there is something in the store


def _saved(now: datetime, cut: str | None, step: int, size: int, age: float) -> CheckpointStatus:
    return CheckpointStatus(cut=cut, step=step, bytes=size, saved_at=now - timedelta(seconds=age))


def show(d: Draft) -> None:
    """Count who is ready, and set the conditions that follow from what was seen."""
    servers = sum(_is(d, name_of(m), "Ready") for m in d.members(Role.SERVER))
    workers = working(d)
    n, w = d.spec.servers.replicas, d.spec.workers.replicas
    ready = {"ready": servers, "total": n, "text": f"{servers}/{n}"}
    d.set(servers=d.status.servers.model_copy(update=ready))
    ready = {"ready": workers, "total": w, "text": f"{workers}/{w}"}
    d.set(workers=d.status.workers.model_copy(update=ready))
    d.set(observed_generation=d.seen.job.generation)
    text = f"{servers} of {n} servers and {workers} of {w} workers are ready"
    whole = servers == n and workers == w
    d.condition("Ready", true=whole, reason="AllReady" if whole else "NotAllReady", message=text)
    active = d.status.recovery is not None
    d.condition("Recovering", true=active, reason="Recovery" if active else "NoRecovery")
    alone = d.status.phase is Phase.RUNNING and workers < w
    least = d.spec.workers.min_replicas
    message = f"{workers} of {w} workers train; at least {least} are needed" if alone else ""
    d.condition(
        "Degraded", true=active or alone,
        reason="MembersLost" if active else "WorkersMissing" if alone else "Complete",
        message=message or ("the job goes on with less than it asked for" if active else ""),
    )  # fmt: skip
    _unreachable(d)
    _stale_checkpoint(d)
    _stalled(d)


def _unreachable(d: Draft) -> None:
    """Say whom the operator alone cannot reach; nobody is replaced for that."""
    limit = d.spec.recovery.timeouts.detect_seconds
    denied, alone = denying(d.seen, limit), unreachable(d.seen, limit)
    reason = message = ""
    if denied:
        reason, message = TOKEN_REFUSED, _refusal(denied)
        if not any(c.reason == TOKEN_REFUSED for c in d.status.conditions):
            d.tell(TOKEN_REFUSED, message, warning=True)
    elif alone:
        reason = "OperatorAlone"
        message = f"the operator cannot reach {', '.join(alone)}; the other members can"
    d.condition("Unreachable", true=bool(reason), reason=reason or "Reached", message=message)


def _refusal(members: Sequence[str]) -> str:
    more = f" and {len(members) - _MOST_NAMED} more" if len(members) > _MOST_NAMED else ""
    return (
        f"{', '.join(members[:_MOST_NAMED])}{more} refuse the operator's token: the operator's key "
        f"(the Secret {KEY_SECRET} in its namespace) is not the one that the job was started with; "
        "put that one back and restart the operator, or delete the job and create it again"
    )


def _is(d: Draft, member: str, *states: str) -> bool:
    report = d.seen.report(member)
    return report is not None and report.state in states


def _stale_checkpoint(d: Draft) -> None:
    errors = save_errors(d)
    if errors and not d.is_true("CheckpointStale"):
        d.tell("CheckpointFailed", "; ".join(errors), warning=True)
    d.condition(
        "CheckpointStale", true=bool(errors), reason="SaveFailed" if errors else "Saved",
        message="; ".join(errors)[:1024],
    )  # fmt: skip


def _stalled(d: Draft) -> None:
    """No new step for progressSeconds is shown, and never a reason to roll anybody back."""
    limit = d.spec.recovery.timeouts.progress_seconds
    progress = d.status.progress
    since = progress.updated_at if progress and progress.updated_at else d.status.phase_since
    stalled = d.left(since, limit) <= 0 and d.status.completion_time is None
    if stalled and not d.is_true("Stalled"):
        d.tell("Stalled", f"no new step for {limit:g} s", warning=True)
    d.condition(
        "Stalled", true=stalled, reason="NoProgress" if stalled else "Progress",
        message=f"no new step for {limit:g} s: see the workers' logs" if stalled else "",
    )  # fmt: skip
