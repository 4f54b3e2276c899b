"""What a server does with each request for its data. No sockets here: frames in, frames out.

One `DataPlane` lives as long as its shard has an owner in this process; the serve loop calls it
from its one thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.applied import Seen
from daruma_trainer.contract import Membership, place, slots_from_hex
from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.server.barrier import Barrier, Made, TwoWritersError
from daruma_trainer.server.beginning import Beginning
from daruma_trainer.server.rebuilding import Sums
from daruma_trainer.server.replies import Reply, refuse, worker_of
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots, SlotState
from daruma_trainer.server.staleness import Staleness
from daruma_trainer.server.steps import Steps
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import (
    ALL_WORKERS,
    BITMAP,
    ENTER,
    OWN,
    PARTIAL,
    PULL,
    UNHEARD,
    WAS_VACANT,
    Frame,
    Header,
    Kind,
    MalformedError,
    Push,
    Refusal,
    State,
    bitmap,
    decode_json,
    decode_push,
    encode_json,
    encode_state,
    from_bitmap,
    mask_of,
)  # fmt: skip
from daruma_trainer.wire import (
    Slots as SlotMask,
)

MAX_READS = 256
"""Pulls that wait for a worker's own batch; more are refused, and go to the head."""


@dataclass(slots=True)
class Waiting:
    """A request that is answered when its time comes: a pull of a later batch, a held push."""

    identity: bytes
    header: Header
    frames: Sequence[Frame]


@dataclass(slots=True)
class Counts:
    """What came and what became of it, in pushes (a part of a split push counts as one)."""

    applied: int = 0
    duplicate: int = 0
    overlap: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0


class Observer(Protocol):
    """Who is told of each update of a shard, right after it was made (replication)."""

    def pushed(self, push: Push, frames: Sequence[Frame], k: Ints) -> None:
        """A push, with its frames after the header, was applied to the slots `k`: the others
        asked for have it already, or are not Ready."""

    def stepped(self, step: int, workers: Sequence[int], k: Ints, made: Made | None) -> None:
        """A step of these workers was made in the slots `k` (Sync)."""

    def touched(self, k: Ints) -> None:
        """The slots `k` changed otherwise."""

    def pulled(self, worker: int, k: Ints) -> None:
        """The slots `k` were sent to a worker, with all that there is of them."""

    def resynced(self, worker: int) -> None:
        """A worker began anew: what it was told on its last connection may not have come."""


class DataPlane:
    """One shard: its slots, its parameters, and the requests that wait for them."""

    def __init__(self, membership: Membership, index: int, incarnation: int) -> None:
        owners = np.array(place(membership.job_uid, membership.servers))
        ids = np.flatnonzero(owners == index)
        state = SlotState.RESTORING if membership.initialised else SlotState.EMPTY
        self.incarnation = incarnation
        self.slots = Slots(ids, membership.workers, state)
        self.shard = Shard(membership.job_uid, ids)
        self.beginning = Beginning(self.shard, self.slots, incarnation)
        self.sums = Sums(self.shard, self.slots)
        self.sync = membership.settings.consistency == "Sync"
        self.barrier = Barrier(self.shard, self.slots)
        self.workers = membership.workers
        self.steps = Steps(membership, self.slots)
        self.unheard: set[int] = set()
        """Workers that did not say since the slots were restored what they can give again."""
        self.counts = Counts()
        self.staleness = Staleness()
        self._lost: dict[int, Stretches] = {}
        """By worker: its batches that were lost here."""
        self.updates = 0
        """How many updates were made to this shard, by this process."""
        self.observer: Observer | None = None
        self.waiting: list[Waiting] = []
        """Pushes that a cut in the making holds back."""
        self.pulls: list[Waiting] = []
        """Pulls of a step, or of a phase's end, that is to come."""
        self.hold: tuple[int, ...] | None = None
        """A cut in the making: the last batch of each worker that may still be applied."""

    # Tables, and their values

    def add_table(self, spec: TableSpec) -> Reply | None:
        """See Beginning."""
        return self.beginning.add_table(spec)

    def note_given(self, k: Ints, tables: int | None = None) -> None:
        """See Beginning."""
        self.beginning.note_given(k, tables)

    @property
    def given(self) -> SlotMask:
        """See Beginning."""
        return self.beginning.given

    @property
    def complete_tables(self) -> int:
        """See Beginning."""
        return self.beginning.complete_tables

    def restored(self, k: Ints) -> None:
        """Restoring → Ready, with a lineage of their own.

        Of tables that their source did not have (`note_given`) the first values come again.
        """
        self.slots.lineage[k] = self.incarnation
        self.slots.state[k] = SlotState.READY
        if self.observer is not None:
            self.observer.touched(k)
        self.steps.refresh()

    # Pushes and pulls

    def push(self, identity: bytes, header: Header, frames: Sequence[Frame]) -> Reply | None:
        """PUSH: apply to the slots that lack it; None if it waits for a cut."""
        push = decode_push(frames)
        if push.worker != worker_of(identity.decode()):
            return refuse(Refusal.MALFORMED, f"{identity.decode()} pushes as worker {push.worker}")
        if self.hold is not None and push.last > self.hold[push.worker]:
            self.waiting.append(Waiting(identity, header, frames))
            return None
        k = self.slots.owned(push.slots)
        if k is None:
            return refuse(Refusal.NOT_OWNER, "slots of another server")
        problem = self.shard.check(push.tables, k)
        if problem:
            return refuse(Refusal.MALFORMED, problem)
        self.counts.pushed_bytes += sum(len(f) for f in frames)
        ready = self.slots.ready[k]
        if self.beginning.lacks((part.table for part in push.tables), k[ready]):
            return refuse(Refusal.RESTORING, "a table's first values are to come, again")
        seen = self.slots.seen(k, push.worker, push.first, push.last)
        new = np.flatnonzero(ready & (seen == Seen.NEW))
        overlap = ready & (seen == Seen.OVERLAP)
        if self.sync:
            try:
                self.barrier.contribute(push, k, new)
            except TwoWritersError as error:
                return refuse(Refusal.OVERLAP, str(error))
            applied = ready & (seen == Seen.DUPLICATE)
            self.counts.duplicate += int(not len(new) and not overlap.any() and bool(ready.any()))
            if self.observer is not None and not len(new):
                self.observer.pushed(push, frames[1:], k[:0])  # a promoted replica may have it
            self.advance()
        else:
            self.staleness.applied(push.worker, header.request, k, new)
            self._apply(push, frames, k, ready, new)
            self.counts.duplicate += int(not len(new) and not overlap.any() and bool(ready.any()))
            applied = ready & (seen != Seen.OVERLAP)
            self.steps.refresh()
        self.counts.overlap += int(overlap.any())
        ids = self.slots.ids[k]
        return Reply(Kind.ACK, [bitmap(mask_of(ids[applied])) + bitmap(mask_of(ids[overlap]))])

    def _apply(
        self, push: Push, frames: Sequence[Frame], k: Ints, ready: NDArray[np.bool_], new: Ints
    ) -> None:
        """Apply a checked push at once, to those of its slots that lack it."""
        began = self.shard.clock()
        others = self.sums.add_from(push, k, ready)
        if len(new):
            self.shard.apply(others, k, new)
            self.shard.update_seconds.observe(self.shard.clock() - began)
            self.slots.advance(k[new], push.worker, push.first, push.last)
            self.counts.applied += 1
            self.updates += 1
        if self.observer is not None:
            if len(others) < len(push.tables):
                self.observer.touched(k)  # sums of other slots than those below, too
            self.observer.pushed(push, frames[1:], k[new])

    def advance(self) -> None:
        """Make every step whose contributions are complete (Sync)."""
        active = self.steps.active()
        if self.sync and not self.steps.too_few(active):
            before = int(self.slots.position.sum())
            if self.barrier.reduce(active, self._stepped):
                self.counts.applied += int(self.slots.position.sum() > before)
            self.steps.refresh()

    def _stepped(self, step: int, workers: Sequence[int], k: Ints, made: Made | None) -> None:
        self.updates += 1
        if self.observer is not None:
            self.observer.stepped(step, workers, k, made)

    def follow(self, membership: Membership) -> None:
        """A newer membership may have lost a worker that the others need not wait for."""
        self.steps.seats.follow(membership)
        self.advance()

    def pull(self, identity: bytes, header: Header, frames: Sequence[Frame]) -> Reply | None:
        """PULL: the Ready ones of the slots asked for; None while their step is to come."""
        meta = memoryview(frames[1])
        if len(meta) != PULL.size + BITMAP:
            raise MalformedError(f"a pull's meta of {len(meta)} bytes")
        min_step, tables, flags = PULL.unpack_from(meta)
        told = 0
        if flags & ENTER:
            worker = worker_of(identity.decode())
            told = WAS_VACANT * self.steps.seats.take(worker) | UNHEARD * (worker in self.unheard)
        k = self.slots.owned(from_bitmap(meta[PULL.size :]))
        if k is None:
            return refuse(Refusal.NOT_OWNER, "slots of another server")
        worker, asked = worker_of(identity.decode()), len(k)
        k = k[self.slots.ready[k]]
        known = tables <= len(self.shard.tables)
        if not len(k) or not known or self.beginning.lacks(range(tables), k):
            return refuse(Refusal.RESTORING, "no slot of these is Ready")
        ends, steps = self.sync or flags & ALL_WORKERS, self.steps
        if flags & OWN:
            # Of a worker at its end, or one that was lost, a replica knows nothing.
            late = int(self.slots.last[k, worker].min()) < min_step
            if len(k) < asked or len(self.pulls) >= MAX_READS:
                return refuse(Refusal.UNSURE, "not all slots are here, or too many pulls wait")
        else:
            late = (steps.clocked or ends) and int(steps.of(k).min()) < min_step
        # Under Sync no step is made with too few; where pushes count at once, pulls have to wait.
        few = steps.clocked and not self.sync and min_step and steps.too_few(steps.active())
        if late or few or (ends and self.sums.lacks(k)):
            self.pulls.append(Waiting(identity, header, frames))
            return None
        partial = self.beginning.has_later(tables, k)
        body = encode_state(self.state(k, tables))
        self.counts.pulled_bytes += sum(len(f) for f in body)
        self.staleness.pulled(worker, header.request, k)
        if self.observer is not None and not partial:
            self.observer.pulled(worker_of(identity.decode()), k)
        return Reply(Kind.STATE, body, told | PARTIAL * partial)

    def state(self, k: Ints, tables: int) -> State:
        """Return whole slots, with all that belongs to them but the optimizer's state."""
        vector, last, window = self.slots.vectors(k)
        ids = self.slots.ids[k]
        values = self.shard.values(k)[:tables]
        lineage, position = self.slots.lineage[k], self.slots.position[k]
        return State(
            mask_of(ids), lineage, position, vector, last, window, values, update=self.updates
        )

    def whole(self, k: Ints) -> State:
        """Return whole slots with all that belongs to them, for a replica."""
        values, steps = self.shard.whole(k)
        return replace(self.state(k, 0), values=values, steps=steps)

    def resync(self, identity: bytes, frames: Sequence[Frame]) -> Reply:
        """RESYNC: what a worker neither has nor can push again is marked and counted as lost."""
        raw = decode_json(frames[1])
        try:
            worker, done = int(raw["worker"]), int(raw["done"])
            held = Stretches.read(raw["held"])
            skipped = Stretches.read(raw.get("skipped", ""))
            ids = np.array(slots_from_hex(raw["slots"]), np.int64)
            rebuilds = [int(t) for t in raw.get("rebuilds", [])]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise MalformedError(f"not a resync: {error!r}") from error
        if worker != worker_of(identity.decode()) or not 0 <= done < 1 << 40:
            raise MalformedError(f"a resync of worker {worker} up to {done}")
        k = self.slots.index_of(ids)
        k = k[k >= 0]
        k = k[self.slots.ready[k]]
        gaps = self.slots.floor(k, worker, done, held)
        # All that ever were: an answer may not have come, or to a past life. But not what nobody
        # made: it counts that itself.
        lost = self._lost[worker] = (self._lost.get(worker, Stretches()) | gaps) - skipped
        if self.observer is not None:
            if gaps:
                self.observer.touched(k)
            self.observer.resynced(worker)
        self.steps.seats.entering.discard(worker)
        self.unheard.discard(worker)
        self.steps.refresh()
        self.advance()
        self.sums.register(worker, rebuilds)
        answer = {
            "lost": lost.text(),
            "complete": self.slots.complete_until(k, worker),
            "rebuild": self.sums.due(worker),
        }
        return Reply(Kind.OK, [encode_json(answer)])

    def rebuild(self, identity: bytes, frames: Sequence[Frame]) -> Reply:
        """REBUILD: a worker's whole part of a sum, for slots that were cleared and lack it."""
        push = decode_push(frames)
        k = self.slots.owned(push.slots)
        if push.worker != worker_of(identity.decode()) or k is None:
            return refuse(Refusal.NOT_OWNER, "another worker's part, or slots of another server")
        problem = self.shard.check(push.tables, k)
        if problem:
            return refuse(Refusal.MALFORMED, problem)
        self.sums.rebuild(push, k)
        if self.observer is not None:
            self.observer.touched(k)
        return Reply(Kind.OK, [b"{}"])

    # Steps

    @property
    def step(self) -> int:
        """The step that this shard is at."""
        return self.steps.now

    @property
    def lost(self) -> int:
        """How many pushes were lost here: acknowledged once, and in no copy that was restored."""
        return sum(len(batches) for batches in self._lost.values())

    def rolled_back(self, step: int) -> None:
        """All slots are as a cut had them: batches that it lacks are made again, and not lost."""
        self.steps.now = step
        for worker, batches in self._lost.items():
            last = int(self.slots.last[:, worker].max(initial=0))
            self._lost[worker] = batches.up_to(last)

    def worker_left(self, worker: int, last: int) -> None:
        """A worker's program ended after this batch."""
        if worker < self.workers and self.steps.left.get(worker) != last:
            self.steps.left[worker] = last
            self.advance()

    def take_waiting(self) -> list[Waiting]:
        """Return what may be answerable now, to be handled again."""
        again, self.pulls = self.pulls, []
        if self.hold is None:
            again, self.waiting = self.waiting + again, []
        return again
