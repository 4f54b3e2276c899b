"""What a worker holds, accumulates and lets go: pure bookkeeping."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.rules import SGD, Adagrad, Adam, Add, Assign, Rule
from daruma_trainer.stretches import Stretches
from daruma_trainer.worker.pushes import MAX_SEALED, Held, Pushes, Update
from pushing import (
    COLS,
    COPY,
    SERVERS,
    accumulate,
    accumulated,
    held,
    rows_of,
    sealed,
    slots_of,
    update,
    values_of,
)
from soak import counted


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
    accumulate(pushes, second, 0)
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


@pytest.mark.parametrize(
    ("combine", "rule", "value"),
    [
        ("Sum", SGD(), 3.0),
        ("Sum", Adam(), 3.0),
        ("Mean", SGD(), 1.0),
        ("Mean", Adagrad(), 1.0),
        ("Auto", Add(), 3.0),
        ("Mean", Add(), 3.0),
        ("Auto", Assign(), 1.0),
    ],
)
def test_an_accumulation_becomes_one_push(combine: str, rule: Rule, value: float) -> None:
    pushes = accumulated(Replay(combine=combine), rule)
    assert pushes.pending == 3
    assert pushes.acked == 0, "not acknowledged while a server lacks it"
    pushes.seal(1, None, [rule])
    (done,) = pushes.sealed[1]
    assert (done.first, done.last, done.count) == (1, 3, 3)
    parts = sealed(pushes, 1)
    assert sum(len(p.values) for p in parts) == len(rows_of(1))
    for part in parts:
        np.testing.assert_allclose(part.values, value)
    assert pushes.replayed == 3
    pushes.drop_sealed(1, 3)
    assert (pushes.acked, pushes.pending, pushes.gap) == (3, 0, 0.0)


def test_a_batch_that_two_servers_get_late_is_replayed_once() -> None:
    pushes = Pushes(Replay())
    for batch in range(1, 6):
        made = held(pushes, batch, update(1.0))
        accumulate(pushes, made, 1)
        if batch > 2:
            accumulate(pushes, made, 0)
        pushes.note_applied(batch, ~(slots_of(1) | slots_of(0)))
    pushes.seal(0, None, [SGD()])
    assert pushes.replayed == 3
    pushes.seal(1, None, [SGD()])
    assert pushes.replayed == 5
    pushes.drop_sealed(0, 5)
    pushes.drop_sealed(1, 5)
    accumulate(pushes, held(pushes, 6, update(1.0)), 1)
    pushes.seal(1, None, [SGD()])
    assert pushes.replayed == 6
    pushes.drop_all(2)
    accumulate(pushes, held(pushes, 3, update(1.0)), 1)
    pushes.seal(1, None, [SGD()])
    assert pushes.replayed == 7, "after a rollback it is another batch"


def test_dropped_batches_are_counted_lost_and_change_nothing() -> None:
    pushes = accumulated(Replay(combine="Drop"), SGD())
    pushes.seal(1, None, [SGD()])
    assert not sealed(pushes, 1), "what goes out only marks the batches"
    assert not pushes.rest
    assert pushes.lost == Stretches.of((1, 3))
    assert pushes.replayed == 0


def test_learning_rates_that_changed_during_an_outage_count_each_for_its_own_batch() -> None:
    pushes = Pushes(Replay(combine="Sum"))
    for batch, lr in [(1, 0.1), (2, 0.4), (3, 0.1)]:
        accumulate(pushes, held(pushes, batch, update(1.0, lr=lr)), 1)
    pushes.seal(1, None, [SGD()])
    for part in sealed(pushes, 1):
        np.testing.assert_allclose(part.lr * part.values, 0.6, rtol=1e-6)


def test_limits_of_an_accumulation() -> None:
    pushes = Pushes(Replay(max_pending=2, max_age_seconds=10))
    assert pushes.may_accumulate(1, 0.0)
    for batch in (1, 2):
        assert pushes.may_accumulate(1, 1.0)
        accumulate(pushes, held(pushes, batch, update(1)), 1, now=1.0)
    assert not pushes.may_accumulate(1, 1.0), "maxPending"
    assert pushes.may_accumulate(2, 1.0), "each server has its own"
    aged = Pushes(Replay(max_age_seconds=10))
    accumulate(aged, held(aged, 1, update(1)), 1, now=1.0)
    assert aged.may_accumulate(1, 10.9)
    assert not aged.may_accumulate(1, 11.1), "maxAgeSeconds"


def test_the_gap_is_a_limit_with_what_others_have_pending() -> None:
    pushes = Pushes(Replay(max_gap=3.0))
    accumulate(pushes, held(pushes, 1, update(1.0)), 1)
    one = 0.1 * np.sqrt(len(rows_of(1)) * COLS)
    assert pushes.gap == pytest.approx(one)
    assert pushes.may_accumulate(1, 0.0)
    pushes.others_gap = 3.0 - one
    assert not pushes.may_accumulate(1, 0.0)
    assert not pushes.may_accumulate(2, 0.0), "it is one limit for all servers"
    assert pushes.view_gap == pytest.approx(3.0)
    accumulate(pushes, held(pushes, 2, update(1.0)), 2)
    two = 0.1 * np.sqrt(len(rows_of(2)) * COLS)
    assert pushes.gap == pytest.approx(np.hypot(one, two)), "they are parts of one vector"
    assert pushes.widest == pytest.approx(3.0 - one + np.hypot(one, two))


def test_a_batch_that_is_held_is_not_overtaken_by_an_accumulation() -> None:
    pushes = Pushes(Replay(max_gap=1000.0))
    accumulate(pushes, held(pushes, 1, update(1.0)), 1)
    pushes.others_gap = 1000.0
    assert not pushes.may_accumulate(1, 0.0)
    held(pushes, 2, update(1.0))
    pushes.hold_back(1)
    pushes.others_gap = 0.0
    assert not pushes.may_accumulate(1, 0.0), "a range with batch 2 in it would hide that"
    pushes.seal(1, None, [SGD()])
    assert pushes.unsent(1) == Stretches.of((1, 2))
    assert pushes.may_accumulate(1, 0.0)


def test_replays_that_nobody_answers_are_not_piled_up() -> None:
    pushes = Pushes(Replay())
    for batch in range(1, 10):
        made = held(pushes, batch, update(1.0))
        if not pushes.may_accumulate(1, 0.0):
            assert len(pushes.sealed[1]) == MAX_SEALED == batch - 1
            return
        accumulate(pushes, made, 1, Add())
        pushes.seal(1, None, [Add()])
    raise AssertionError("the worker never waited")


@pytest.mark.parametrize(("rule", "expected"), [(Add(), [1, 3, 2]), (Assign(), [1, 2, 2])])
def test_rows_are_joined_row_by_row(rule: Rule, expected: list[float]) -> None:
    pushes = Pushes(Replay())
    a, b, c = sorted(rows_of(1)[:3])
    foreign = rows_of(0)[0]
    for batch, rows, value in [(1, [a, b, foreign], 1.0), (2, [b, c], 2.0)]:
        made = held(pushes, batch, update(value, rows=sorted(rows)))
        accumulate(pushes, made, 1, rule)
    pushes.seal(1, None, [rule])
    values: dict[int, float] = {}
    for part in sealed(pushes, 1):
        assert part.rows is not None
        assert (np.diff(part.rows) > 0).all()
        values |= dict(zip(part.rows.tolist(), part.values[:, 0].tolist(), strict=True))
    assert values == dict(zip([a, b, c], expected, strict=True))


@pytest.mark.parametrize(
    ("combine", "rule", "expected"),
    [
        ("Sum", SGD(), [3.0, 5.0, 2.0]),
        ("Sum", Adam(), [3.0, 5.0, 2.0]),
        ("Mean", SGD(), [1.0, 5 / 3, 2 / 3]),
        ("Mean", Adam(), [1.5, 2.5, 2.0]),
    ],
)
def test_gradients_of_rows_are_joined_row_by_row(
    combine: str, rule: Rule, expected: list[float]
) -> None:
    """SGD's mean is over the batches; where a rule is scale-free a row's is over its gradients."""
    pushes = Pushes(Replay(combine=combine))
    a, b, c = rows_of(1)[:3]
    for batch, values in enumerate([{a: 2.0, b: 2.0}, {a: 1.0}, {b: 3.0, c: 2.0}], 1):
        rows = np.array(sorted(values))
        gradient = np.array([[values[row]] * COLS for row in rows.tolist()], np.float32)
        accumulate(pushes, held(pushes, batch, Update(0, 0.1, gradient, rows)), 1, rule)
    pushes.seal(1, None, [rule])
    assert values_of(sealed(pushes, 1)) == pytest.approx(
        dict(zip([a, b, c], expected, strict=True))
    )


def test_accumulating_leaves_the_held_gradient_alone() -> None:
    pushes = Pushes(Replay())
    first = held(pushes, 1, update(1))
    accumulate(pushes, first, 1)
    accumulate(pushes, held(pushes, 2, update(5)), 1)
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
                accumulate(self.pushes, made, server)

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
        self.pushes.seal(server, None, [SGD()])

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
            can = self.pushes.unsent(server)
            assert missing <= set(can)


STORIES, COUNTED = counted("stories of 30 steps: outages and replays", 60, 5_000)
TestOutages = COUNTED(Outages.TestCase)
TestOutages.settings = settings(max_examples=STORIES, stateful_step_count=30, deadline=None)


def test_what_is_covered_is_let_go_though_nobody_acknowledged_it() -> None:
    """Acknowledgements may be lost, and a step that others complete (Sync) has none."""
    pushes = Pushes(Replay())
    pushes.begin(1)
    pushes.hold(Held(1, 1, (update(1),), {0}))
    pushes.begin(2)
    later = Held(2, 1, (update(1),), {0})
    pushes.hold(later)
    pushes.accumulate(later, 0, COPY, 0.0, [SGD()])
    pushes.seal(0, None, [SGD()])
    for server in (1, 2):
        for batch in (1, 2):
            pushes.note_applied(batch, slots_of(server))
    assert pushes.acked == 0
    pushes.note_covered(0, slots_of(0), 1)
    assert pushes.acked == 1
    pushes.note_covered(0, slots_of(0), 2)
    assert (pushes.acked, pushes.sealed) == (2, {})


def test_what_every_slot_has_is_kept_until_it_is_covered() -> None:
    pushes = Pushes(Replay())
    made = held(pushes, 1, update(1.0))
    made.uncovered |= {0, 2}
    pushes.note_applied(1, np.ones(SLOTS, np.bool_))
    pushes.note_covered(0, slots_of(0), 1)
    assert pushes.acked == 0
    assert list(pushes.held) == [1], "one server alone has it"
    pushes.note_covered(2, slots_of(2), 1)
    assert (pushes.acked, pushes.held) == (1, {})
