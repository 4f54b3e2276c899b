"""A job whose network, clock and operator are simulated; its servers and workers are the real ones.

`Client` and `Server` are made as ever, with links that hand frames over when they are told to.
What a connection does is what ZeroMQ's do: it keeps order; when it breaks, what was on its way is
lost, what waited in the sender's queue is not, and both ends hear of it. The operator does what
`controller.replicating` and `losing` do, at once or late.
"""

import json
from collections import deque
from collections.abc import Callable, Collection, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from daruma_operator.recovery.plan import plan_slots
from daruma_trainer.agent import Command
from daruma_trainer.contract import (
    SLOTS,
    ContractError,
    Member,
    Membership,
    Report,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    Suspect,
    slots_from_hex,
    slots_to_hex,
)
from daruma_trainer.errors import DarumaError, ReplacedError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import TableSpec, slot_of_blocks
from daruma_trainer.links import Answer
from daruma_trainer.rules import SGD, Add, rule_to_json
from daruma_trainer.server import lifecycle, restoring, serve
from daruma_trainer.server import reporting as server_reporting
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.data import DataPlane, Reply
from daruma_trainer.server.fencing import Fence
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.server.reporting import report_of
from daruma_trainer.server.serve import Server
from daruma_trainer.wire import Frame, Header, Kind, decode_json
from daruma_trainer.worker import client as worker_client
from daruma_trainer.worker import reporting as worker_reporting
from daruma_trainer.worker import sessions as worker_sessions
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.pushes import Update
from daruma_trainer.worker.sessions import Wanted

UID = "uid"
WORKERS = 2
BATCHES = 40
"""Of each worker, at most."""
ROWS = 4
TABLES = 2
"""At first."""
RATE = 0.5
COPIES_SECONDS = 1.0
"""How long the operator waits for workers to say what they have."""
EMPTY_SLOTS = (0, 1023)
"""Of slots without blocks these two are looked at."""
IDS = sorted(
    {*EMPTY_SLOTS, *(int(s) for t in range(TABLES + 1) for s in slot_of_blocks(UID, t, ROWS))}
)


class Everything:
    """Sockets at which the poller saw something."""

    def __contains__(self, _socket: object) -> bool:
        return True


class Wire:
    """A connection from a member to a server: what `links.Link` is."""

    def __init__(self, job: "SimulatedJob", own: str, peer: Member) -> None:
        self.job, self.own, self.peer = job, own, peer
        self.connected = self.closed = self.full = False
        self.up: deque[list[bytes]] = deque()
        self.down: deque[list[bytes]] = deque()
        self.came: deque[list[bytes]] = deque()
        self._events: list[str] = []
        self._pending: dict[int, Answer] = {}
        self._request = 0
        job.wires.append(self)

    # What a Link does

    def request(
        self, header: Header, body: Sequence[Frame], answer: Answer | None, *, patient: bool = False
    ) -> bool:
        self._request += 1
        whole = replace(header, request=self._request, incarnation=self.peer.incarnation)
        if not self.send(whole, body):
            return False
        if answer is not None:
            self._pending[self._request] = answer
        return True

    def send(self, header: Header, body: Sequence[Frame]) -> bool:
        if self.full:
            return False
        self.up.append([header.encode(), *map(bytes, body)])
        return True

    def receive(
        self, ready: Container[object], unasked: Callable[[Any, Header, Sequence[Frame]], None]
    ) -> list[str]:
        while self.came:
            parts = self.came.popleft()
            header = Header.decode(parts)
            if header.incarnation != self.peer.incarnation:
                continue
            answer = self._pending.pop(header.request, None) if header.request else None
            if answer is not None:
                answer(header, parts)
            else:
                unasked(self, header, parts)
        events, self._events = self._events, []
        return events

    def suspect(self, seconds: float) -> Suspect | None:
        return None

    def expire(self, seconds: float, patience: float = 0.0) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.came.clear()
        self._pending.clear()
        if not (self.connected and self.up):
            self.job.wires.remove(self)

    # What the network does

    def connect(self) -> None:
        self.connected = True
        self._events.append("connected")

    def cut(self, lost: int, kept: int) -> None:
        """Break: the first messages on their way are lost; those that had come are read."""
        if not self.connected:
            return
        self.connected = False
        self._events.append("disconnected")
        for _ in range(min(lost, len(self.up))):
            self.up.popleft()
        self.came.extend(list(self.down)[:kept])
        self.down.clear()

    def carry(self, up: int, down: int) -> int:
        """Let so many messages arrive; returns how many did."""
        moved = 0
        node = self.job.servers.get(self.peer.id)
        while self.connected and self.up and up and node is not None:
            up -= 1
            moved += 1
            node.inbox.append((self.own.encode(), self.up.popleft()))
        while self.connected and self.down and down and not self.closed:
            down -= 1
            moved += 1
            self.came.append(self.down.popleft())
        if self.closed and not self.up and self in self.job.wires:
            self.job.wires.remove(self)
        return moved


class Door:
    """What `server.door.Door` is."""

    def __init__(self, job: "SimulatedJob", me: Identity) -> None:
        self.job, self.me = job, me
        self.members: set[str] = set()
        self.allowed = 0
        """How many messages the loop gets."""

    @property
    def workers(self) -> list[str]:
        return sorted(m for m in self.members if m.startswith("worker-"))

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        node = self.job.servers[self.me.id]
        if not self.allowed or not node.inbox:
            return None
        self.allowed -= 1
        return node.inbox.popleft()

    def send(self, identity: bytes, header: Header, body: Sequence[Frame]) -> bool:
        for wire in self.job.wires:
            there = wire.connected and not wire.closed
            if there and (wire.own, wire.peer.id) == (identity.decode(), self.me.id):
                wire.down.append([header.encode(), *map(bytes, body)])
                return True
        return False

    def close(self) -> None:
        pass


class SimulatedServer(Server):
    """A server's loop, turned by hand."""

    _door: Any

    def __init__(self, job: "SimulatedJob", member: Member) -> None:
        super().__init__(Identity("ns", "job", Role.SERVER, 0, member.incarnation, ""))
        self.job = job
        self.inbox: deque[tuple[bytes, list[bytes]]] = deque()

    def spin(self, messages: int = serve.BATCH) -> None:
        """Go once round the loop, as `run` does."""
        self._door.allowed = messages
        self._fence.turn()
        self._run_inbox()
        self._serve()
        self._siblings.turn({}, self._from_sibling)
        self.replicator.turn(Everything())
        self._after()
        self.job.record(self)

    def obey(self, body: Membership | Restore) -> None:
        """Take an operator's command at the next turn."""
        kind = "membership" if isinstance(body, Membership) else "restore"
        self.post(partial(self._obey, Command(kind, body)))

    @property
    def ended(self) -> bool:
        return self._exit is not None

    @property
    def plane(self) -> DataPlane | None:
        return self.life.plane

    @property
    def epoch(self) -> int:
        return self._epoch

    def end(self) -> None:
        self._close()

    def _dispatch(self, identity: bytes, frames: Sequence[Frame]) -> None:
        super()._dispatch(identity, frames)
        self.job.record(self)

    def _reply(self, identity: bytes, request: Header, reply: Reply) -> None:
        if request.kind is Kind.RESYNC and reply.kind is Kind.OK:
            worker = int(identity.decode().split("-")[1])
            lost = decode_json(reply.body[0])["lost"]
            self.job.reported |= {(worker, b) for b in lost}
        super()._reply(identity, request, reply)

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        if kind is Kind.COVERED:
            worker = int(member.split("-")[1])
            self.job.emitted(self, worker, int(decode_json(body[0])["batch"]))
        return super().tell(member, kind, body)


class SimulatedWorker(Client):
    """A worker's I/O thread and program, turned by hand."""

    def __init__(self, job: "SimulatedJob", member: Member) -> None:
        super().__init__(
            Identity("ns", "job", Role.WORKER, member.index, member.incarnation, "")
        )
        self.job = job
        self.begun = False
        self.pulling: Wanted | None = None
        """What the program waits for."""
        self.patient = False
        """Whether it waits for servers that are away, too."""

    @property
    def idle(self) -> bool:
        return self.begun and self.resumed and self.pulling is None and self.batch < BATCHES

    @property
    def ended(self) -> bool:
        return isinstance(self.failure, ReplacedError)

    def spin(self) -> None:
        """Go once round the I/O loop; then let the program look."""
        with self.lock:
            try:
                self._turn({})
            except DarumaError as error:
                self.failure = error
            except ContractError:
                pass
        if self.failure is not None and not self.ended:
            raise self.failure
        self._program()

    def step(self) -> None:
        """The program pushes a batch and waits for what follows from it."""
        sync = self.job.settings.consistency == "Sync"
        self.push(self.job.updates(self.me.index, self.batch + 1), self.generation)
        self.pulling = self.pull(self.batch if sync else 0)

    def refresh(self) -> None:
        """Pull the newest values."""
        self.pulling = self.pull(0)

    def add_tables(self) -> None:
        """Declare what tables there are by now, and wait for them."""
        for spec in self.job.specs[len(self._live.copy.specs) :]:
            self.add_table(spec, self.job.initial(spec))
        self.announce()
        self.pulling, self.patient = self.pull(0), True

    def end(self) -> None:
        if self._sessions is not None:
            self._sessions.close()
        self._context.destroy(linger=0)

    def _program(self) -> None:
        if self.membership is None or self.ended:
            return
        if not self.begun:
            self.begun = True
            self.add_tables()
        if self.pulling is None:
            return
        if not self.resumed:
            if not self.pulling.missing.any() and self.resume(self.generation):
                self.pulling, self.patient = None, False
            return
        missing = self.pulling.missing & ~(self.away() & (not self.patient))
        if not missing.any() and (self.patient or not self.crowded):
            self.pulling, self.patient = None, False

    def _unasked(self, link: Any, header: Header, frames: Sequence[Frame]) -> None:
        if header.kind is Kind.COVERED:
            batch = int(decode_json(frames[1])["batch"])
            self.job.promised(link.peer, self.me.index, batch)
        super()._unasked(link, header, frames)


@dataclass(slots=True)
class Promise:
    """That a push outlives so many failures more."""

    failures: int
    """How many there had been."""
    tolerance: int


class Operator:
    """Status and decisions; looks and tells when it is told to."""

    def __init__(self, job: "SimulatedJob") -> None:
        self.job = job
        self.epoch = 1
        self.members: dict[tuple[Role, int], Member] = {}
        self.replicas: tuple[Member, ...] = ()
        self.initialised = False
        self.recovery: int | None = None
        self.planned = 0
        self.since = 0.0
        """When the last loss was seen."""
        self.seen: dict[str, Report] = {}
        self.suspected: set[str] = set()
        self.told: dict[str, int] = {}

    @property
    def head(self) -> Member:
        return self.members[Role.SERVER, 0]

    @property
    def everybody(self) -> list[Member]:
        return [*self.members.values(), *self.replicas]

    @property
    def membership(self) -> Membership:
        return Membership(
            UID, "ns", "job", self.epoch, 1, WORKERS, tuple(self.members.values()),
            self.job.settings, self.initialised, recovery=self.recovery, replicas=self.replicas,
        )  # fmt: skip

    def begin(self) -> None:
        for role, count in ((Role.SERVER, 1), (Role.WORKER, WORKERS)):
            for index in range(count):
                self.members[role, index] = self._make(role, index)
        self._addresses()

    def look(self, chosen: Callable[[Member], bool]) -> None:
        """Read the reports of some members."""
        for member in self.everybody:
            if chosen(member) and self.job.reaches("operator", member.id):
                report = self.job.report(member)
                if report is not None:
                    self.seen[member.id] = report

    def act(self, *, hurry: bool = False) -> None:
        """Decide once. `hurry`: wait no longer for workers that said nothing."""
        self._addresses()
        self._keep_up()
        self._lose()
        head = self.seen.get(self.head.id)
        if head is None:
            return
        if not self.initialised:
            if head.initialised:
                self.initialised = True
                self.epoch += 1
            return
        if self.recovery is not None:
            self._recover(head, hurry=hurry)
        else:
            self._replicate()

    def tell(self, member: Member) -> None:
        """Give a member the newest membership."""
        if self.told.get(member.id) == self.epoch or not self.job.reaches("operator", member.id):
            return
        self.told[member.id] = self.epoch
        if member.id in self.job.servers:
            self.job.servers[member.id].obey(self.membership)
        elif member.id in self.job.workers:
            self.job.workers[member.id]._command(Command("membership", self.membership))

    def gone(self, member: Member) -> bool:
        return member.id in self.suspected or not self.job.alive(member.id)

    def _make(self, role: Role, index: int) -> Member:
        node = self.job.node_of(role, index, self.epoch)
        member = Member(role, index, self.epoch, f"pod-{role}-{index}-{self.epoch}", None, node)
        self.job.start(member)
        return member

    def _addresses(self) -> None:
        """Members that were made in an earlier pass have an address by now."""
        new = [m for m in self.everybody if m.address is None]
        if not new:
            return
        addressed = {m.id: replace(m, address=f"{m.id}:7070") for m in new}
        self.members = {seat: addressed.get(m.id, m) for seat, m in self.members.items()}
        self.replicas = tuple(addressed.get(m.id, m) for m in self.replicas)
        self.epoch += 1

    def _keep_up(self) -> None:
        kept = tuple(
            m
            for m in self.replicas
            if not self.gone(m) and m.incarnation > self.head.incarnation
        )
        if kept != self.replicas:
            self.replicas = kept
            self.epoch += 1

    def _lose(self) -> None:
        lost = [m for m in self.members.values() if self.gone(m)]
        if not lost:
            return
        self.epoch += 1
        self.recovery, self.planned = self.recovery or self.epoch, 0
        self.since = self.job.now
        for member in lost:
            chosen = self._candidate(member) if member.role is Role.SERVER else None
            if chosen is not None:
                self.replicas = tuple(m for m in self.replicas if m != chosen)
            self.members[member.role, member.index] = chosen or self._make(
                member.role, member.index
            )

    def _candidate(self, lost: Member) -> Member | None:
        for member in sorted(self.replicas, key=lambda m: m.incarnation):
            report = self.seen.get(member.id)
            if member.address is None or report is None or not self.job.alive(member.id):
                continue
            if report.follows is not None or not self.job.settings.chain:
                return member
        return None

    def _recover(self, head: Report, *, hurry: bool) -> None:
        if head.epoch < self.epoch:
            return
        if head.state == "Ready":
            self.recovery = None
            self.epoch += 1
            return
        if head.restore is not None and head.restore.missing and self.planned == self.epoch:
            self.epoch += 1
            return
        if self.planned == self.epoch or head.state != "Restoring":
            return
        workers = [m for m in self.members.values() if m.role is Role.WORKER]
        asked = [*workers, self.head]
        reports = {m.id: self.seen[m.id] for m in asked if m.id in self.seen}
        since = self.recovery or 0
        copies = {i: r.copies for i, r in reports.items() if r.epoch >= since and r.copies}
        silent = [m for m in workers if m.id not in copies]
        if any(self.job.has_copy(m) for m in silent):
            if not hurry and self.job.now - self.since < COPIES_SECONDS:
                return
            self.job.fail(len(silent))
        kinds = {SourceKind.REPLICA, SourceKind.PEER}
        plan = plan_slots(range(SLOTS), kinds, copies, stored=False, replica=self.head.id)
        sources = plan.sources
        if plan.unsourced:
            self.job.broken("no source for some slots")
            found = {s for source in sources for s in slots_from_hex(source.slots)}
            rest = [s for s in range(SLOTS) if s not in found]
            sources = (*sources, Source(SourceKind.INITIAL, slots_to_hex(rest)))
        self.planned = self.epoch
        order = Restore(since, self.epoch, self.head.id, sources)
        self.job.servers[self.head.id].obey(order)

    def _replicate(self) -> None:
        while 1 + len(self.replicas) < self.job.settings.replicas:
            self.epoch += 1
            self.replicas = (*self.replicas, self._make(Role.SERVER, 0))


class SimulatedJob:
    """One server with its replicas, two workers, the network between them, and the operator."""

    def __init__(self, settings: Settings, momentum: float, *, shared: bool) -> None:
        self.settings, self.momentum, self.shared = settings, momentum, shared
        self.now = 100.0
        self.wires: list[Wire] = []
        self.servers: dict[str, SimulatedServer] = {}
        self.workers: dict[str, SimulatedWorker] = {}
        self.parted: set[frozenset[str]] = set()
        self.specs = [self._spec(0, BATCHES * WORKERS, Add()), self._weights()]
        self.failures = 0
        self.promises: dict[tuple[int, int], Promise] = {}
        self.reported: set[tuple[int, int]] = set()
        """(worker, batch) that a RESYNC was told are lost."""
        self.versions: dict[tuple[int, ...], list[bytes]] = {}
        """(slot, tables, lineage, position): what a slot of that version is."""
        self._last: dict[str, bytes] = {}
        self._emitted: dict[tuple[str, int, int], Promise] = {}
        self._at_loss: dict[str, tuple[int, bool]] = {}
        """By head that was lost: failures before, and whether all its replicas had joined."""
        self._stack = ExitStack()
        self._patch()
        self.operator = Operator(self)
        self.operator.begin()

    def close(self) -> None:
        """Give back what the processes hold."""
        for node in (*self.servers.values(), *self.workers.values()):
            node.end()
        self._stack.close()

    def _patch(self) -> None:
        clock = SimpleNamespace(monotonic=lambda: self.now)

        def wire(_context: Any, own: str, _token: str, peer: Member, _poller: Any) -> Wire:
            return Wire(self, own, peer)

        def idle(*_args: Any) -> SimpleNamespace:
            nothing: Callable[..., None] = lambda *_: None  # noqa: E731
            return SimpleNamespace(close=nothing, follow=nothing, tick=nothing, report=())

        threads = SimpleNamespace(
            Condition=worker_client.threading.Condition,
            Thread=lambda **_: SimpleNamespace(start=lambda: None),
        )
        patches: list[tuple[Any, str, Any]] = [
            (worker_sessions, "Link", wire),
            (serve, "Link", wire),
            (serve, "Door", lambda me, _context, _poller: Door(self, me)),
            (serve, "Guests", idle),
            (serve, "Agent", idle),
            (worker_client, "Agent", idle),
            (worker_client, "threading", threads),
            (serve, "Fence", partial(Fence, clock=clock.monotonic)),
            (serve, "Replicator", partial(Replicator, clock=clock.monotonic)),
            (lifecycle, "Background", lambda _post: ByHand()),
        ]
        timed = (
            worker_sessions, worker_client, worker_reporting, serve, lifecycle, restoring,
            server_reporting,
        )  # fmt: skip
        patches += [(module, "time", clock) for module in timed]
        for module, name, value in patches:
            self._stack.enter_context(mock.patch.object(module, name, value))

    # What is trained

    def _spec(self, number: int, cols: int, rule: Any) -> TableSpec:
        return TableSpec(number, f"t{number}", (ROWS, cols), 1, rule_to_json(rule))

    def _weights(self) -> TableSpec:
        return self._spec(1, 3, SGD(momentum=self.momentum))

    def initial(self, spec: TableSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
        values = np.zeros((spec.rows, spec.cols), np.float32)
        return values if spec.id == 0 else values + np.float32(spec.id)

    def updates(self, worker: int, batch: int) -> tuple[Update, ...]:
        """What a batch of a worker is: a mark of its own in the first table, and gradients."""
        mark = np.zeros((ROWS, self.specs[0].cols), np.float32)
        mark[:, worker * BATCHES + batch - 1] = 1.0
        return (Update(0, 0.0, mark), *(self._gradient(s, worker, batch) for s in self.specs[1:]))

    def _gradient(self, spec: TableSpec, worker: int, batch: int) -> Update:
        base = np.arange(spec.rows * spec.cols, dtype=np.float32).reshape(spec.rows, spec.cols)
        return Update(spec.id, RATE, np.cos(base + np.float32(batch + worker / 3)))

    # Members

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
    def head(self) -> SimulatedServer | None:
        return self.servers.get(self.operator.head.id)

    @property
    def replicated(self) -> bool:
        """Whether all replicas there should be have joined (but where they need not)."""
        status = self.operator
        chain = [status.head, *sorted(status.replicas, key=lambda m: m.incarnation)]
        if len(chain) < self.settings.replicas or any(status.gone(m) for m in chain):
            return False
        if self.stateless:
            return True
        nodes = [self.servers[m.id] for m in chain]
        known = all(node.epoch == status.epoch for node in nodes)
        return known and all(node.replicator.follows is not None for node in nodes[1:])

    @property
    def stateless(self) -> bool:
        """Whether workers' copies count."""
        return not self.settings.chain and not self.momentum

    # Failures

    def kill(self, member: str) -> None:
        """A process ends; what it sent may still arrive."""
        node = self.servers.pop(member, None) or self.workers.pop(member)
        for wire in list(self.wires):
            if wire.peer.id == member:
                wire.cut(len(wire.up), 0)
        node.end()

    def crash(self, member: str) -> None:
        """A process is killed, or its machine, where it shares that."""
        found = {m.id: m for m in self.operator.everybody}
        node = found[member].node if member in found else None
        for other in [i for i, m in found.items() if m.node == node] or [member]:
            if self.alive(other):
                self.note_loss(other)
                self.kill(other)
        self.fail(int(member in found and self._counts(found[member])))

    def suspect(self, member: Member) -> None:
        """The operator takes a member for lost that is not."""
        if member.id not in self.operator.suspected:
            self.note_loss(member.id)
            self.operator.suspected.add(member.id)
            self.fail(int(self._counts(member)))

    def note_loss(self, member: str) -> None:
        if member == self.operator.head.id and member not in self.operator.suspected:
            self._at_loss[member] = self.failures, self.replicated

    def _counts(self, member: Member) -> bool:
        """Whether its loss is one that pushes are promised to outlive."""
        first = member.node == "node-shared"
        return member.role is Role.SERVER or self.stateless or first

    def fail(self, count: int) -> None:
        self.failures += count

    def broken(self, why: str) -> None:
        """State was lost: that must not happen while a promise holds."""
        held = [p for p, promise in self.promises.items() if self.left(promise) >= 0]
        assert not held, (why, held, self.failures)

    def left(self, promise: Promise) -> int:
        return promise.tolerance - (self.failures - promise.failures)

    # What is promised

    def emitted(self, server: SimulatedServer, worker: int, batch: int) -> None:
        """A server says that a worker's batches up to this are covered."""
        lost = self._at_loss.get(server.me.id)
        failures, replicated = (self.failures, self.replicated) if lost is None else lost
        tolerance = 1 if replicated else 0
        if self.stateless and server.membership is not None:
            tolerance = self._others(server.membership, worker) - 1
        elif lost is not None and not replicated:
            tolerance = -1
        self._emitted[server.me.id, worker, batch] = Promise(failures, tolerance)

    def _others(self, membership: Membership, worker: int) -> int:
        sender = membership.member(Role.WORKER, worker)
        nodes = {m.failure_domain for m in (*membership.members, *membership.replicas)}
        nodes -= {sender.failure_domain} if sender is not None else set()
        return min(self.settings.copies, len(nodes))

    def promised(self, server: Member, worker: int, batch: int) -> None:
        """A worker was told so."""
        new = self._emitted[server.id, worker, batch]
        for b in range(1, batch + 1):
            if (worker, b) in self.reported or new.tolerance < 0:
                continue
            old = self.promises.setdefault((worker, b), replace(new))
            if self.left(new) > self.left(old) >= 0:
                self.promises[worker, b] = replace(new)

    def renew(self, tolerance: int) -> None:
        """All is on as many nodes as it should be."""
        for promise in self.promises.values():
            if self.left(promise) >= 0:
                promise.failures, promise.tolerance = self.failures, tolerance

    # What is looked at

    def record(self, server: SimulatedServer) -> None:
        """A slot of one version is the same wherever it is."""
        plane = server.plane
        if plane is None or len(plane.shard.tables) < TABLES:
            return
        slots, tables = plane.slots, plane.shard.tables
        arrays = [a for t in tables for a in (t.data, *t.state, t.steps)]
        given = slots.ready & plane.given
        parts = (given, slots.lineage, slots.position, slots.last, slots.window)
        arrays += [a[IDS] for a in parts]
        now = b"".join(a.tobytes() for a in arrays)
        if self._last.get(server.me.id) == now:
            return
        self._last[server.me.id] = now
        for k in IDS:  # one server: slots are their own indices
            if given[k]:
                self._compare(plane, k)

    def _compare(self, plane: DataPlane, k: int) -> None:
        slots = plane.slots
        version = int(slots.lineage[k]), int(slots.position[k])
        key = (k, len(plane.shard.tables), *version)
        content = [slots.last[k].tobytes(), slots.window[k].tobytes()]
        for table in plane.shard.tables:
            rows = slice(*table.layout.slot_rows[k : k + 2].tolist())
            blocks = slice(*table.layout.slot_blocks[k : k + 2].tolist())
            content += [a[rows].tobytes() for a in (table.data, *table.state)]
            content.append(table.steps[blocks].tobytes())
        known = self.versions.setdefault(key, content)
        if known != content:
            raise AssertionError(f"two states of slot {key}: {known} {content}")

    def marks(self, server: SimulatedServer) -> np.ndarray[Any, Any]:
        """How often each slot's blocks have each batch; shape (rows, workers, batches)."""
        plane = server.plane
        if plane is None or not plane.shard.tables:
            return np.zeros((0, WORKERS, BATCHES))
        return plane.shard.tables[0].data.reshape(-1, WORKERS, BATCHES)

    @property
    def may_add_table(self) -> bool:
        workers = self.live_workers
        idle = len(workers) == WORKERS and all(w.idle for w in workers)
        return idle and len(self.specs) == TABLES

    def add_table(self) -> None:
        """Programs declare a third table, which begins with values."""
        self.specs.append(self._spec(TABLES, 3, SGD(momentum=self.momentum)))
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
        return done()


def quiet(job: SimulatedJob) -> bool:
    """Whether nothing is under way and everybody is where they should be."""
    status = job.operator
    everybody: Collection[Member] = status.everybody
    return (
        status.initialised
        and status.recovery is None
        and len(status.replicas) == job.settings.replicas - 1
        and all(job.alive(m.id) and status.told.get(m.id) == status.epoch for m in everybody)
        and job.replicated
        and not any(w.came or (w.connected and (w.up or w.down)) for w in job.wires)
        and all(w.idle or w.batch >= BATCHES for w in job.live_workers)
    )
