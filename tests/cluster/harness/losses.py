"""How good a job's result is, beside runs that nobody disturbed."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from testcluster import locked
from testjobs import DATA, RATE, SOFTMAX, STEPS, JobNamespace

from daruma_trainer.checkpoint.export import Arrays
from daruma_trainer.checkpoint.loading import load_state, open_cut
from daruma_trainer.contract import Settings
from daruma_trainer.programs.data import classification
from local_cluster import local_cluster

RUNS = 5
PROGRAM = [str(SOFTMAX), str(STEPS), DATA, RATE, "0"]


def full_loss(tables: Arrays) -> float:
    """Return the mean cross-entropy over all training samples."""
    (x, y), _ = classification(DATA, 0)
    scores = x @ tables["weight"].T
    scores -= scores.max(axis=1, keepdims=True)
    right = scores[np.arange(len(y)), y]
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - right))


def loss_of(jobs: JobNamespace, uri: str) -> float:
    """Return the loss of a result; NaN where the claim's files cannot be read from here."""
    if jobs.cluster.folder is None:
        return math.nan
    claim = jobs.cluster.folder / "volumes" / jobs.name
    return full_loss(load_state(*open_cut(f"file://{claim}{urlsplit(uri).path}")))


def check_loss(jobs: JobNamespace, status: dict[str, Any], folder: Path) -> None:
    """A job's result must be at most a tenth worse than the worst of those undisturbed."""
    loss = loss_of(jobs, status["result"]["uri"])
    limit = 1.1 * undisturbed(folder)
    assert math.isnan(loss) or loss <= limit, f"a loss of {loss:.4f}, at most {limit:.4f}"


def undisturbed(folder: Path) -> float:
    """Return the largest loss of 5 runs without a failure, made once a test run."""
    note = folder / "undisturbed.json"
    with locked(folder, "undisturbed.lock"):
        if not note.exists():
            note.write_text(json.dumps([_run() for _ in range(RUNS)]))
    losses: list[float] = json.loads(note.read_text())
    return max(losses)


def _run() -> float:
    with tempfile.TemporaryDirectory(prefix="daruma-undisturbed-") as name:
        store = Path(name) / "store"
        settings = Settings(store=f"file://{store}")
        with local_cluster(
            Path(name), servers=1, workers=2, settings=settings, program=PROGRAM
        ) as members:
            members.finish()
        return full_loss(load_state(*open_cut(f"file://{store}/{members.membership.prefix}")))
