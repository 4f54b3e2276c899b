"""A shard that is handed over: whole and exact, or refused in words."""

import io
from collections.abc import Iterator

import numpy as np
import pytest

from daruma_trainer.agent import Agent, Outcome, ViewCell
from daruma_trainer.checkpoint.segment import Blocks
from daruma_trainer.contract import Member, Membership, Report, Role, Settings
from daruma_trainer.errors import DamagedError, StoreError
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, Adam, Rule, rule_to_json
from daruma_trainer.server import handover
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.handover import fetch, pack, unpack
from daruma_trainer.server.slots import SlotState

TOKEN = "a-token-of-this-test"


def plane_of() -> DataPlane:
    members = (Member(Role.SERVER, 0, 1, "s0"), Member(Role.WORKER, 0, 1, "w0"))
    plane = DataPlane(Membership("u", "n", "j", 1, 2, 1, members, Settings()), 0, 1)
    rng = np.random.default_rng(0)
    tables: list[tuple[tuple[int, ...], Rule]] = [((300, 5), Adam()), ((9,), SGD())]
    for i, (shape, rule) in enumerate(tables):
        assert plane.add_table(TableSpec(i, f"t{i}", shape, 2, rule_to_json(rule))) is None
        table = plane.shard.tables[i]
        for array in (table.data, *table.state):
            array[:] = rng.normal(size=array.shape)
        table.steps[:] = rng.integers(0, 100, len(table.steps))
    n = len(plane.slots.ids)
    plane.note_given(np.arange(n))
    plane.slots.state[:] = SlotState.READY
    plane.slots.position[:] = rng.integers(0, 1000, n)
    plane.slots.last[:] = rng.integers(0, 1000, (n, 1))
    plane.steps.now = 77
    return plane


def count(blocks: list[Blocks]) -> int:
    return sum(len(some.head) for some in blocks)


def test_all_that_belongs_to_a_shard_arrives() -> None:
    plane = plane_of()
    manifest, blocks, damaged = unpack(io.BytesIO(b"".join(pack(plane, "u", 0))))
    assert damaged == []
    assert (manifest.step, manifest.incarnation, manifest.shard) == (77, 1, 0)
    assert list(manifest.tables) == plane.shard.specs
    assert (manifest.slots.last == plane.slots.last).all()
    assert (manifest.slots.window == plane.slots.window).all()
    assert (manifest.slots.position == plane.slots.position).all()
    for table in plane.shard.tables:
        here = [some for some in blocks if some.table == table.layout.table.id]
        mine = {b.block: b for some in here for b in some.singly()}
        for i, block in enumerate(table.layout.blocks.tolist()):
            rows = slice(int(table.layout.block_starts[i]), int(table.layout.block_starts[i + 1]))
            found = mine[block]
            assert (found.data == table.data[rows].reshape(-1)).all()
            assert found.steps == table.steps[i]
            assert len(found.state) == len(table.state)
            for array, given in zip(table.state, found.state, strict=True):
                assert (given == array[rows].reshape(-1)).all()


def test_what_ends_early_or_is_something_else_is_refused() -> None:
    whole = b"".join(pack(plane_of(), "u", 0))
    for size in [0, 10, 100, len(whole) // 2, len(whole) - 1]:
        with pytest.raises(DamagedError):
            unpack(io.BytesIO(whole[:size]))
    with pytest.raises(DamagedError, match="not a shard"):
        unpack(io.BytesIO(b"X" + whole[1:]))


def test_a_flipped_byte_costs_its_block_alone() -> None:
    whole = bytearray(b"".join(pack(plane_of(), "u", 0)))
    _, blocks, _ = unpack(io.BytesIO(bytes(whole)))
    whole[-5] ^= 1
    _, kept, damaged = unpack(io.BytesIO(bytes(whole)))
    assert count(kept) == count(blocks) - 1
    assert len(damaged) == 1
    assert "checksum" in damaged[0]


@pytest.fixture
def agent() -> Iterator[Agent]:
    giving: list[DataPlane] = []

    def shard() -> Iterator[bytes | bytearray] | None:
        # The word that it is to freeze comes while the successor asks already.
        giving.append(plane_of())
        return pack(giving[-1], "u", 0) if len(giving) > 2 else None

    cell = ViewCell(Report("server-0-1", 1, "Frozen"))
    made = Agent(("127.0.0.1", 0), TOKEN, cell, lambda _: Outcome(), lambda: b"", shard)
    yield made
    made.close()


def test_a_successor_asks_until_its_predecessor_is_frozen(agent: Agent) -> None:
    manifest, blocks, damaged = fetch(f"127.0.0.1:{agent.port}", TOKEN)
    assert manifest.step == 77
    assert count(blocks) == len(manifest.blocks)
    assert damaged == []


def test_it_is_given_to_nobody_without_the_token(agent: Agent) -> None:
    with pytest.raises(StoreError, match="401"):
        fetch(f"127.0.0.1:{agent.port}", "another")


def test_one_that_never_freezes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "FREEZE_SECONDS", 0.1)
    cell = ViewCell(Report("server-0-1", 1, "Ready"))
    made = Agent(("127.0.0.1", 0), TOKEN, cell, lambda _: Outcome(), lambda: b"")
    try:
        with pytest.raises(StoreError, match="does not hand its shard over"):
            fetch(f"127.0.0.1:{made.port}", TOKEN)
    finally:
        made.close()
    with pytest.raises(StoreError, match="does not hand its shard over"):
        fetch(f"127.0.0.1:{made.port}", TOKEN)
