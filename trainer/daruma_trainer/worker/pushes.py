"""What a worker has pushed and not yet seen applied everywhere, and what it could not push.

A batch is *held* until all 1,024 slots have applied it; it can be pushed again to whoever lacks
it. What belongs to a server that is away is *accumulated* instead, so that memory is O(model)
however long the outage; an accumulation is sealed at its first send. Pure bookkeeping.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import Rule
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import Slots
from daruma_trainer.worker.accumulating import Accumulation
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.latency import Latency
from daruma_trainer.worker.residual import Residual, Ride

MAX_SEALED = 2
"""Replays of one server that may wait for an answer before its worker waits too: each may have
been applied, so they cannot be made one. Memory stays bounded where a server dies in replay after
replay."""


@dataclass(frozen=True, slots=True)
class Update:
    """One table's part of a batch."""

    table: int
    lr: float
    values: Floats
    """(rows, cols): of the whole table, or of `rows`."""
    rows: Ints | None = None


@dataclass(slots=True)
class Held:
    """A batch that some slots have not applied yet."""

    batch: int
    epoch: int
    """Newest epoch known when it was first sent."""
    updates: tuple[Update, ...]
    uncovered: set[int] = field(default_factory=set)
    """Servers whose part of it is not on as many nodes as the job asks for."""
    unacked: Slots = field(default_factory=lambda: np.ones(SLOTS, np.bool_))
    rides: dict[int, Ride] = field(default_factory=dict)
    """By server: what of its replay goes with this batch."""


class Pushes:
    """All that one worker has under way."""

    def __init__(self, replay: Replay) -> None:
        self.limits = replay
        self.held: dict[int, Held] = {}
        self.sealed: dict[int, list[Accumulation]] = {}
        """By server: accumulations that were sent and not yet acknowledged."""
        self.open: dict[int, Accumulation] = {}
        """By server: the accumulation that still takes gradients."""
        self.rest: dict[int, Residual] = {}
        """By server: what of its replay rides on the batches that follow."""
        self.acked = 0
        """The last batch that all slots have (with all before it)."""
        self.acked_epoch = 0
        self.replayed = 0
        self._late: set[int] = set()
        """Of the replayed those that some server still lacks: it may get them late as well."""
        self.lost = Stretches()
        """Batches that a slot had acknowledged and has no more, and nobody can give it."""
        self.others_gap = 0.0
        """Sum of the gaps of the other workers, as servers said last."""
        self.widest = 0.0
        """The largest `view_gap` since it was last set to 0."""
        self.latency = Latency()

    def hold(self, held: Held) -> None:
        """Keep a new batch."""
        self.held[held.batch] = held
        self.latency.sent(held.batch)

    def accumulate(
        self, held: Held, server: int, copy: HostCopy, now: float, rules: Sequence[Rule]
    ) -> None:
        """Move a server's part of a batch into its accumulation."""
        held.unacked &= ~copy.slots_of(server)
        held.uncovered.discard(server)
        into = self.open.get(server)
        if into is None:
            into = self.open[server] = Accumulation(held.batch, now)
            if (rest := self.rest.pop(server, None)) is not None and rest.left:
                rest.give_back(into)
        into.add(held.batch, held.updates, copy.groups_of(server), rules, copy.data)
        if not held.unacked.any():
            self.settle()  # all servers are away: nobody's answer will let it go
        self.widest = max(self.widest, self.view_gap)

    def may_accumulate(self, server: int, now: float) -> bool:
        """Return whether the limits of spec.recovery.replay allow another batch."""
        into, limits = self.open.get(server), self.limits
        if limits.max_gap is not None and not self.view_gap < limits.max_gap:
            return False
        if into is None:
            return len(self.sealed.get(server, [])) < MAX_SEALED
        age = now - into.since
        return not into.full and into.count < limits.max_pending and age < limits.max_age_seconds

    def hold_back(self, server: int) -> None:
        """A batch that a server lacks is held by itself: its accumulation takes no later one."""
        if server in self.open:
            self.open[server].full = True

    @property
    def gap(self) -> float:
        """How far this worker's batches that await servers would move the parameters (L2; at most).

        Elastic consistency's ‖x − v‖, as far as it comes from these; see `Accumulation.gap`.
        """
        by_server: dict[int, float] = {}
        pending: list[tuple[int, Accumulation | Residual]] = []
        pending += [*self.open.items(), *self.rest.items()]
        pending += [(server, done) for server, row in self.sealed.items() for done in row]
        for server, part in pending:
            by_server[server] = by_server.get(server, 0.0) + part.gap
        return math.hypot(*by_server.values())

    def note_others(self, gap: float) -> None:
        """Servers said how far the batches that the other workers have pending would move."""
        self.others_gap = gap
        self.widest = max(self.widest, self.view_gap)

    @property
    def view_gap(self) -> float:
        """The same with what other workers have pending, as servers said last.

        The distance of a sum is at most the sum of the distances.
        """
        return self.gap + self.others_gap

    def seal(self, server: int, moved: float | None, rules: Sequence[Rule]) -> None:
        """Close a server's open accumulation: it goes out as one push and can no longer grow.

        `moved`: how far the server's part moves from one pull to the next (L2), where it is known.
        """
        into = self.open.pop(server, None)
        if into is None:
            return
        if self.limits.combine == "Drop":
            # It goes out empty, so that the server marks the batches: later ones build on them.
            into.parts.clear()
            self.lose(into.first, into.last)
        else:
            if self.limits.combine == "Auto":
                rest = Residual.of(into, rules, self.limits, moved)
                if rest is not None:
                    self.rest[server] = rest
            elif self.limits.combine == "Mean":
                for table, part in into.parts.items():
                    if rules[table].gradient:
                        part.average()
            self._count_late(into)
        self.sealed.setdefault(server, []).append(into)

    def _count_late(self, into: Accumulation) -> None:
        """A batch is replayed once, however many servers were away."""
        late = set(range(into.first, into.last + 1))
        self._late = {batch for batch in self._late if batch > self.acked}
        self.replayed += len(late - self._late)
        self._late |= late

    def ride(self, held: Held, server: int, copy: HostCopy) -> None:
        """Let a batch that goes to a server take a part of its replay along."""
        rest = self.rest.get(server)
        if rest is None:
            return
        ride = rest.ride(held.updates, copy.groups_of(server))
        if ride is not None:
            held.rides[server] = ride
        if not rest.left:
            del self.rest[server]

    def hold_again(self, server: int, slots: Slots) -> None:
        """A server was replaced: it may lack what its predecessor had acknowledged.

        Its slots drop what they have already. What was accumulated for it goes out by itself.
        """
        for done in self.sealed.get(server, []):
            done.unacked |= slots
            done.applied = False
        mine = [*self.sealed.get(server, []), *filter(None, [self.open.get(server)])]
        for held in self.held.values():
            if not any(a.first <= held.batch <= a.last for a in mine):
                held.unacked |= slots

    def note_applied(self, batch: int, slots: Slots) -> None:
        """These slots have this batch."""
        held = self.held.get(batch)
        if held is not None:
            held.unacked &= ~slots
            self.settle()

    def note_state(self, slots: Ints, last: Ints) -> None:
        """A pull showed the last applied batch of this worker in each of these slots."""
        for held in self.held.values():
            held.unacked[slots[last >= held.batch]] = False
        self.settle()

    def note_covered(self, server: int, slots: Slots, batch: int) -> None:
        """A server's part of all batches up to this is on as many nodes as the job asks for.

        Its slots have them, then: where a step waited for others (Sync) nothing else may say so.
        """
        for held in self.held.values():
            if held.batch <= batch:
                held.uncovered.discard(server)
                held.unacked &= ~slots
        for done in [a for a in self.sealed.get(server, []) if a.last <= batch]:
            self.drop_sealed(server, done.last)
        self.settle()

    def cover_nothing(self) -> None:
        """The job does not ask for copies any more: what is applied need not be kept.

        Replays that were applied go out once more: what answers them lets them go.
        """
        for held in self.held.values():
            held.uncovered.clear()
        for done in (done for row in self.sealed.values() for done in row):
            done.unacked[:] = True
        self.settle()

    def uncovered(self, server: int) -> int:
        """How many batches are not covered by a server."""
        return sum(server in held.uncovered for held in self.held.values())

    def drop_sealed(self, server: int, last: int) -> None:
        """The accumulation that ends with this batch need not be kept: applied, or counted lost."""
        row = self.sealed.pop(server, [])
        if rest := [a for a in row if a.last != last]:
            self.sealed[server] = rest
        for done in [a for a in row if a.last == last]:
            self._note_latency(range(done.first, done.last + 1))
        self.settle()

    def keep_sealed(self, done: Accumulation) -> None:
        """An accumulation is applied, and kept until it is covered."""
        done.applied = True
        self._note_latency(range(done.first, done.last + 1))

    def settle(self) -> None:
        """Let go of what every slot has, and move `acked` on."""
        applied = [(b, h) for b, h in self.held.items() if not h.unacked.any()]
        self._note_latency([batch for batch, _ in applied])
        for batch, held in applied:
            if not self._waits(batch):
                self.acked_epoch = max(self.acked_epoch, held.epoch)
            if not held.uncovered:
                del self.held[batch]
        rest = [*self.held, *(a.first for a in self._accumulations())]
        newest = max(self.acked, self._newest)
        self.acked = max(self.acked, min(rest) - 1 if rest else newest)

    _newest = 0

    def begin(self, batch: int) -> None:
        """A batch of this number is about to be held."""
        self._newest = batch

    def lose(self, first: int, last: int) -> None:
        """These batches were lost, or some part of each was."""
        self.lost |= Stretches.of((first, last))
        self.latency.lost(first, last)

    def unsent(self, server: int) -> Stretches:
        """Return every batch that this worker can still give to a server, for a resync."""
        mine = [*self.sealed.get(server, []), *filter(None, [self.open.get(server)])]
        return Stretches.these(self.held) | Stretches.of(*((a.first, a.last) for a in mine))

    def drop_all(self, batch: int) -> None:
        """A rollback: nothing of what was under way counts, and numbers go on after `batch`."""
        self.held.clear()
        self.sealed.clear()
        self.open.clear()
        self.rest.clear()
        self._late.clear()
        self.latency.forget()
        self.acked = self._newest = batch

    @property
    def pending(self) -> int:
        """Batches accumulated and not yet sent: the longest of all servers."""
        return max((a.count for a in self.open.values()), default=0)

    def _note_latency(self, batches: Iterable[int]) -> None:
        """Count those of these batches that no slot lacks any more."""
        lacking = [a for a in self._accumulations() if not a.applied]
        for batch in batches:
            held = self.held.get(batch)
            lacks = held is not None and held.unacked.any()
            if not lacks and not any(a.first <= batch <= a.last for a in lacking):
                self.latency.applied(batch)

    def _waits(self, batch: int) -> bool:
        return any(a.first <= batch <= a.last for a in self._accumulations())

    def _accumulations(self) -> list[Accumulation]:
        return [*self.open.values(), *(a for row in self.sealed.values() for a in row)]
