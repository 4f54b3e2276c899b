"""Do what was decided. Nothing here decides; what fails is tried again by the next pass."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
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
from daruma_operator.controller.agents import Agents, Refusals, Talk
from daruma_operator.errors import ClusterError
from daruma_operator.substrate.protocol import Event, JobKey, PodPlan, Substrate

LOG = logging.getLogger("daruma.operator")
Message = PutMembership | PostRestore | PostCheckpoint
Work = Callable[[], Coroutine[Any, Any, None]]
CREATIONS = 16
"""Pods of one job that are made or removed at the same time, and events that are told."""
AGAIN_SECONDS, LONGEST_SECONDS = 0.5, 30.0
"""Before a pod that was refused is asked for again: at first, and doubled each time up to this. Of
a large job under a quota there may be a thousand, and deadlines have the job looked at often."""
EVENTS_SECONDS = 10.0
"""What a pass may take to tell people: an API server that hangs must not hold up a recovery."""


class PodNotMadeError(ClusterError):
    """A pod was refused, or its template is wrong: people have to know, not the log alone."""

    def __init__(self, plan: PodPlan, why: str) -> None:
        super().__init__(f"the pod {plan.name} could not be made: {why}")
        self.plan = plan


class TokenNotPutError(ClusterError):
    """The Secret of a job's token was refused: new pods wait for it, unless it is there already."""


async def apply(
    acts: Iterable[Act],
    job: TrainingJob,
    substrate: Substrate,
    agents: Agents,
    talk: Talk,
    point: Callable[[str], None],
) -> bool:
    """Do all acts, those that do not wait for each other at once; False if a member refused.

    A member has its membership before anything else. Nothing waits for a pod to be deleted, and
    what fails holds up nothing else: under a quota, a pod that is refused may be waiting for one
    that is deleted here. Then the first failure is raised. Nothing goes on after the return.
    """
    acts = list(acts)
    plans = [act.plan for act in acts if isinstance(act, CreatePod)]
    messages = _by_member(acts)
    refused: list[str] = []

    async def create() -> None:
        failures: list[Exception] = []
        if due := _due(plans, talk):
            talk.equipped = False
        if not talk.equipped:
            # Before pods, or they start late; and whatever comes of it: what a full quota refuses
            # may be there, and a pod waits for its Secret by itself.
            failures += await _together([partial(_equip, substrate, job, talk)])
        if due:
            refusals = await _together(partial(_make, substrate, job, p, talk) for p in due)
            point("pods-created")
            failures = refusals + failures
        _raise_first(failures)

    async def tell(each: list[Message]) -> None:
        if not await _tell(agents, talk, each):
            refused.append(each[0].member)

    talks = [partial(tell, each) for each in messages]
    failures = await _together([create, *talks], at_once=1 + len(talks))
    for kind, name in ((PutMembership, "membership-sent"), (PostRestore, "restore-sent")):
        if any(isinstance(act, kind) for act in acts):
            point(name)
    failures += await _together(
        partial(substrate.delete_pod, job, a.name, a.uid, a.grace_seconds)
        for a in acts
        if isinstance(a, DeletePod)
    )
    _raise_first(failures)
    return not refused


async def announce(job: TrainingJob, substrate: Substrate, events: Sequence[Event]) -> None:
    """Tell people, in about this order; what was not told in time is not told.

    A pass that is cancelled meanwhile ends no sooner: no other knows of all of it.
    """
    if not events:
        return
    telling = asyncio.create_task(_announce(job, substrate, events))
    try:
        await asyncio.shield(telling)
    except asyncio.CancelledError:
        await telling
        raise


async def _announce(job: TrainingJob, substrate: Substrate, events: Sequence[Event]) -> None:
    try:
        async with asyncio.timeout(EVENTS_SECONDS):
            _raise_first(await _together(partial(substrate.emit, job, e) for e in events))
    except TimeoutError:
        where, limit = JobKey(job.namespace, job.name), EVENTS_SECONDS
        LOG.warning("%s: not all of %d events were told in %g s", where, len(events), limit)


async def _together(works: Iterable[Work], at_once: int = CREATIONS) -> list[Exception]:
    """Do all, begun in this order; returns what failed, once none is under way any more."""
    gate = asyncio.Semaphore(at_once)

    async def bounded(work: Work) -> None:
        # Made only here: a pass may be cancelled while it waits.
        async with gate:
            await work()

    results = await asyncio.gather(*(bounded(work) for work in works), return_exceptions=True)
    _raise_first(r for r in results if not isinstance(r, Exception | None))
    return [r for r in results if isinstance(r, Exception)]


def _raise_first(failures: Iterable[BaseException]) -> None:
    for error in failures:
        raise error


async def _equip(substrate: Substrate, job: TrainingJob, talk: Talk) -> None:
    try:
        await substrate.equip(job)
        talk.equipped = True
    except ClusterError as error:
        raise TokenNotPutError(
            f"new pods may wait for the job's token: its Secret cannot be put there: {error}"
        ) from error


def _due(plans: Sequence[PodPlan], talk: Talk) -> list[PodPlan]:
    """Return the pods that are to be asked for now: those that were refused have to wait."""
    names = {plan.name for plan in plans}
    talk.refusals = {name: r for name, r in talk.refusals.items() if name in names}
    now = asyncio.get_running_loop().time()
    waiting = {name for name, r in talk.refusals.items() if r.until > now}
    return [plan for plan in plans if plan.name not in waiting]


async def _make(substrate: Substrate, job: TrainingJob, plan: PodPlan, talk: Talk) -> None:
    before = talk.refusals.pop(plan.name, None)
    try:
        await substrate.create_pod(job, plan)
    except ClusterError as error:
        count = 1 if before is None else before.count + 1
        delay = min(AGAIN_SECONDS * 2 ** min(count - 1, 20), LONGEST_SECONDS)
        until = asyncio.get_running_loop().time() + delay
        talk.refusals[plan.name] = Refusals(count, until)
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
