"""Do what was decided. Nothing here decides; what fails is tried again by the next pass."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
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
from daruma_operator.substrate.protocol import Substrate

CREATIONS = 16
"""Pods of one job that are made or removed at the same time."""


async def apply(
    acts: Iterable[Act],
    job: TrainingJob,
    substrate: Substrate,
    agents: Agents,
    talk: Talk,
    point: Callable[[str], None],
) -> bool:
    """Do all acts, those that do not wait for each other at once; False if a member refused.

    Pods come first, for they take longest. A member has its membership before anything else.
    """
    acts = list(acts)
    gate = asyncio.Semaphore(CREATIONS)

    async def bounded(work: Coroutine[Any, Any, None]) -> None:
        async with gate:
            await work

    creations = [substrate.create_pod(job, a.plan) for a in acts if isinstance(a, CreatePod)]
    if creations:
        await asyncio.gather(*map(bounded, creations))
        point("pods-created")
    memberships = [a for a in acts if isinstance(a, PutMembership)]
    told = await asyncio.gather(*(agents.put_membership(talk, a) for a in memberships))
    if memberships:
        point("membership-sent")
    restores = [a for a in acts if isinstance(a, PostRestore)]
    planned = await asyncio.gather(*(agents.post_restore(talk, a) for a in restores))
    if restores:
        point("restore-sent")
    saves = [a for a in acts if isinstance(a, PostCheckpoint)]
    saved = await asyncio.gather(*(agents.post_checkpoint(talk, a) for a in saves))
    deletions = [
        substrate.delete_pod(job, a.name, a.uid, a.grace_seconds)
        for a in acts
        if isinstance(a, DeletePod)
    ]
    await asyncio.gather(*map(bounded, deletions))
    return all([*told, *planned, *saved])
