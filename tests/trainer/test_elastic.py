"""Steps whose workers come and go: means have the right weights, nobody is waited for in vain."""

from dataclasses import replace

import numpy as np
import pytest

from daruma_trainer.applied import FULL
from daruma_trainer.contract import Role, Settings
from daruma_trainer.identity import Identity
from daruma_trainer.rules import SGD
from daruma_trainer.server.seats import Seats
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import Push, TablePush, mask_of
from planes import Planes
from simulated_job import SimulatedJob, quiet

GRADIENTS = (1.0, 10.0, 100.0)


def sync(least: int = 1, workers: int = 3) -> Planes:
    """Two servers under `Sync`; worker w's gradient is 10^w everywhere, the rate 1."""
    settings = Settings(consistency="Sync", min_replicas=least)
    planes = Planes(settings, SGD(), workers=workers, gives=lambda w, _b: GRADIENTS[w])
    for seat in planes.seats:
        planes.enter(seat)
    for seat in planes.seats:
        planes.step(seat)
    assert all(not seat.missing for seat in planes.seats)
    return planes


def at(planes: Planes) -> list[float]:
    """Where each server's values are, as a sum of means."""
    found = []
    for server in range(len(planes.planes)):
        values = planes.values(server)
        assert (values == values.flat[0]).all()
        found.append(-float(values.flat[0]))
    return found


def test_a_part_that_reached_one_server_and_not_the_other_counts_where_it_is() -> None:
    planes = sync()
    assert at(planes) == [37, 37]
    dying = planes.seats[2]
    planes.make(dying)
    planes.arrive(dying, 0)
    planes.lose(2)
    for seat in planes.seats[:2]:
        planes.step(seat)
    # All gave to server 0; server 1 waits for the worker that was lost, until it knows.
    assert at(planes) == [74, 37]
    planes.tell(1)
    assert at(planes) == [74, 37 + 5.5]
    assert not planes.seats[0].missing | planes.seats[1].missing
    planes.tell(0)
    for seat in planes.seats[:2]:
        planes.step(seat)
    assert at(planes) == pytest.approx([79.5, 48])


def test_what_one_server_lacks_of_before_the_skipped_is_lost() -> None:
    """A worker dies after a step that one server, lost with it, had made without its part."""
    planes = sync(workers=2)
    for seat in planes.seats:
        planes.step(seat)
    younger = planes.planes[1]
    younger.slots.last[:, 1], younger.slots.window[:, 1] = 1, 1
    planes.lose(1)
    planes.tell(0)
    planes.tell(1)
    for _ in range(3):
        planes.step(planes.seats[0])
    planes.membership = replace(
        planes.membership,
        members=tuple(
            replace(m, incarnation=9) if (m.role, m.index) == (Role.SERVER, 1) else m
            for m in planes.membership.members
        ),
    )
    successor = planes.seats[1]
    planes.enter(successor)
    assert (successor.batch, len(successor.position.skipped)) == (5, 3)
    assert planes.resync(successor, 0) == []
    assert planes.resync(successor, 1) == [2], "skipped were 3, 4 and 5"


def test_however_many_are_lost_the_worker_hears_of_each() -> None:
    planes = sync(workers=2)
    seat = planes.seats[0]
    seat.batch = 5000
    assert planes.resync(seat, 1) == list(range(2, 5001))
    assert planes.planes[1].lost == 4999


def test_each_life_of_a_worker_hears_of_all_that_were_lost() -> None:
    planes = sync(workers=2)
    seat = planes.seats[0]
    seat.batch = 9
    assert planes.resync(seat, 1) == list(range(2, 10))
    assert planes.resync(seat, 1) == list(range(2, 10)), "the first answer may not have come"
    assert planes.planes[1].lost == 8
    planes.lose(0)
    successor = planes.seats[0]
    successor.batch = 5
    assert planes.resync(successor, 1) == list(range(2, 10)), "it makes 6 to 9 again in vain"
    assert planes.planes[1].lost == 8


def test_a_seat_may_be_vacant_for_as_long_as_a_job_takes() -> None:
    planes = sync(workers=2)
    seat, plane = planes.seats[0], planes.planes[1]
    seat.batch = 10**9
    seat.position.skipped = Stretches.of((2, 10**9))
    assert planes.resync(seat, 1) == []
    assert plane.lost == 0
    assert (plane.slots.last[:, 0] == 10**9).all()


def test_what_a_rollback_has_made_again_is_not_lost() -> None:
    planes = sync(workers=2)
    seat, plane = planes.seats[0], planes.planes[1]
    seat.batch = 9
    planes.resync(seat, 1)
    assert plane.lost == 8
    plane.slots.last[:] = 4
    plane.rolled_back(4)
    assert (plane.lost, plane.step) == (3, 4)


def test_after_a_rollback_all_past_lives_batches_are_made_again_from_there_on() -> None:
    planes = sync(workers=2)
    for _ in range(3):
        for seat in planes.seats:
            planes.step(seat)
    planes.lose(1)
    planes.tell(0)
    planes.tell(1)
    late = planes.seats[1]
    planes.enter(late)
    assert late.position.after == 4
    late.position.mixed = {2, 4}
    late.copy.last[:], late.copy.window[:] = 3, 7
    me = Identity("n", "j", Role.WORKER, 1, late.incarnation, "t", ("h", 1))
    assert late.position.choose(late.copy, planes.membership, me) == 3
    assert (late.position.after, late.position.mixed) == (3, {2})


def test_what_was_skipped_and_is_made_after_a_rollback_may_be_lost() -> None:
    """And what was skipped before that still is none that is lost."""
    planes = sync(workers=2)
    planes.lose(1)
    planes.tell(0)
    planes.tell(1)
    for _ in range(5):
        planes.step(planes.seats[0])
    late = planes.seats[1]
    planes.enter(late)
    assert late.position.skipped == Stretches.of((2, 6))
    late.copy.last[:], late.copy.window[:] = 3, FULL
    me = Identity("n", "j", Role.WORKER, 1, late.incarnation, "t", ("h", 1))
    late.batch = late.position.choose(late.copy, planes.membership, me)
    assert late.batch == 3
    late.batch = 8
    restored = planes.planes[1]
    restored.slots.last[:], restored.slots.window[:] = 1, FULL
    assert planes.resync(late, 1) == [4, 5, 6, 7, 8], "2 and 3 nobody made"


def test_what_a_worker_had_counted_as_lost_and_now_skips_is_not_lost_as_well() -> None:
    """All went back, and the others are far ahead again when it knows where it goes on."""
    settings = Settings(consistency="Bounded", max_staleness=2, min_replicas=1)
    job = SimulatedJob(settings, 0.0)
    try:
        worker, other = job.live_workers
        assert job.until(lambda: quiet(job), 400)
        assert worker.copy is not None
        assert worker.pushes is not None
        worker.copy.last[:, worker.me.index] = 3
        worker.copy.last[:, other.me.index] = 9
        worker.pushes.lost = Stretches.these((2, 5, 12))
        assert worker.resume(worker.generation)
        assert (worker.batch, worker.position.skipped) == (9, Stretches.of((4, 9)))
        assert worker.pushes.lost == Stretches.of((2, 2))
    finally:
        job.close()


def test_nobody_makes_again_what_others_counted_lost() -> None:
    """A server and a worker are lost at once, but the worker is fenced an epoch later."""
    planes = sync(least=2, workers=2)
    for _ in range(4):
        for seat in planes.seats:
            planes.step(seat)
    restored = planes.planes[1]
    restored.slots.last[:], restored.slots.window[:] = 1, 1
    restored.unheard = {0, 1}
    assert planes.resync(planes.seats[0], 1) == [2, 3, 4, 5]
    planes.membership = replace(
        planes.membership,
        epoch=2,
        members=tuple(
            replace(m, incarnation=2) if (m.role, m.index) == (Role.SERVER, 1) else m
            for m in planes.membership.members
        ),
    )
    planes.lose(1)
    successor = planes.seats[1]
    planes.enter(successor)
    assert successor.batch == 5, "a step of its batch alone would be made in the restored slots"
    assert planes.resync(successor, 1) == [2, 3, 4, 5]
    assert not restored.unheard


@pytest.mark.parametrize("knows_first", [0, 1])
def test_its_part_counts_too_where_the_step_was_not_made_yet(knows_first: int) -> None:
    planes = sync()
    planes.make(planes.seats[2])
    planes.arrive(planes.seats[2], 0)
    planes.lose(2)
    for server in (knows_first, 1 - knows_first):
        planes.tell(server)
    for seat in planes.seats[:2]:
        planes.step(seat)
    assert at(planes) == [74, 42.5]


def enter_late(planes: Planes) -> None:
    """Two steps are made without worker 2, whose replacement enters while a third is made."""
    planes.lose(2)
    for server in (0, 1):
        planes.tell(server)
    first, second, late = planes.seats
    for _ in range(2):
        planes.step(first)
        planes.step(second)
    # Server 0 has made the fourth step when it is asked; server 1 has not.
    planes.make(first)
    planes.make(second)
    planes.arrive(first, 0)
    planes.arrive(second, 0)
    planes.enter(late)
    planes.arrive(first, 1)
    planes.arrive(second, 1)


def test_a_replacement_enters_after_the_newest_step_and_what_it_missed_is_counted() -> None:
    planes = sync()
    enter_late(planes)
    late = planes.seats[2]
    assert at(planes) == pytest.approx([37 + 3 * 5.5, 37 + 2 * 5.5]), "server 1 waits for it"
    assert (late.batch, len(late.position.skipped)) == (4, 3)
    assert [planes.resync(late, server) for server in (0, 1)] == [[], []], "nothing was lost"
    assert at(planes) == pytest.approx([53.5, 53.5])
    for server in (0, 1):
        planes.ask(late, server, planes.pace(late))
    assert not late.missing
    np.testing.assert_allclose(late.copy.data[0], -53.5)
    for seat in planes.seats:
        planes.step(seat)
    assert at(planes) == pytest.approx([90.5, 90.5])
    assert [p.lost for p in planes.planes] == [0, 0]


def test_a_replacement_that_dies_while_it_enters_leaves_the_seat_vacant_again() -> None:
    planes = sync()
    enter_late(planes)
    planes.lose(2)
    for server in (0, 1):
        planes.tell(server)
    assert at(planes) == pytest.approx([53.5, 53.5])
    planes.enter(planes.seats[2])
    assert (planes.seats[2].batch, len(planes.seats[2].position.skipped)) == (4, 3)


def test_a_replacement_that_comes_at_once_skips_nothing() -> None:
    planes = sync()
    planes.lose(2)
    for server in (0, 1):
        planes.tell(server)
    late = planes.seats[2]
    planes.enter(late)
    assert (late.batch, len(late.position.skipped)) == (1, 0)
    for server in (0, 1):
        planes.resync(late, server)
    for seat in planes.seats:
        planes.step(seat)
    assert at(planes) == [74, 74]


@pytest.mark.parametrize("least", [0, 3])
def test_where_all_are_needed_the_step_waits_for_the_replacement(least: int) -> None:
    planes = sync(least)
    planes.lose(2)
    for server in (0, 1):
        planes.tell(server)
    for seat in planes.seats[:2]:
        planes.step(seat)
    assert at(planes) == [37, 37]
    late = planes.seats[2]
    planes.enter(late)
    assert (late.batch, len(late.position.skipped)) == (1, 0)
    planes.step(late)
    assert at(planes) == [74, 74]


def test_with_fewer_than_min_replicas_nobody_goes_on() -> None:
    planes = sync(2)
    planes.lose(2)
    planes.lose(1)
    for server in (0, 1):
        planes.tell(server)
    first, second, _ = planes.seats
    planes.step(first)
    assert at(planes) == [37, 37]
    planes.enter(second)
    for server in (0, 1):
        planes.resync(second, server)
    planes.step(second)
    assert at(planes) == [42.5, 42.5]


def test_those_that_left_are_not_missed() -> None:
    planes = sync(2)
    planes.leave(planes.seats[0])
    planes.leave(planes.seats[1])
    planes.step(planes.seats[2])
    assert at(planes) == [137, 137]


def test_a_server_that_began_later_waits_for_whom_it_does_not_know() -> None:
    planes = sync()
    planes.lose(2)
    vacant = planes.membership
    assert Seats(vacant).vacant == {2}, "nobody has that seat"
    named = tuple(replace(m, address=m.address or "w:9") for m in vacant.members)
    assert Seats(replace(vacant, members=named)).vacant == set(), "it may have entered elsewhere"


def test_what_a_step_overwrote_is_still_known_and_exact() -> None:
    """Server 0 makes a step, server 1 waits: what both were before it comes from a live worker."""
    planes = sync(0)
    dying, live = planes.seats[2], planes.seats[0]
    planes.make(dying)
    planes.arrive(dying, 0)
    planes.lose(2)
    for seat in planes.seats[:2]:
        planes.step(seat)
    assert at(planes) == [74, 37]
    assert live.missing == {1}
    late = planes.seats[2]
    planes.enter(late)
    assert late.batch == 1
    assert late.copy.previous is not None
    assert live.copy.previous is not None
    further = late.copy.last[:, 2] > late.batch
    np.testing.assert_array_equal(further, planes.masks[0])
    before = live.copy.previous.give(further, 2, late.batch)
    np.testing.assert_array_equal(before.slots, further)
    late.copy.take(before)
    np.testing.assert_array_equal(late.copy.data[0], -37)
    assert not (late.copy.last[:, 2] > late.batch).any()
    # Asked for what it never had, a worker gives nothing.
    assert not live.copy.previous.give(further, 2, 7).slots.any()
    planes.step(late)
    assert at(planes) == [74, 74]
    np.testing.assert_array_equal(live.copy.data[0], -74)


def bounded(staleness: int) -> Planes:
    settings = Settings(consistency="Bounded", max_staleness=staleness, min_replicas=1)
    return Planes(settings, SGD(), gives=lambda w, _b: GRADIENTS[w])


def test_who_comes_late_to_the_beginning_skips_nothing_under_bounded() -> None:
    planes = bounded(1)
    first, second, late = planes.seats
    for seat in (first, second):
        planes.enter(seat)
    for _ in range(2):
        planes.step(first)
        planes.step(second)
    assert first.missing == {0, 1}, "two ahead of the one that has not begun"
    planes.enter(late)
    assert (late.batch, len(late.position.skipped)) == (0, 0)
    planes.step(late)
    assert not first.missing


def test_who_comes_back_as_far_behind_may_be_waited_for_in_vain_and_skips() -> None:
    """The others may be making a batch already that its next one is too old for."""
    planes = bounded(1)
    for seat in planes.seats:
        planes.enter(seat)
    planes.lose(2)
    for server in (0, 1):
        planes.tell(server)
    first, second, late = planes.seats
    for _ in range(2):
        planes.step(first)
        planes.step(second)
    assert not first.missing, "it makes its third batch"
    planes.enter(late)
    assert (late.batch, len(late.position.skipped)) == (2, 2)


def test_a_step_needs_nothing_of_who_entered_after_it() -> None:
    # On a server that was made anew, to which that worker has never given anything.
    planes = Planes(Settings(consistency="Sync"), SGD(), workers=2, gives=lambda _w, _b: 1.0)
    plane = planes.planes[0]
    k = np.arange(len(plane.slots.ids))
    plane.slots.mark(k, 1, 1, 1)
    ones = np.ones(plane.shard.tables[0].data.shape, np.float32)
    push = Push(0, 1, 1, 1, 0, mask_of(plane.slots.ids), (TablePush(0, 1.0, ones),))
    plane.barrier.contribute(push, k, k)
    assert plane.barrier.reduce([0, 1], lambda *_: None)
    np.testing.assert_array_equal(plane.slots.last, 1)
