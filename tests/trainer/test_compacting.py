"""Tests of compaction: what is moved, how much a store holds, and what happens to damage."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daruma_trainer.checkpoint.places import ROW
from daruma_trainer.server.compacting import REWRITE, to_move
from saving_world import World

SMALL = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=60)


@given(blocks=SMALL, dead=st.lists(st.integers(0, 500), min_size=5, max_size=5))
def test_what_is_moved_fits_the_budget_and_comes_out_of_the_emptiest(
    blocks: list[tuple[int, int]], dead: list[int]
) -> None:
    rows = np.zeros(len(blocks), ROW)
    rows["segment"] = [s for s, _ in blocks]
    rows["length"] = [n for _, n in blocks]
    live = np.bincount(rows["segment"], weights=rows["length"], minlength=5)
    sizes = (live + dead).astype(np.int64)
    chosen = to_move(rows, sizes, 100)
    assert int(rows["length"][chosen].sum()) <= 100
    assert len(set(chosen.tolist())) == len(chosen)
    if sizes.sum() <= REWRITE * live.sum():
        assert not len(chosen)
        return
    share = live / np.maximum(sizes, 1)
    left = np.setdiff1d(np.arange(len(rows)), chosen)
    if len(chosen) and len(left):
        fullest = share[rows["segment"][chosen]].max()
        assert (share[rows["segment"][left]] >= fullest - 1e-12).all()


@pytest.mark.parametrize("hot", [5, 40])
@pytest.mark.parametrize("fraction", [0.125, 0.25, 1.0])
def test_a_store_holds_at_most_about_three_times_what_lives(
    tmp_path: Path, hot: int, fraction: float
) -> None:
    """Some blocks change and are saved often; the others stay where they were for ever."""
    world = World(tmp_path, every=8, fraction=fraction, selection="Priority")
    world.begin()
    world.background.run()
    rng = np.random.default_rng(0)
    most = 0.0
    live = sum(p.length for p in world.newest().blocks.values())
    for _ in range(120):
        world.train(1, 0.0)
        world.change(rng.integers(0, hot, 3), 1.0)
        world.save()
        held = sum(p.stat().st_size for p in tmp_path.rglob("segment-*"))
        most = max(most, held / live)
    world.newest()
    assert most < 3.5
    assert world.saver.moved_total <= world.saver.bytes_total / 2


def test_a_record_that_compaction_finds_damaged_is_saved_anew(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    (first,) = tmp_path.rglob("segment-*")
    quiet = int(world.plane.shard.tables[0].layout.blocks[39])
    place = world.newest().blocks[0, quiet]
    data = bytearray(first.read_bytes())
    data[place.offset + 60] ^= 1
    first.write_bytes(data)
    for n in range(60):
        world.train(1, 0.0)
        world.change([n % 39], 1.0)
        world.saver.tick()
        while world.saver.pending:
            world.saver.work(idle=True)
        world.background.run()
    assert world.saver.moved_total > 0
    assert world.newest().blocks[0, quiet].segment != place.segment
