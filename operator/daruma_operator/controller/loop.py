"""The controller: one pass a job at a time, observe → decide → write status → act → tell.

A pass reads everything anew, so it may be cut off anywhere and repeated by anyone. Only what a won
status write announced is done; what was done is seen by the next pass.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter

from daruma_operator.api.job import TrainingJob
from daruma_operator.clock import SteadyClock
from daruma_operator.controller.agents import Agents, Talk
from daruma_operator.controller.apply import PodNotMadeError, TokenNotPutError, announce, apply
from daruma_operator.controller.decide import Decision, decide
from daruma_operator.controller.draft import Policy
from daruma_operator.controller.gather import observe
from daruma_operator.controller.observe import Seen
from daruma_operator.controller.queue import WorkQueue
from daruma_operator.controller.telling import untold
from daruma_operator.errors import UnreadableJobError
from daruma_operator.metrics import Metrics
from daruma_operator.names import seat
from daruma_operator.settings import Settings
from daruma_operator.substrate.protocol import (
    Event,
    JobKey,
    PodState,
    StatusConflict,
    Substrate,
)

LOG = logging.getLogger("daruma.operator")


def _nothing(_point: str) -> None:
    """Do nothing at a point of a pass."""


def _unobserved(_seen: Seen, _decision: Decision) -> None:
    """Show a pass to nobody."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Where others look in."""

    point: Callable[[str], None] = _nothing
    """Called inside a pass, with `decided`, `status-written`, and `pods-created`,
    `membership-sent`, `restore-sent` after the acts of that kind. Tests end the process there."""
    observer: Callable[[Seen, Decision], None] = _unobserved
    """Called once a pass after the status was written (or need not be): `decision.status` is
    what holds now, `seen.heard` the newest report of each member."""


class Controller:
    """Looks after all jobs of a substrate. `clock` gives the time for status."""

    def __init__(
        self,
        substrate: Substrate,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], datetime] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self._substrate = substrate
        self._settings = settings
        self._metrics = metrics
        self._clock = clock or SteadyClock()
        self._hooks = hooks or Hooks()
        self._queue = WorkQueue()
        self._agents = Agents(settings, self.enqueue)
        self._errors: dict[JobKey, int] = {}
        self._known: dict[JobKey, str] = {}
        """Uids of jobs of which this operator has told what the one before may not have."""
        self._counted: dict[JobKey, TrainingJob] = {}
        """Jobs as this operator last saw them: what changed in their status until then is counted.
        Of a write whose answer is lost nobody knows when, or whether, it comes true."""

    def enqueue(self, key: JobKey) -> None:
        """Ask for a pass: something about the job may have changed. From the loop's thread."""
        self._queue.add(key)
        self._metrics.queue_depth.set(len(self._queue))

    async def enqueue_all(self) -> None:
        """Ask for a pass over every job; repairs what a watch missed."""
        for key in await self._substrate.list_jobs():
            self.enqueue(key)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then end the passes in progress and close all connections."""
        tasks = [
            asyncio.create_task(self._work(stop), name=f"pass {n}")
            for n in range(self._settings.passes)
        ]
        tasks.append(asyncio.create_task(self._resync(), name="resync"))
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._queue.close()
            await self._agents.close()

    async def _resync(self) -> None:
        while True:
            try:
                await self.enqueue_all()
            except Exception:
                LOG.exception("the list of jobs could not be read; it will be tried again")
                await asyncio.sleep(self._settings.longest_backoff_seconds)
                continue
            await asyncio.sleep(self._settings.resync_seconds)

    async def _work(self, stop: asyncio.Event) -> None:
        # A cancellation that comes together with a timeout may be taken for that.
        while not stop.is_set():
            key, waited = await self._queue.get()
            self._metrics.queue_depth.set(len(self._queue))
            self._metrics.queue_wait.observe(waited)
            started = perf_counter()
            try:
                await self._pass(key)
                self._errors.pop(key, None)
            except StatusConflict:
                # Somebody else changed the job: what was decided is void, and nothing was done.
                self._queue.add(key)
            except UnreadableJobError as error:
                # It is not gone: its members train, and their polls go on.
                self._metrics.reconcile_errors.labels(type(error).__name__).inc()
            except Exception as error:  # noqa: BLE001 - the reconcile edge
                self._failed(key, error)
            finally:
                self._metrics.reconcile_seconds.observe(perf_counter() - started)
                self._queue.done(key)

    def _failed(self, key: JobKey, error: Exception) -> None:
        count = self._errors.get(key, 0)
        self._errors[key] = count + 1
        settings = self._settings
        delay = settings.first_backoff_seconds * 2 ** min(count, 20)
        delay = min(delay, settings.longest_backoff_seconds)
        LOG.error("%s: the pass failed, again in %.1f s", key, delay, exc_info=error)
        self._metrics.reconcile_errors.labels(type(error).__name__).inc()
        self._queue.add_after(key, delay)

    async def _pass(self, key: JobKey) -> None:
        job = await self._substrate.read_job(key)
        if job is None or job.deletion_timestamp is not None:
            # Its pods have it as owner and go with it.
            self._agents.forget(key)
            self._queue.forget(key)
            self._known.pop(key, None)
            self._counted.pop(key, None)
            self._metrics.note_job(key.namespace, key.name, None)
            return
        self._count(key, job)
        pods = tuple(await self._substrate.list_pods(job))
        talk = self._agents.talk(key, job.uid) or await self._begin(key, job)
        # Whoever runs has found it.
        talk.equipped |= all(pod.state is not PodState.WAITING for pod in pods)
        seen = await observe(job, pods, talk, self._agents)
        policy = Policy.of(self._settings, self._substrate.store_uri(job))
        decision = decide(seen, policy, now := self._clock())
        again = () if self._known.get(key) == job.uid else untold(job.status, now)
        self._hooks.point("decided")
        if decision.status != job.status:
            # It may be written though the answer is lost: then the next pass tells of it.
            self._known.pop(key, None)
            written = await self._substrate.write_status(job, decision.status)
            self._count(key, written)
            if decision.reason != job.status.reason or decision.phase != job.status.phase:
                LOG.info("%s: %s, %s: %s", key, decision.phase, decision.reason, decision.message)
            job = written
            self._hooks.point("status-written")
        self._metrics.note_job(key.namespace, key.name, decision.status)
        self._hooks.observer(seen, decision)
        if decision.after is not None:
            # Before anything can fail: deadlines do not wait for that to be repeated.
            self._queue.add_after(key, decision.after)
        try:
            done = await self._act(job, decision, talk, again)
        finally:
            if talk.refusals:
                soonest = min(r.until for r in talk.refusals.values())
                left = soonest - asyncio.get_running_loop().time()
                self._queue.add_after(key, max(left, 0.0))
        if not done:
            self._queue.add_after(key, self._settings.retry_seconds)
        if decision.final:
            self._agents.forget(key)

    async def _begin(self, key: JobKey, job: TrainingJob) -> Talk:
        talk = self._agents.begin(key, job.uid, await self._substrate.token(job))
        talk.began = self._clock()
        return talk

    async def _act(
        self, job: TrainingJob, decision: Decision, talk: Talk, events: tuple[Event, ...]
    ) -> bool:
        """Do what was decided, and tell people, whatever becomes of it; False: do it again."""
        try:
            return await apply(
                decision.acts, job, self._substrate, self._agents, talk, self._hooks.point
            )
        except PodNotMadeError as error:
            # Named for the epoch, so that repeats are no news.
            who = seat(error.plan.role, error.plan.index)
            events += (Event("PodNotCreated", str(error), job.status.epoch, True, who),)
            raise
        except TokenNotPutError as error:
            events += (Event("TokenNotPut", str(error), job.status.epoch, True),)
            raise
        finally:
            # Status has them: no later pass decides them again.
            self._known[JobKey(job.namespace, job.name)] = job.uid
            await announce(job, self._substrate, (*events, *decision.events))

    def _count(self, key: JobKey, job: TrainingJob) -> None:
        """Count what changed in a job's status since this operator last saw it."""
        before, self._counted[key] = self._counted.get(key), job
        if before is not None and before.uid == job.uid:
            limit = before.spec.run_policy.backoff_limit
            self._metrics.note_write(key.namespace, before.status, job.status, limit)
