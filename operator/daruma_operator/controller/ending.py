"""How a job ends: its result is made durable, or it fails with a reason. Both are final. Pure."""

from daruma_operator.api.status import Phase, Result
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.verdicts import name_of
from daruma_trainer.contract import Role, indexes

MAX_ERROR = 400


def fail(d: Draft, reason: str, message: str) -> None:
    """The job is over, and did not reach its end."""
    if d.status.recovery is not None:
        d.close("Failed")
    d.phase(Phase.FAILED, reason, message)
    d.set(completion_time=d.now)
    d.condition("Failed", true=True, reason=reason, message=message[:1024])
    d.tell("Failed", message, warning=True)


def deadline(d: Draft) -> bool:
    """Fail the job if it is older than it may be."""
    seconds = d.spec.run_policy.active_deadline_seconds
    if seconds is None or d.left(d.status.start_time, seconds) > 0:
        return False
    d.tell("DeadlineExceeded", f"{seconds:g} s have passed", warning=True)
    fail(d, "DeadlineExceeded", f"runPolicy.activeDeadlineSeconds = {seconds:g} have passed")
    return True


def all_left(d: Draft) -> bool:
    """Whether every worker's program came to its end."""
    done = indexes(d.status.workers.succeeded_indexes)
    workers = d.members(Role.WORKER)
    return bool(workers) and all(
        m.index in done
        or ((report := d.seen.report(name_of(m))) is not None and report.state == "Left")
        for m in workers
    )


def wants_result(d: Draft) -> bool:
    """Whether a final cut has to be durable before the job counts as succeeded."""
    return d.policy.store is not None and d.spec.checkpoint.final and d.status.initialised


def save_errors(d: Draft) -> list[str]:
    """Return why saves fail, by server.

    Of members that count: the last words of one that was lost are of the past.
    """
    reports = [(name_of(m), d.seen.report(name_of(m))) for m in d.members(Role.SERVER)]
    return [f"{name}: {r.save_error}" for name, r in reports if r is not None and r.save_error]


def result_saved(d: Draft) -> bool:
    """Whether the final cut is durable."""
    return d.status.result is not None


def end(d: Draft) -> None:
    """All workers have left: save the result, then wait for them to exit."""
    _take_result(d)
    done = indexes(d.status.workers.succeeded_indexes)
    everybody = len(done) >= d.spec.workers.replicas
    saved = result_saved(d) or not wants_result(d)
    if everybody and saved:
        d.phase(Phase.SUCCEEDED, "AllWorkersSucceeded", _sentence(d))
        d.set(completion_time=d.now)
        d.condition("Succeeded", true=True, reason="AllWorkersSucceeded", message=_sentence(d))
        d.tell("Succeeded", _sentence(d))
        return
    if saved:
        d.phase(Phase.RUNNING, "WorkersLeaving", "the workers are done and are released")
        return
    if d.status.reason != "SavingResult":
        d.set(phase_since=d.now)
    error = next(iter(save_errors(d)), "")[:MAX_ERROR]
    text = "the workers are done; the final cut is being saved"
    d.phase(Phase.RUNNING, "SavingResult", text + (f", again and again: {error}" if error else ""))
    limit = d.spec.recovery.timeouts.progress_seconds
    if d.left_to_act(d.status.phase_since, limit) <= 0:
        d.tell("ResultNotSaved", f"the final cut was not durable within {limit:g} s", warning=True)
        fail(
            d,
            "ResultNotSaved",
            f"the workers are done, but the final cut was not durable within {limit:g} s: "
            + (error or "see the servers' logs, and whether checkpoint.store can be written to"),
        )


def _take_result(d: Draft) -> None:
    if result_saved(d) or not wants_result(d):
        return
    for member in d.members(Role.SERVER):
        report = d.seen.report(name_of(member))
        if report is not None and report.final:
            cut = report.cut if report.cut and report.cut.path == report.final else None
            step = 0 if d.status.progress is None else d.status.progress.step
            size = cut.bytes if cut else 0
            store = d.spec.checkpoint.store or d.policy.store or ""
            uri = f"{store.rstrip('/')}/{report.final}"
            d.set(result=Result(uri=uri, step=step, bytes=size))
            d.tell("ResultSaved", f"the result is {uri}")
            return


def _sentence(d: Draft) -> str:
    count = max((r.id for r in d.status.recoveries), default=0)
    uri = f"; the result is {d.status.result.uri}" if d.status.result else ""
    return f"every worker ended well, after {count} recover{'y' if count == 1 else 'ies'}{uri}"
