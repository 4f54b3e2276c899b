"""The benchmark of checkpoints runs, whatever its numbers are, and its page holds them."""

import json
from pathlib import Path

import pytest

from daruma_trainer.bench import checkpoint
from daruma_trainer.bench.checkpoint import Plan


def test_a_small_run_on_two_stores_makes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    tiny = Plan((1, 11), 1, 1, 0.01)
    monkeypatch.setattr(Plan, "of", lambda **_: tiny)
    out, page = tmp_path / "out.json", tmp_path / "docs" / "page.md"
    stores = ["--store", "directory", "--store", s3]
    assert checkpoint.main([*stores, "--quick", "--json", str(out), "--write", str(page)]) == 0
    found = json.loads(out.read_text())
    assert {(r["store"], r["megabytes"], r["fraction"]) for r in found["saves"]} == {
        (store, megabytes, fraction)
        for store in ("directory", "s3")
        for megabytes in (1, 11)
        for fraction in (0.125, 1.0)
    }
    assert all(r[what][0] > 0 for r in found["saves"] for what in ("blocked", "durable"))
    ours = ("daruma, r = 1/8", "daruma, r = 1")
    ways = {"directory": (*ours, "torch.save, all", "async_save, all"), "s3": ours}
    assert {(r["store"], r["way"], r["think"], r["every"]) for r in found["rates"]} == {
        (store, way, think, every)
        for store in ways
        for way in ways[store]
        for think in (0.05, 0.0)
        for every in (8, 1)
    }
    assert [(r["store"], r["megabytes"], "cold" in r) for r in found["restores"]] == [
        ("directory", 11, True), ("s3", 11, False),
    ]  # fmt: skip
    assert page.read_text() == checkpoint.page(found)
    assert all(f"| {store} | 11 |" in page.read_text() for store in ways)


def test_a_store_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert checkpoint.main(["--quick", "--store", f"file://{tmp_path}/file"]) == 1
    assert "the first save failed" in capsys.readouterr().err
