"""What a server's /metrics answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from daruma_trainer.contract import Settings
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.rules import SGD, Add, rule_to_json
from daruma_trainer.wire import Header, Kind, Push, TablePush, encode_push
from expositions import families, sample, server_text
from planes import Planes
from saving_world import World

LABELS = 'index="0",job="j",role="Server"'


def scraped(**life: Any) -> dict[str, float]:
    lines = server_text(**life).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.replace(f"{{{LABELS}}}", ""): float(value) for name, value in pairs}


def test_before_the_first_membership_there_is_little_to_say() -> None:
    assert scraped() == {"daruma_stale_requests_total": 2.0}


def test_saves_and_cuts_that_were_given_up_are_counted(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(3)
    world.cuts.abandoned = 4
    found = scraped(plane=world.plane, saver=world.saver, cuts=world.cuts)
    assert found["daruma_step"] == found["daruma_checkpoint_age_steps"] == 3
    before = found["daruma_checkpoint_bytes_total"]
    assert before == world.saver.bytes_total > 0
    assert found["daruma_cuts_abandoned_total"] == 4
    assert found["daruma_replica_bytes_total"] == 11
    assert found["daruma_checkpoint_seconds_count"] == 1
    world.cuts.take("00000001-0000000003")
    world.background.run()
    found = scraped(plane=world.plane, saver=world.saver, cuts=world.cuts)
    assert found["daruma_checkpoint_bytes_total"] > before, "a cut is bytes that were saved, too"
    assert found["daruma_checkpoint_seconds_count"] == 2
    assert found["daruma_checkpoint_seconds_sum"] > 0


@dataclass
class Clock:
    """Stands still but when it is told how long something took."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Slow:
    """An update rule that takes so many seconds each time."""

    clock: Clock
    seconds: float
    name: ClassVar[str] = "sgd"
    state_names: ClassVar[tuple[str, ...]] = ()
    gradient: ClassVar[bool] = True

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        self.clock.now += self.seconds
        return 0.0


def slow(consistency: str, seconds: float = 0.25) -> tuple[Planes, Clock]:
    """A job of one server, whose table takes its time, and two workers."""
    job, clock = Planes(Settings(consistency=consistency), SGD(), servers=1, workers=2), Clock()
    (plane,) = job.planes
    plane.shard.clock = clock
    plane.shard.tables[0].rule = Slow(clock, seconds)
    for seat in job.seats:
        job.enter(seat)
    return job, clock


def updates(job: Planes) -> tuple[float, float]:
    """How many updates there were, and their seconds together."""
    text = server_text(plane=job.planes[0])
    return sample(text, "daruma_update_seconds_count"), sample(text, "daruma_update_seconds_sum")


@pytest.mark.parametrize("consistency", ["Async", "Bounded"])
def test_each_push_is_an_update(consistency: str) -> None:
    job, clock = slow(consistency)
    first, second = job.seats
    for seat in (first, second):
        job.make(seat)
        job.arrive(seat, 0)
        clock.now += 100.0
    assert updates(job) == (2, 0.5)
    text = server_text(plane=job.planes[0])
    assert sample(text, "daruma_update_seconds_bucket", le="0.2") == 0
    assert sample(text, "daruma_update_seconds_bucket", le="0.5") == 2
    first.flying.append((0, 1))  # sent again: its acknowledgement was lost
    job.arrive(first, 0)
    assert job.planes[0].counts.duplicate == 1
    assert updates(job) == (2, 0.5), "nothing was done with it"


def test_a_push_is_one_update_with_the_sums_that_it_adds_to() -> None:
    job, clock = slow("Async")
    (plane,) = job.planes
    assert plane.add_table(TableSpec(1, "sum", (4, 1), 1, rule_to_json(Add()))) is None
    plane.note_given(np.arange(len(plane.slots.ids)))
    plane.sums.register(0, [1])
    plane.shard.tables[1].rule = Slow(clock, 0.5)
    shapes = [table.data.shape for table in plane.shard.tables]
    parts = [TablePush(i, 1.0, np.zeros(shape, np.float32)) for i, shape in enumerate(shapes)]
    body = encode_push(Push(0, 1, 1, 1, 0, job.masks[0], tuple(parts)))
    frames = [b"", *(bytes(frame) for frame in body)]
    reply = plane.push(job.seats[0].id, Header(Kind.PUSH, 1, 1, 1), frames)
    assert reply is not None
    assert reply.kind is Kind.ACK
    assert updates(job) == (1, 0.75)


def test_under_sync_a_step_is_one_update_however_long_its_workers_took() -> None:
    job, clock = slow("Sync")
    for seat in job.seats:
        assert updates(job) == (0, 0)
        job.make(seat)
        job.arrive(seat, 0)
        clock.now += 100.0
    assert updates(job) == (1, 0.25)
    assert "daruma_staleness_steps" not in families(server_text(plane=job.planes[0]))
