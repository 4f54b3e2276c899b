"""How long a worker's pushes take, with a clock that a test moves."""

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS, Replay
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.wire import Slots
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.latency import Latency
from daruma_trainer.worker.pushes import Held, Pushes, Update
from expositions import sample, worker_text

NAME = "daruma_push_latency_seconds"


class Job:
    """A worker of three servers."""

    def __init__(self, replay: Replay | None = None) -> None:
        self.now = 0.0
        self.copy = HostCopy("uid", 3, 1)
        self.copy.add(TableSpec(0, "t", (64, 2), 1, rule_to_json(Add())))
        self.copy.arrange()
        self.pushes = Pushes(replay or Replay())
        self.pushes.latency = Latency(lambda: self.now)

    def push(self, batch: int, *, away: tuple[int, ...] = (), covers: bool = False) -> Held:
        """Make a batch; what is for servers that are away is accumulated."""
        self.pushes.begin(batch)
        values = np.ones((64, 2), np.float32)
        held = Held(batch, 1, (Update(0, 1.0, values),), set(range(3)) if covers else set())
        self.pushes.hold(held)
        for server in away:
            self.pushes.accumulate(held, server, self.copy, self.now, [Add()])
        return held

    def applied(self, batch: int, *servers: int) -> None:
        for server in servers:
            self.pushes.note_applied(batch, self.slots(server))

    def seal(self, server: int) -> None:
        """It is there again: what was accumulated goes out."""
        self.pushes.seal(server, None, [Add()])

    def slots(self, server: int) -> Slots:
        return self.copy.slots_of(server)

    @property
    def seen(self) -> tuple[float, float]:
        """How many pushes were applied by all, and their seconds together."""
        text = worker_text(pushes=self.pushes)
        return sample(text, f"{NAME}_count"), sample(text, f"{NAME}_sum")


def test_it_ends_with_the_last_server() -> None:
    job = Job()
    job.push(1)
    job.now = 0.25
    job.applied(1, 0, 1)
    assert job.seen == (0, 0)
    job.now = 0.75
    job.applied(1, 2)
    assert job.seen == (1, 0.75)
    job.applied(1, 0, 1, 2)  # of a push that was sent twice
    assert job.seen == (1, 0.75)
    text = worker_text(pushes=job.pushes)
    assert sample(text, f"{NAME}_bucket", le="0.5") == 0
    assert sample(text, f"{NAME}_bucket", le="1.0") == 1


def test_under_sync_a_pull_says_it() -> None:
    """An acknowledgement comes before the other workers' parts: the step shows in its values."""
    job = Job()
    job.push(1)
    job.now = 2.0
    job.pushes.note_state(np.arange(SLOTS), np.full(SLOTS, 1))
    assert job.seen == (1, 2.0)


def test_one_that_was_sent_to_a_server_that_died_waits_for_its_successor() -> None:
    job = Job()
    job.push(1)
    job.applied(1, 0, 1)
    job.now = 8.0
    job.pushes.hold_again(2, job.slots(2))
    job.applied(1, 2)
    assert job.seen == (1, 8.0)


def test_each_of_a_replay_counts_with_its_whole_wait() -> None:
    job = Job()
    for batch in (1, 2, 3):
        job.push(batch, away=(1,))
        job.applied(batch, 0, 2)
        job.now += 10.0
    assert job.seen == (0, 0)
    job.seal(1)
    job.now = 40.0
    (done,) = job.pushes.sealed[1]
    job.pushes.drop_sealed(1, done.last)
    assert job.seen == (3, 40.0 + 30.0 + 20.0)


def test_what_two_servers_missed_waits_for_both() -> None:
    job = Job()
    job.push(1, away=(0, 1))
    job.push(2, away=(1,))
    job.applied(1, 2)
    job.applied(2, 2)
    for server in (0, 1):
        job.seal(server)
    job.now = 3.0
    job.pushes.drop_sealed(1, 2)
    assert job.seen == (0, 0), "server 0 lacks the first, and has not said that it has the second"
    job.now = 5.0
    job.applied(2, 0)
    assert job.seen == (1, 5.0)
    job.now = 7.0
    job.pushes.drop_sealed(0, 1)
    assert job.seen == (2, 12.0)


def test_with_copies_it_ends_when_it_is_applied_and_not_when_it_is_covered() -> None:
    job = Job()
    job.push(1, covers=True)
    job.now = 1.0
    job.applied(1, 0, 1, 2)
    assert job.seen == (1, 1.0)
    assert job.pushes.acked == 0, "it is still kept"
    # A server is lost and takes it again: that is no second push.
    job.pushes.hold_again(1, job.slots(1))
    job.now = 9.0
    for server in range(3):
        job.pushes.note_covered(server, job.slots(server), 1)
    assert job.pushes.acked == 1
    assert job.seen == (1, 1.0)


def test_a_replay_that_is_kept_until_it_is_covered_counts_when_it_is_applied() -> None:
    job = Job()
    job.push(1, away=(1,), covers=True)
    job.applied(1, 0, 2)
    job.seal(1)
    (done,) = job.pushes.sealed[1]
    job.now = 4.0
    job.pushes.keep_sealed(done)
    assert job.seen == (1, 4.0)
    job.now = 9.0
    for server in range(3):
        job.pushes.note_covered(server, job.slots(server), 1)
    assert job.seen == (1, 4.0)


def test_a_replay_that_its_server_took_to_the_grave_is_waited_for_again() -> None:
    job = Job()
    job.push(1, away=(0, 1), covers=True)
    job.applied(1, 2)
    for server in (0, 1):
        job.seal(server)
    (first,), (second,) = job.pushes.sealed[0], job.pushes.sealed[1]
    job.pushes.keep_sealed(second)
    job.pushes.hold_again(1, job.slots(1))
    job.pushes.keep_sealed(first)
    assert job.seen == (0, 0)
    job.now = 6.0
    job.pushes.keep_sealed(second)
    assert job.seen == (1, 6.0)


@pytest.mark.parametrize("combine", ["Auto", "Drop"])
def test_what_was_lost_was_not_applied(combine: str) -> None:
    job = Job(Replay(combine=combine))
    job.push(1, away=(1,))
    job.push(2, away=(1,))
    for batch in (1, 2):
        job.applied(batch, 0, 2)
    job.seal(1)
    if combine == "Auto":
        job.pushes.lose(1, 2)  # the server has some of it already
    job.pushes.drop_sealed(1, 2)
    assert job.pushes.acked == 2
    assert job.seen == (0, 0)


def test_what_a_rollback_dropped_was_not_applied() -> None:
    job = Job()
    job.push(1)
    job.now = 1.0
    job.pushes.drop_all(0)
    job.now = 2.0
    job.push(1)
    job.now = 2.5
    job.applied(1, 0, 1, 2)
    assert job.seen == (1, 0.5), "it was made again"
    job.push(2)
    job.pushes.drop_all(2)
    job.pushes.latency.applied(2)
    assert job.seen == (1, 0.5), "nothing is remembered of one that the cut has already"


def test_each_batch_counts_once_in_whatever_order() -> None:
    now = [0.0]
    latency = Latency(lambda: now[0])
    for batch in range(7, 107):
        now[0] = float(batch)
        latency.sent(batch)
    latency.lost(40, 60)
    latency.lost(100, 1 << 60)
    now[0] = 200.0
    order = np.random.default_rng(0).permutation(np.arange(0, 200)).tolist()
    for batch in [*order, *order]:
        latency.applied(batch)
    left = [b for b in range(7, 100) if not 40 <= b <= 60]
    assert (latency.seen.count, latency.seen.total) == (len(left), sum(200.0 - b for b in left))
    latency.forget()
    latency.sent(3)  # a rollback went back to 2
    latency.applied(106)
    latency.applied(3)
    assert latency.seen.count == len(left) + 1
