"""A job whose network, clock and operator are simulated; its servers and workers are the real ones.

It knows what each slot really holds, what workers were promised, and how many failures there were.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from daruma_trainer.contract import Member, Membership, Report, Role, Settings
from daruma_trainer.server import serve
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.reporting import report_of
from daruma_trainer.wire import State
from simulated_members import SimulatedServer, SimulatedWorker
from simulated_network import Network, Wire
from simulated_operator import Operator
from simulated_processes import simulated
from simulated_training import BATCHES, TABLES, WORKERS, Training, batches_of
from simulated_versions import Versions


@dataclass(frozen=True, slots=True)
class Saved:
    """A cut: of each shard all slots, of each worker the last batch, and what was lost by then."""

    shards: list[State]
    batches: dict[int, int]
    reported: frozenset[tuple[int, int]]
    skipped: frozenset[tuple[int, int]]


@dataclass(slots=True)
class Promise:
    """That a push outlives so many failures more."""

    failures: int
    """How many there had been."""
    tolerance: int


class SimulatedJob:
    """Servers with their replicas, two workers, the network between them, and the operator."""

    def __init__(
        self,
        settings: Settings,
        momentum: float,
        *,
        shared: bool = False,
        single: bool = False,
        servers: int = 1,
        narrow: bool = False,
    ) -> None:
        """`narrow`: little may be under way to a replica, whole slots one by one and in turns."""
        self.settings, self.momentum, self.shared = settings, momentum, shared
        self.count = servers
        self.now = 100.0
        self.network = Network()
        self.servers: dict[str, SimulatedServer] = {}
        self.workers: dict[str, SimulatedWorker] = {}
        self.parted: set[frozenset[str]] = set()
        self.training = Training(momentum, single, settings.consistency == "Sync")
        self.specs = [self.training.marks(), self.training.weights(1)]
        self.failures = 0
        self.lost_workers = 0
        self._calm = 0, 0
        """How many failures and lost workers there had been when all was well."""
        self._outlives = 0
        self.began_again = False
        """Whether slots came back as zeros: there was no source for them."""
        self.promises: dict[tuple[int, int, int], Promise] = {}
        """By (server's index, worker, batch)."""
        self.cut: Saved | None = None
        """Where a rollback goes to."""
        self.skipped: set[tuple[int, int]] = set()
        """(worker, batch) that nobody made, as the worker said that entered after them."""
        self.reported: set[tuple[int, int]] = set()
        """(worker, batch) that a RESYNC was told are lost."""
        self.versions = Versions()
        self.void: set[tuple[int, int]] = set()
        """(worker, batch) that were counted as lost before the last rollback."""
        self.told: set[tuple[int, int, int]] = set()
        """(server's index, worker, batch) that a worker was told is covered, by whomever."""
        self._emitted: dict[tuple[str, int, int], Promise] = {}
        self.lagging: set[tuple[int, int]] = set()
        """(worker, batch) that a replica lacked in some slot, perhaps one without marks, when its
        head was lost."""
        self._at_loss: dict[str, tuple[int, int]] = {}
        """By head that was lost: failures before, and how many covered pushes would outlive."""
        self._stack = ExitStack()
        here = simulated(self.network, lambda: self.now, narrow=narrow)
        self._stack.enter_context(here)
        self.operator = Operator(self)
        self.operator.begin()

    def close(self) -> None:
        """Give back what the processes hold."""
        for member in self.members():
            self._take(member).end()
        self._stack.close()

    # Members

    @property
    def wires(self) -> list[Wire]:
        return self.network.wires

    def node_of(self, role: Role, index: int, epoch: int) -> str:
        """The machine of a new member: where `shared`, worker 0 has the first server's."""
        if self.shared and epoch == 1 and (role is Role.SERVER or index == 0):
            return "node-shared"
        return f"node-{role}-{index}-{epoch}"

    def start(self, member: Member) -> None:
        if member.role is Role.SERVER:
            self.servers[member.id] = SimulatedServer(self, member)
        else:
            self.workers[member.id] = SimulatedWorker(self, member)

    def alive(self, member: str) -> bool:
        return member in self.servers or member in self.workers

    def members(self) -> list[str]:
        return [*self.servers, *self.workers]

    def reaches(self, a: str, b: str) -> bool:
        return frozenset((a, b)) not in self.parted

    def report(self, member: Member) -> Report | None:
        if member.id in self.servers:
            return report_of(self.servers[member.id])
        return self.workers[member.id]._report() if member.id in self.workers else None

    def has_copy(self, member: Member) -> bool:
        worker = self.workers.get(member.id)
        copy = None if worker is None else worker.copy
        return copy is not None and bool(copy.lineage.any())

    @property
    def live_workers(self) -> list[SimulatedWorker]:
        """Those that the operator counts."""
        named = [m for m in self.operator.members.values() if m.role is Role.WORKER]
        return [self.workers[m.id] for m in named if m.id in self.workers]

    @property
    def heads(self) -> list[SimulatedServer]:
        """Those that the operator counts and that live."""
        return [self.servers[m.id] for m in self.operator.heads if m.id in self.servers]

    def depth(self, index: int) -> int:
        """How many replicas in a row have all that is covered of a shard."""
        chain = self.operator.chain(index)
        if any(self.operator.gone(m) for m in chain):
            return 0
        nodes = [self.servers[m.id] for m in chain]
        if any(node.epoch != self.operator.epoch for node in nodes):
            return 0
        joined = takewhile(lambda node: node.replicator.follows is not None, nodes[1:])
        return len(list(joined))

    @property
    def replicated(self) -> bool:
        """Whether all replicas there should be have joined (but where they need not)."""
        chains = [self.operator.chain(index) for index in range(self.count)]
        if any(len(chain) < self.settings.replicas for chain in chains):
            return False
        if any(self.operator.gone(m) for chain in chains for m in chain):
            return False
        return self.stateless or all(
            self.depth(index) == len(chain) - 1 for index, chain in enumerate(chains)
        )

    def tolerance(self, index: int) -> int:
        """How many failures what is covered of a shard outlives."""
        if self.settings.chain and self.settings.ack != "Tail":
            return min(1, self.depth(index))
        return self.depth(index)

    @property
    def stateless(self) -> bool:
        """Whether workers' copies count."""
        return not self.settings.chain and not self.momentum

    # Failures

    def kill(self, member: str, arrive: int = 0) -> None:
        """A process ends; of what it sent last, so many messages may still arrive."""
        node = self._take(member)
        self.network.inboxes.pop(member, None)
        for wire in list(self.wires):
            if wire.peer.id == member:
                wire.cut(len(wire.up), 0)
            elif wire.own == member:
                wire.end(arrive)
        node.end()

    def _take(self, member: str) -> SimulatedServer | SimulatedWorker:
        return self.servers.pop(member, None) or self.workers.pop(member)

    def crash(self, member: str, arrive: int = 0) -> None:
        """A process is killed, or its machine, where it shares that."""
        found = {m.id: m for m in self.operator.everybody}
        node = found[member].node if member in found else None
        for other in [i for i, m in found.items() if m.node == node] or [member]:
            if self.alive(other):
                self.note_loss(other)
                self.kill(other, arrive)
        self.fail(int(member in found and self._counts(found[member])))

    def suspect(self, member: Member) -> None:
        """The operator takes a member for lost that is not."""
        if member.id not in self.operator.suspected:
            self.note_loss(member.id)
            self.operator.suspected.add(member.id)
            self.fail(int(self._counts(member)))

    def note_loss(self, member: str) -> None:
        index = next((m.index for m in self.operator.heads if m.id == member), None)
        self.lost_workers += member.startswith("worker-")
        if index is not None and member not in self.operator.suspected:
            self._at_loss[member] = self.failures, self.tolerance(index)
            if not self.settings.covers:
                self._note_lag(index)

    def _note_lag(self, index: int) -> None:
        made = {w.me.index: w.batch + 1 for w in self.workers.values()}
        replicas = [self.servers[m.id] for m in self.operator.chain(index)[1:] if self.alive(m.id)]
        for plane in [replica.plane for replica in replicas if replica.plane is not None]:
            for k in np.flatnonzero(plane.shard.layout.slot_bytes):
                for worker, last in made.items():
                    has = batches_of(plane.slots.last[k, worker], plane.slots.window[k, worker])
                    lacks = np.flatnonzero(has[:last] == 0) + 1
                    self.lagging |= {(worker, b) for b in lacks.tolist()}

    def _counts(self, member: Member) -> bool:
        """Whether its loss is one that pushes are promised to outlive."""
        first = member.node == "node-shared"
        return member.role is Role.SERVER or self.stateless or first

    def fail(self, count: int) -> None:
        self.failures += count

    def broken(self, index: int) -> None:
        """Some slots of a shard have no source: that must not happen while a promise holds."""
        held = [p for p, v in self.promises.items() if p[0] == index and self.left(v) >= 0]
        assert not held, ("no source for some slots", held, self.failures)
        self.began_again = True

    def left(self, promise: Promise) -> int:
        return promise.tolerance - (self.failures - promise.failures)

    # What is promised

    def emitted(self, server: SimulatedServer, worker: int, batch: int) -> None:
        """A server says that a worker's batches up to this are covered."""
        lost = self._at_loss.get(server.me.id)
        failures, tolerance = (
            (self.failures, self.tolerance(server.me.index)) if lost is None else lost
        )
        if self.stateless and server.membership is not None:
            tolerance = self._others(server, server.membership, worker) - 1
        elif lost is not None and not tolerance:
            tolerance = -1
        self._emitted[server.me.id, worker, batch] = Promise(failures, tolerance)

    def _others(self, server: SimulatedServer, membership: Membership, worker: int) -> int:
        sender = membership.member(Role.WORKER, worker)
        holders = (*membership.of(Role.WORKER), *membership.chain(server.me.index))
        nodes = {m.failure_domain for m in holders}
        nodes -= {sender.failure_domain} if sender is not None else set()
        return min(self.settings.copies, len(nodes))

    def resumed(self, worker: SimulatedWorker) -> None:
        """A worker knows where it goes on."""
        assert worker.pushes is not None
        assert worker.pushes.lost == worker.pushes.lost.up_to(worker.batch), "it makes it again"
        index, worker.began_at = worker.me.index, worker.batch
        # What past lives had lost of what comes now is made again (`Report.after`).
        again = {(index, b) for w, b in self.reported if w == index and b > worker.batch}
        self.reported -= again if worker.position.after == worker.batch else set()
        self.skipped |= {(index, b) for b in worker.position.skipped}

    def lose(self, server: SimulatedServer, worker: str, batches: list[int]) -> None:
        """A server counts batches as lost that a worker says it cannot give again."""
        sender = self.workers.get(worker)
        index = int(worker.split("-")[1])
        self.reported |= {(index, b) for b in batches} - server.void
        if sender is None or not self.settings.covers:
            return
        own = {(server.me.index, index, b) for b in batches if b > sender.began_at}
        assert own <= self.told, ("forgotten before it was covered", sorted(own - self.told))

    def aligned(self, worker: SimulatedWorker) -> None:
        """A worker goes on: under `Sync` no slot of its copy is further than it is itself."""
        sync = self.settings.consistency == "Sync" and not self.settings.min_replicas
        if worker.pulling is None and sync and worker.batch + 1 not in worker.position.mixed:
            assert worker.copy is not None
            assert worker.copy.last[:, worker.me.index].max() <= worker.batch, "of two steps"

    def mixed(self) -> None:
        """A worker makes a batch of values of two steps: not while copies outlive what was lost."""
        failures, workers = self._calm
        enough = self.failures - failures <= self._outlives and self.lost_workers - workers <= 1
        assert not (enough and self.settings.covers), "a step that nobody has any more"

    def promised(self, server: Member, worker: int, batch: int) -> None:
        """A worker was told so."""
        new = self._emitted[server.id, worker, batch]
        for b in range(1, batch + 1):
            self.told.add((server.index, worker, b))
            if (worker, b) in self.reported | self.skipped or new.tolerance < 0:
                continue
            old = self.promises.setdefault((server.index, worker, b), replace(new))
            if self.left(new) > self.left(old) >= 0:
                self.promises[server.index, worker, b] = replace(new)

    def renew(self) -> None:
        """All is on as many nodes as it should be."""
        for (index, _, _), promise in self.promises.items():
            if self.left(promise) >= 0:
                tolerance = 1 if self.stateless else self.tolerance(index)
                promise.failures, promise.tolerance = self.failures, tolerance

    # Rollbacks

    def save(self) -> None:
        """Take a cut, now that nothing is under way and nothing is missing.

        Not where nobody had what made one step of all shards: who went back there would mix again.
        """
        if any(w.batch + 1 in w.position.mixed for w in self.live_workers):
            return
        self._calm = self.failures, self.lost_workers
        self._outlives = min(1 if self.stateless else self.tolerance(i) for i in range(self.count))
        self.cut = Saved(
            [h.plane.whole(np.arange(len(h.plane.slots.ids))) for h in self.heads if h.plane],
            {w.me.index: w.batch for w in self.live_workers},
            frozenset(self.reported),
            frozenset(self.skipped),
        )

    def load_cut(self, plane: DataPlane, index: int) -> None:
        """Bring a shard back to the cut."""
        if self.cut is None:
            raise RuntimeError("no cut")
        for spec in self.specs:
            plane.add_table(spec)
        state, k, slots = self.cut.shards[index], np.arange(len(plane.slots.ids)), plane.slots
        plane.shard.set_whole(k, state.values, state.steps)
        slots.position[k] = state.position
        slots.last[k], slots.window[k] = state.last[state.vector], state.window[state.vector]
        plane.note_given(k)
        plane.rolled_back(0)
        plane.restored(k)

    def rolled_back(self) -> None:
        """The operator decided so: what came after the cut never was."""
        if self.cut is None:
            raise RuntimeError("no cut")
        batches = self.cut.batches
        self.told = {p for p in self.told if p[2] <= batches[p[1]]}
        self.promises = {p: v for p, v in self.promises.items() if p[2] <= batches[p[1]]}
        self.reported, self.skipped = set(self.cut.reported), set(self.cut.skipped)
        self.lagging = set()
        self.void = {
            (w.me.index, b)
            for w in self.workers.values()
            if w.pushes is not None
            for b in w.pushes.lost.up_to(batches[w.me.index])
        }

    # What is looked at

    def record(self, server: SimulatedServer) -> None:
        """A slot of one version is the same wherever it is."""
        if server.plane is not None:
            self.versions.record(server.me.id, server.plane, server.generation)

    def marks(self, server: SimulatedServer) -> np.ndarray[Any, Any]:
        """How often each slot's blocks have each batch; shape (rows, workers, batches)."""
        plane = server.plane
        if plane is None or not plane.shard.tables:
            return np.zeros((0, WORKERS, BATCHES))
        return plane.shard.tables[0].data.reshape(-1, WORKERS, BATCHES)

    def wrong(self, server: SimulatedServer) -> str | None:
        """Say which weights are not what the applied batches make of them, where that is known."""
        plane = server.plane
        if plane is None or len(plane.shard.tables) < TABLES or self.momentum:
            return None
        if self.reported or self.began_again or self.skipped or self.settings.min_replicas:
            return None
        if server.generation != self.operator.rollback.generation:
            return None  # what it lost and has yet to give up, nobody counts any more
        return self.training.wrong(plane)

    @property
    def may_add_table(self) -> bool:
        workers = self.live_workers
        calm = self.operator.recovery is None
        idle = calm and len(workers) == WORKERS and all(w.idle for w in workers)
        return idle and len(self.specs) == TABLES

    def add_table(self) -> None:
        """Programs declare a third table, which begins with values."""
        self.specs.append(self.training.weights(TABLES))
        self.cut = None  # it has no such table
        for worker in self.live_workers:
            worker.add_tables()

    # Running

    def move(self, chosen: Callable[[Wire], bool], up: int, down: int) -> int:
        """Connect, and let messages arrive."""
        moved = 0
        for wire in list(self.wires):
            if not chosen(wire):
                continue
            there = wire.peer.id in self.servers and self.reaches(wire.own, wire.peer.id)
            if not wire.connected and not wire.closed and there and self.alive(wire.own):
                wire.connect()
                moved += 1
            moved += wire.carry(up, down)
        return moved

    def spin(self, member: str, messages: int = serve.BATCH) -> None:
        if member in self.servers:
            node = self.servers[member]
            node.spin(messages)
        else:
            self.workers[member].spin()
        if self.alive(member) and (self.servers.get(member) or self.workers[member]).ended:
            self.kill(member)

    def round(self) -> int:
        """Everybody gets everything that is under way, and has a turn."""
        moved = self.move(lambda _: True, serve.BATCH, serve.BATCH)
        for member in self.members():
            self.spin(member)
        return moved

    def operate(self, chosen: Callable[[Member], bool] = lambda _: True) -> None:
        """The operator looks at some, decides, and tells everybody it reaches."""
        self.operator.look(chosen)
        self.operator.act(hurry=False)
        for member in self.operator.everybody:
            self.operator.tell(member)

    def until(self, done: Callable[[], bool], rounds: int, dt: float = 0.03) -> bool:
        """Let everything go its way until something is so."""
        for _ in range(rounds):
            if done():
                return True
            self.now += dt
            self.round()
            self.operate()
            self._sweep()
        return done()

    def _sweep(self) -> None:
        """The operator has deleted the pods of those that it took for lost."""
        for member in self.operator.suspected & set(self.members()):
            if member not in {m.id for m in self.operator.everybody}:
                self.kill(member)


def quiet(job: SimulatedJob) -> bool:
    """Whether nothing is under way and everybody is where they should be."""
    status = job.operator
    everybody: Collection[Member] = status.everybody
    return (
        status.initialised
        and status.recovery is None
        and len(status.replicas) == job.count * (job.settings.replicas - 1)
        and all(job.alive(m.id) and status.told.get(m.id) == status.epoch for m in everybody)
        and job.replicated
        and not any(
            (w.came and job.alive(w.own) and not w.closed) or (w.connected and (w.up or w.down))
            for w in job.wires
        )
        and all(w.idle or w.batch >= BATCHES for w in job.live_workers)
    )
