"""Gather what a decision may look at: keep the polls that the job's state calls for, and ask at
once where something just happened."""

import asyncio
from collections.abc import Mapping

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import Phase
from daruma_operator.controller.agents import Agents, Talk
from daruma_operator.controller.observe import Seen, runs
from daruma_operator.substrate.protocol import PodFacts
from daruma_trainer.contract import Role, agent_address, member_id

FRESH_SECONDS = 1.0
"""A view younger than this need not be asked for again before a decision."""
FINAL = (Phase.SUCCEEDED, Phase.FAILED)


async def observe(job: TrainingJob, pods: tuple[PodFacts, ...], talk: Talk, agents: Agents) -> Seen:
    """Return what is seen of a job now."""
    if job.status.phase in FINAL:
        agents.follow(talk, {}, calm=True)
        return Seen(job, pods)
    spec = job.spec
    talk.members = spec.servers.replicas * spec.replicas + spec.workers.replicas
    targets = reachable(job, pods)
    seen = _seen(job, pods, talk)
    if is_calm(seen, targets):
        agents.follow(talk, _one(targets, talk), calm=True)
        return seen
    agents.follow(talk, targets, calm=False)
    now = asyncio.get_running_loop().time()
    # The last words of a worker that ended, its result's metrics, came just before its end.
    ended = any(p.role is Role.WORKER and p.exit_code == 0 for p in pods)
    fresh = 0.0 if ended else FRESH_SECONDS
    stale = {
        member: agent
        for member, agent in targets.items()
        if member not in talk.failing
        and (member not in talk.views or now - talk.views[member][0] > fresh)
    }
    # A suspect's long poll would take long to fail; others are asked so that a decision taken now
    # rests on what they know now. One that was never heard is still starting: its poll will tell.
    stale |= {m: a for m, a in targets.items() if m in talk.views and seen.suspected(m) is not None}
    if stale:
        await agents.look(talk, stale)
    return _seen(job, pods, talk)


def reachable(job: TrainingJob, pods: tuple[PodFacts, ...]) -> dict[str, str]:
    """Agents of the members whose pods run, servers first; without status, of all pods."""
    status = job.status
    names = {m.pod for m in (*status.members, *status.returning)}
    found = {
        member_id(p.role, p.index, p.incarnation): (p.role, p.index, agent_address(p.address))
        for p in pods
        if p.address is not None and runs(p) and (p.name in names or job.status.phase is None)
    }
    alive = {p.name for p in pods if runs(p)}
    for m in (*status.members, *status.handing, *status.replicas):
        if m.guest and m.address is not None and m.pod in alive:
            name = member_id(m.role, m.index, m.incarnation)
            found[name] = (m.role, m.index, agent_address(m.address))
    ordered = sorted(found.items(), key=lambda item: item[1][:2])
    return {member: agent for member, (_, _, agent) in ordered}


def is_calm(seen: Seen, targets: Mapping[str, str]) -> bool:
    """Whether one member's view is enough: it runs, all are there, and nobody suspects anybody."""
    status = seen.job.status
    return (
        status.phase is Phase.RUNNING
        and status.recovery is None
        and all(
            (pod := seen.pod(m.pod)) is not None and (runs(pod) or pod.exit_code == 0)
            for m in status.members
        )
        and all(
            seen.delivered.get(member, 0) >= status.epoch
            or ((report := seen.report(member)) is not None and report.epoch >= status.epoch)
            for member in targets
        )
        and not seen.doubted
        and not any(heard.report.state == "Left" for heard in seen.heard.values())
    )


def _one(targets: Mapping[str, str], talk: Talk) -> dict[str, str]:
    """The member to poll: the one polled already, else the first that answered last."""
    good = [m for m in targets if m not in talk.failing] or list(targets)
    kept = [m for m in good if m in talk.polls and m.startswith("server-")]
    return {m: targets[m] for m in (kept or good)[:1]}


def _seen(job: TrainingJob, pods: tuple[PodFacts, ...], talk: Talk) -> Seen:
    now = asyncio.get_running_loop().time()
    return Seen(
        job,
        pods,
        heard=talk.heard(now),
        reached=frozenset(m for m in talk.views if m not in talk.failing),
        failing={m: now - silence.since for m, silence in talk.failing.items()},
        refused=frozenset(m for m, silence in talk.failing.items() if silence.refused),
        denied=frozenset(m for m, silence in talk.failing.items() if silence.denied),
        delivered=dict(talk.delivered),
        planned=dict(talk.planned),
        saving=dict(talk.saving),
        began=talk.began,
    )
