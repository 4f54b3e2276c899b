"""What a worker holds, accumulates and lets go: pure bookkeeping."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, Adagrad, Adam, Add, Assign, Rule, rule_to_json
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import Slots, TablePush
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.pushes import MAX_SEALED, Held, Pushes, Update
from daruma_trainer.worker.sending import parts_of
from soak import counted

SERVERS = 3
ROWS, COLS = 64, 2


def copy_of(rule: Rule) -> HostCopy:
    copy = HostCopy("uid", SERVERS, 1)
    copy.add(TableSpec(0, "t", (ROWS, COLS), 1, rule_to_json(rule)))
    copy.arrange()
    return copy


COPY = copy_of(SGD())


def slots_of(server: int) -> Slots:
    return COPY.slots_of(server)


def rows_of(server: int) -> list[int]:
    groups = COPY.groups_of(server)
    return [row for group in groups for row in group.layout.tables[0].rows.tolist()]


def update(value: float, lr: float = 0.1, rows: list[int] | None = None) -> Update:
    count = ROWS if rows is None else len(rows)
    index = None if rows is None else np.array(rows, np.int64)
    return Update(0, lr, np.full((count, COLS), value, np.float32), index)


def held(pushes: Pushes, batch: int, *updates: Update, epoch: int = 1) -> Held:
    pushes.begin(batch)
    made = Held(batch, epoch, updates)
    pushes.hold(made)
    return made


def accumulate(
    pushes: Pushes, made: Held, server: int, rule: Rule | None = None, now: float = 0.0
) -> None:
    pushes.accumulate(made, server, COPY, now, [rule or SGD()])


def sealed(pushes: Pushes, server: int) -> list[TablePush]:
    """What a server's only replay sends, all its messages together."""
    (done,) = pushes.sealed[server]
    return [part for parts in done.cut(COPY.groups_of(server)) for part in parts]


def ridden(pushes: Pushes, batch: int, server: int, own: float = 0.0, lr: float = 0.1) -> float:
    """What the next batch sends to a server, a value of it, with what rides along."""
    made = held(pushes, batch, update(own, lr))
    pushes.ride(made, server, COPY)
    groups = COPY.groups_of(server)
    values = [part.values for n in range(len(groups)) for part in parts_of(made, groups, n)]
    flat = np.concatenate([v.reshape(-1) for v in values])
    assert (flat == flat[0]).all()
    np.testing.assert_array_equal(made.updates[0].values, np.float32(own))
    return float(flat[0])


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


def accumulated(replay: Replay, rule: Rule, count: int = 3) -> Pushes:
    pushes = Pushes(replay)
    for batch in range(1, count + 1):
        made = held(pushes, batch, update(1.0))
        accumulate(pushes, made, 1, rule)
        pushes.note_applied(batch, ~slots_of(1))
    return pushes


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


def test_gradients_ride_on_the_batches_that_follow_while_they_agree() -> None:
    pushes = accumulated(Replay(), SGD(), count=10)
    pushes.seal(1, None, [SGD()])
    assert not sealed(pushes, 1), "its own push marks the batches"
    assert pushes.rest[1].left == 10
    # One mean gradient of 1, whatever the batch says; then half as many more, and more.
    assert ridden(pushes, 11, 1, own=-1.0) == pytest.approx(0.0)
    assert ridden(pushes, 12, 1, own=1.0) == pytest.approx(2.5)
    assert ridden(pushes, 13, 1, own=1.0, lr=0.2) == pytest.approx(1 + 2.25 / 2), "its own rate"
    assert pushes.rest[1].left == pytest.approx(10 - 4.75)
    assert ridden(pushes, 14, 1, own=-0.1) == pytest.approx(-0.1), "it points elsewhere"
    assert 1 not in pushes.rest
    assert ridden(pushes, 15, 1, own=1.0) == pytest.approx(1.0)


def test_all_of_a_short_replay_rides_and_no_more() -> None:
    pushes = accumulated(Replay(), SGD(), count=3)
    pushes.seal(1, None, [SGD()])
    total = sum(ridden(pushes, batch, 1, own=1e-6) for batch in range(4, 10))
    assert total == pytest.approx(3.0, rel=1e-4)
    assert not pushes.rest


def test_momentum_lets_it_out_in_as_many_steps_as_it_remembers() -> None:
    rule = SGD(momentum=0.9)
    pushes = accumulated(Replay(), rule, count=100)
    pushes.seal(1, None, [rule])
    found = [ridden(pushes, batch, 1, own=1e-6) for batch in range(101, 112)]
    assert found[0] == pytest.approx(1.0, rel=1e-4)
    assert found[10] == pytest.approx(1.5, rel=1e-3)


def test_a_replay_for_adam_is_no_step_of_its_own() -> None:
    for scale_free in (Adam(), Adagrad()):
        pushes = accumulated(Replay(), scale_free, count=5)
        pushes.seal(1, None, [scale_free])
        assert not sealed(pushes, 1)
        assert ridden(pushes, 6, 1, own=3.0) == pytest.approx(2.0), "the mean of both"
        assert not pushes.rest
        assert ridden(pushes, 7, 1, own=3.0) == pytest.approx(3.0)


def test_a_replay_goes_no_further_than_the_part_would_have_moved() -> None:
    pushes = accumulated(Replay(trust=0.5), SGD(), count=10)
    pushes.seal(1, 0.2, [SGD()])
    mean = 0.1 * np.sqrt(len(rows_of(1)) * COLS)
    assert pushes.rest[1].left == pytest.approx(0.5 * 0.2 * 10 / mean, rel=1e-5)


def test_what_did_not_ride_begins_the_next_accumulation() -> None:
    pushes = accumulated(Replay(), SGD(), count=10)
    pushes.seal(1, None, [SGD()])
    pushes.drop_sealed(1, 10)
    ridden(pushes, 11, 1, own=1.0)
    pushes.note_applied(11, np.ones(SLOTS, np.bool_))
    before = pushes.gap
    accumulate(pushes, held(pushes, 12, update(1.0)), 1)
    assert not pushes.rest
    assert pushes.open[1].parts[0].weight == 10
    assert pushes.open[1].first == 12, "the others were marked"
    np.testing.assert_allclose(pushes.open[1].parts[0].values, 10.0)
    assert pushes.gap == pytest.approx(before * 10 / 9)
    pushes.drop_all(0)
    assert pushes.gap == 0.0


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


def values_of(parts: tuple[TablePush, ...] | list[TablePush]) -> dict[int, float]:
    """Of pushes of single rows: the first value of each row."""
    found: dict[int, float] = {}
    for part in parts:
        assert part.rows is not None
        assert (np.diff(part.rows) > 0).all()
        assert (part.values == part.values[:, :1]).all()
        found |= dict(zip(part.rows.tolist(), part.values[:, 0].tolist(), strict=True))
    return found


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


def replayed(rule: Rule, *given: tuple[list[int], float]) -> Pushes:
    """A worker that has batches of single rows to replay to server 1."""
    pushes = Pushes(Replay())
    for batch, (rows, value) in enumerate(given, 1):
        accumulate(pushes, held(pushes, batch, update(value, rows=sorted(rows))), 1, rule)
    pushes.seal(1, None, [rule])
    assert not sealed(pushes, 1), "gradients ride on the batches that follow"
    return pushes


def rides(pushes: Pushes, batch: int, rows: list[int], value: float) -> dict[int, float]:
    """What server 1 gets of a batch of single rows."""
    made = held(pushes, batch, update(value, rows=sorted(rows)))
    pushes.ride(made, 1, COPY)
    groups = COPY.groups_of(1)
    return values_of([p for number in range(len(groups)) for p in parts_of(made, groups, number)])


def test_a_batch_of_rows_takes_the_replays_rows_along() -> None:
    """The mean of two batches first; no row more than the replay and the batch have."""
    a, b, c, other = rows_of(1)[:4]
    pushes = replayed(SGD(), ([a, b], 4.0), ([b], 2.0))
    assert rides(pushes, 3, [b, c], 1.0) == {a: 2.0, b: 4.0, c: 1.0}
    # The rest is another mean: where a batch has none of the rows it says nothing against it.
    assert rides(pushes, 4, [other], 1.0) == {a: 2.0, b: 3.0, other: 1.0}
    assert rides(pushes, 5, [b], 1.0) == {b: 1.0}


def test_a_batch_of_rows_that_points_elsewhere_ends_the_replay() -> None:
    a, b = rows_of(1)[:2]
    pushes = replayed(SGD(), ([a, b], 4.0), ([b], 2.0))
    assert rides(pushes, 3, [b], 1.0) == {a: 2.0, b: 4.0}
    assert rides(pushes, 4, [b], -1.0) == {b: -1.0}
    assert rides(pushes, 5, [b], 1.0) == {b: 1.0}


def test_a_replay_to_a_scale_free_rule_is_one_gradient_of_each_row() -> None:
    a, b, c = rows_of(1)[:3]
    pushes = replayed(Adam(), ([a, b], 4.0), ([b], 2.0))
    assert rides(pushes, 3, [b, c], 1.0) == {a: 4.0, b: 2.0, c: 1.0}
    assert rides(pushes, 4, [b], 1.0) == {b: 1.0}


@pytest.mark.parametrize(("rule", "expected"), [(SGD(), [8 / 3, 4.0]), (Adam(), [4.0, 12.0])])
def test_what_did_not_ride_of_rows_begins_the_next_replay(
    rule: Rule, expected: list[float]
) -> None:
    a, b, c = rows_of(1)[:3]
    pushes = replayed(rule, ([a], 4.0), ([a], 4.0))
    accumulate(pushes, held(pushes, 3, update(12.0, rows=[b])), 1, rule)
    pushes.seal(1, None, [rule])
    assert rides(pushes, 4, [c], 1.0) == pytest.approx({a: expected[0], b: expected[1], c: 1.0})


def test_a_whole_gradient_takes_the_replays_rows_along() -> None:
    a, b = rows_of(1)[:2]
    kinds: list[tuple[Rule, float]] = [(SGD(), 3.0), (Adam(), 2.5)]
    for kind, expected in kinds:
        pushes = replayed(kind, ([a], 4.0), ([b], 0.0))
        made = held(pushes, 3, update(1.0))
        pushes.ride(made, 1, COPY)
        (part,) = parts_of(made, COPY.groups_of(1), 0)
        assert part.rows is None
        found = dict(zip(rows_of(1), part.values[:, 0].tolist(), strict=True))
        assert (found[a], found[rows_of(1)[2]]) == (expected, 1.0)


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
