"""The benchmark of checkpoints runs, whatever its numbers are, and its page holds them."""

import json
from pathlib import Path

import pytest

from daruma_trainer.bench import checkpoint
from daruma_trainer.bench.checkpoint import Plan


def test_a_small_run_makes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Plan((1, 11), 1, 1, 0.01)
    monkeypatch.setattr(Plan, "of", lambda **_: tiny)
    out, page = tmp_path / "out.json", tmp_path / "docs" / "page.md"
    assert checkpoint.main(["--quick", "--json", str(out), "--write", str(page)]) == 0
    found = json.loads(out.read_text())
    assert {(r["megabytes"], r["fraction"]) for r in found["saves"]} == {
        (1, 0.125), (1, 1.0), (11, 0.125), (11, 1.0),
    }  # fmt: skip
    assert all(r[what][0] > 0 for r in found["saves"] for what in ("blocked", "durable"))
    assert {(r["way"], r["think"], r["every"]) for r in found["rates"]} == {
        (way, think, every)
        for way in ("daruma, r = 1/8", "daruma, r = 1", "torch.save, all", "async_save, all")
        for think in (0.05, 0.0)
        for every in (8, 1)
    }
    assert [r["megabytes"] for r in found["restores"]] == [11]
    assert page.read_text() == checkpoint.page(found)


def test_a_store_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert checkpoint.main(["--quick", "--store", f"file://{tmp_path}/file"]) == 1
    assert "the first save failed" in capsys.readouterr().err
