"""From a status to what has to be done: what it announces and the facts do not show yet. Pure."""

from daruma_operator.api.spec import CleanPodPolicy
from daruma_operator.api.status import Phase, TrainingJobStatus
from daruma_operator.controller.acts import (
    Act,
    CreatePod,
    DeletePod,
    PostCheckpoint,
    PostRestore,
    PutMembership,
)
from daruma_operator.controller.draft import Policy
from daruma_operator.controller.membership import membership_of
from daruma_operator.controller.observe import Seen, agent_of
from daruma_operator.controller.sourcing import restores_of
from daruma_operator.controller.verdicts import PROCESS_ENDED, name_of
from daruma_operator.names import cut_number, pod_plan
from daruma_operator.substrate.protocol import PodFacts, PodState
from daruma_trainer.contract import Role

FINAL = (Phase.SUCCEEDED, Phase.FAILED)


def acts_of(seen: Seen, status: TrainingJobStatus, policy: Policy) -> tuple[Act, ...]:
    """Return the acts, in the order in which they are done."""
    if status.phase in FINAL:
        return tuple(_clean(seen, policy))
    return (
        *_creations(seen, status),
        *_memberships(seen, status, policy),
        *_restores(seen, status, policy),
        *_saves(seen, status),
        *_deletions(seen, status, policy),
    )


def _creations(seen: Seen, status: TrainingJobStatus) -> list[Act]:
    name = seen.job.name
    return [
        CreatePod(pod_plan(name, m.role, m.index, m.incarnation))
        for m in (*status.members, *status.returning)
        if m.address is None and not m.guest and seen.pod(m.pod) is None
    ]


def _memberships(seen: Seen, status: TrainingJobStatus, policy: Policy) -> list[Act]:
    """Everybody who has an address in the membership, and lacks it, gets it."""
    if not any(m.address for m in status.members):
        return []
    membership = membership_of(seen.job, status, policy.store)
    found: list[Act] = []
    for member in (*status.members, *status.handing, *status.replicas):
        agent = agent_of(seen, member)
        name = name_of(member)
        if agent is None or member.address is None or name not in seen.reached:
            continue
        report = seen.report(name)
        known = max(seen.delivered.get(name, 0), 0 if report is None else report.epoch)
        if known < status.epoch:
            found.append(PutMembership(name, agent, membership))
    return found


def _restores(seen: Seen, status: TrainingJobStatus, policy: Policy) -> list[Act]:
    found: list[Act] = []
    members = {name_of(m): m for m in status.members}
    for name, restore in restores_of(seen, status, stored=policy.store is not None).items():
        agent = agent_of(seen, members[name])
        if agent is not None and name in seen.reached:
            found.append(PostRestore(name, agent, restore))
    return found


def _saves(seen: Seen, status: TrainingJobStatus) -> list[Act]:
    if status.reason not in ("SavingResult", "WorkersLeaving"):
        return []
    step = 0 if status.progress is None else status.progress.step
    # A periodic cut of the same step has been taken already, and may be of a moment before the end.
    number = f"{cut_number(status.epoch, step)}_final"
    return [
        PostCheckpoint(name_of(m), agent, number)
        for m in status.members
        if m.role is Role.SERVER
        and (agent := agent_of(seen, m)) is not None
        and seen.saving.get(name_of(m)) != number
        and (status.reason == "SavingResult" or not _final(seen, name_of(m)))
    ]


def _final(seen: Seen, member: str) -> bool:
    report = seen.report(member)
    return report is not None and report.final is not None


def _deletions(seen: Seen, status: TrainingJobStatus, policy: Policy) -> list[Act]:
    """Pods of incarnations that were replaced. A dead one's log is kept until it is over."""
    current = {m.pod for m in (*status.members, *status.returning, *status.handing)}
    active = status.recovery is not None
    losses = status.recovery.losses if status.recovery is not None else ()
    ended = {loss.pod for loss in losses if loss.reason == PROCESS_ENDED}
    return [
        _delete(pod, policy.superseded_grace_seconds)
        for pod in seen.pods
        if pod.name not in current
        and not pod.deleting
        and not (active and (pod.state is PodState.TERMINATED or pod.name in ended))
    ]


def _clean(seen: Seen, policy: Policy) -> list[Act]:
    keep = seen.job.spec.run_policy.clean_pod_policy
    if keep is CleanPodPolicy.NONE:
        return []
    return [
        _delete(pod, policy.clean_grace_seconds)
        for pod in seen.pods
        if not pod.deleting and (keep is CleanPodPolicy.ALL or pod.state is not PodState.TERMINATED)
    ]


def _delete(pod: PodFacts, grace: float) -> DeletePod:
    return DeletePod(pod.name, pod.uid, grace)
