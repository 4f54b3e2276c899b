"""A job's world in memory: pods and members that behave as the real ones do, as far as the operator
can tell. Pure: no clock, no I/O; `pass_` is one pass of the controller.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.spec import TrainingJobSpec
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.controller.acts import (
    Act,
    CreatePod,
    DeletePod,
    PostCheckpoint,
    PostRestore,
    PutMembership,
)
from daruma_operator.controller.decide import Decision, decide
from daruma_operator.controller.draft import Policy
from daruma_operator.controller.observe import Heard, Seen
from daruma_operator.substrate.protocol import PodFacts, PodPlan, PodState
from daruma_trainer.contract import (
    SLOTS,
    Copies,
    Guest,
    Membership,
    Outage,
    Report,
    Restore,
    RestoreReport,
    Role,
    SavedState,
    SourceKind,
    Suspect,
    member_id,
    place,
    slots_from_hex,
    slots_to_hex,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
EVERYTHING = slots_to_hex(range(SLOTS))
FOREVER = 10**9
"""Steps of a job that does not end by itself."""


def spec_of(**changes: Any) -> TrainingJobSpec:
    """A spec of 3 servers and 2 workers with a store; `changes` replace whole parts."""
    raw: dict[str, Any] = {
        "program": {"image": "i", "command": ["c"]},
        "servers": {"replicas": 3},
        "workers": {"replicas": 2},
        "checkpoint": {"store": "file:///s", "claimName": "c"},
    }
    return TrainingJobSpec.model_validate(raw | changes)


def ladder(strategy: str, *fallback: str, **more: object) -> dict[str, object]:
    """Return `recovery` of a spec."""
    return {"strategy": strategy, "fallback": list(fallback), **more}


@dataclass
class Sim:
    """One member's process."""

    role: Role
    index: int
    incarnation: int
    membership: Membership | None = None
    state: str = "Joining"
    step: int = 0
    generation: int = 0
    initialised: bool = False
    acked: int = 0
    skipped: int = 0
    outage: Outage | None = None
    restore: RestoreReport | None = None
    plan: Restore | None = None
    final: str | None = None
    suspects: tuple[Suspect, ...] = ()
    host: str | None = None
    """The pod that an adopted server lives in."""
    guests: tuple[Guest, ...] = ()
    cut: SavedState | None = None
    """What it went back to."""
    error: str | None = None
    older: SavedState | None = None
    waiting: str | None = None
    save_error: str | None = None
    follows: str | None = None
    was_replica: bool = False

    @property
    def id(self) -> str:
        return member_id(self.role, self.index, self.incarnation)


@dataclass
class World:
    """One job, its pods and their processes."""

    spec: TrainingJobSpec = field(default_factory=spec_of)
    store: str | None = "file:///s"
    moments: dict[str, int] = field(default_factory=dict)
    """What restores say of them."""
    total: int = 30
    """Steps after which workers leave."""
    cut: SavedState | None = None
    dead_sources: bool = False
    """Restores find none of their sources."""
    dead_peers: bool = False
    """Workers do not give what they offered."""
    damaged: tuple[str, ...] = ()
    bad_cuts: dict[str, SavedState | None] = field(default_factory=dict)
    """Cuts that no server can load, and the one that there is before each."""
    away: str | None = None
    """Why the store does not answer to those that restore from it."""
    unsaved: bool = False
    """The final cut never becomes durable."""
    slow: bool = False
    """Nobody initialises the servers."""
    holds_pods: bool = False
    """New pods stay Waiting."""
    holds_steps: bool = False
    """Workers make none."""
    guests_at: str | None = None
    """Where hosts say that their guests listen, if not in their own pods."""
    lost_acts: bool = False
    """What a decision announces is not done."""
    lost_plans: bool = False
    """Restore plans reach nobody."""
    lagging: bool = False
    """Replicas do not come up to date."""
    now: datetime = START
    job: TrainingJob = field(init=False)
    pods: dict[str, PodFacts] = field(default_factory=dict)
    sims: dict[str, Sim] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    planned: dict[str, Restore] = field(default_factory=dict)
    saving: dict[str, str] = field(default_factory=dict)
    failing: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    unheard: set[str] = field(default_factory=set)
    """Members that this operator has not heard of, from anybody."""
    late_words: dict[str, Report] = field(default_factory=dict)
    """What a member said before, and is still the last that came."""
    denied: set[str] = field(default_factory=set)
    began: datetime = START
    silent: dict[str, float] = field(default_factory=dict)
    """Members whose agents answer while their loops stand still: for how long."""
    created: list[str] = field(default_factory=list)
    last: dict[str, Report] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.job = TrainingJob(name="j", namespace="n", uid="u", spec=self.spec)

    @property
    def status(self) -> TrainingJobStatus:
        return self.job.status

    # What the operator sees

    def seen(self) -> Seen:
        heard = {i: Heard(0.1, r) for i, r in self.last.items()}
        heard |= {i: self._heard(s) for i, s in self.sims.items() if self.runs(s)}
        heard = {i: words for i, words in heard.items() if i not in self.unheard}
        mute = self.unheard | self.failing.keys()
        reached = {i for i, s in self.sims.items() if self.runs(s) and i not in mute}
        return Seen(
            self.job,
            tuple(self.pods.values()),
            heard,
            frozenset(reached),
            dict(self.failing),
            frozenset(self.refused),
            dict(self.delivered),
            dict(self.planned),
            dict(self.saving),
            frozenset(self.denied),
            self.began,
        )

    def _heard(self, sim: Sim) -> Heard:
        """Siblings hand on what one says that does not answer the operator, but its copies."""
        report, age = self.report(sim), self.silent.get(sim.id, 0.01)
        if late := self.late_words.get(sim.id):
            report = replace(late, epoch=report.epoch)
        if sim.id in self.failing:
            return Heard(age, replace(report, copies=()), 0)
        return Heard(age, report)

    def runs(self, sim: Sim) -> bool:
        pod = self.pods.get(sim.host or f"j-{sim.id}")
        return pod is not None and pod.state is PodState.RUNNING

    def report(self, sim: Sim) -> Report:
        copies: tuple[Copies, ...] = ()
        member = sim.membership
        if sim.role is Role.WORKER and sim.step and member is not None and member.recovery:
            steps = [s.step for s in self.sims.values() if s.role is Role.WORKER] or [sim.step]
            copies = (Copies(1, min(steps) * len(steps), self._offered()),)
        if sim.state == "Restoring" and sim.was_replica and sim.plan is None:
            copies = (Copies(1, 1, slots_to_hex(self.slots(sim.index))),)
        server = sim.role is Role.SERVER
        return Report(
            sim.id,
            0 if member is None else member.epoch,
            sim.state,
            step=sim.step,
            skipped=sim.skipped,
            generation=sim.generation,
            initialised=sim.initialised,
            suspects=sim.suspects,
            copies=copies,
            cut=(sim.cut or self.cut) if server else None,
            older=sim.older,
            waiting=sim.waiting,
            error=sim.error,
            save_error=sim.save_error,
            final=sim.final,
            outage=sim.outage,
            restore=sim.restore,
            update_norm=0.5 if server else None,
            acked_epoch=sim.acked,
            acked_age=0.0 if sim.acked else None,
            loss=None if server else 1.0,
            total_steps=None if server else self.total,
            guests=sim.guests,
            follows=sim.follows,
        )

    def _offered(self) -> str:
        """What a worker offers: the slots of servers that are away, or all if none is."""
        there = {s.index for s in self.sims.values() if s.role is Role.SERVER and self._serves(s)}
        owners = place("u", self.spec.servers.replicas)
        away = [s for s, owner in enumerate(owners) if owner not in there]
        return slots_to_hex(away) if away else EVERYTHING

    def _serves(self, sim: Sim) -> bool:
        return sim.state == "Ready" and self.runs(sim)

    # What the operator does

    def pass_(self, *, restarted: bool = False) -> Decision:
        """One pass; `restarted`: a new operator, which remembers nothing, makes it."""
        if restarted:
            self.delivered, self.planned, self.saving, self.began = {}, {}, {}, self.now
        policy = Policy(store=self.store, progress_seconds=0.0, copies_seconds=1.0)
        decision = decide(self.seen(), policy, self.now)
        self.job = self.job.model_copy(update={"status": decision.status})
        self.decisions.append(decision)
        for act in () if self.lost_acts else decision.acts:
            self.do(act)
        return decision

    def do(self, act: Act) -> None:
        match act:
            case CreatePod(plan):
                self.create(plan)
            case DeletePod(name):
                self.remove(name)
            case PutMembership(member, _, membership):
                self.put_membership(member, membership)
                self.delivered[member] = membership.epoch
            case PostRestore() if self.lost_plans:
                pass
            case PostRestore(member, _, restore):
                self.post_restore(member, restore)
                self.planned[member] = restore
            case PostCheckpoint(member, _, number):
                self.post_checkpoint(number)
                self.saving[member] = number

    def create(self, plan: PodPlan) -> None:
        if plan.name in self.pods:
            return
        self.created.append(plan.name)
        pod = PodFacts(
            plan.name, f"uid-{plan.name}", plan.role, plan.index, plan.incarnation,
            PodState.WAITING, reason="ContainerCreating",
        )  # fmt: skip
        self.pods[plan.name] = pod
        if not self.holds_pods:
            self.start(plan.name)

    def start(self, name: str) -> None:
        pod = self.pods[name]
        address = f"10.0.{len(self.created)}.1:7070"
        self.pods[name] = replace(pod, state=PodState.RUNNING, address=address, reason=None)
        sim = Sim(pod.role, pod.index, pod.incarnation)
        self.sims[sim.id] = sim

    def put_membership(self, member: str, new: Membership) -> None:
        sim = self.sims[member]
        first = sim.membership is None
        assert first or sim.membership is None or new.epoch >= sim.membership.epoch
        sim.membership = new
        if self._stands_by(sim, new):
            return
        if sim.role is Role.SERVER:
            self._take_in(sim, new)
        if sim.role is Role.WORKER:
            sim.generation = new.rollback.generation
            sim.state = sim.state if sim.state == "Left" else "Training"
            return
        if first and not new.initialised and self.slow:
            sim.state = "Empty"
        elif first and not new.initialised:
            sim.state, sim.initialised = "Ready", True
        elif first:
            sim.state = "Restoring"
        if new.rollback.generation > sim.generation:
            sim.generation, cut = new.rollback.generation, new.rollback.cut
            sim.error = sim.older = None
            if cut in self.bad_cuts:
                sim.error, sim.older = f"cannot load {cut}", self.bad_cuts[cut]
                sim.state = "Restoring"
            elif cut is not None:
                known = [self.cut, *self.bad_cuts.values()]
                sim.cut = next(c for c in known if c is not None and c.path == cut)
                sim.state, sim.initialised = "Ready", True

    def _stands_by(self, sim: Sim, new: Membership) -> bool:
        """Whether it hands over, is a replica, or was one until now.

        A replica is up to date as soon as it hears of the one before it.
        """
        if any(m.id == sim.id for m in new.handing):
            sim.state = "Frozen"
            return True
        if any(m.id == sim.id for m in new.replicas):
            chain = [m.id for m in new.chain(sim.index)]
            sim.state, sim.was_replica = "Replica", True
            if not self.lagging:
                sim.follows = chain[chain.index(sim.id) - 1]
            return True
        if sim.state != "Replica":
            return False
        sim.state = "Restoring"
        if sim.follows is not None:
            mine = len(self.slots(sim.index))
            sim.state, sim.initialised = "Ready", True
            sim.restore = RestoreReport(new.recovery or 0, {"replica": mine}, 100, done=True)
        return True

    def slots(self, index: int) -> list[int]:
        """The slots of a server."""
        return [s for s, o in enumerate(place("u", self.spec.servers.replicas)) if o == index]

    def _take_in(self, sim: Sim, new: Membership) -> None:
        """Start and end the guests of a server's pod."""
        own = new.member(Role.SERVER, sim.index)
        if own is None or sim.host is not None:
            return
        wanted = new.guests(own)
        for gone in [g.id for g in sim.guests if g.id not in {m.id for m in wanted}]:
            self.end_guest(gone)
        kept = [g for g in sim.guests if g.id in {m.id for m in wanted}]
        for member in wanted:
            if member.id not in {g.id for g in kept}:
                self.sims[member.id] = Sim(
                    Role.SERVER, member.index, member.incarnation, host=own.pod
                )
                host = self.guests_at or (own.address or "").rpartition(":")[0]
                kept.append(Guest(member.id, f"{host}:{7072 + 2 * member.incarnation}"))
        sim.guests = tuple(kept)

    def end_guest(self, guest: str, code: int | None = None) -> None:
        """End a guest's process; its host says so if it was not told to end it."""
        if (sim := self.sims.pop(guest, None)) is not None:
            self.last[guest] = self.report(sim)
        for host in self.sims.values():
            if code is not None:
                host.guests = tuple(
                    replace(g, exit_code=code) if g.id == guest else g for g in host.guests
                )

    def post_restore(self, member: str, restore: Restore) -> None:
        sim = self.sims[member]
        sim.plan = restore
        mine = self.slots(sim.index)
        offered = {s for source in restore.sources for s in slots_from_hex(source.slots)}
        assert offered.issuperset(mine), "a plan that leaves slots out"
        sim.waiting = self.away
        if self.away is not None:
            sim.restore = RestoreReport(restore.recovery, epoch=restore.epoch)
            return
        if self.dead_sources:
            sim.restore = RestoreReport(
                restore.recovery, missing=len(mine), damaged=self.damaged, epoch=restore.epoch
            )
            return
        there = [s.kind.value for s in restore.sources]
        kinds = [k for k in there if not (self.dead_peers and k == PEER)][: len(mine)]
        assert kinds or not mine, "no source is left"
        sim.restore = RestoreReport(
            restore.recovery, {k: len(mine) for k in kinds[:1]}, 100, 0.01, moments=self.moments,
            damaged=self.damaged, done=True, epoch=restore.epoch,
        )  # fmt: skip
        sim.state, sim.initialised = "Ready", True

    def post_checkpoint(self, number: str) -> None:
        for sim in self.sims.values():
            if sim.role is Role.SERVER and self.runs(sim) and not self.unsaved:
                sim.final = f"n/j/u/cuts/{number}.json" if self.store else ""

    # What happens

    def remove(self, name: str) -> None:
        pod = self.pods.pop(name, None)
        if pod is not None:
            self._silence(pod)

    def kill(self, seat: str, code: int = 137, reason: str = "Error") -> str:
        """End the process of `server-1` whatever its incarnation; returns the pod's name."""
        pod = self.pod(seat)
        self._silence(pod)
        self.pods[pod.name] = replace(
            pod, state=PodState.TERMINATED, exit_code=code, reason=reason, message="boom"
        )
        return pod.name

    def hang_up(self, seat: str) -> str:
        """End a process; its port is closed and workers lost it, but its pod says nothing yet."""
        pod = self.pod(seat)
        name = member_id(pod.role, pod.index, pod.incarnation)
        self._silence(pod)
        self.failing[name] = 0.0
        self.refused.add(name)
        self.suspect(name)
        return pod.name

    def suspect(self, name: str) -> None:
        for sim in self.sims.values():
            if sim.role is Role.WORKER:
                sim.suspects = (Suspect(name, 0.05, "Disconnected"),)

    def pod(self, seat: str) -> PodFacts:
        role, index = seat.split("-")
        found = [
            p
            for p in self.pods.values()
            if p.role.lower() == role and p.index == int(index) and p.state is PodState.RUNNING
        ]
        return max(found, key=lambda p: p.incarnation)

    def sim(self, seat: str) -> Sim:
        pod = self.pod(seat)
        return self.sims[member_id(pod.role, pod.index, pod.incarnation)]

    def _silence(self, pod: PodFacts) -> None:
        own = member_id(pod.role, pod.index, pod.incarnation)
        for name in [i for i, s in self.sims.items() if i == own or s.host == pod.name]:
            sim = self.sims.pop(name)
            self.last[sim.id] = self.report(sim)

    def train(self) -> None:
        """Every worker makes a step if all servers serve it; released ones end."""
        workers = [s for s in self.sims.values() if s.role is Role.WORKER and self.runs(s)]
        for worker in () if self.holds_steps else workers:
            member = worker.membership
            if worker.state == "Left" and self._released():
                self.finish(f"worker-{worker.index}")
            elif member is not None and worker.state == "Training" and self._served(member):
                worker.step += 1
                worker.acked = member.epoch
                if worker.step >= self.total:
                    worker.state = "Left"

    def finish(self, seat: str) -> None:
        pod = self.pod(seat)
        self._silence(pod)
        self.pods[pod.name] = replace(
            pod, state=PodState.TERMINATED, exit_code=0, reason="Completed"
        )

    def _released(self) -> bool:
        servers = [s for s in self.sims.values() if s.role is Role.SERVER and self.runs(s)]
        return any(s.final is not None for s in servers)

    def _served(self, membership: Membership) -> bool:
        servers = membership.of(Role.SERVER)
        return len(servers) == membership.servers and all(
            m.address is not None
            and (sim := self.sims.get(m.id)) is not None
            and self.runs(sim)
            and sim.state == "Ready"
            and sim.membership is not None
            and sim.membership.epoch == membership.epoch
            for m in servers
        )

    def tick(self, seconds: float = 0.1, *, restarted: bool = False) -> Decision:
        """Train, let time pass, look."""
        self.train()
        self.now += timedelta(seconds=seconds)
        self.failing = {m: age + seconds for m, age in self.failing.items()}
        self.silent = {m: age + seconds for m, age in self.silent.items()}
        return self.pass_(restarted=restarted)

    def until(self, done: Callable[["World"], bool], ticks: int = 100, **more: Any) -> "World":
        """Tick until something is so; fails after `ticks`."""
        for _ in range(ticks):
            if done(self):
                return self
            self.tick(**more)
        raise AssertionError(f"not within {ticks} ticks: {self.status.model_dump_json(indent=1)}")

    def until_phase(self, phase: str, **more: Any) -> "World":
        return self.until(lambda w: w.status.phase == phase, **more)

    def running(self) -> "World":
        """Look, then train until nothing is wrong and a few steps are made."""
        self.tick()
        return self.until(
            lambda w: (
                w.status.phase == "Running"
                and w.status.recovery is None
                and w.status.progress is not None
                and w.status.progress.step >= 3
            )
        )


def sources_of(world: World) -> dict[str, int]:
    return world.status.recoveries[-1].sources


PEER = SourceKind.PEER.value
RUNNING = SourceKind.RUNNING_CHECKPOINT.value
FULL = SourceKind.FULL_CHECKPOINT.value
