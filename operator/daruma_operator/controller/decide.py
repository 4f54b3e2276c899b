"""Decide what a TrainingJob needs next.

Pure: what was observed goes in, what to do comes out. No call, no clock, no log line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from daruma_operator.api.status import MemberStatus, Phase, TrainingJobStatus
from daruma_operator.controller.acting import FINAL, acts_of
from daruma_operator.controller.acts import Act
from daruma_operator.controller.adopting import hand_back, successor
from daruma_operator.controller.draft import Draft, Policy
from daruma_operator.controller.ending import all_left, deadline, end, result_saved, wants_result
from daruma_operator.controller.failures import explain, hasty
from daruma_operator.controller.losing import lose
from daruma_operator.controller.observe import Seen, newest_pods, runs
from daruma_operator.controller.progress import attribute, fold, show
from daruma_operator.controller.recovering import recover
from daruma_operator.controller.replicating import keep_up, replicate, show_replicas, unheard
from daruma_operator.controller.starting import addresses, pending, starting
from daruma_operator.controller.verdicts import UNRESPONSIVE, Verdict, losses, name_of
from daruma_operator.substrate.protocol import Event
from daruma_trainer.contract import Role, indexes

# The one source of truth; tests/operator/test_decide.py proves that `decide` keeps to it. None is
# a job without status: a new one, or one whose status was lost.
TRANSITIONS: Mapping[Phase | None, frozenset[Phase]] = {
    None: frozenset({Phase.PENDING, Phase.STARTING, Phase.RUNNING, Phase.RECOVERING}),
    Phase.PENDING: frozenset({Phase.STARTING, Phase.RECOVERING, Phase.FAILED}),
    Phase.STARTING: frozenset({Phase.PENDING, Phase.RUNNING, Phase.RECOVERING, Phase.FAILED}),
    Phase.RUNNING: frozenset({Phase.PENDING, Phase.RECOVERING, Phase.SUCCEEDED, Phase.FAILED}),
    Phase.RECOVERING: frozenset({Phase.PENDING, Phase.RUNNING, Phase.FAILED}),
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset(),
}
SUSPECT_SECONDS = 0.25
"""While somebody is doubted, the next look is no later than this."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a pass does: write `status` if it differs, then `acts`, then tell `events`."""

    phase: Phase
    reason: str
    message: str
    status: TrainingJobStatus
    acts: tuple[Act, ...]
    events: tuple[Event, ...]
    after: float | None
    """Seconds until the next pass, if nothing happens before; None: only events matter."""

    @property
    def final(self) -> bool:
        """Whether nothing is left to be done for the job, ever."""
        return self.phase in FINAL and not self.acts


def decide(seen: Seen, policy: Policy, now: datetime) -> Decision:
    """Decide what the job needs."""
    d = Draft(seen, policy, now, seen.job.status)
    if d.status.phase not in FINAL:
        _advance(d)
    return _decision(d)


def _advance(d: Draft) -> None:
    if d.status.phase is None:
        _begin(d)
    _catch_up(d)
    explain(d)
    fold(d)
    if deadline(d):
        return
    keep_up(d)
    verdicts = _losses(d)
    if verdicts:
        lose(d, verdicts)
    if d.status.phase in FINAL:
        return
    addresses(d)
    if d.status.observed_generation not in (None, d.seen.job.generation):
        d.raise_epoch()  # members take what was edited with the next membership, not with a loss
    match d.status.phase:
        case Phase.PENDING if d.status.recovery is None:
            pending(d)
        case Phase.STARTING:
            starting(d)
        case Phase.PENDING | Phase.RECOVERING:
            recover(d)
        case _:
            pass
    if d.status.phase is d.seen.job.status.phase is Phase.RUNNING:
        _tend(d)
    attribute(d)
    show(d)
    show_replicas(d)


def _tend(d: Draft) -> None:
    """All is well: what is there to be done beside training."""
    if all_left(d):
        end(d)
        return
    hand_back(d)
    if d.status.recovery is None:
        replicate(d)


def _catch_up(d: Draft) -> None:
    """Members that are ahead of status were told by an operator whose status was lost since."""
    reports = (d.seen.report(name_of(m)) for m in d.status.members)
    top = max((r.epoch for r in reports if r is not None), default=0)
    if top > d.status.epoch:
        d.set(epoch=top + 1)


def _losses(d: Draft) -> tuple[Verdict, ...]:
    done = indexes(d.status.workers.succeeded_indexes)
    found = losses(d.seen, d.status.members, d.spec.recovery.timeouts, done, early=hasty(d))
    if all_left(d) and (result_saved(d) or not wants_result(d)):
        # The result is safe: no server is needed but to release the workers, and a worker that
        # was released closes its agent before its process is gone.
        found = tuple(v for v in found if v.member.role is Role.WORKER and v.reason != UNRESPONSIVE)
    return tuple(v for v in found if v.member.role is Role.WORKER or not unheard(d, v.member.index))


def _begin(d: Draft) -> None:
    """A new job; or, where pods are there already, one whose status was lost."""
    pods = newest_pods(d.seen.pods)
    heard = [h.report for h in d.seen.heard.values()]
    epoch = 1 + max([0, *(p.incarnation for p in d.seen.pods), *(r.epoch for r in heard)])
    d.set(epoch=epoch, start_time=d.now)
    seats = [(Role.SERVER, i) for i in range(d.spec.servers.replicas)]
    seats += [(Role.WORKER, i) for i in range(d.spec.workers.replicas)]
    members = []
    for role, index in seats:
        pod = pods.get((role, index))
        if pod is None or not (runs(pod) and pod.address):
            members.append(successor(d, role, index, epoch))
            continue
        members.append(
            MemberStatus(
                role=role, index=index, incarnation=pod.incarnation, pod=pod.name,
                address=pod.address, node=pod.node,
            )
        )  # fmt: skip
    d.replace_members(members)
    adopted = [m for m in members if m.address is not None]
    if not adopted:
        d.phase(Phase.PENDING, "PodsCreated", "the pods are being created")
        return
    _adopt(d)


def _adopt(d: Draft) -> None:
    """Take up what runs. Who is missing was made anew; if training had begun, it is restored."""
    reports = [h.report for h in d.seen.heard.values()]
    generation = max((r.generation for r in reports), default=0)
    d.set(rollback=d.status.rollback.model_copy(update={"generation": generation}))
    missing = [m for m in d.status.members if m.address is None or _has_no_state(d, m)]
    trained = any(r.initialised or r.step > 0 for r in reports)
    d.set(initialised=trained)
    if not trained:
        d.phase(Phase.PENDING, "StatusRebuilt", "the status was lost; the pods were found")
        return
    if missing:
        # Their last incarnations are unknown: each is a loss of the one before this epoch.
        gone = tuple(Verdict(m, "StatusLost", False, None, None) for m in missing)
        d.phase(Phase.RUNNING, "StatusRebuilt", "the status was lost; the pods were found")
        lose(d, gone)
        return
    d.phase(Phase.RUNNING, "StatusRebuilt", "the status was lost; the pods were found")


def _has_no_state(d: Draft, member: MemberStatus) -> bool:
    """Whether a server that runs never got its slots, and nobody knows any more whence."""
    report = d.seen.report(name_of(member))
    lacking = ("Joining", "Restoring", "Frozen")
    return member.role is Role.SERVER and report is not None and report.state in lacking


def _decision(d: Draft) -> Decision:
    status, before = d.status, d.seen.job.status
    only_progress = before.model_copy(
        update={"progress": status.progress, "checkpoint": status.checkpoint}
    )
    fresh = before.progress.updated_at if before.progress else None
    if status != before and status == only_progress and fresh is not None:
        left = d.left(fresh, d.policy.progress_seconds)
        if left > 0:
            status = before
    if status.phase not in FINAL:
        # Whatever was missed, the next look is never far.
        d.waits.append(max(d.policy.progress_seconds, 0.0 if d.training else 1.0))
    acts = acts_of(d.seen, status, d.policy)
    if status.phase is None:
        raise ValueError("a decision without a phase")
    if d.seen.doubted:
        d.waits.append(SUSPECT_SECONDS)
    if status.phase is not before.phase:
        d.waits.append(0.0)
    after = None if status.phase in FINAL and not acts else min(d.waits, default=None)
    return Decision(
        status.phase, status.reason, status.message, status, acts, tuple(d.events), after
    )
