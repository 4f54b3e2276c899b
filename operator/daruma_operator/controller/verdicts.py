"""Who is lost, who is done, who cannot be reached: facts turned into verdicts. Pure.

A member is dead when its container ended, when its pod is gone or going, or when it answers
neither the operator (for detectSeconds) nor a member that does answer. A server whose host refuses
connections, and that a member lost as well, has ended before its container says so (decision 16).
A server whose agent answers, but whose loop stood still for hungSeconds, hangs if a member gets no
answer from it either.
Nothing else is a verdict: not a node that is NotReady, not the operator's failure alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from daruma_operator.api.spec import Timeouts
from daruma_operator.api.status import MemberStatus
from daruma_operator.controller.observe import Seen
from daruma_operator.substrate.protocol import PodFacts, PodState
from daruma_trainer.contract import ExitCode, Role, member_id

UNRESPONSIVE = "Unresponsive"
HUNG = "Hung"
"""Its agent answers, its loop does not."""
PROCESS_ENDED = "ProcessEnded"
"""Nobody listens there any more; how it ended is not known yet."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One member that is lost."""

    member: MemberStatus
    reason: str
    """OOMKilled, Error, … of its container; PodDeleted, Disrupted, Unresponsive, Hung,
    ProcessEnded."""
    counts: bool
    """Whether it counts towards runPolicy.backoffLimit; what the cluster took does not."""
    age: float | None
    """Seconds since a member first saw it fail; None: nobody did."""
    pod: PodFacts | None


def event_of(reason: str) -> str:
    """Return the reason of the event that tells of a loss for that reason."""
    special = {"OOMKilled": "OOMKilled", UNRESPONSIVE: "NodeLost", "Disrupted": "Preempted"}
    return special.get(reason, "PodFailed")


def name_of(member: MemberStatus) -> str:
    """Return a member's id."""
    return member_id(member.role, member.index, member.incarnation)


def described(member: MemberStatus) -> str:
    """Name a member for people: by its pod, or as a guest in the pod of another."""
    return f"{name_of(member)}, in the pod {member.pod}," if member.guest else member.pod


def losses(
    seen: Seen,
    members: Iterable[MemberStatus],
    timeouts: Timeouts,
    done: frozenset[int],
    *,
    early: bool = False,
) -> tuple[Verdict, ...]:
    """Return the members that are lost; workers in `done` ended well and are none.

    early: take a server's word of its own end from its closed port, before its container's.
    """
    found = []
    for member in members:
        if member.role is Role.WORKER and member.index in done:
            continue
        verdict = _verdict(seen, member, timeouts)
        if verdict is None and early:
            verdict = _closed(seen, member)
        if verdict is not None:
            found.append(verdict)
    return tuple(found)


def _verdict(seen: Seen, member: MemberStatus, timeouts: Timeouts) -> Verdict | None:
    pod = seen.pod(member.pod)
    name = name_of(member)
    age = seen.suspected(name)
    if member.guest and (code := _guest_ended(seen, name)) is not None:
        return Verdict(member, f"Exit{code}" if code >= 0 else f"Signal{-code}", True, age, None)
    if pod is None:
        # Without an address it was announced but perhaps never made: it is made (again).
        if member.address is None and not member.guest:
            return None
        return Verdict(member, "PodDeleted", False, age, None)
    if pod.state is PodState.TERMINATED:
        return ended(member, pod, age)
    if pod.deleting or pod.disrupted:
        return Verdict(member, _taken(pod), False, age, pod)
    # One that was never heard has yet to join (torch takes its time): a deadline of its own.
    if name not in seen.heard or not confirmed(seen, member):
        return None
    return _silent(seen, member, timeouts, pod)


def _silent(seen: Seen, member: MemberStatus, timeouts: Timeouts, pod: PodFacts) -> Verdict | None:
    """Judge a member from which others get no answer by what the operator gets."""
    name = name_of(member)
    failing, age = seen.failing.get(name), seen.suspected(name)
    if name in seen.denied:
        return None  # it is there: who may not ask it knows nothing else of it
    if failing is not None:
        lost = failing >= timeouts.detect_seconds
        return Verdict(member, UNRESPONSIVE, False, age or failing, pod) if lost else None
    # A worker's program may well keep everything of its process waiting.
    hangs = member.role is Role.SERVER and seen.silent(name) >= timeouts.hung_seconds
    return Verdict(member, HUNG, True, age, pod) if hangs else None


def ended(member: MemberStatus, pod: PodFacts, age: float | None) -> Verdict:
    """Judge by a pod whose container ended."""
    taken = pod.deleting or pod.disrupted
    reason = _taken(pod) if taken else (pod.reason or "Error")
    # A guest that goes with its host is no failure of its own.
    counts = not (taken or member.guest)
    return Verdict(member, reason, counts, age, pod)


def _closed(seen: Seen, member: MemberStatus) -> Verdict | None:
    """A server that was heard before, whose port is closed to the operator and to a member."""
    name = name_of(member)
    closed = name in seen.refused and name in seen.heard and confirmed(seen, member)
    if not closed or member.guest or member.role is not Role.SERVER:
        return None
    return Verdict(member, PROCESS_ENDED, True, seen.suspected(name), seen.pod(member.pod))


def _guest_ended(seen: Seen, name: str) -> int | None:
    """Exit code of an adopted server that ended, as its host says."""
    for heard in seen.heard.values():
        for guest in heard.report.guests:
            if guest.id == name and guest.exit_code is not None:
                return guest.exit_code
    return None


def _taken(pod: PodFacts) -> str:
    return "Disrupted" if pod.disrupted else "PodDeleted"


def confirmed(seen: Seen, member: MemberStatus) -> bool:
    """Whether a member that the operator reaches cannot reach this one either."""
    name = name_of(member)
    if any(other in seen.reached and other != name for other, _ in seen.suspicions.get(name, ())):
        return True
    if member.role is Role.SERVER:
        return False
    # Nobody connects to a worker; servers hear it four times a second.
    heard = seen.heard.get(name)
    if heard is None or heard.age <= seen.failing.get(name, 0.0):
        return False
    return any(other.startswith("server-") for other in seen.reached)


def finished(pod: PodFacts | None) -> bool:
    """Whether a worker's program came to its end. Others may exit with 0 when told to end."""
    return (
        pod is not None
        and pod.state is PodState.TERMINATED
        and pod.exit_code == ExitCode.OK
        and not (pod.deleting or pod.disrupted)
    )


def denying(seen: Seen, detect_seconds: float) -> tuple[str, ...]:
    """Members that do not take the operator's token: for a moment an address may be another's."""
    names = [name_of(m) for m in seen.job.status.members]
    return tuple(
        name
        for name in names
        if name in seen.denied and seen.failing.get(name, 0.0) >= detect_seconds
    )


def unreachable(seen: Seen, detect_seconds: float) -> tuple[str, ...]:
    """Members that the others reach but the operator does not."""
    return tuple(
        name_of(m)
        for m in seen.job.status.members
        if seen.failing.get(name_of(m), 0.0) >= detect_seconds
        and m.address is not None
        and (heard := seen.heard.get(name_of(m))) is not None
        and heard.age < detect_seconds
        and not confirmed(seen, m)
    )
