"""A small model of the protocol, run against the real slot, dedupe and membership code.

Workers push batches to a shard over a network that loses, repeats and delays acknowledgements; the
shard is lost and comes back from a copy that somebody pulled. The model knows which batches each
slot really holds. Whatever happens: no push is applied twice, none that was acknowledged is lost
without being counted, and at the end every slot has every batch, applied or counted.
"""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daruma_trainer.applied import FULL, Seen, complete_until, mark, seen
from daruma_trainer.server.slots import Slots, SlotState
from daruma_trainer.stretches import Stretches
from soak import counted

WORKERS = 2
IDS = [3, 17, 400, 1023]


class Shard:
    """The real bookkeeping, with the values a server would have: a count of each batch."""

    def __init__(self) -> None:
        self.slots = Slots(IDS, WORKERS, SlotState.READY)
        self.values: list[Counter[tuple[int, int]]] = [Counter() for _ in IDS]

    def push(self, worker: int, first: int, last: int, k: list[int]) -> list[int]:
        """Apply where it is new; returns the slots that have it now."""
        where = np.array(k)
        found = self.slots.seen(where, worker, first, last)
        new = where[found == Seen.NEW]
        for s in new.tolist():
            self.values[s].update((worker, b) for b in range(first, last + 1))
        if len(new):
            self.slots.advance(new, worker, first, last)
        return [int(s) for s in where[found != Seen.OVERLAP]]


class Copy:
    """What a worker pulled: values and applied vectors of every slot."""

    def __init__(self, shard: Shard) -> None:
        self.values = [Counter(v) for v in shard.values]
        self.last = shard.slots.last.copy()
        self.window = shard.slots.window.copy()
        self.position = shard.slots.position.copy()


class Protocol(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.shard = Shard()
        self.copies = [Copy(self.shard) for _ in range(WORKERS)]
        self.batch = [0] * WORKERS
        self.held: list[dict[int, set[int]]] = [{} for _ in range(WORKERS)]
        """By worker and batch: the slots not known to have it."""
        self.lost: set[tuple[int, int]] = set()

    @rule(worker=st.integers(0, WORKERS - 1))
    def step(self, worker: int) -> None:
        self.batch[worker] += 1
        self.held[worker][self.batch[worker]] = set(range(len(IDS)))

    @rule(
        worker=st.integers(0, WORKERS - 1),
        arrives=st.sets(st.integers(0, len(IDS) - 1)),
        acknowledged=st.booleans(),
    )
    def send(self, worker: int, arrives: set[int], acknowledged: bool) -> None:
        """Send all held batches in order; some parts get through, some answers come back."""
        for batch in sorted(self.held[worker]):
            if not arrives:
                return
            done = self.shard.push(worker, batch, batch, sorted(arrives))
            if acknowledged:
                self.held[worker][batch] -= set(done)
                if not self.held[worker][batch]:
                    del self.held[worker][batch]

    @rule(worker=st.integers(0, WORKERS - 1))
    def pull(self, worker: int) -> None:
        self.copies[worker] = Copy(self.shard)

    @rule(
        source=st.integers(0, WORKERS - 1), slots=st.sets(st.integers(0, len(IDS) - 1), min_size=1)
    )
    def lose_and_restore(self, source: int, slots: set[int]) -> None:
        """Slots are lost, restored from a worker's copy, and every worker resyncs."""
        copy = self.copies[source]
        k = np.array(sorted(slots))
        for s in k.tolist():
            self.shard.values[s] = Counter(copy.values[s])
        bookkeeping = self.shard.slots
        bookkeeping.last[k], bookkeeping.window[k] = copy.last[k], copy.window[k]
        bookkeeping.position[k] = copy.position[k]
        bookkeeping.lineage[k] += 1
        for worker in range(WORKERS):
            gone = bookkeeping.floor(
                k, worker, self.batch[worker], Stretches.these(self.held[worker])
            )
            self.lost |= {(worker, b) for b in gone}
            for batch, missing in self.held[worker].items():
                have = bookkeeping.seen(k, worker, batch, batch) == Seen.DUPLICATE
                missing |= {s for s, h in zip(k.tolist(), have, strict=True) if not h}

    @invariant()
    def nothing_is_applied_twice(self) -> None:
        for values in self.shard.values:
            assert all(count == 1 for count in values.values())

    @invariant()
    def nothing_acknowledged_is_missing_uncounted(self) -> None:
        for worker in range(WORKERS):
            for batch in range(1, self.batch[worker] + 1):
                for s, values in enumerate(self.shard.values):
                    if (worker, batch) not in values and (worker, batch) not in self.lost:
                        assert s in self.held[worker].get(batch, set()), (worker, batch, s)

    @precondition(lambda self: any(self.batch))
    @rule()
    def flush(self) -> None:
        for worker in range(WORKERS):
            self.send(worker, set(range(len(IDS))), acknowledged=True)
            assert not self.held[worker]
            for s in range(len(IDS)):
                done = self.shard.slots.complete_until(np.array([s]), worker)
                assert done == self.batch[worker]


STORIES, COUNTED = counted("stories of 30 steps: slots, pushes, memberships", 150, 5_000)
Protocol.TestCase.settings = settings(max_examples=STORIES, stateful_step_count=30, deadline=None)
TestProtocol = COUNTED(Protocol.TestCase)


def test_entries_know_ranges() -> None:
    entry = mark(*mark(0, FULL, 1, 5), 8, 8)
    assert seen(*entry, 1, 5) is Seen.DUPLICATE
    assert seen(*entry, 6, 7) is Seen.NEW
    assert seen(*entry, 5, 6) is Seen.OVERLAP
    assert seen(*entry, 8, 9) is Seen.OVERLAP
    assert seen(*entry, 9, 12) is Seen.NEW
    assert complete_until(*entry) == 5
    assert complete_until(*mark(*entry, 6, 7)) == 8


def test_what_is_older_than_the_window_counts_as_applied() -> None:
    entry = mark(0, FULL, 100, 100)
    assert seen(*entry, 1, 1) is Seen.DUPLICATE
    assert seen(*entry, 99, 99) is Seen.NEW


def test_what_is_marked_as_lost_is_another_version() -> None:
    """A replica that was not told of it must not pass for one that was."""
    slots = Slots(IDS, 1, SlotState.READY)
    slots.advance(np.array([0, 1]), 0, 1, 1)
    before = slots.position.copy()
    assert slots.floor(np.arange(4), 0, 1, Stretches()) == Stretches.these([1])
    assert (slots.position - before).tolist() == [0, 0, 1, 1]
