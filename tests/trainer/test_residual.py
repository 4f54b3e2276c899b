"""What of a replay rides on the batches that follow it, and what does not."""

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.rules import SGD, Adagrad, Adam, Rule
from daruma_trainer.worker.pushes import Pushes
from daruma_trainer.worker.sending import parts_of
from pushing import COLS, COPY, accumulate, accumulated, held, rows_of, sealed, update, values_of


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
