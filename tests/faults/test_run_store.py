"""`daruma run` whose saves lie in a bucket: a server is killed, the result is read from there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import softmax
from daruma_trainer.checkpoint.store import open_store
from daruma_trainer.programs.data import classification
from left_behind import left_by
from s3_server import SECRET

pytestmark = pytest.mark.faults
DEADLINE = 180.0
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec:
  program:
    image: none
    command: [python, PROGRAM, "STEPS"]
  servers: {replicas: 2}
  workers: {replicas: 2}
  checkpoint: CHECKPOINT
  recovery: {strategy: Partial}
"""


def daruma(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "daruma_operator.cli.main", *arguments],
        cwd=folder, timeout=DEADLINE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(folder: Path, steps: int, checkpoint: dict[str, object], *arguments: str) -> str:
    text = MANIFEST.replace("STEPS", str(steps)).replace("CHECKPOINT", json.dumps(checkpoint))
    text = text.replace("PROGRAM", softmax.__file__)
    (folder / "toy.yaml").write_text(text)
    daruma(folder, "run", "toy.yaml", "--out", "out", *arguments)
    assert left_by(folder) == []
    written = [p for p in folder.rglob("*") if p.is_file()]
    assert not any(SECRET.encode() in p.read_bytes() for p in written)
    found = json.loads((folder / "out" / "report.json").read_text())
    assert found["phase"] == "Succeeded"
    assert found["metrics"]["test_accuracy"] >= 0.9
    if arguments:
        (recovery,) = found["recoveries"]
        assert recovery["outcome"] == "Succeeded"
        assert recovery["sources"]["runningCheckpoint"] > 300, "half of 1,024 slots"
    uri: str = found["result"]["uri"]
    return uri


def accuracy(folder: Path, uri: str) -> float:
    """Export a result, and score it as the program does."""
    daruma(folder, "export", uri, "-o", "model")
    state = load_file(folder / "model")
    _, (x, y) = classification("digits", 0)
    return float(np.mean((x @ state["weight"].T).argmax(1) == y))


def test_a_killed_server_comes_back_from_a_bucket(tmp_path: Path, s3: str) -> None:
    store = {"store": f"{s3}/folder", "every": 32, "fraction": 0.25}
    uri = run(tmp_path, 200, store, "--kill", "server-1@step=60")
    assert uri.startswith(f"{s3}/folder/default/toy/")
    assert not any((tmp_path / "out" / "store").iterdir())
    exported = accuracy(tmp_path, uri)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert exported == pytest.approx(found["metrics"]["test_accuracy"], abs=1e-6)
    # The job's folder names its newest cut as well.
    assert accuracy(tmp_path, uri.rpartition("/cuts/")[0]) == exported
    # Another job begins with it: one step is not enough to learn this from nothing.
    assert run(tmp_path, 1, {**store, "restoreFrom": uri}) != uri
    assert len(open_store(f"{s3}/folder").list("default/toy")) == 2
