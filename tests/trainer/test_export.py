"""Export: shards become one state dict, or a sentence about what is damaged."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from daruma_trainer.checkpoint import export, loading
from daruma_trainer.checkpoint.manifest import Cut, Manifest, SlotStates, cut_name
from daruma_trainer.checkpoint.places import Place, Places
from daruma_trainer.checkpoint.segment import BlockState, write_segment
from daruma_trainer.checkpoint.store import open_store
from daruma_trainer.errors import DamagedError, StoreError
from daruma_trainer.layout import TableSpec

PREFIX = "default/toy/u1"
TABLES = (
    TableSpec(0, "weight", (5, 3), 2, "{}"),
    TableSpec(1, "bias", (5,), 3, "{}"),
    TableSpec(2, "scale", (), 1, "{}"),
)
NONE = np.zeros(0, np.int64)
NOWHERE = SlotStates(NONE, NONE, NONE, NONE.reshape(0, 1), NONE.reshape(0, 1).astype(np.uint64))


def state() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {t.name: random.random(t.shape, np.float32) for t in TABLES}


def save(root: Path, shards: int = 2, leave_out: tuple[int, int] | None = None) -> str:
    """Write a cut of these tables, blocks dealt to shards in turn; returns its URI."""
    store, values = open_store(f"file://{root}"), state()
    keys = [(t.id, b) for t in TABLES for b in range(t.blocks)]
    names = []
    for shard in range(shards):
        mine = [key for key in keys[shard::shards] if key != leave_out]
        blocks = []
        for table, block in mine:
            spec = TABLES[table]
            rows = values[spec.name].reshape(spec.rows, spec.cols)
            data = rows[block * spec.block_rows : (block + 1) * spec.block_rows]
            blocks.append(BlockState(table, block, 1, 9, 9, data.ravel(), ()))
        records, places = write_segment(blocks)
        segment = f"{PREFIX}/shard-{shard:04d}/segment"
        store.write(segment, records)
        where = {key: Place(segment, o, n) for key, (o, n) in zip(mine, places, strict=True)}
        manifest = Manifest("u1", shard, 1, 1, 9, TABLES, Places.of(where), NOWHERE, "cut")
        names.append(f"{PREFIX}/shard-{shard:04d}/manifest")
        store.write(names[-1], manifest.encode())
    cut = Cut("00000001-0000000009", 9, shards, tuple(names), 100, (9,))
    store.write(cut_name(PREFIX, cut.number), cut.encode())
    return f"file://{root}/{cut_name(PREFIX, cut.number)}"


def test_safetensors(tmp_path: Path) -> None:
    names = export.export(save(tmp_path), "safetensors", tmp_path / "out")
    loaded = load_file(tmp_path / "out")
    assert names == sorted(loaded) == ["bias", "scale", "weight"]
    for name, array in state().items():
        np.testing.assert_array_equal(loaded[name], array)


def test_torch(tmp_path: Path) -> None:
    import torch  # takes seconds: only the process that runs this pays for it

    export.export(save(tmp_path), "torch", tmp_path / "out")
    loaded = torch.load(tmp_path / "out", weights_only=True)
    for name, array in state().items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)


def test_a_jobs_folder_gives_its_newest_cut(tmp_path: Path) -> None:
    save(tmp_path)
    assert loading.open_cut(f"file://{tmp_path}/{PREFIX}")[1].step == 9


def test_a_folder_without_a_cut_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no complete cut"):
        loading.open_cut(f"file://{tmp_path}/{PREFIX}")


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    uri = save(tmp_path)
    segment = tmp_path / PREFIX / "shard-0001" / "segment"
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(DamagedError, match=r"shard-0001.*block.*there is no cut before it"):
        export.export(uri, "safetensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["default"]
    # Nothing older is taken for it unasked; but where there is one, it is named.
    older = Cut("00000001-0000000004", 4, 1, ("m",), 100, (4,))
    name = cut_name(PREFIX, older.number)
    open_store(f"file://{tmp_path}").write(name, older.encode())
    found = f"the cut before it, of step 4, is file://{tmp_path}/{name}"
    for asked in (uri, f"file://{tmp_path}/{PREFIX}"):
        with pytest.raises(DamagedError, match=found):
            loading.load(asked)
    (tmp_path / PREFIX / "shard-0001" / "manifest").unlink()
    with pytest.raises(DamagedError, match=found):
        loading.load(uri)


def test_a_missing_block_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    uri = save(tmp_path, leave_out=(0, 1))
    with pytest.raises(DamagedError, match="'weight': 2 of 3 blocks"):
        loading.load_state(*loading.open_cut(uri))


@pytest.mark.parametrize(
    ("uri", "code"),
    [("runs/mlr", 2), ("s3://a/b/c/d/e/f/cuts/1.json", 2), ("file:///no/a/b/c/cuts/1.json", 1)],
)
def test_what_is_no_checkpoint(
    uri: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([uri, "-o", str(tmp_path / "out")]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([save(tmp_path), "-o", str(tmp_path / "no" / "out")]) == 1
    assert "cannot write" in capsys.readouterr().err
