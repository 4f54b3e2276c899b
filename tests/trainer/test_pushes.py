"""What a worker holds, accumulates and lets go: pure bookkeeping."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.wire import Slots
from daruma_trainer.worker.pushes import Held, Pushes, Update
from soak import counted

SERVERS = 3
OWNER = np.arange(SLOTS) % SERVERS


def slots_of(server: int) -> Slots:
    return np.equal(OWNER, server)


def update(value: float, lr: float = 0.1, rows: list[int] | None = None) -> Update:
    count = 4 if rows is None else len(rows)
    index = None if rows is None else np.array(rows, np.int64)
    return Update(0, lr, np.full((count, 2), value, np.float32), index)


def held(pushes: Pushes, batch: int, *updates: Update, epoch: int = 1) -> Held:
    pushes.begin(batch)
    made = Held(batch, epoch, updates)
    pushes.hold(made)
    return made


def test_a_batch_is_acknowledged_when_all_slots_have_it() -> None:
    pushes = Pushes(Replay())
    held(pushes, 1, update(1), epoch=7)
    for server in range(SERVERS):
        assert (pushes.acked, pushes.acked_epoch) == (0, 0)
        pushes.note_applied(1, slots_of(server))
    assert (pushes.acked, pushes.acked_epoch) == (1, 7)
    assert not pushes.held


def test_what_is_held_goes_out_again_to_the_successor_of_a_lost_server() -> None:
    pushes = Pushes(Replay())
    first = held(pushes, 1, update(1))
    pushes.note_applied(1, slots_of(0) | slots_of(1))
    second = held(pushes, 2, update(2))
    pushes.accumulate(second, 0, slots_of(0), 0.0, ["sgd"])
    pushes.hold_again(0, slots_of(0))
    np.testing.assert_array_equal(first.unacked, slots_of(0) | slots_of(2))
    # Its part is in the accumulation: sent twice it would be refused as an overlap.
    assert not second.unacked[slots_of(0)].any()


def test_a_later_batch_does_not_overtake_an_earlier_one() -> None:
    pushes = Pushes(Replay())
    everything = np.ones(SLOTS, np.bool_)
    held(pushes, 1, update(1))
    held(pushes, 2, update(1))
    pushes.note_applied(2, everything)
    assert pushes.acked == 0
    pushes.note_applied(1, everything)
    assert pushes.acked == 2


def test_a_pull_that_shows_a_batch_is_as_good_as_its_acknowledgement() -> None:
    pushes = Pushes(Replay())
    held(pushes, 1, update(1))
    held(pushes, 2, update(1))
    pushes.note_state(np.arange(SLOTS), np.full(SLOTS, 1))
    assert pushes.acked == 1
    assert list(pushes.held) == [2]


def accumulated(replay: Replay, how: str, count: int = 3) -> Pushes:
    pushes = Pushes(replay)
    for batch in range(1, count + 1):
        made = held(pushes, batch, update(1.0))
        pushes.accumulate(made, 1, slots_of(1), 0.0, [how])
        pushes.note_applied(batch, ~slots_of(1))
    return pushes


@pytest.mark.parametrize(
    ("combine", "how", "moved", "value"),
    [
        ("Sum", "sgd", {}, 3.0),
        ("Mean", "sgd", {}, 1.0),
        ("Auto", "sgd", {}, 3.0),
        ("Auto", "adam", {}, 1.0),
        ("Auto", "adagrad", {}, 1.0),
        ("Auto", "add", {}, 3.0),
        ("Mean", "add", {}, 3.0),
        ("Auto", "assign", {}, 1.0),
    ],
)
def test_an_accumulation_becomes_one_push(
    combine: str, how: str, moved: dict[int, float], value: float
) -> None:
    pushes = accumulated(Replay(combine=combine), how)
    assert pushes.pending == 3
    assert pushes.acked == 0, "not acknowledged while a server lacks it"
    pushes.seal(1, moved, [how])
    (sealed,) = pushes.sealed[1]
    assert (sealed.first, sealed.last, sealed.count) == (1, 3, 3)
    np.testing.assert_allclose(sealed.tables[0].values, value)
    assert pushes.replayed == 3
    pushes.drop_sealed(1, 3)
    assert (pushes.acked, pushes.pending) == (3, 0)


def test_a_long_sum_goes_no_further_than_the_part_would_have_moved() -> None:
    pushes = accumulated(Replay(trust=0.5), "sgd", count=10)
    pushes.seal(1, {1: 0.2}, ["sgd"])
    (sealed,) = pushes.sealed[1]
    length = 0.1 * float(np.linalg.norm(sealed.tables[0].values))
    assert length == pytest.approx(0.5 * 0.2 * 10, rel=1e-5)


def test_dropped_batches_are_counted_lost_and_change_nothing() -> None:
    pushes = accumulated(Replay(combine="Drop"), "sgd")
    pushes.seal(1, {}, ["sgd"])
    (sealed,) = pushes.sealed[1]
    assert not sealed.tables, "what goes out only marks the batches"
    assert pushes.lost == {1, 2, 3}
    assert pushes.replayed == 0


def test_learning_rates_that_changed_during_an_outage_count_each_for_its_own_batch() -> None:
    pushes = Pushes(Replay(combine="Sum"))
    for batch, lr in [(1, 0.4), (2, 0.1)]:
        made = held(pushes, batch, update(1.0, lr=lr))
        pushes.accumulate(made, 1, slots_of(1), 0.0, ["sgd"])
    pushes.seal(1, {}, ["sgd"])
    (sealed,) = pushes.sealed[1]
    sent = sealed.tables[0]
    np.testing.assert_allclose(sent.lr * sent.values, 0.5, rtol=1e-6)


def test_limits_of_an_accumulation() -> None:
    pushes = Pushes(Replay(max_pending=2, max_age_seconds=10))
    assert pushes.may_accumulate(1, 0.0)
    for batch in (1, 2):
        assert pushes.may_accumulate(1, 1.0)
        pushes.accumulate(held(pushes, batch, update(1)), 1, slots_of(1), 1.0, ["sgd"])
    assert not pushes.may_accumulate(1, 1.0), "maxPending"
    assert pushes.may_accumulate(2, 1.0), "each server has its own"
    aged = Pushes(Replay(max_age_seconds=10))
    aged.accumulate(held(aged, 1, update(1)), 1, slots_of(1), 1.0, ["sgd"])
    assert aged.may_accumulate(1, 10.9)
    assert not aged.may_accumulate(1, 11.1), "maxAgeSeconds"


@pytest.mark.parametrize(("how", "expected"), [("add", [1, 3, 2]), ("assign", [1, 2, 2])])
def test_rows_are_joined_row_by_row(how: str, expected: list[float]) -> None:
    pushes = Pushes(Replay())
    for batch, rows, value in [(1, [0, 2], 1.0), (2, [2, 5], 2.0)]:
        made = held(pushes, batch, update(value, rows=rows))
        pushes.accumulate(made, 1, slots_of(1), 0.0, [how])
    pushes.seal(1, {}, [how])
    sent = pushes.sealed[1][0].tables[0]
    assert sent.rows is not None
    assert sent.rows.tolist() == [0, 2, 5]
    assert sent.values[:, 0].tolist() == expected


def test_accumulating_leaves_the_held_gradient_alone() -> None:
    pushes = Pushes(Replay())
    first = held(pushes, 1, update(1))
    pushes.accumulate(first, 1, slots_of(1), 0.0, ["sgd"])
    pushes.accumulate(held(pushes, 2, update(5)), 1, slots_of(1), 0.0, ["sgd"])
    np.testing.assert_array_equal(first.updates[0].values, 1.0)


class Outages(RuleBasedStateMachine):
    """Servers come and go; whatever happens, no batch is forgotten and none is counted early."""

    def __init__(self) -> None:
        super().__init__()
        self.pushes = Pushes(Replay())
        self.batch = 0
        self.lacking: dict[int, set[int]] = {s: set() for s in range(SERVERS)}
        """Model: the batches that a server does not have."""

    @rule(away=st.sets(st.integers(0, SERVERS - 1), max_size=SERVERS - 1))
    def push(self, away: set[int]) -> None:
        self.batch += 1
        made = held(self.pushes, self.batch, update(1))
        for server in range(SERVERS):
            self.lacking[server].add(self.batch)
            if server in away:
                self.pushes.accumulate(made, server, slots_of(server), 0.0, ["sgd"])

    @rule(server=st.integers(0, SERVERS - 1), data=st.data())
    @precondition(lambda self: self.batch > 0)
    def acknowledge(self, server: int, data: st.DataObject) -> None:
        batch = data.draw(st.integers(1, self.batch))
        made = self.pushes.held.get(batch)
        if made is not None and made.unacked[slots_of(server)].any():
            self.lacking[server].discard(batch)
        self.pushes.note_applied(batch, slots_of(server))

    @rule(server=st.integers(0, SERVERS - 1))
    def seal(self, server: int) -> None:
        self.pushes.seal(server, {}, ["sgd"])

    @rule(server=st.integers(0, SERVERS - 1))
    def sealed_applied(self, server: int) -> None:
        for done in list(self.pushes.sealed.get(server, [])):
            ours = [b for b in range(done.first, done.last + 1) if not self._held(server, b)]
            self.lacking[server] -= set(ours)
            self.pushes.drop_sealed(server, done.last)

    def _held(self, server: int, batch: int) -> bool:
        made = self.pushes.held.get(batch)
        return made is not None and bool(made.unacked[slots_of(server)].any())

    @invariant()
    def acknowledged_is_what_everybody_has(self) -> None:
        oldest = min((b for missing in self.lacking.values() for b in missing), default=None)
        if oldest is not None:
            assert self.pushes.acked < oldest
        else:
            assert self.pushes.acked == self.batch

    @invariant()
    def whatever_is_lacking_can_still_be_given(self) -> None:
        for server, missing in self.lacking.items():
            can = set(self.pushes.unsent(server))
            assert missing <= can


STORIES, COUNTED = counted("stories of 30 steps: outages and replays", 60, 5_000)
TestOutages = COUNTED(Outages.TestCase)
TestOutages.settings = settings(max_examples=STORIES, stateful_step_count=30, deadline=None)
