"""Which step a shard is at, and whom the next one waits for."""

import numpy as np
import pytest

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.server.slots import Slots, SlotState
from daruma_trainer.server.steps import EVERYTHING, Steps

WORKERS = 3


def steps_of(last: list[list[int]], least: int = 0, consistency: str = "Sync") -> Steps:
    """Of slots that have up to these batches of the workers."""
    members = tuple(Member(Role.WORKER, w, 1, f"w{w}", f"a:{w}") for w in range(WORKERS))
    settings = Settings(consistency=consistency, min_replicas=least)
    membership = Membership("uid", "n", "j", 1, 1, WORKERS, members, settings)
    slots = Slots(range(len(last)), WORKERS, SlotState.READY)
    if last:
        slots.last[:] = last
    return Steps(membership, slots)


@pytest.mark.parametrize(("consistency", "step"), [("Sync", 2), ("Bounded", 2), ("Async", 4)])
def test_the_step_is_the_slowest_clock_or_the_share_of_pushes(consistency: str, step: int) -> None:
    steps = steps_of([[2, 4, 6], [3, 4, 5]], consistency=consistency)
    steps.refresh()
    assert steps.now == step
    steps.now = 100
    steps.refresh()
    assert steps.now == 100, "it never goes back"


def test_each_slot_has_its_own_and_is_not_held_up_by_who_ended() -> None:
    steps = steps_of([[2, 4, 6], [3, 4, 5]])
    both = np.arange(2)
    assert steps.of(both).tolist() == [2, 3]
    steps.left[0] = 2
    assert steps.of(both).tolist() == [4, 4]
    steps.ended[1] = 4
    assert steps.gone == {0: 2, 1: 4}
    assert steps.of(both).tolist() == [6, 5]
    steps.ended[2] = 6
    assert steps.of(both).tolist() == [2, 3], "all are at their end"


def test_who_ended_still_counts_in_the_steps_it_gave_to() -> None:
    steps = steps_of([[2, 4, 6], [3, 4, 5]])
    steps.left |= {0: 2, 1: 4, 2: 9}
    assert steps.active() == [2]
    steps.left[0] = 3
    assert steps.active() == [0, 2], "a slot lacks its last"


def test_a_vacant_seat_is_not_waited_for_and_too_few_are() -> None:
    steps = steps_of([[0, 0, 0]], least=2)
    assert steps.active() == [0, 1, 2]
    steps.seats.away.add(1)
    assert steps.active() == [0, 2]
    assert not steps.too_few([0, 2])
    assert steps.too_few([0])
    steps.left[0] = 0
    assert not steps.too_few([1, 2])
    steps.left[2] = 0
    assert not steps.too_few([1]), "of three two are at their end"


def test_what_every_slot_has() -> None:
    assert steps_of([[2, 4, 6], [3, 4, 5]]).complete() == (2, 4, 5)


def test_a_shard_without_slots_is_where_the_others_are() -> None:
    steps = steps_of([])
    assert steps.slotless
    assert steps.complete() == (EVERYTHING,) * WORKERS
    steps.heard(7)
    steps.heard(5)
    steps.refresh()
    assert steps.now == 7
    whole = steps_of([[1, 1, 1]])
    whole.heard(7)
    assert whole.now == 0, "it knows by itself"
