"""The documents keep up with the repository: links lead somewhere, and nothing private is named."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from daruma_operator.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("charts/**/*.md")]
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = [t for t in LINK.findall(path.read_text()) if "://" not in t]
    missing = [t for t in targets if not (path.parent / t).exists()]
    assert not missing, f"{path.relative_to(ROOT)} links to {missing}"


def test_every_target_that_documents_name_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for path in DOCUMENTS for target in re.findall(r"`make ([a-z-]+)`", path.read_text())
    }
    assert named <= known, f"no such target: {sorted(named - known)}"


def test_help_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    for target in ("demo", "test", "check", "unit", "faults", "cluster", "soak", "bench", "docs"):
        assert re.search(rf"^\s+{target}\s", done.stdout, re.MULTILINE), target


# What users read of a job is explained

OPERATOR = ROOT / "operator" / "daruma_operator"
SAID = {"tell", "Event", "condition", "phase", "fail", "set_record"}
"""Calls with names that users see: events, conditions, reasons."""
NAME = re.compile(r"[A-Z][a-z][A-Za-z]+")


def names_said() -> set[str]:
    found = set()
    for path in OPERATOR.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            function = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if function in SAID:
                words = [w for a in (*call.args, *call.keywords) for w in ast.walk(a)]
                found |= {w.value for w in words if isinstance(w, ast.Constant)}
    return {word for word in found if isinstance(word, str) and NAME.fullmatch(word)}


def metric_names() -> set[str]:
    found = {f.name for f in Metrics().registry.collect()}
    for path in (ROOT / "trainer" / "daruma_trainer").glob("*/metrics.py"):
        found |= set(re.findall(r'"(daruma_\w+)"', path.read_text()))
    return found


def test_every_event_condition_reason_and_metric_is_explained() -> None:
    page = (ROOT / "docs" / "guides" / "observing.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page))
    assert len(names_said()) > 40
    assert names_said() <= explained, f"not explained: {sorted(names_said() - explained)}"
    without = {name.removesuffix("_total") for name in explained}
    assert metric_names() <= without, f"not explained: {sorted(metric_names() - without)}"
