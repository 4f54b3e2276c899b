"""The world of `controller_world` behind a Substrate and real agents, so that the controller runs
as it does in production: its own event loop, HTTP, status writes that may conflict.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from http import HTTPStatus

from controller_world import World
from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.clock import SteadyClock
from daruma_operator.controller.loop import Controller, Hooks
from daruma_operator.metrics import Metrics
from daruma_operator.settings import Settings
from daruma_operator.substrate.protocol import Event, JobKey, PodFacts, PodPlan, StatusConflict
from daruma_trainer.agent import Agent, Command, Outcome, ViewCell
from daruma_trainer.contract import AGENT_PORT, DATA_PORT, Membership, Report, Restore

KEY = JobKey("n", "j")
TOKEN = "a-token"
DEADLINE = 60.0
SETTINGS = Settings(
    passes=2, progress_seconds=0.02, calm_seconds=0.02, copies_seconds=0.2, retry_seconds=0.01
)


class LiveWorld(World):
    """A world whose members have agents that listen on loopback."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lock = threading.RLock()
        self.cells: dict[str, ViewCell] = {}
        self.agents: dict[str, Agent] = {}
        self.changed: Callable[[], None] = _nothing

    def start(self, name: str) -> None:
        super().start(name)
        pod = self.pods[name]
        sim = next(s for s in self.sims.values() if f"j-{s.id}" == name)
        cell = self.cells[sim.id] = ViewCell(Report(sim.id, 0, "Joining"))
        agent = Agent(
            ("127.0.0.1", 0), TOKEN, cell, lambda c: self.command(sim.id, c), lambda: b""
        )  # fmt: skip
        self.agents[sim.id] = agent
        address = f"127.0.0.1:{agent.port + DATA_PORT - AGENT_PORT}"
        self.pods[name] = replace(pod, address=address)

    def command(self, member: str, command: Command) -> Outcome:
        with self.lock:
            if member not in self.sims:
                return Outcome(HTTPStatus.CONFLICT, "gone")
            body = command.body
            if isinstance(body, Membership):
                known = self.sims[member].membership
                if known is not None and body.epoch <= known.epoch:
                    same = body == known
                    return Outcome() if same else Outcome(HTTPStatus.CONFLICT, "another content")
                self.put_membership(member, body)
            elif isinstance(body, Restore):
                self.post_restore(member, body)
            else:
                self.post_checkpoint(body["number"])
            self.publish()
            return Outcome()

    def publish(self) -> None:
        """Members tell each other everything at once, but what copies they offer."""
        now = time.monotonic()
        heard = {i: (now, self.report(s)) for i, s in self.sims.items() if self.runs(s)}
        for member, cell in self.cells.items():
            if member in heard:
                others = {
                    i: (at, replace(report, copies=()))
                    for i, (at, report) in heard.items()
                    if i != member
                }
                membership = self.sims[member].membership
                epoch = 0 if membership is None else membership.epoch
                cell.publish(epoch, heard[member][1], others)

    def beat(self) -> None:
        """One step of training."""
        with self.lock:
            before = dict(self.pods)
            self.train()
            self.publish()
        if before != self.pods:
            self.changed()

    def fall(self, seat: str, code: int = 137) -> None:
        with self.lock:
            name = self.kill(seat, code)
            self.agents.pop(name.removeprefix("j-")).close()
            self.publish()
        self.changed()

    def remove(self, name: str) -> None:
        super().remove(name)
        agent = self.agents.pop(name.removeprefix("j-"), None)
        if agent is not None:
            agent.close()

    def running_pods(self) -> list[str]:
        with self.lock:
            return [n for n, p in self.pods.items() if p.state == "Running"]

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()


class LiveSubstrate:
    """A world as the controller's Protocol wants it. `conflicts`: writes that lose, by number."""

    def __init__(self, world: LiveWorld, conflicts: Sequence[int] = ()) -> None:
        self.world = world
        self.conflicts = set(conflicts)
        self.writes = 0
        self.events: list[Event] = []
        self.acts_after_conflict = 0
        self.dead = False
        """Whether the operator was killed: a dead process does nothing more."""
        self._version = 0
        self._lost = False

    async def list_jobs(self) -> Sequence[JobKey]:
        return [KEY]

    async def read_job(self, key: JobKey) -> TrainingJob | None:
        self._lost = False
        return self.world.job.model_copy(update={"resource_version": str(self._version)})

    async def list_pods(self, job: TrainingJob) -> Sequence[PodFacts]:
        with self.world.lock:
            return list(self.world.pods.values())

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        self.writes += 1
        if self.writes in self.conflicts or job.resource_version != str(self._version):
            self._lost = True
            raise StatusConflict
        self._version += 1
        raw = status.model_dump(mode="json", by_alias=True)
        status = TrainingJobStatus.model_validate(raw)
        self.world.job = self.world.job.model_copy(update={"status": status})
        return self.world.job

    async def token(self, job: TrainingJob) -> str:
        return TOKEN

    async def equip(self, job: TrainingJob) -> None:
        """Pods of this world need no Secret."""

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        self.acts_after_conflict += self._lost
        with self.world.lock:
            self.world.create(plan)
        self.world.changed()

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        self.acts_after_conflict += self._lost
        with self.world.lock:
            self.world.remove(name)
        self.world.changed()

    async def emit(self, job: TrainingJob, event: Event) -> None:
        if self.dead:
            raise Killed
        if (event.reason, event.epoch, event.member) not in [
            (e.reason, e.epoch, e.member) for e in self.events
        ]:
            self.events.append(event)

    def store_uri(self, job: TrainingJob) -> str | None:
        return self.world.store


class Killed(BaseException):
    """The operator's process ends here: nothing of it may go on."""


def _nothing() -> None:
    """No operator listens."""


class Operator:
    """One operator after the other over the same substrate, each of which may be killed."""

    def __init__(self, substrate: LiveSubstrate) -> None:
        self.substrate = substrate
        self.world = substrate.world
        self.metrics = Metrics()
        self.deaths: list[str] = []
        self.die_at: list[str] = []
        self.clock: Callable[[], datetime] = SteadyClock()

    async def run_until(self, done: Callable[[], bool]) -> None:
        """Train and operate until `done`; an operator that is killed is followed by another."""
        beats = asyncio.create_task(self._beats())
        try:
            async with asyncio.timeout(DEADLINE):
                while not await self._one(done):
                    pass
        finally:
            beats.cancel()
            self.world.changed = _nothing

    async def _one(self, done: Callable[[], bool]) -> bool:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        self.substrate.dead = False

        def point(name: str) -> None:
            if self.substrate.dead:
                raise Killed
            if self.die_at and self.die_at[0] == name:
                self.die_at.pop(0)
                self.deaths.append(name)
                self.substrate.dead = True
                stop.set()
                raise Killed

        hooks = Hooks(point=point)
        controller = Controller(self.substrate, SETTINGS, self.metrics, self.clock, hooks)

        def wake() -> None:
            if not stop.is_set():
                controller.enqueue(KEY)

        def changed() -> None:
            loop.call_soon_threadsafe(wake)

        self.world.changed = changed
        running = asyncio.create_task(controller.run(stop))
        while not done() and not stop.is_set():
            await asyncio.sleep(0.01)
        stop.set()
        await running
        return done()

    async def _beats(self) -> None:
        while True:
            self.world.beat()
            await asyncio.sleep(0.01)


def operate(
    substrate: LiveSubstrate, done: Callable[[], bool], die_at: Sequence[str] = ()
) -> Operator:
    """Run the story to its end in an event loop of its own."""
    operator = Operator(substrate)
    operator.die_at = list(die_at)
    asyncio.run(operator.run_until(done))
    return operator
