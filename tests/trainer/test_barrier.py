"""Steps of `Sync`: what makes one, and in which order."""

from collections.abc import Sequence

import numpy as np

from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.barrier import Barrier, Made
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots, SlotState
from daruma_trainer.wire import Push, TablePush, mask_of

IDS = np.arange(1024)
ROWS = 4


class Server:
    """One shard of two workers."""

    def __init__(self) -> None:
        self.slots = Slots(IDS, 2, SlotState.READY)
        self.shard = Shard("uid", IDS)
        self.shard.create(TableSpec(0, "t", (ROWS, 1), 1, rule_to_json(SGD())))
        self.barrier = Barrier(self.shard, self.slots)
        self.steps: list[int] = []

    def push(
        self, worker: int, batch: int, gradient: float, *, rate: float = 1.0, tables: int = 1
    ) -> None:
        values = np.full((ROWS, 1), gradient, np.float32)
        parts = (TablePush(0, rate, values),) * tables
        push = Push(worker, batch, batch, 1, 0, mask_of(IDS), parts)
        self.barrier.contribute(push, IDS, np.flatnonzero(self.slots.last[:, worker] < batch))
        self.barrier.reduce([0, 1], self._stepped)

    def _stepped(self, step: int, workers: Sequence[int], k: Ints, made: Made | None) -> None:
        self.steps.append(step)

    @property
    def values(self) -> set[float]:
        return set(self.shard.tables[0].data.ravel().tolist())


def test_a_promoted_replica_makes_all_the_steps_that_it_lacks() -> None:
    """Workers keep pushes until they are covered: it gets several of one before the other's."""
    server = Server()
    for batch in (1, 2, 3):
        server.push(0, batch, 2.0 * batch)
    assert server.steps == []
    server.push(0, 2, 4.0)  # sent again
    server.push(1, 1, 4.0)
    assert server.steps == [1]
    assert server.values == {-3.0}
    server.push(1, 2, 0.0)
    server.push(1, 3, 0.0)
    assert server.steps == [1, 2, 3]
    assert server.values == {-8.0}
    assert (server.slots.last == 3).all()


def test_a_step_has_the_rate_of_its_own_batch() -> None:
    """Some slots came back a step further than others: they take a worker's next batch already."""
    server = Server()
    further = server.shard.layout.slots[:512]
    server.slots.mark(further, 0, 1, 1)
    server.slots.mark(further, 1, 1, 1)
    server.push(0, 1, 2.0, rate=1.0)
    server.push(0, 2, 2.0, rate=0.25)
    server.push(1, 1, 2.0, rate=1.0)
    behind = server.shard.tables[0].layout.slot_rows[512]
    assert 0 < behind < ROWS
    assert server.shard.tables[0].data.ravel().tolist() == [0.0] * behind + [-2.0] * (ROWS - behind)
    server.push(1, 2, 2.0, rate=0.25)
    assert server.values == {-0.5, -2.5}


def test_a_step_does_not_depend_on_who_used_a_table_before() -> None:
    """A replica that is promoted was not there before."""
    old, new = Server(), Server()
    for worker in (0, 1):
        old.push(worker, 1, 0.0)
    new.slots.last[:] = 1
    for server in (old, new):
        server.push(0, 2, 4.0)
        server.push(1, 2, 0.0, tables=0)
    assert old.values == new.values == {-2.0}


def test_what_waits_for_its_turn_is_dropped_with_a_rollback() -> None:
    server = Server()
    for batch in (1, 2):
        server.push(0, batch, 2.0)
    server.barrier.drop()
    server.push(0, 1, 6.0)
    server.push(1, 1, 6.0)
    assert server.steps == [1]
    server.push(1, 2, 6.0)
    assert server.steps == [1]
