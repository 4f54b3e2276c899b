"""A worker's host copy of the parameters: what it last pulled, slot by slot.

It is the source of every gradient, and the freshest copy of a lost slot (source `peer`): a slot's
values travel with its version and applied vector, so each slot here is exact by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.contract import SLOTS, Copies, group_versions, place
from daruma_trainer.layout import Floats, Ints, ShardLayout, TableSpec
from daruma_trainer.wire import (
    BITMAP,
    ORIGIN,
    Frame,
    MalformedError,
    Slots,
    State,
    from_bitmap,
    mask_of,
    split_slots,
)
from daruma_trainer.worker.previous import Previous


@dataclass(frozen=True, slots=True)
class Group:
    """Slots of one server that fit one message."""

    server: int
    mask: Slots
    layout: ShardLayout


class HostCopy:
    """All tables in their own shape, with the version and applied vector of each slot."""

    def __init__(
        self, uid: str, servers: int, workers: int, *, keeps_for: int | None = None
    ) -> None:
        """`keeps_for`: the worker whose copy it is, if it keeps what a step overwrites."""
        self._uid = uid
        self._servers = servers
        self.owner: Ints = np.array(place(uid, servers))
        self.servers: list[int] = np.unique(self.owner).tolist()
        """Those that own slots: of very many some have none."""
        self.specs: list[TableSpec] = []
        self.data: list[Floats] = []
        """(rows, cols) of each table."""
        self.lineage: Ints = np.zeros(SLOTS, np.int64)
        self.position: Ints = np.zeros(SLOTS, np.int64)
        self.last: Ints = np.zeros((SLOTS, workers), np.int64)
        self.window: NDArray[np.uint64] = np.full((SLOTS, workers), (1 << 64) - 1, np.uint64)
        self.tables: Ints = np.zeros(SLOTS, np.int64)
        """How many tables each slot was pulled with."""
        self.whole: Ints = np.zeros((SLOTS, 2), np.int64)
        """(lineage, position) as of which each slot has all that its server had of it. Pulls that
        lack a table which this worker has yet to declare are newer, and have no more of that."""
        self.groups: list[Group] = []
        self.previous = None if keeps_for is None else Previous(self, keeps_for)
        self._versions: tuple[bytes, tuple[Copies, ...]] = b"", ()
        self._moved: dict[int, float] = {}
        """By a message's first slot: a running mean of how far its slots moved (L2) from one pull
        to the next."""

    def add(self, spec: TableSpec) -> None:
        """Make room for a table; `arrange` once after the last."""
        self.specs.append(spec)
        self.data.append(np.zeros((spec.rows, spec.cols), np.float32))

    def arrange(self) -> None:
        """Compute which slots go into one message."""
        self.groups = []
        for server in range(self._servers):
            whole = ShardLayout(self._uid, self.specs, np.flatnonzero(self.owner == server))
            self.groups += [
                Group(server, mask_of(part), ShardLayout(self._uid, self.specs, part))
                for part in split_slots(whole)
            ]

    def take(self, state: State, *, partial: bool = False) -> Slots:
        """Overwrite slots by what a server sent; MalformedError if sizes differ. Returns which.

        `partial`: the server has values of more tables than this worker declared.
        """
        group = self._group(state.slots)
        if self.previous is not None:
            self.previous.keep(state, group)
        step = 0.0
        for i, flat in enumerate(state.values):
            layout = group.tables[i]
            if flat.size != len(layout.rows) * layout.table.cols:
                raise MalformedError(f"table {i}: {flat.size} values for {len(layout.rows)} rows")
            values = flat.reshape(-1, layout.table.cols)
            change = values - self.data[i][layout.rows]
            step += float(np.vdot(change, change))
            self.data[i][layout.rows] = values
        slots = group.slots
        self.tables[slots] = len(state.values)
        self.lineage[slots] = state.lineage
        self.position[slots] = state.position
        if not partial:
            self.whole[slots] = np.stack([state.lineage, state.position], axis=1)
        workers = min(self.last.shape[1], state.last.shape[1])
        self.last[slots, :workers] = state.last[state.vector][:, :workers]
        self.window[slots, :workers] = state.window[state.vector][:, :workers]
        if len(slots):
            old = self._moved.get(int(slots[0]), step**0.5)
            self._moved[int(slots[0])] = 0.9 * old + 0.1 * step**0.5
        return state.slots

    def outdates(self, state: State) -> bool:
        """Whether a slot is newer here than in what somebody sent."""
        slots = np.flatnonzero(state.slots)
        lineage, position = self.lineage[slots], self.position[slots]
        older = (state.lineage == lineage) & (state.position < position)
        return bool((older | (state.lineage < lineage)).any())

    def give(self, mask: Slots) -> list[State]:
        """Return slots for a restoring server, each with the tables that it was pulled with.

        For the thread that calls `take`; tables may be added meanwhile.
        """
        counts = np.unique(self.tables[mask & (self.tables > 0)]).tolist()
        return [self._give(mask & (self.tables == count), count) for count in counts]

    def _give(self, mask: Slots, tables: int) -> State:
        slots, data = np.flatnonzero(mask), self.data[:tables]
        layout = ShardLayout(self._uid, self.specs[:tables], slots)
        both = np.hstack([self.last[slots], self.window[slots].view(np.int64)])
        unique, index = np.unique(both, axis=0, return_inverse=True)
        workers = self.last.shape[1]
        return State(
            mask,
            self.lineage[slots],
            self.position[slots],
            index.reshape(-1).astype(np.int64),
            np.ascontiguousarray(unique[:, :workers]),
            np.ascontiguousarray(unique[:, workers:]).view(np.uint64),
            tuple(d[t.rows].reshape(-1) for d, t in zip(data, layout.tables, strict=True)),
        )

    def fetched(self, meta: Frame) -> list[State]:
        """Return what a FETCH asks for: the newest, or what was there at some worker's batch."""
        mask = from_bitmap(meta[:BITMAP])
        if len(meta) == BITMAP:
            return self.give(mask)
        if len(meta) != BITMAP + ORIGIN.size or self.previous is None:
            raise MalformedError("a FETCH of values that this worker does not keep")
        worker, batch = ORIGIN.unpack(meta[BITMAP:])
        if worker >= self.last.shape[1]:
            raise MalformedError(f"a FETCH for worker {worker}")
        return [self.previous.give(mask, worker, batch)]

    def knows(self, slots: Slots, workers: Sequence[int], batch: int) -> bool:
        """Whether these slots have this batch of each of these workers."""
        return bool((self.last[slots][:, workers] >= batch).all())

    def versions(self, mask: Slots) -> tuple[Copies, ...]:
        """Group these slots by version, for the operator's plan."""
        k = np.flatnonzero(mask & (self.whole[:, 0] > 0))
        lineage, position = np.ascontiguousarray(self.whole[k].T)
        key = b"".join((k.tobytes(), lineage.tobytes(), position.tobytes()))
        if self._versions[0] != key:
            found = group_versions(k.tolist(), lineage.tolist(), position.tolist())
            self._versions = key, found
        return self._versions[1]

    def moved(self, server: int) -> float | None:
        """Return how far a server's part moves from one pull to the next (L2), on the mean."""
        found = [self._moved.get(int(np.argmax(group.mask))) for group in self.groups_of(server)]
        known = [way for way in found if way is not None]
        return math.hypot(*known) if known else None

    def groups_of(self, server: int) -> list[Group]:
        """Return a server's messages: together they have its slots, in ascending order."""
        return [group for group in self.groups if group.server == server]

    def slots_of(self, server: int) -> Slots:
        """Return the mask of a server's slots."""
        return np.equal(self.owner, server)

    def _group(self, mask: Slots) -> ShardLayout:
        for group in self.groups:
            if (group.mask == mask).all():
                return group.layout
        return self.layout_of(np.flatnonzero(mask))

    def layout_of(self, slots: Ints) -> ShardLayout:
        """Return where the rows of these slots stand in a message."""
        return ShardLayout(self._uid, self.specs, slots)

    def forget(self) -> None:
        """Offer nothing of this to anybody: it is of a lineage that is no more (a rollback)."""
        self.lineage[:] = self.whole[:] = 0
        if self.previous is not None:
            self.previous.lineage[:] = 0


def gather(parts: Sequence[Floats | None], layout: ShardLayout) -> list[Floats | None]:
    """Take a layout's rows of each table's array, in wire order."""
    return [
        None if part is None else part[table.rows]
        for part, table in zip(parts, layout.tables, strict=True)
    ]
