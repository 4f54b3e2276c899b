"""The documents keep up with the repository: links lead somewhere, and nothing private is named."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

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


# What a new user does on a cluster


def commands(path: Path) -> list[str]:
    """Return the lines of a document's code blocks that name no language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if not language for line in block.splitlines()]


README = commands(ROOT / "README.md")
FILTERS = [line.rpartition("|")[0] for line in README if line.startswith("sed ")]


def test_every_file_that_the_readme_works_on_exists() -> None:
    named = re.findall(r"(?:\S+/)+\S+\.yaml|\S+/Dockerfile|charts/\S+", "\n".join(README))
    assert {"operator/Dockerfile", "charts/daruma", "manifests/crd.yaml"} <= set(named)
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", FILTERS)
def test_what_the_readme_applies_has_images_of_the_users_registry(command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "R": "registry.example.com/mine"},
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    built = set(re.findall(r"docker build -t \$R(/\S+)", "\n".join(README)))
    images = re.findall(r"^ *(?:- )?image: \"?([^\"\n]+)\"?$", done.stdout, re.MULTILINE)
    assert images
    assert {image.removeprefix("registry.example.com/mine") for image in images} <= built
    assert "apiVersion: daruma.dev/v1alpha1" in done.stdout or "kind: Deployment" in done.stdout


def test_the_job_in_the_readme_is_the_one_that_is_applied() -> None:
    (shown,) = re.findall(
        r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert any("manifests/examples/first.yaml" in command for command in FILTERS)
    applied = yaml.safe_load((ROOT / "manifests/examples/first.yaml").read_text())
    assert yaml.safe_load(shown) == applied
    assert "checkpoint" not in applied["spec"], "nobody has a claim or a bucket at first"


def test_the_claim_of_the_examples_is_there() -> None:
    claim = yaml.safe_load((ROOT / "manifests/claim.yaml").read_text())
    used = [
        yaml.safe_load(path.read_text())["spec"].get("checkpoint", {}).get("claimName")
        for path in (ROOT / "manifests/examples").glob("*.yaml")
    ]
    assert set(used) == {claim["metadata"]["name"], None}


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
