"""Notes of a shard's motion: true distances, bounded, over the whole of training."""

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.server.motion import NOTES, SAMPLE, Motion
from daruma_trainer.server.shard import Shard


def shard_of(rows: int, cols: int = 4) -> Shard:
    shard = Shard("uid", np.arange(SLOTS))
    shard.create(TableSpec(0, "w", (rows, cols), 1, rule_to_json(SGD())))
    return shard


def test_moves_are_the_distances_between_the_notes() -> None:
    shard, motion = shard_of(100), Motion(10.0, 0)
    for step in range(0, 41, 5):
        shard.tables[0].data[:] = step
        motion.tick(shard, step)
    assert [(m.first, m.last) for m in motion.moves] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert [m.norm for m in motion.moves] == pytest.approx([10 * np.sqrt(400)] * 4)


def test_they_reach_over_the_whole_of_training_and_do_not_grow() -> None:
    shard, motion = shard_of(10), Motion(1.0, 0)
    for step in range(5000):
        shard.tables[0].data[:] = step
        motion.tick(shard, step)
    assert NOTES // 2 <= len(motion.moves) <= NOTES
    assert motion.moves[0].first == 0
    assert motion.moves[-1].last > 4000
    lengths = {b - a for a, b in ((m.first, m.last) for m in motion.moves)}
    assert len(lengths) == 1, "one length for all, or the fit would compare what differs"


def test_a_large_shard_is_sampled_without_bias() -> None:
    rng = np.random.default_rng(0)
    shard, motion = shard_of(40 * SAMPLE // 4), Motion(1.0, 3)
    motion.tick(shard, 0)
    step = rng.normal(size=shard.tables[0].data.shape).astype(np.float32)
    shard.tables[0].data += step
    motion.tick(shard, 1)
    assert motion.moves[0].norm == pytest.approx(float(np.linalg.norm(step)), rel=0.03)


def test_after_a_rollback_they_begin_anew() -> None:
    shard, motion = shard_of(10), Motion(1.0, 0)
    for step in range(5):
        motion.tick(shard, step)
    motion.forget()
    assert not motion.moves
    motion.tick(shard, 2)
    motion.tick(shard, 3)
    assert [(m.first, m.last) for m in motion.moves] == [(2, 3)]
