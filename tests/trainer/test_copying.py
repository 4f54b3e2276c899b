"""Tests of the copy that a save makes: its records are the blocks, byte for byte."""

import numpy as np
import pytest

from daruma_trainer.checkpoint.segment import BlockState, write_segment
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, Adam, rule_to_json
from daruma_trainer.server.copying import Buffers, copy_blocks, record_floats
from daruma_trainer.server.shard import Shard
from daruma_trainer.server.slots import Slots, SlotState

SLOTS = np.arange(1024)


@pytest.mark.parametrize("part", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("rows", "cols", "block_rows"), [(999, 7, 10), (20, 9_000, 1), (3, 5, 2)])
def test_records_are_those_that_blocks_are_written_as(
    rows: int, cols: int, block_rows: int, part: float
) -> None:
    rng = np.random.default_rng(1)
    shard, slots = Shard("uid", SLOTS), Slots(SLOTS, 1, SlotState.READY)
    slots.lineage[:], slots.position[:] = 3, rng.integers(0, 99, 1024)
    for i, rule in enumerate((rule_to_json(Adam()), rule_to_json(SGD()))):
        shard.create(TableSpec(i, f"t{i}", (rows, cols), block_rows, rule))
    chosen = []
    for table in shard.tables:
        for array in (table.data, *table.state):
            array[:] = rng.normal(size=array.shape)
        blocks = len(table.layout.blocks)
        table.steps[:] = rng.integers(1, 50, blocks)
        chosen.append(np.flatnonzero(rng.random(blocks) < part))
    pieces, buffer = copy_blocks(shard.tables, chosen, slots, Buffers())
    expected = []
    for table, mine in zip(shard.tables, chosen, strict=True):
        owner = np.searchsorted(table.layout.slot_blocks, mine, side="right") - 1
        for b, s in zip(mine.tolist(), owner.tolist(), strict=True):
            at = slice(int(table.layout.block_starts[b]), int(table.layout.block_starts[b + 1]))
            block = BlockState(
                table.layout.table.id, int(table.layout.blocks[b]), 3, int(slots.position[s]),
                int(table.steps[b]), table.data[at].ravel(),
                tuple(a[at].ravel() for a in table.state),
            )  # fmt: skip
            expected.append(block)
    whole = write_segment(expected)[0]
    for array in [a for t in shard.tables for a in (t.data, *t.state)]:
        array[:] = 0.0  # pushes go on while it is written
    for piece in pieces:
        piece.seal()
    written = b"".join(piece.records.tobytes() for piece in pieces)
    assert written == whole
    assert buffer.nbytes >= len(written)
    saved = [np.full(t.data.size, np.nan, np.float32) for t in shard.tables]
    for piece in pieces:
        piece.keep(saved[piece.table])
    kept = sum(int((~np.isnan(s)).sum()) for s in saved)
    assert kept == sum(b.data.size for b in expected)


def test_memory_is_used_again() -> None:
    buffers = Buffers()
    small, large = buffers.take(10), buffers.take(1000)
    buffers.give(large)
    buffers.give(small)
    assert buffers.take(5) is small
    assert buffers.take(11) is large
    for size in (1, 2, 3):
        buffers.give(np.empty(size, np.float32))
    assert buffers.take(1).size == 2, "not more than two are kept"


def test_a_record_is_its_head_and_its_arrays() -> None:
    shard = Shard("uid", SLOTS)
    shard.create(TableSpec(0, "t", (9, 4), 2, rule_to_json(Adam())))
    assert sorted(record_floats(shard.tables[0]).tolist()) == [14 + 3 * 4, *[14 + 3 * 8] * 4]
