"""How many updates of others a push is behind: shards without sockets, answers at once."""

import pytest

from daruma_trainer.contract import Settings
from daruma_trainer.rules import SGD
from expositions import sample, server_text
from planes import Planes, Seat

NAME = "daruma_staleness_steps"
ASYNC = Settings(consistency="Async")


def job(settings: Settings = ASYNC, workers: int = 2) -> Planes:
    """A job of one server, whose workers have pulled."""
    made = Planes(settings, SGD(), servers=1, workers=workers)
    for seat in made.seats:
        made.enter(seat)
    return made


def seen(planes: Planes) -> tuple[float, float]:
    """How many pushes were counted, and how far behind they were together."""
    text = server_text(plane=planes.planes[0])
    return sample(text, f"{NAME}_count"), sample(text, f"{NAME}_sum")


def push(planes: Planes, seat: Seat) -> None:
    """Without the pull that follows."""
    planes.make(seat)
    planes.arrive(seat, 0)


@pytest.mark.parametrize(
    "settings", [ASYNC, Settings(consistency="Bounded", max_staleness=9)], ids=["Async", "Bounded"]
)
def test_a_worker_is_as_far_behind_as_others_pushed_since_its_pull(settings: Settings) -> None:
    planes = job(settings, workers=4)
    slow, *others = planes.seats
    for behind, seat in enumerate(others):
        planes.step(seat)
        assert seen(planes) == (behind + 1, sum(range(behind + 1)))
    planes.step(slow)
    assert seen(planes) == (4, 0 + 1 + 2 + 3)
    text = server_text(plane=planes.planes[0])
    assert sample(text, f"{NAME}_bucket", le="2.0") == 3
    assert sample(text, f"{NAME}_bucket", le="4.0") == 4
    planes.step(slow)
    assert seen(planes) == (5, 6), "it has pulled since, and its own push is not another's"


def test_a_fast_worker_leaves_a_slow_one_behind() -> None:
    planes = job()
    slow, fast = planes.seats
    for _ in range(20):
        planes.step(fast)
    assert seen(planes) == (20, 0)
    planes.step(slow)
    assert seen(planes) == (21, 20)


def test_a_push_that_comes_twice_counts_once() -> None:
    planes = job()
    slow, fast = planes.seats
    planes.step(fast)
    planes.step(slow)
    slow.flying.append((0, 1))
    planes.arrive(slow, 0)
    assert planes.planes[0].counts.duplicate == 1
    assert seen(planes) == (2, 1)


def test_the_newest_pull_counts() -> None:
    """A program may pull whenever it likes (`job.refresh`), and computes on that."""
    planes = job()
    slow, fast = planes.seats
    for _ in range(3):
        planes.step(fast)
    planes.ask(slow, 0, 0)
    planes.step(fast)
    planes.step(slow)
    assert seen(planes) == (5, 1)


def test_one_whose_pull_this_server_did_not_answer_does_not_count() -> None:
    """A replica did, or the predecessor of a restored server: what lay between is not known."""
    planes = job()
    slow, fast = planes.seats
    push(planes, slow)
    planes.step(fast)
    assert seen(planes) == (2, 1)
    push(planes, slow)
    assert seen(planes) == (2, 1)
    planes.ask(slow, 0, 0)
    planes.step(fast)
    push(planes, slow)
    assert seen(planes) == (4, 3), "the fast one's counts, and so does this"


def test_a_push_that_waits_for_a_cut_counts_from_the_pull_before_it() -> None:
    """Its worker pulls meanwhile, and computes the next batch on that."""
    planes = job()
    (plane,), (held, other) = planes.planes, planes.seats
    plane.hold = (0, 100)
    for _ in range(3):
        planes.step(other)
    push(planes, held)
    assert len(plane.waiting) == 1
    planes.ask(held, 0, 0)
    planes.step(other)
    assert seen(planes) == (4, 0)
    plane.hold = None
    for waiting in plane.take_waiting():
        assert plane.push(waiting.identity, waiting.header, waiting.frames) is not None
    assert seen(planes) == (5, 4)
    push(planes, held)
    assert seen(planes) == (6, 5), "one since its pull; the push that waited was its own"


def test_a_replacement_counts_from_its_own_pull() -> None:
    """Numbers of requests begin again with its connection."""
    planes = job()
    lost, other = planes.seats
    for _ in range(5):
        planes.step(lost)
    planes.lose(0)
    planes.tell(0)
    planes.step(other)
    seat = planes.seats[0]
    planes.enter(seat)
    for _ in range(2):
        planes.step(other)
    before = seen(planes)
    planes.step(seat)
    assert seen(planes) == (before[0] + 1, before[1] + 2)
