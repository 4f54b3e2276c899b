"""Prices: bounds that hold, and nothing claimed that is not known."""

from math import sqrt

import pytest

from daruma_operator.api.status import Pushes
from daruma_operator.recovery.price import (
    EXACT,
    UNKNOWN,
    DeltaKind,
    Gone,
    LostShard,
    bound,
    counters,
    remember,
)
from daruma_trainer.contract import Report, index_text


def test_nothing_acknowledged_since_is_exact() -> None:
    assert bound([LostShard(0, None), LostShard(0, 3.0)]) == EXACT
    assert bound([]) == EXACT


def test_the_bound_adds_up_over_orthogonal_shards() -> None:
    delta = bound([LostShard(3, 1.0), LostShard(2, 2.0)])
    assert delta.kind is DeltaKind.UPPER_BOUND
    assert delta.value == pytest.approx(sqrt(3**2 + 4**2))


def test_the_distance_when_it_was_saved_counts() -> None:
    delta = bound([LostShard(2, 0.5, distance=1.0)])
    assert delta.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    "shard",
    [
        LostShard(2, None),
        LostShard(None, 1.0),
        LostShard(2, 1.0, distance=None),
        LostShard(2, float("inf")),
        LostShard(2, float("nan")),
    ],
)
def test_what_is_not_known_is_unknown(shard: LostShard) -> None:
    assert bound([LostShard(0, None), shard]) == UNKNOWN


def test_a_push_is_lost_once() -> None:
    reports = {
        "server-0-1": Report("server-0-1", 1, "Ready", lost=4),
        "server-1-1": Report("server-1-1", 1, "Ready", lost=4),
        "worker-0-1": Report("worker-0-1", 1, "Training", lost=3, replayed=2),
        "worker-1-1": Report("worker-1-1", 1, "Training", replayed=5, skipped=6, mixed=1),
        "worker-9-1": Report("worker-9-1", 1, "Training", lost=99, replayed=99),
    }
    live = [m for m in reports if m != "worker-9-1"]
    nothing = Gone()
    assert counters(reports, live, nothing) == Pushes(lost=3, replayed=7, skipped=6, mixed=1)
    assert counters(reports, ["worker-0-1", "worker-7-7"], nothing) == Pushes(lost=3, replayed=2)


def test_a_push_that_two_servers_lost_in_two_lives_of_its_worker_is_lost_once() -> None:
    first = Report("worker-1-1", 1, "Training", lost=4, lost_batches="1-4", replayed=1)
    gone = remember(Gone(), "1", first)
    second = Report("worker-1-5", 1, "Training", lost=5, lost_batches="3-6,9")
    assert counters({"worker-1-5": second}, ["worker-1-5"], gone) == Pushes(lost=7, replayed=1)
    more = remember(gone, "1", second)
    assert counters({}, [], more) == Pushes(lost=7, replayed=1)
    assert more.lost == {"1": "1-6,9"}


def test_what_a_later_life_makes_again_is_not_lost() -> None:
    past = Gone(lost={"1": "2-6"})
    second = Report("worker-1-5", 1, "Training", lost=1, lost_batches="3", after=4)
    assert counters({"worker-1-5": second}, ["worker-1-5"], past).lost == 3
    gone = remember(past, "1", second)
    assert (gone.pushes.lost, gone.lost) == (0, {"1": "2-4"})
    unknown = Report("worker-1-5", 1, "Joining")
    assert counters({"worker-1-5": unknown}, ["worker-1-5"], past).lost == 5


def test_what_a_rollback_has_made_again_is_not_skipped() -> None:
    """A life skipped 50 to 100; all went back to 40, and the next one entered after 60."""
    first = Report("worker-1-1", 1, "Training", skipped=51, skipped_batches="50-100", after=0)
    gone = remember(Gone(), "1", first)
    assert counters({}, [], gone) == Pushes(skipped=51)
    second = Report("worker-1-5", 1, "Training", skipped=20, skipped_batches="41-60", after=60)
    assert counters({"worker-1-5": second}, ["worker-1-5"], gone) == Pushes(skipped=20)
    gone = remember(gone, "1", second)
    assert (gone.skipped, gone.pushes) == ({"1": "41-60"}, Pushes())
    third = Report("worker-1-9", 1, "Training", skipped=1, skipped_batches="70", after=70)
    assert counters({"worker-1-9": third}, ["worker-1-9"], gone) == Pushes(skipped=21)


def test_what_a_past_life_skipped_is_not_lost_as_well() -> None:
    """It entered after 100, which it had left off at 50; then a server lacks all since 45."""
    gone = remember(
        Gone(), "0", Report("w-0-1", 1, "Training", skipped=50, skipped_batches="51-100", after=100)
    )
    late = Report("worker-0-5", 1, "Training", lost=69, lost_batches="46-114", after=110)
    assert counters({late.id: late}, [late.id], gone) == Pushes(lost=19, skipped=50)
    gone = remember(gone, "0", late)
    assert (gone.lost, gone.skipped) == ({"0": "46-50,101-114"}, {"0": "51-100"})
    assert counters({}, [], gone) == Pushes(lost=19, skipped=50)


def test_what_a_past_life_lost_is_not_skipped_as_well() -> None:
    """It lost 45 and went back to 40, where it died; the next one entered after 60."""
    past = Gone(lost={"0": "45"})
    late = Report("worker-0-5", 1, "Training", skipped=20, skipped_batches="41-60", after=60)
    assert counters({late.id: late}, [late.id], past) == Pushes(skipped=20)


@pytest.mark.parametrize(
    "text",
    ["1-99999999999", "4-1", "x", "1-2-3", "-5", "1-99999999999999999999", "9" * 4000],
)
def test_what_cannot_be_is_not_taken_up(text: str) -> None:
    report = Report("worker-0-1", 1, "Training", lost=3, lost_batches=text)
    past = Gone(lost={"0": "1-9"})
    assert counters({"worker-0-1": report}, ["worker-0-1"], past).lost == 12
    assert remember(past, "0", report) == Gone(Pushes(lost=3), {"0": "1-9"}, {"0": ""})


def test_of_too_many_the_number_alone_is_remembered() -> None:
    lost = index_text(range(1, 1001, 2))
    gone = remember(Gone(), "0", Report("w-0-1", 1, "Training", lost=507, lost_batches=lost))
    assert gone.lost["0"].count(",") < 200
    assert counters({}, [], gone).lost == 507


def test_what_a_lost_worker_had_counted_still_counts() -> None:
    reports = {
        "server-0-1": Report("server-0-1", 1, "Ready", lost=4),
        "worker-0-7": Report("worker-0-7", 1, "Training", lost=1, skipped=2),
    }
    gone = Pushes(lost=5, replayed=1, skipped=3)
    found = counters(reports, reports, Gone(gone))
    assert found == Pushes(lost=6, replayed=1, skipped=5)
    assert found.since(gone) == Pushes(lost=1, skipped=2)
