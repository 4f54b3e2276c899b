"""A storm of kills over a whole job: it converges, nothing grows, and every push is accounted for.

Each strategy has a storm of its own under `daruma run`: servers, workers, both at once, a
replacement while it restores, a replica. Each batch leaves a mark in every row, so that the result
tells of each whether it was applied once; what is missing must have been counted.
"""

import math
import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import storm_program
from daruma_trainer.contract import Role
from daruma_trainer.layout import Floats
from soak import counted
from storm import DEADLINE, Storm, Used, storm

SERVERS, WORKERS = 3, 2
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: storm}}
spec:
  program:
    image: none
    command: [python, {program}, "{steps}", "{think}", {calm}, {kind}]
  servers: {{replicas: 3}}
  workers: {{replicas: 2, minReplicas: {least}}}
  consistency: {{mode: {mode}}}
  checkpoint: {{store: "file:///saves", every: 8, fraction: 0.25}}
  recovery: {{{recovery}}}
  runPolicy: {{backoffLimit: 100}}
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy under one consistency."""

    recovery: str
    mode: str
    replicas: int = 0
    kind: str = "add"
    least: int = 1

    @property
    def name(self) -> str:
        words = self.recovery.replace("strategy: ", "").replace("copies: ", "copies-").split(", ")
        return "-".join([*words[:1], *(w for w in words if w.startswith("copies")), self.mode])


CELLS = (
    Cell("strategy: Partial", "Async", kind="rebuilt"),
    Cell("strategy: Partial", "Sync", kind="sgd", least=2),
    Cell("strategy: FullCheckpoint", "Async"),
    Cell("strategy: FullCheckpoint", "Sync"),
    Cell("strategy: Freshest", "Async"),
    Cell("strategy: Freshest", "Sync"),
    Cell("strategy: Stateless", "Async"),
    Cell("strategy: Stateless", "Sync", least=2),
    Cell("strategy: Chain, chain: {replicas: 2, ack: Tail}, fallback: [Stateless]", "Async", 1),
    Cell("strategy: Chain, chain: {replicas: 2, ack: Tail}, fallback: [Stateless]", "Sync", 1),
    Cell("strategy: Freshest, copies: 2", "Async", 1),
    Cell("strategy: Freshest, copies: 2", "Sync", 1),
)
COUNT, STORM = counted("recoveries in storms of kills, all strategies in turn", 50, 500)
BLOWS = math.ceil(COUNT / len(CELLS))
STEPS, THINK_MS = max(500, 30 * BLOWS), 5 * BLOWS
"""Of each worker at most, and how long a step takes in the beginning: longer and longer, so that
none comes to its end while the storm lasts."""
MORE_DESCRIPTORS, MORE_KIB = 16, 48 * 1024
"""What a process may hold at the end of a storm that it did not hold at its beginning."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def blows_of(cell: Cell, dice: random.Random) -> list[str]:
    """All kinds of blows in turn, in an order of the dice's."""
    kinds = ["server", "worker", "both", "again"] + ["replica"] * (cell.replicas > 0)
    dice.shuffle(kinds)
    rounds = islice(cycle(kinds), BLOWS + BLOWS // len(kinds) * (cell.replicas > 0))
    return list(rounds)


@STORM
@pytest.mark.parametrize("number", range(len(CELLS)), ids=[cell.name for cell in CELLS])
def test_storm(tmp_path: Path, number: int) -> None:
    cell, dice = CELLS[number], random.Random(number)
    calm = tmp_path / "calm"
    manifest = MANIFEST.format(
        program=storm_program.__file__, steps=STEPS, think=THINK_MS, calm=calm, kind=cell.kind,
        least=cell.least, mode=cell.mode, recovery=cell.recovery,
    )  # fmt: skip
    with storm(tmp_path, manifest, dice, (SERVERS, WORKERS, cell.replicas)) as job:
        job.spared = {(Role.SERVER, number % SERVERS), (Role.WORKER, number // 2 % WORKERS)}
        job.settle()
        job.strike("server")  # what is made once, for the first recovery, is there now
        early = job.used()
        for blow in blows_of(cell, dice):
            job.strike(blow)
        late = job.used()
        last = job.calm(calm)
        assert job.run.wait(DEADLINE) == 0, job.output[-6000:]
    check_growth(early, late)
    check_records(job, cell)
    found = result(tmp_path, job.report)
    check_marks(job, found["digits"], last, cell)
    if cell.kind == "add":
        check_weights(found["weights"], last, cell)


def check_growth(early: dict[str, Used], late: dict[str, Used]) -> None:
    assert early.keys() == late.keys(), "nobody killed them"
    for name, before in early.items():
        after = late[name]
        assert after.descriptors <= before.descriptors + MORE_DESCRIPTORS, (name, before, after)
        assert after.kib <= before.kib + MORE_KIB, (name, before, after)


def check_records(job: Storm, cell: Cell) -> None:
    """Every recovery came to its end, and nobody was lost who was not killed."""
    records = [r for r in job.report["recoveries"] if r["cause"] != "HandBack"]
    assert {r["outcome"] for r in records} == {"Succeeded"}, records
    # A loss in a hand-back joins it; who hands over is no loss.
    losses = [x for r in records for x in r["losses"] if x["reason"] != "HandBack"]
    pods = {f"storm-{member}" for member in job.killed}
    assert {x["pod"] for x in losses} <= pods, "somebody was lost whom nobody killed"
    found = {f"{x['role'].lower()}-{x['index']}-{x['incarnation']}" for x in losses}
    # What lives on in a replica loses nothing with a pod that was to take its slots back.
    assert cell.replicas or found >= set(job.killed), "a kill was not noticed"


def check_marks(job: Storm, digits: Floats, last: int, cell: Cell) -> None:
    """Each batch up to the last is applied once by every slot, or counted."""
    report, pushes = job.report, job.report["pushes"]
    assert (report["phase"], report["steps"]) == ("Succeeded", last)
    assert pushes["applied"] + pushes["lost"] + pushes["skipped"] == WORKERS * last
    marks = storm_program.digits_of(digits, WORKERS, STEPS)
    # A mean is of those who gave: what one lost, the other's digit has in its place.
    once = marks.sum(axis=1).max() <= WORKERS if cell.kind == "sgd" else marks.max() <= 1
    assert once, "a batch was applied twice"
    assert not marks[:, :, last:].any()
    marks = marks[:, :, :last]
    missing = int((marks.min(axis=0) == 0).sum())
    counted = pushes["lost"] + pushes["skipped"]
    # What was made again, the servers counted as lost.
    assert missing == counted or (cell.kind == "rebuilt" and missing < counted), (missing, pushes)
    assert pushes["replayed"] <= pushes["applied"]


def check_weights(weights: Floats, last: int, cell: Cell) -> None:
    """It converges: in all rows at least as far as 90 % as many undisturbed batches do.

    What a rollback undoes is made again, and what a worker's copy or a replica lacks are a few
    batches. With `Partial` blocks go back to their last save: its cells train digits alone.
    """
    updates = last if cell.mode == "Sync" else WORKERS * last
    bound = (1 - storm_program.rate(STEPS)) ** (0.9 * updates)
    apart = float(np.abs(weights - storm_program.truth()).max())
    assert apart <= bound, (apart, bound, last)


def result(folder: Path, report: dict[str, Any]) -> dict[str, Floats]:
    command = [sys.executable, "-m", "daruma_operator.cli.main", "export"]
    out = folder / "result"
    subprocess.run(
        [*command, report["result"]["uri"], "-o", str(out)],
        check=True, timeout=DEADLINE, capture_output=True,
    )  # fmt: skip
    found: dict[str, Floats] = load_file(out)
    return found
