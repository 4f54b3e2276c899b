"""Layouts: both sides of the wire must agree on which row lies where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daruma_trainer.contract import SLOTS, ContractError, place
from daruma_trainer.layout import (
    BLOCKS_A_SERVER,
    MAX_BLOCK_BYTES,
    ShardLayout,
    TableSpec,
    choose_block_rows,
    runs,
    slot_of_blocks,
)

RULE = '{"rule": "add"}'


def spec(rows: int, cols: int, block_rows: int, number: int = 0) -> TableSpec:
    return TableSpec(number, f"t{number}", (rows, cols), block_rows, RULE)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3000),
    cols=st.integers(1, 5),
    block_rows=st.integers(1, 40),
    servers=st.integers(1, 7),
)
def test_every_row_lies_on_exactly_one_server(
    rows: int, cols: int, block_rows: int, servers: int
) -> None:
    table = spec(rows, cols, min(block_rows, rows))
    owner = np.array(place("uid", servers))
    seen = [
        ShardLayout("uid", [table], np.flatnonzero(owner == s)).tables[0].rows
        for s in range(servers)
    ]
    assert np.sort(np.concatenate(seen)).tolist() == list(range(rows))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 2000), block_rows=st.integers(1, 40), picked=st.sets(st.integers(0, 99)))
def test_a_slot_is_one_range_of_rows_and_means_the_same_in_any_selection(
    rows: int, block_rows: int, picked: set[int]
) -> None:
    table = spec(rows, 3, min(block_rows, rows))
    whole = ShardLayout("uid", [table], np.arange(SLOTS)).tables[0]
    slots = np.array(sorted(picked), np.int64)
    part = ShardLayout("uid", [table], slots).tables[0]
    for k, slot in enumerate(slots.tolist()):
        mine = part.rows[part.slot_rows[k] : part.slot_rows[k + 1]]
        same = whole.rows[whole.slot_rows[slot] : whole.slot_rows[slot + 1]]
        assert mine.tolist() == same.tolist()
    assert part.slot_rows[-1] == len(part.rows)


def test_wire_order_is_by_slot_and_then_by_block() -> None:
    table = spec(101, 2, 4)
    layout = ShardLayout("uid", [table], np.arange(SLOTS)).tables[0]
    slot_of = slot_of_blocks("uid", 0, table.blocks)
    pairs = [(int(slot_of[b]), int(b)) for b in layout.blocks]
    assert pairs == sorted(pairs)
    assert len(layout.rows) == 101, "the last block is shorter"


def test_slots_are_salted_by_the_job_and_the_table() -> None:
    first = slot_of_blocks("uid", 0, 200)
    assert (first != slot_of_blocks("other", 0, 200)).any()
    assert (first != slot_of_blocks("uid", 1, 200)).any()
    assert first.min() >= 0
    assert first.max() < SLOTS


@pytest.mark.parametrize("servers", [1, 4, 16])
def test_blocks_are_small_enough_for_every_server_and_never_above_the_bound(servers: int) -> None:
    for rows, cols in [(1_000_000, 25), (65, 10), (4096, 4096), (1, 7)]:
        chosen = choose_block_rows(rows, cols, servers)
        assert 1 <= chosen <= rows
        assert chosen == 1 or chosen * cols * 4 <= MAX_BLOCK_BYTES
        blocks = -(-rows // chosen)
        assert blocks >= min(rows, servers * BLOCKS_A_SERVER)


def test_block_bytes_of_the_manifest_wins() -> None:
    assert choose_block_rows(1000, 4, 3, block_bytes=160) == 10
    assert choose_block_rows(5, 4, 3, block_bytes=1 << 20) == 5, "no more rows than there are"


def test_a_scalar_and_a_vector_are_tables_too() -> None:
    assert (TableSpec(0, "s", (), 1, RULE).rows, TableSpec(0, "s", (), 1, RULE).cols) == (1, 1)
    assert (TableSpec(0, "v", (9,), 2, RULE).cols, TableSpec(0, "v", (9,), 2, RULE).blocks) == (
        1,
        5,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 4]},
        {"shape": [1 << 41]},
        {"shape": [1 << 30, 1 << 30]},
        {"shape": [1] * 17},
        {"shape": "x"},
        {"block_rows": 0},
        {"block_rows": 99},
        {"id": -1},
        {"id": 4096},
        {"name": ""},
        {"name": "n" * 257},
        {"rule": "{"},
    ],
)
def test_a_table_out_of_bounds_is_refused_before_anything_is_allocated(
    change: dict[str, object],
) -> None:
    good = spec(10, 4, 2).to_json()
    assert TableSpec.from_json(good) == spec(10, 4, 2)
    with pytest.raises(ContractError):
        TableSpec.from_json({**good, **change})


def test_runs_are_the_ranges_of_a_mask() -> None:
    assert runs(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert runs(np.zeros(5, np.bool_)) == []
