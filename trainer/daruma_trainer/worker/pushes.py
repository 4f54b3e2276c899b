"""What a worker has pushed and not yet seen applied everywhere, and what it could not push.

A batch is *held* until all 1,024 slots have applied it; it can be pushed again to whoever lacks
it. What belongs to a server that is away is *accumulated* instead, so that memory is O(model)
however long the outage; an accumulation is sealed at its first send. Pure bookkeeping.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.wire import Slots

SCALE_FREE = frozenset({"adam", "adagrad"})
"""Rules to which a sum of gradients is one gradient: a replay takes the mean as one step."""


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


@dataclass(slots=True)
class Accumulation:
    """Gradients for one server that is away, as one update of batches first..last."""

    first: int
    last: int
    count: int
    since: float
    """Monotonic time of the first."""
    tables: dict[int, Update]
    applied: bool = False
    """Whether its server has it, though not on as many nodes as the job asks for."""


class Pushes:
    """All that one worker has under way."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.held: dict[int, Held] = {}
        self.sealed: dict[int, list[Accumulation]] = {}
        """By server: accumulations that were sent and not yet acknowledged."""
        self.open: dict[int, Accumulation] = {}
        """By server: the accumulation that still takes gradients."""
        self.acked = 0
        """The last batch that all slots have (with all before it)."""
        self.acked_epoch = 0
        self.replayed = 0
        self.lost: set[int] = set()

    def hold(self, held: Held) -> None:
        """Keep a new batch."""
        self.held[held.batch] = held

    def accumulate(
        self, held: Held, server: int, mask: Slots, now: float, rules: Sequence[str]
    ) -> None:
        """Move a server's part of a batch into its accumulation."""
        held.unacked &= ~mask
        held.uncovered.discard(server)
        into = self.open.get(server)
        if into is None:
            into = Accumulation(held.batch, held.batch, 0, now, {})
            self.open[server] = into
        into.last = held.batch
        into.count += 1
        for update in held.updates:
            self._add(into, update, rules[update.table])

    def may_accumulate(self, server: int, now: float) -> bool:
        """Return whether the limits of spec.recovery.replay allow another batch."""
        into = self.open.get(server)
        if into is None:
            return True
        age = now - into.since
        return into.count < self._replay.max_pending and age < self._replay.max_age_seconds

    def seal(self, server: int, moved: Mapping[int, float], rules: Sequence[str]) -> None:
        """Close a server's open accumulation: it goes out as one push and can no longer grow."""
        into = self.open.pop(server, None)
        if into is None:
            return
        if self._replay.combine == "Drop":
            # It goes out empty, so that the server marks the batches: later ones build on them.
            into.tables.clear()
            self.lost |= set(range(into.first, into.last + 1))
        else:
            for table, update in into.tables.items():
                into.tables[table] = self._combine(into, update, rules[table], moved.get(server))
            self.replayed += into.count
        self.sealed.setdefault(server, []).append(into)

    def hold_again(self, server: int, slots: Slots) -> None:
        """A server was replaced: it may lack what its predecessor had acknowledged.

        Its slots drop what they have already. What was accumulated for it goes out by itself.
        """
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

    def note_sealed(self, server: int, last: int) -> None:
        """The accumulation that ends with this batch was applied; it is not covered yet."""
        for done in self.sealed.get(server, []):
            done.applied |= done.last == last

    def note_covered(self, server: int, batch: int) -> None:
        """A server's part of all batches up to this is on as many nodes as the job asks for."""
        for held in self.held.values():
            if held.batch <= batch:
                held.uncovered.discard(server)
        for done in [a for a in self.sealed.get(server, []) if a.applied and a.last <= batch]:
            self.drop_sealed(server, done.last)
        self.settle()

    def uncovered(self, server: int) -> int:
        """How many batches are not covered by a server."""
        return sum(server in held.uncovered for held in self.held.values())

    def drop_sealed(self, server: int, last: int) -> None:
        """The accumulation that ends with this batch need not be kept: applied, or counted lost."""
        rest = [a for a in self.sealed.get(server, []) if a.last != last]
        if rest:
            self.sealed[server] = rest
        else:
            self.sealed.pop(server, None)
        self.settle()

    def settle(self) -> None:
        """Let go of what every slot has, and move `acked` on."""
        for batch, held in [(b, h) for b, h in self.held.items() if not h.unacked.any()]:
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

    def unsent(self, server: int) -> list[int]:
        """Return every batch that this worker can still give to a server, for a resync."""
        batches = set(self.held)
        for a in [*self.sealed.get(server, []), *filter(None, [self.open.get(server)])]:
            batches |= set(range(a.first, a.last + 1))
        return sorted(batches)

    def drop_all(self, batch: int) -> None:
        """A rollback: nothing of what was under way counts, and numbers go on after `batch`."""
        self.held.clear()
        self.sealed.clear()
        self.open.clear()
        self.acked = self._newest = batch

    @property
    def pending(self) -> int:
        """Batches accumulated and not yet sent: the longest of all servers."""
        return max((a.count for a in self.open.values()), default=0)

    def _waits(self, batch: int) -> bool:
        return any(a.first <= batch <= a.last for a in self._accumulations())

    def _accumulations(self) -> list[Accumulation]:
        return [*self.open.values(), *(a for row in self.sealed.values() for a in row)]

    def _add(self, into: Accumulation, update: Update, rule: str) -> None:
        old = into.tables.get(update.table)
        if old is None:
            into.tables[update.table] = Update(
                update.table, update.lr, update.values.copy(), update.rows
            )
        elif update.rows is not None or old.rows is not None:
            into.tables[update.table] = _merge_rows(old, update, rule)
        elif rule == "assign":
            np.copyto(old.values, update.values)
        elif rule == "sgd" and update.lr != old.lr:
            # The rate changed during the outage: each gradient counts with its own, as a share of
            # the larger one.
            rate = max(old.lr, update.lr)
            np.multiply(old.values, np.float32(old.lr / rate), out=old.values)
            np.add(old.values, update.values * np.float32(update.lr / rate), out=old.values)
            into.tables[update.table] = Update(update.table, rate, old.values)
        else:
            np.add(old.values, update.values, out=old.values)
            into.tables[update.table] = Update(update.table, update.lr, old.values)

    def _combine(
        self, into: Accumulation, update: Update, rule: str, moved: float | None
    ) -> Update:
        """Make one update of a sum of gradients (design: replay, `combine`)."""
        if rule in ("add", "assign"):
            return update
        how = self._replay.combine
        mean = how == "Mean" or (how == "Auto" and rule in SCALE_FREE)
        factor = 1 / into.count if mean else 1.0
        if how == "Auto" and not mean and moved is not None:
            # A long sum taken at once overshoots: no longer than the way the part would have gone.
            length = update.lr * float(np.linalg.norm(update.values))
            limit = self._replay.trust * moved * into.count
            if length > limit and math.isfinite(length):
                factor = limit / length
        if factor != 1.0:
            np.multiply(update.values, np.float32(factor), out=update.values)
        return update


def _merge_rows(old: Update, new: Update, rule: str) -> Update:
    """Join two row-wise updates: sums for `add`, the newer for `assign`."""
    if old.rows is None or new.rows is None:
        raise ValueError("a table is pushed either whole or by rows while its server is away")
    rows = np.union1d(old.rows, new.rows)
    values = np.zeros((len(rows), old.values.shape[1]), np.float32)
    values[np.searchsorted(rows, old.rows)] = old.values
    at = np.searchsorted(rows, new.rows)
    if rule == "add":
        values[at] += new.values
    else:
        values[at] = new.values
    return Update(old.table, new.lr, values, rows)
