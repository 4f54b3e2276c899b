"""Checkpoints survive their writer: killed, truncated, damaged, on a full disk."""

import errno
import resource
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from daruma_trainer.checkpoint.manifest import (
    Cut,
    Manifest,
    SlotStates,
    cut_name,
    cut_number,
    newest_cut,
    newest_manifest,
    shard_folder,
)
from daruma_trainer.checkpoint.places import ROW, Place, Places
from daruma_trainer.checkpoint.reading import Memory, read_blocks
from daruma_trainer.checkpoint.segment import HEAD, BlockState, read_records, write_segment
from daruma_trainer.checkpoint.selection import Selection, Turn, select
from daruma_trainer.checkpoint.store import DirectoryStore, open_store
from daruma_trainer.errors import (
    ConfigurationError,
    DamagedError,
    StoreAwayError,
    StoreError,
    StoreFullError,
)
from daruma_trainer.layout import TableSpec

PREFIX = "ns/job/uid"
SPEC = TableSpec(0, "t", (8, 4), 2, "{}")


def block(number: int, value: float) -> BlockState:
    data = np.full(8, value, np.float32)
    return BlockState(0, number, 1, int(value), int(value), data, (data + 1,))


def save(
    store: DirectoryStore,
    number: int,
    value: float,
    before: dict[tuple[int, int], Place] | None = None,
) -> Manifest:
    """Save the four blocks of a shard as one value; the first two only where `before` is given."""
    folder = shard_folder(PREFIX, 0, 1)
    blocks = [block(b, value) for b in range(2 if before else 4)]
    data, places = write_segment(blocks)
    segment = f"{folder}/segment-{number:010d}.seg"
    named = dict(before or {})
    named |= {(0, b.block): Place(segment, *p) for b, p in zip(blocks, places, strict=True)}
    ids = np.array([5])
    slots = SlotStates(ids, ids, ids, np.array([[number]]), np.array([[1]], np.uint64))
    manifest = Manifest("uid", 0, 1, number, int(value), (SPEC,), Places.of(named), slots)
    store.write(segment, data)
    store.write(f"{folder}/manifest-{number:010d}.json", manifest.encode())
    return manifest


def newest(store: DirectoryStore) -> Manifest:
    found = newest_manifest(store, PREFIX, 0, below=9)
    assert found is not None
    return found[1]


def test_the_newest_save_reads_back(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    first = save(store, 1, 1.0)
    save(store, 2, 2.0, dict(first.blocks))
    manifest = newest(store)
    assert manifest.step == 2
    blocks, damaged = read_blocks(store, manifest, manifest.blocks)
    assert not damaged
    assert [float(b.data[0]) for b in sorted(blocks, key=lambda b: b.block)] == [2, 2, 1, 1]
    assert [b.steps for b in sorted(blocks, key=lambda b: b.block)] == [2, 2, 1, 1]
    assert float(blocks[0].state[0][0]) == float(blocks[0].data[0]) + 1


def test_any_flipped_byte_of_a_segment_damages_that_block_alone(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    manifest = save(store, 1, 1.0)
    place = manifest.blocks[0, 1]
    path = tmp_path / place.segment
    good = path.read_bytes()
    for at in range(place.offset, place.offset + place.length):
        bad = bytearray(good)
        bad[at] ^= 0x41
        path.write_bytes(bad)
        blocks, damaged = read_blocks(store, manifest, manifest.blocks)
        assert sorted(b.block for b in blocks) == [0, 2, 3], at
        assert len(damaged) == 1
        assert "block 1 of table 0" in damaged[0]


@pytest.mark.parametrize("kind", ["manifest", "segment"])
def test_truncation_anywhere_leaves_a_complete_state(tmp_path: Path, kind: str) -> None:
    store = DirectoryStore(tmp_path)
    first = save(store, 1, 1.0)
    save(store, 2, 2.0, dict(first.blocks))
    (path,) = tmp_path.rglob(f"{kind}-{2:010d}.*")
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        manifest = newest(store)
        blocks, damaged = read_blocks(store, manifest, manifest.blocks)
        if kind == "manifest":
            assert manifest.step == 1
            assert len(blocks) == 4
        else:
            assert len(blocks) + len(damaged) == 4
            assert {b.block for b in blocks} >= {2, 3}, "what lies elsewhere is whole"


def test_a_manifest_that_was_cut_or_changed_anywhere_is_damaged(tmp_path: Path) -> None:
    good = save(DirectoryStore(tmp_path), 1, 1.0).encode()
    assert Manifest.decode(good).blocks[0, 3].length > 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x41
        for data in (good[:at], bytes(bad)):
            with pytest.raises(DamagedError):
                Manifest.decode(data)


def test_neighbouring_records_are_read_at_once(tmp_path: Path) -> None:
    asked: list[list[tuple[int, int]]] = []

    class Asked(DirectoryStore):
        def read_ranges(
            self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
        ) -> Sequence[bytes | memoryview]:
            asked.append(list(ranges))
            return super().read_ranges(name, ranges, into)

    store = Asked(tmp_path)
    manifest = save(store, 1, 1.0)
    size = manifest.blocks[0, 0].length
    read_blocks(store, manifest, [(0, 0), (0, 3), (0, 1)])
    assert asked == [[(0, 2 * size), (3 * size, size)]]


def test_memory_is_used_again_where_it_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daruma_trainer.checkpoint.reading.CHUNK", 100)
    memory = Memory()
    first, other = memory.take(10), memory.take(10)
    assert len(first) == 100
    assert other is not first
    memory.give(first)
    assert memory.take(100) is first
    memory.give(first)
    assert len(memory.take(101)) == 101


@pytest.mark.parametrize("away", [False, True])
def test_a_segment_that_cannot_be_read_is_not_asked_for_every_block(
    tmp_path: Path, away: bool
) -> None:
    asked: list[str] = []

    class Failing(DirectoryStore):
        def read_ranges(
            self, name: str, ranges: Sequence[tuple[int, int]], into: memoryview | None = None
        ) -> Sequence[bytes | memoryview]:
            asked.append(name)
            raise StoreAwayError("away") if away else StoreError("gone")

    folder = shard_folder(PREFIX, 0, 1)
    places = {(0, b): Place(f"{folder}/s", 100 * b, 100) for b in range(500)}
    manifest = replace(save(DirectoryStore(tmp_path), 1, 1.0), blocks=Places.of(places))
    if away:
        with pytest.raises(StoreAwayError):
            read_blocks(Failing(tmp_path), manifest, list(places))
        assert len(asked) == 1, "nothing says that it is damaged"
        return
    blocks, damaged = read_blocks(Failing(tmp_path), manifest, list(places))
    assert not blocks
    assert len(damaged) == 500
    assert len(asked) < 10


@pytest.mark.parametrize(
    ("number", "away"), [(errno.ESTALE, True), (errno.EHOSTDOWN, True), (errno.EIO, False)]
)
def test_a_file_system_whose_server_is_away_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, away: bool
) -> None:
    store = DirectoryStore(tmp_path)
    save(store, 1, 1.0)

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "open", fails)
    for ask in (lambda: store.read("a"), lambda: store.read_ranges("a", [(0, 1)])):
        with pytest.raises(StoreError) as caught:
            ask()
        assert isinstance(caught.value, StoreAwayError) is away
    if away:
        with pytest.raises(StoreAwayError):
            newest(store)
    else:
        with pytest.raises(AssertionError):
            newest(store)


def test_ranges_of_an_object_end_where_it_does(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.write("a", b"0123456789")
    assert store.read_ranges("a", [(2, 3), (0, 1), (9, 1), (4, 0)]) == [b"234", b"0", b"9", b""]
    with pytest.raises(StoreError, match="ends at 10"):
        store.read_ranges("a", [(0, 2), (8, 3)])
    with pytest.raises(StoreError, match="cannot read b"):
        store.read_ranges("b", [(0, 1)])


def test_a_full_disk_is_an_error_with_a_name_and_leaves_what_was(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    save(store, 1, 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(StoreFullError, match="cannot write"):
            store.write("big", b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert newest(store).step == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_cut_exists_when_its_file_does_and_is_written_once(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    assert newest_cut(store, PREFIX) is None
    for step in (8, 16):
        cut = Cut(cut_number(1, step), step, 1, ("m",), 10, (step,))
        assert store.create(cut_name(PREFIX, cut.number), cut.encode())
        assert not store.create(cut_name(PREFIX, cut.number), b"another")
    found = newest_cut(store, PREFIX)
    assert found is not None
    assert found[1].step == 16
    (tmp_path / found[0]).write_bytes(b"{")
    older = newest_cut(store, PREFIX)
    assert older is not None
    assert older[1].step == 8


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"number": 1}'])
def test_what_is_no_cut_or_manifest_is_damaged_by_name(data: bytes) -> None:
    with pytest.raises(DamagedError):
        Cut.decode(data)
    with pytest.raises(DamagedError):
        Manifest.decode(data)
    row = np.array([(0, 0, 0, len(data), 0)], ROW)
    found, bad = read_records(memoryview(data), row)
    assert (found, list(bad)) == ([], [0])


def test_records_of_all_kinds_side_by_side_are_read_as_they_were_written() -> None:
    """Tables, sizes and states change between neighbours, also where the length does not."""
    rng = np.random.default_rng(0)
    written = [
        BlockState(table, b, b + 1, b + 2, b + 3, values[0], tuple(values[1:]))
        for b, (table, states, size) in enumerate(
            [(0, 0, 6), (0, 0, 6), (0, 1, 3), (1, 1, 3), (1, 2, 2), (1, 0, 0), (0, 0, 6), (2, 0, 9)]
        )
        for values in [rng.random((1 + states, size), np.float32)]
    ]
    data, places = write_segment(written)
    rows = np.array(
        [(b.table, b.block, 0, n, o) for b, (o, n) in zip(written, places, strict=True)], ROW
    )
    found, bad = read_records(memoryview(data), rows)
    assert not bad
    assert [len(some.head) for some in found] == [2, 1, 1, 1, 1, 1, 1]
    for ours, theirs in zip((b for some in found for b in some.singly()), written, strict=True):
        assert (ours.table, ours.block, ours.lineage, ours.position, ours.steps) == (
            theirs.table, theirs.block, theirs.lineage, theirs.position, theirs.steps,
        )  # fmt: skip
        np.testing.assert_array_equal(ours.data, theirs.data)
        np.testing.assert_array_equal(ours.state, theirs.state)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"magic": b"XXXX"}, "not a record of this format"),
        ({"form": 1}, "not a record of this format"),
        ({"size": 0xFFFFFFFF, "states": 0xFFFF}, "length does not fit"),
        ({"states": 0}, "length does not fit"),
        ({"steps": 9}, "the checksum does not fit"),
        ({"table": 1}, "another block's record"),
        ({"block": 7}, "another block's record"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_of_it_alone(
    change: dict[str, int | bytes], problem: str
) -> None:
    blocks = [block(b, 1.0) for b in range(3)]
    whole, places = write_segment(blocks)
    rows = np.array([(0, b.block, 0, n, o) for b, (o, n) in zip(blocks, places, strict=True)], ROW)
    data = bytearray(whole)
    offset, length = places[1]
    head = np.frombuffer(data, HEAD, 1, offset)
    for name, value in change.items():
        head[name] = value
    if "another" in problem:
        head["checksum"] = xxhash.xxh3_64_intdigest(data[offset + 8 : offset + length])
    found, bad = read_records(memoryview(data), rows)
    assert [b.block for some in found for b in some.singly()] == [0, 2]
    assert list(bad) == [1]
    assert problem in str(bad[1])


def test_names_outside_of_the_store_and_other_stores_are_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for name in ("../x", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(StoreError):
            store.read(name)
    for uri in ("ftp://bucket/p", "file://host/p", "/plain", "file:relative"):
        with pytest.raises(ConfigurationError, match="file:///"):
            open_store(uri)


EQUAL = np.full(5, 100)
SHUFFLED = np.random.default_rng(0).permutation


def test_priority_takes_the_farthest_and_all_in_turn() -> None:
    distances = np.array([1, 9, 0, 9, 4], np.float32)
    chosen, turn = select(Selection.PRIORITY, (distances, EQUAL), 0.4, Turn(), SHUFFLED)
    assert (chosen.tolist(), turn) == ([1, 3], Turn(2))
    seen: set[int] = set()
    for _ in range(5):
        still = np.zeros(5, np.float32), EQUAL
        chosen, turn = select(Selection.PRIORITY, still, 0.2, turn, SHUFFLED)
        seen |= set(chosen.tolist())
    assert seen == set(range(5)), "blocks that do not change are saved in turn"
    blocks = distances, EQUAL
    chosen, turn = select(Selection.ROUND_ROBIN, blocks, 0.6, Turn(4), SHUFFLED)
    assert (chosen.tolist(), turn.cursor) == ([0, 1, 4], 2)
    chosen, _ = select(Selection.RANDOM, blocks, 0.6, Turn(), SHUFFLED)
    assert len(set(chosen.tolist())) == 3


def test_priority_takes_what_leaves_the_least_distance_for_its_bytes() -> None:
    distances = np.array([9, 5, 5, 1, np.nan], np.float32)
    sizes = np.array([400, 100, 100, 100, 100])
    chosen, _ = select(Selection.PRIORITY, (distances, sizes), 0.375, Turn(), SHUFFLED)
    assert chosen.tolist() == [1, 2, 4]
    chosen, _ = select(Selection.DISTANCE, (distances, sizes), 0.625, Turn(), SHUFFLED)
    assert chosen.tolist() == [0, 4]
    nothing = select(
        Selection.PRIORITY, (np.empty(0, np.float32), np.empty(0, np.int64)), 0.5, Turn(), SHUFFLED
    )
    assert (nothing[0].tolist(), nothing[1]) == ([], Turn())


@pytest.mark.parametrize("how", list(Selection))
def test_every_selection_spends_its_share_of_the_bytes(how: Selection) -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(60, 5000, 23)
    turn, spent = Turn(), 0
    for save in range(1, 41):
        distances = rng.random(23).astype(np.float32)
        chosen, turn = select(how, (distances, sizes), 0.125, turn, SHUFFLED)
        spent += int(sizes[chosen].sum())
        assert abs(spent - save * 0.125 * sizes.sum()) <= sizes.max() + save / 2
    chosen, _ = select(how, (distances, sizes), 1.0, Turn(), SHUFFLED)
    assert chosen.tolist() == list(range(23))
