"""`daruma run` with a worker killed: the job goes on without it, and every batch is counted."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_cluster import PROGRAMS
from left_behind import left_by

pytestmark = pytest.mark.faults
DEADLINE = 120.0
STEPS = 150
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec:
  program:
    image: none
    command: [python, PROGRAM, marks, "STEPS", "5", "GATE"]
  servers: {replicas: 2}
  workers: {replicas: 3, minReplicas: LEAST}
  consistency: CONSISTENCY
"""
STEP = re.compile(r"Running.* step (\d+)")


def run(
    folder: Path, consistency: str, least: int, *, gated: bool
) -> tuple[dict[str, Any], list[int]]:
    """Kill worker 2 at step 20; returns the report, and the steps that were shown before the gate.

    `gated`: its replacement may not begin before the job has gone on without it.
    """
    gate = folder / "gate"
    text = MANIFEST.replace("PROGRAM", PROGRAMS).replace("STEPS", str(STEPS))
    text = text.replace("GATE", str(gate)).replace("LEAST", str(least))
    (folder / "toy.yaml").write_text(text.replace("CONSISTENCY", consistency))
    if not gated:
        gate.touch()
    out = folder / "out"
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", "toy.yaml"]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--out", str(out), "--kill", "worker-2@step=20"],
            stdout=output, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
    try:
        end = time.monotonic() + DEADLINE
        shown: list[int] = []
        while gated and not any(step > 45 for step in shown):
            assert time.monotonic() < end, (folder / "output").read_text()
            after = (folder / "output").read_text().partition("RecoverySucceeded")[2]
            shown = [int(step) for step in STEP.findall(after)]
            time.sleep(0.05)
        gate.touch()
        assert process.wait(DEADLINE) == 0, (folder / "output").read_text()
    finally:
        process.kill()
        process.wait()
    assert left_by(folder) == []
    found = json.loads((out / "report.json").read_text())
    assert isinstance(found, dict)
    return found, shown


@pytest.mark.parametrize(
    "consistency", ["{mode: Sync}", "{mode: Bounded, maxStaleness: 2}"], ids=["Sync", "Bounded"]
)
def test_the_step_waits_for_no_replacement_and_what_it_skipped_is_in_the_report(
    tmp_path: Path, consistency: str
) -> None:
    found, shown = run(tmp_path, consistency, 1, gated=True)
    (recovery,) = found["recoveries"]
    assert (recovery["cause"], recovery["reason"]) == ("WorkerLost", "WentOnWithout")
    assert shown, "it was Running while the replacement stood at the gate"
    pushes = found["pushes"]
    assert pushes["skipped"] >= 20
    assert pushes["applied"] + pushes["lost"] + pushes["skipped"] == 3 * STEPS
    assert (pushes["lost"], pushes["mixed"]) == (0, 0)
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)


@pytest.mark.parametrize(
    ("consistency", "least"), [("{mode: Sync}", 3), ("{mode: Async}", 1)], ids=["Sync", "Async"]
)
def test_where_it_is_waited_for_or_nobody_waits_nothing_is_skipped(
    tmp_path: Path, consistency: str, least: int
) -> None:
    found, _ = run(tmp_path, consistency, least, gated=False)
    (recovery,) = found["recoveries"]
    assert recovery["cause"] == "WorkerLost"
    if least == 3:
        assert recovery["reason"] == "WorkerReplaced"
    pushes = found["pushes"]
    assert pushes["applied"] == 3 * STEPS
    assert (pushes["lost"], pushes["skipped"], pushes["mixed"]) == (0, 0, 0)
