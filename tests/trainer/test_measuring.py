"""Tests of the distances that are measured a little at a time."""

from itertools import pairwise

import numpy as np
import pytest

from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, Add, Assign, rule_to_json
from daruma_trainer.server import measuring
from daruma_trainer.server.measuring import Distances
from daruma_trainer.server.shard import Shard
from daruma_trainer.wire import TablePush

SLOTS = np.arange(1024)


def shard_of(rows: int, cols: int, block_rows: int) -> Shard:
    shard = Shard("uid", SLOTS)
    shard.create(TableSpec(0, "t", (rows, cols), block_rows, rule_to_json(SGD())))
    shard.create(TableSpec(1, "u", (rows, 3), block_rows, rule_to_json(Add())))
    rng = np.random.default_rng(0)
    for table in shard.tables:
        table.data[:] = rng.normal(size=table.data.shape)
    return shard


def in_full(shard: Shard, distances: Distances) -> list[float]:
    return [
        float(np.sum((table.data.reshape(-1)[a:b] - saved[a:b]) ** 2))
        for table, saved in zip(shard.tables, distances.saved, strict=True)
        for a, b in zip(
            table.layout.block_starts[:-1] * table.layout.table.cols,
            table.layout.block_starts[1:] * table.layout.table.cols,
            strict=True,
        )
    ]


def measured(shard: Shard, distances: Distances) -> int:
    """Make a pass; returns its tiles."""
    return sum(1 for _ in distances.measure(shard.tables))


@pytest.mark.parametrize(("rows", "cols", "block_rows"), [(999, 7, 10), (50, 40_000, 1), (1, 5, 1)])
def test_a_pass_equals_the_whole_computed_at_once(rows: int, cols: int, block_rows: int) -> None:
    shard = shard_of(rows, cols, block_rows)
    distances = Distances()
    distances.cover(shard.tables)
    assert np.isinf(distances.all()).all(), "nothing was saved yet"
    assert distances.total() is None
    for never in distances.never:
        never[:] = False
    assert measured(shard, distances) > 0
    np.testing.assert_allclose(distances.all(), in_full(shard, distances), rtol=1e-4)
    assert distances.total() == pytest.approx(sum(in_full(shard, distances)) ** 0.5, rel=1e-4)
    assert measured(shard, distances) == 0, "nothing changed since"


def test_after_pushes_only_what_they_touched_is_measured_again() -> None:
    shard = shard_of(40_000, 7, 100)
    distances = Distances()
    distances.cover(shard.tables)
    for never in distances.never:
        never[:] = False
    whole = measured(shard, distances)
    rows = np.array([17, 39_999])
    values = np.full(6, 2.0, np.float32)
    shard.apply([TablePush(1, 0.0, values, rows)], SLOTS, SLOTS)
    assert 0 < measured(shard, distances) <= 2 < whole
    np.testing.assert_allclose(distances.all(), in_full(shard, distances), rtol=1e-4)
    slot = int(np.flatnonzero(np.diff(shard.tables[0].layout.slot_blocks))[5])
    count = int(np.diff(shard.tables[0].layout.slot_rows)[slot])
    shard.update(0, slot, slot + 1, np.ones((count, 7), np.float32), 0.5)
    assert 0 < measured(shard, distances) < whole / 4
    np.testing.assert_allclose(distances.all(), in_full(shard, distances), rtol=1e-4)
    shard.set_values(SLOTS, {0: np.zeros(shard.tables[0].data.size, np.float32)})
    measured(shard, distances)
    np.testing.assert_allclose(distances.all(), in_full(shard, distances), rtol=1e-4)


def test_a_push_during_a_pass_counts_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TILE", 64)
    shard = shard_of(100, 8, 2)
    distances = Distances()
    distances.cover(shard.tables)
    for never in distances.never:
        never[:] = False
    for _ in distances.measure(shard.tables):
        shard.update(0, 0, 1024, np.ones(shard.tables[0].data.shape, np.float32), 0.1)
    assert shard.tables[0].changed.any()
    measured(shard, distances)
    np.testing.assert_allclose(distances.all(), in_full(shard, distances), rtol=1e-4)


def labelled(rows: int, cols: int, block_rows: int) -> tuple[Shard, Distances]:
    """A shard of random labels below 7, whose saved copy is of all 0."""
    shard = Shard("uid", SLOTS)
    rule = rule_to_json(Assign(labels=7))
    shard.create(TableSpec(0, "z", (rows, cols), block_rows, rule))
    shard.tables[0].data[:] = np.random.default_rng(0).integers(0, 7, shard.tables[0].data.shape)
    distances = Distances()
    distances.cover(shard.tables)
    distances.never[0][:] = False
    return shard, distances


@pytest.mark.parametrize(("rows", "cols", "block_rows"), [(999, 8, 10), (3, 40_000, 1), (1, 5, 1)])
def test_labels_are_compared_by_how_often_they_occur(rows: int, cols: int, block_rows: int) -> None:
    shard, distances = labelled(rows, cols, block_rows)
    measured(shard, distances)
    (table,), (saved,) = shard.tables, distances.saved
    edges = table.layout.block_starts * cols
    expected = []
    for a, b in pairwise(edges.tolist()):
        live, old = (
            np.bincount(values[a:b].astype(np.int64), minlength=7)
            for values in (table.data.reshape(-1), saved)
        )
        expected.append((np.abs(live - old).sum() / 2) ** 2)
    np.testing.assert_allclose(distances.all(), expected)
    assert distances.total() is None, "it is no L2 distance, which a bound could be made of"
    assert measured(shard, distances) == 0, "nothing changed since"


def test_tokens_that_exchanged_their_labels_moved_no_distribution() -> None:
    shard, distances = labelled(40, 6, 2)
    data = shard.tables[0].data
    distances.saved[0][:] = data.reshape(-1)
    data[:] = data[:, ::-1]
    measured(shard, distances)
    assert not distances.all().any()
    data[0, 0] = (data[0, 0] + 1) % 7
    shard.tables[0].changed[:] = True
    measured(shard, distances)
    assert sorted(distances.all().tolist())[-2:] == [0.0, 1.0]


def test_what_is_no_label_stops_no_save() -> None:
    shard, distances = labelled(40, 6, 2)
    shard.tables[0].data[0] = [np.nan, np.inf, -np.inf, -3, 1e30, 6.5]
    measured(shard, distances)
    assert np.isfinite(distances.all()).all()
