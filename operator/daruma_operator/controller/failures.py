"""What is known of failures: which count towards the limit, how the last one came about. Pure."""

import signal
from collections.abc import Sequence
from datetime import datetime, timedelta

from daruma_operator.api.spec import Placement
from daruma_operator.api.status import Counted, Failure, Loss, MemberStatus
from daruma_operator.controller.draft import Draft
from daruma_operator.controller.ending import fail
from daruma_operator.controller.telling import lost
from daruma_operator.controller.verdicts import HUNG, PROCESS_ENDED, Verdict, described, ended
from daruma_operator.substrate.protocol import PodFacts, PodState
from daruma_trainer.contract import ExitCode, Role

_SIGNALS = {128 + s: s.name for s in signal.Signals}
"""Exit codes of processes that a signal ended."""
MAX_COUNTED = 100
MAX_MESSAGE = 400


def count(d: Draft, verdicts: Sequence[Verdict]) -> None:
    """Note failures, and which of them count."""
    restarts = d.status.restarts
    since = d.now - timedelta(seconds=d.spec.run_policy.window_seconds)
    counted = [c for c in restarts.counted if c.at > since]
    counted += [Counted(role=v.member.role, at=d.now) for v in verdicts if v.counts]
    roles = [v.member.role for v in verdicts]
    update = {
        "servers": restarts.servers + roles.count(Role.SERVER),
        "workers": restarts.workers + roles.count(Role.WORKER),
        "disruptions": restarts.disruptions + sum(not v.counts for v in verdicts),
        "counted": tuple(counted[-2 * MAX_COUNTED :]),
    }
    worst = max(verdicts, key=lambda v: v.counts)
    d.set(restarts=restarts.model_copy(update=update), last_failure=_failure(worst, d.now))


def _failure(v: Verdict, time: datetime | None) -> Failure:
    pod = v.pod
    return Failure(
        role=v.member.role,
        index=v.member.index,
        pod=v.member.pod,
        node=pod.node if pod else None,
        exit_code=pod.exit_code if pod else None,
        reason=v.reason,
        message=((pod.message if pod else None) or "")[-MAX_MESSAGE:],
        time=time,
    )


def over_limit(d: Draft, verdicts: Sequence[Verdict]) -> bool:
    """Fail the job if a program asks for what cannot be, or too many failures count."""
    for v in verdicts:
        if v.member.role is Role.WORKER and v.pod and v.pod.exit_code == ExitCode.USAGE:
            text = last_words(v.pod) or "its program was used wrongly"
            fail(d, "ProgramRefused", f"{v.member.pod} ended with exit code 2: {text}")
            return True
    limit = d.spec.run_policy.backoff_limit
    for role in Role:
        used = sum(c.role is role for c in d.status.restarts.counted)
        if used > limit and any(v.counts and v.member.role is role for v in verdicts):
            last = max(verdicts, key=lambda v: (v.member.role is role, v.counts))
            window = d.spec.run_policy.window_seconds
            said = f"{used} failures of {role.lower()}s count; the limit is {limit}"
            d.tell("LimitReached", said, warning=True)
            fail(
                d,
                "BackoffLimitExceeded",
                f"{used} failures of {role.lower()}s within {window:g} s are more than "
                f"runPolicy.backoffLimit = {limit}; the last one: {sentence(last)}",
            )
            return True
    return False


def hasty(d: Draft) -> bool:
    """Whether a server's end is acted on before it is known how it came about.

    Not while the how decides what follows: what the user must read of a server that never worked
    or was the last that may fail, and whether memory was short, where others would adopt.
    """
    counted = sum(c.role is Role.SERVER for c in d.status.restarts.counted)
    return (
        d.status.initialised
        and counted < d.spec.run_policy.backoff_limit
        and d.spec.recovery.placement is Placement.REPLACE
    )


def explain(d: Draft) -> None:
    """Say how processes ended of which that was not known, as soon as their pods tell."""
    record = d.status.recovery
    for loss in () if record is None else record.losses:
        pod = d.seen.pod(loss.pod)
        if loss.reason != PROCESS_ENDED or pod is None or pod.state is not PodState.TERMINATED:
            continue
        member = MemberStatus(
            role=loss.role, index=loss.index, incarnation=loss.incarnation, pod=loss.pod
        )
        verdict = ended(member, pod, None)
        known = loss.model_copy(update={"reason": verdict.reason})
        d.set_record(losses=tuple(known if x == loss else x for x in d.record.losses))
        _correct(d, loss, verdict)
        d.events.append(lost(known, sentence(verdict)))


def _correct(d: Draft, loss: Loss, verdict: Verdict) -> None:
    restarts, last = d.status.restarts, d.status.last_failure
    if not verdict.counts:
        counted = list(restarts.counted)
        if (its := Counted(role=loss.role, at=loss.at)) in counted:
            counted.remove(its)
        update = {"counted": tuple(counted), "disruptions": restarts.disruptions + 1}
        d.set(restarts=restarts.model_copy(update=update))
    if last is not None and last.pod == loss.pod:
        d.set(last_failure=_failure(verdict, last.time))


def sentence(v: Verdict) -> str:
    """Say that a member was lost, why, and what its container said last."""
    code = None if v.pod is None else v.pod.exit_code
    said = "" if v.pod is None else last_words(v.pod)
    if v.reason == HUNG:
        said = "it does nothing, though its agent answers (see timeouts.hungSeconds)"
    exited = "" if code is None else f" with exit code {code}"
    if code in _SIGNALS:
        # What a process said before it was killed need not tell why.
        exited += f" ({_SIGNALS[code]})"
        said = said and f"; it said last: {said}"
    else:
        said = said and f": {said}"
    return f"{described(v.member)} was lost ({v.reason}){exited}{said}"


def last_words(pod: PodFacts) -> str:
    """Return the last line of what a container left behind: of a traceback, the error."""
    lines = (pod.message or "").strip().splitlines()
    return lines[-1].strip()[-MAX_MESSAGE:] if lines else ""
