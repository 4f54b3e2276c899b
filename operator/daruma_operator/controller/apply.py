"""Do what was decided. Nothing here decides; what fails is tried again by the next pass."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from daruma_operator.api.job import TrainingJob
from daruma_operator.controller.acts import (
    Act,
    CreatePod,
    DeletePod,
    PostCheckpoint,
    PostRestore,
    PutMembership,
)
from daruma_operator.controller.agents import Agents, Talk
from daruma_operator.errors import ClusterError
from daruma_operator.substrate.protocol import PodPlan, Substrate

Message = PutMembership | PostRestore | PostCheckpoint
CREATIONS = 16
"""Pods of one job that are made or removed at the same time."""


class PodNotMadeError(ClusterError):
    """A pod was refused, or its template is wrong: people have to know, not the log alone."""

    def __init__(self, plan: PodPlan, why: str) -> None:
        super().__init__(f"the pod {plan.name} could not be made: {why}")
        self.plan = plan


async def apply(
    acts: Iterable[Act],
    job: TrainingJob,
    substrate: Substrate,
    agents: Agents,
    talk: Talk,
    point: Callable[[str], None],
) -> bool:
    """Do all acts, those that do not wait for each other at once; False if a member refused.

    A member has its membership before anything else. Nothing waits for a pod to be deleted.
    """
    acts = list(acts)
    gate = asyncio.Semaphore(CREATIONS)

    async def bounded(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # Made only here: a pass may be cancelled while it waits.
        async with gate:
            await work()

    async def create() -> None:
        plans = [act.plan for act in acts if isinstance(act, CreatePod)]
        await asyncio.gather(*(bounded(partial(_make, substrate, job, p)) for p in plans))
        if plans:
            point("pods-created")

    talks = [_tell(agents, talk, each) for each in _by_member(acts)]
    _, *told = await asyncio.gather(create(), *talks)
    for kind, name in ((PutMembership, "membership-sent"), (PostRestore, "restore-sent")):
        if any(isinstance(act, kind) for act in acts):
            point(name)
    deletions = [
        bounded(partial(substrate.delete_pod, job, a.name, a.uid, a.grace_seconds))
        for a in acts
        if isinstance(a, DeletePod)
    ]
    await asyncio.gather(*deletions)
    return all(told)


async def _make(substrate: Substrate, job: TrainingJob, plan: PodPlan) -> None:
    try:
        await substrate.create_pod(job, plan)
    except ClusterError as error:
        raise PodNotMadeError(plan, str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Templates are the user's, and checked by nobody before.
        part = f"spec.{plan.role.lower()}s.template cannot be merged into it"
        raise PodNotMadeError(plan, f"{part} ({type(error).__name__}: {error})") from error


def _by_member(acts: Iterable[Act]) -> list[list[Message]]:
    found: dict[str, list[Message]] = {}
    for act in acts:
        if isinstance(act, PutMembership | PostRestore | PostCheckpoint):
            found.setdefault(act.member, []).append(act)
    return list(found.values())


async def _tell(agents: Agents, talk: Talk, messages: list[Message]) -> bool:
    """Speak to one member, in order; a slow one holds up no other."""
    for act in messages:
        match act:
            case PutMembership():
                done = await agents.put_membership(talk, act)
            case PostRestore():
                done = await agents.post_restore(talk, act)
            case PostCheckpoint():
                done = await agents.post_checkpoint(talk, act)
        if not done:
            return False
    return True
