"""The real code of servers, saves and recoveries, without sockets and processes.

Four `DataPlane`s hold one training run's tables as servers do, placed by `contract.place`. Any
number of ways to save look on at once, each with the servers' own `Saver` or `Cuts` and a store of
its own; a lost server comes back through the real `Restorer`, into a new plane. This is the only
module of the benchmark that knows how those are made.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.arms import SERVERS, Cost, Saving, Strategy
from daruma_trainer.bench.rework.memory import MemoryStore
from daruma_trainer.bench.rework.problems import Problem, Values
from daruma_trainer.bench.rework.updates import Arms
from daruma_trainer.checkpoint.manifest import Cut, newest_cut
from daruma_trainer.checkpoint.reading import Unread
from daruma_trainer.contract import (
    Member,
    Membership,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    slots_to_hex,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints, TableSpec, choose_block_rows
from daruma_trainer.rules import rule_to_json
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.cuts import FIRST, Cuts
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.server.saving import Saver
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import Frame, Header, Kind, Push, TablePush, encode_push, mask_of
from daruma_trainer.worker.copies import HostCopy

WORKER = "worker-0-1"


def membership(uid: str, saving: Saving | None = None, *, initialised: bool = False) -> Membership:
    """A job of four servers and a worker under Sync, with one way to save."""
    members = [Member(Role.SERVER, i, 1, f"server-{i}", f"host:{7000 + i}") for i in range(SERVERS)]
    members.append(Member(Role.WORKER, 0, 1, "worker-0", "host:8000"))
    full = saving is not None and saving.strategy is Strategy.FULL
    settings = Settings(
        consistency="Sync",
        store="file:///memory",
        every=0 if saving is None else saving.every,
        fraction=1.0 if saving is None else saving.fraction,
        selection="Priority" if saving is None else saving.selection.value,
        cuts=full,
        running=not full,
    )
    return Membership(
        uid, "bench", "rework", 1, SERVERS, 1, tuple(members), settings, initialised=initialised
    )


def specs(problem: Problem) -> list[TableSpec]:
    """The problem's tables, cut into blocks as a job's are."""
    return [
        TableSpec(
            i, t.name, (t.rows, t.cols), choose_block_rows(t.rows, t.cols, SERVERS),
            rule_to_json(t.rule),
        )
        for i, t in enumerate(problem.tables)
    ]  # fmt: skip


def even(problem: Problem) -> bool:
    """Whether all blocks are equally large, so that a choice by distance needs no sizes."""
    pairs = zip(specs(problem), problem.tables, strict=True)
    return len({(spec.block_rows * table.cols, table.rule.name) for spec, table in pairs}) == 1


class Servers:
    """One training run on real shards."""

    def __init__(self, uid: str, problem: Problem, values: Values) -> None:
        self.uid, self.problem = uid, problem
        self.specs = specs(problem)
        self.planes = [DataPlane(membership(uid), i, 1) for i in range(SERVERS)]
        for plane in self.planes:
            add_tables(plane, self.specs)
            layout = plane.shard.layout.tables
            k = np.arange(len(plane.slots.ids))
            plane.shard.set_values(
                k, {i: v[0][layout[i].rows].reshape(-1) for i, v in enumerate(values)}
            )
            plane.note_given(k)
            plane.slots.state[:] = SlotState.READY
            plane.slots.lineage[:] = 1
            plane.note_given(k)
        self.frames: list[list[Frame]] = []
        """The last push, a server at a time, as it would be sent."""

    def push(self, batch: int, pushes: Values) -> None:
        """Apply a step's push to all shards."""
        self.frames = []
        for plane in self.planes:
            k = np.arange(len(plane.slots.ids))
            parts = [
                TablePush(
                    i,
                    self.problem.lr,
                    np.ascontiguousarray(p[0][plane.shard.layout.tables[i].rows]),
                )
                for i, p in enumerate(pushes)
            ]
            if problem := plane.shard.check(parts, k):
                raise BenchError(f"{self.problem.name}: the servers refuse its push: {problem}")
            plane.shard.apply(parts, k, k)
            plane.slots.advance(k, 0, batch, batch)
            plane.updates += 1
            plane.steps.refresh()
            mask = mask_of(plane.slots.ids)
            push = Push(0, batch, batch, 1, batch - 1, mask, tuple(parts))
            self.frames.append(encode_push(push))

    def push_again(self, plane: DataPlane, server: int) -> None:
        """Send the last push to the successor of a server: its worker still has it."""
        header = Header(Kind.PUSH, 0, 2, plane.incarnation)
        reply = plane.push(WORKER.encode(), header, [header.encode(), *self.frames[server]])
        if reply is None or reply.kind is not Kind.ACK:
            raise BenchError(f"server {server} does not take a push again: {reply}")

    def state(self) -> Arms:
        """Return all that the servers hold, as one arm."""
        return state_of(self.problem, self.planes)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.shard.nbytes for p in self.planes)


def add_tables(plane: DataPlane, tables: list[TableSpec]) -> None:
    """Make the tables on a server; BenchError if it refuses one."""
    for spec in tables:
        if plane.add_table(spec) is not None:
            raise BenchError(f"table {spec.name} was refused")


def state_of(problem: Problem, planes: list[DataPlane]) -> Arms:
    """Gather what servers hold into one arm."""
    arms = Arms([], [], [])
    for i, table in enumerate(problem.tables):
        shape = (1, table.rows, table.cols)
        states = len(planes[0].shard.tables[i].state)
        arms.values.append(np.zeros(shape, np.float32))
        arms.moments.append(tuple(np.zeros(shape, np.float32) for _ in range(states)))
        arms.steps.append(np.zeros(shape[:2], np.int64))
    for plane in planes:
        put(arms, plane)
    return arms


def put(arms: Arms, plane: DataPlane) -> None:
    """Overwrite what one server holds in all of the arms."""
    for i, table in enumerate(plane.shard.tables):
        rows = table.layout.rows
        arms.values[i][:, rows] = table.data
        for array, moment in zip(arms.moments[i], table.state, strict=True):
            array[:, rows] = moment
        arms.steps[i][:, rows] = np.repeat(table.steps, np.diff(table.layout.block_starts))


class Peer:
    """A worker's host copy, by the worker's own code."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._copy = HostCopy(servers.uid, SERVERS, 1)
        for spec in servers.specs:
            self._copy.add(spec)
        self._copy.arrange()

    def pull(self) -> None:
        """Take all slots as they are now."""
        for group in self._copy.groups:
            plane = self._servers.planes[group.server]
            k = plane.slots.index_of(np.flatnonzero(group.mask))
            self._copy.take(plane.state(k, len(self._servers.specs)))

    @property
    def copy(self) -> HostCopy:
        """What was pulled."""
        return self._copy

    @property
    def nbytes(self) -> int:
        """Bytes that the worker keeps."""
        return sum(d.nbytes for d in self._copy.data)


class Saves:
    """One way to save, on all servers of a run, and to bring them back."""

    def __init__(self, servers: Servers, saving: Saving) -> None:
        self.saving = saving
        self.store = MemoryStore()
        self.held_up = 0.0
        """Seconds of CPU of the serve loop: choosing and copying."""
        self.background = 0.0
        """Seconds of CPU of the store's thread."""
        self._first = (0, 0)
        """Bytes of blocks and of manifests that the first save wrote."""
        self._servers = servers
        self._store_thread = ByHand()
        self._membership = membership(servers.uid, saving)
        self._savers = [
            Saver(plane, self.store, self._store_thread, self._membership, i)
            for i, plane in enumerate(servers.planes)
        ]
        full = saving.strategy is Strategy.FULL
        self._cuts = [self._make_cuts(i) for i in range(SERVERS)] if full else []

    def begin(self) -> None:
        """Save the initial values: manifest 0, or the first cut."""
        errors: list[str | None] = []
        for cuts in self._cuts:
            cuts.take(FIRST)
        for saver in self._savers if not self._cuts else []:
            saver.save_all("running", "", lambda _written, error: errors.append(error))
        self._work()
        if any(errors):
            raise BenchError(f"the first save failed: {errors}")
        self._first = (self.store.data, self.store.manifests)

    def tick(self) -> None:
        """After a step: save what is due."""
        # Another way to save may have measured these blocks, and marked them as unchanged.
        for plane in self._servers.planes:
            for table in plane.shard.tables:
                table.changed[:] = True
        began = time.process_time()
        for part in self._cuts or self._savers:
            part.tick()
        for saver in self._savers:
            while saver.pending:
                saver.work(idle=True)
        self.held_up += time.process_time() - began
        self._work()
        if errors := [saver.error for saver in self._savers if saver.error]:
            raise BenchError(f"a save under {self.saving.name} failed: {errors[0]}")

    @property
    def cost(self) -> Cost:
        """What it has cost since the first save; the steps are left to the caller."""
        data, manifests = self._first
        return Cost(
            0, self.store.data - data, self.store.manifests - manifests,
            self.held_up, self.background, self.memory,
        )  # fmt: skip

    @property
    def memory(self) -> int:
        """Bytes of arrays that savers keep between saves: the running checkpoint, and buffers."""
        return sum(saver.memory for saver in self._savers)

    def restore(self, server: int, peer: Peer | None = None) -> DataPlane:
        """Bring one server back from the running checkpoint, or from a peer with its moments."""
        plane, restorer, asked = self._successor(server)
        every = slots_to_hex(plane.slots.ids.tolist())
        sources = [Source(SourceKind.RUNNING_CHECKPOINT, every)]
        if peer is not None:
            add_tables(plane, self._servers.specs)
            sources.insert(0, Source(SourceKind.PEER, every, member=WORKER))
        restorer.begin(Restore(1, 2, _successor(server).id, tuple(sources)))
        if peer is not None:
            for ids, number in asked:
                for state in peer.copy.give(mask_of(ids)):
                    restorer.on_copy(WORKER, number, state)
        self._work()
        report = restorer.report
        if report is None or not report.done or report.damaged:
            raise BenchError(
                f"server {server} did not come back under {self.saving.name}: {report}"
            )
        return plane

    def roll_back(self) -> list[DataPlane]:
        """Bring all servers back to the newest cut."""
        found = newest_cut(self.store, self._membership.prefix)
        if found is None:
            raise BenchError(f"{self.saving.name} has no cut")
        planes: list[DataPlane] = []
        outcomes: list[Cut | Unread] = []
        for server in range(SERVERS):
            plane, restorer, _ = self._successor(server)
            restorer.load_cut(found[0], outcomes.append)
            planes.append(plane)
        self._work()
        if len(outcomes) != SERVERS or any(isinstance(o, Unread) for o in outcomes):
            raise BenchError(f"the rollback to {found[0]} failed: {outcomes}")
        return planes

    def _work(self) -> None:
        self.background += seconds_of(self._store_thread.run)

    def _successor(self, server: int) -> tuple[DataPlane, Restorer, list[tuple[Ints, int]]]:
        member = membership(self._servers.uid, self.saving, initialised=True)
        plane = DataPlane(member, server, 2)
        asked: list[tuple[Ints, int]] = []

        def fetch(_member: str, ids: Ints, number: int) -> bool:
            asked.append((ids, number))
            return True

        def complete() -> None:
            plane.restored(np.arange(len(plane.slots.ids)))

        restorer = Restorer(
            plane,
            self.store,
            self._store_thread,
            member.prefix,
            _successor(server),
            fetch,
            complete,
        )
        return plane, restorer, asked

    def _make_cuts(self, index: int) -> Cuts:
        def tell(other: int, message: dict[str, Any]) -> None:
            self._cuts[other].receive(message, 0)

        plane = self._servers.planes[index]
        saver, member = self._savers[index], self._membership
        return Cuts(plane, saver, self.store, self._store_thread, index, tell, member)


def _successor(server: int) -> Identity:
    return Identity("bench", "rework", Role.SERVER, server, 2, "")


def seconds_of(work: Callable[[], None]) -> float:
    """Seconds of CPU of something."""
    began = time.process_time()
    work()
    return time.process_time() - began
