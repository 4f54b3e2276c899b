"""`daruma run` with `copies: 2`, and a server, a worker or both killed at a random step.

Real processes and the real operator; `tests/trainer/test_copies_killed.py` has the same story with
a simulated network, very often. A killed server's guests, so other servers' replicas, go with it.
"""

import contextlib
import http.client
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import copies_program
from copies_program import TABLE, WORKERS
from daruma_trainer.bench.members import processes
from daruma_trainer.contract import Role
from left_behind import left_by
from soak import counted

DEADLINE = 150.0
STEPS, SERVERS = 60, 2
VICTIMS = (("server",), ("worker",), ("server", "worker"))
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: copied}}
spec:
  program:
    image: none
    command: [python, {program}, {rule}, "{rows}", "{steps}", gate]
  servers: {{replicas: 2}}
  workers: {{replicas: 2, minReplicas: {least}}}
  consistency: {{mode: {mode}}}
  recovery: {{strategy: Freshest, copies: 2}}
"""
SEEDS, COUNTED = counted("a node killed under `daruma run` with copies: 2, in each cell", 1, 20)
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Arrays = dict[str, "np.ndarray[Any, Any]"]


def run(folder: Path, mode: str, rows: int, rule: str, kills: list[str]) -> tuple[Any, Arrays]:
    """Return the report and the tables of a job whose members are killed so."""
    folder.mkdir()
    text = MANIFEST.format(
        program=copies_program.__file__, rule=rule, rows=rows, steps=STEPS, mode=mode,
        least=WORKERS if mode == "Sync" else 1,
    )  # fmt: skip
    (folder / "job.yaml").write_text(text)
    daruma = [sys.executable, "-m", "daruma_operator.cli.main"]
    orders = [word for kill in kills for word in ("--kill", kill)]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*daruma, "run", "job.yaml", "--out", str(folder / "out"), *orders],
            stdout=output, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
    try:
        until_replicated(folder / "out", process)
        (folder / "gate").touch()
        assert process.wait(DEADLINE) == 0, (folder / "output").read_text()[-6000:]
    finally:
        process.kill()
        process.wait()
    assert left_by(folder) == []
    report = json.loads((folder / "out" / "report.json").read_text())
    result = [*daruma, "export", report["result"]["uri"], "-o", str(folder / "result")]
    subprocess.run(result, check=True, timeout=DEADLINE, capture_output=True)
    return report, load_file(folder / "result")


def until_replicated(out: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until each server counts on its replica: what is lost before that was promised less."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            servers = [p for p in processes(out) if p.role is Role.SERVER]
            views = [p.view()[1] for p in servers]
            followed = {told.follows for view in views for _, told in view.others.values()}
            if len(servers) == SERVERS and followed.issuperset(p.id for p in servers):
                return
        time.sleep(0.05)
    raise AssertionError("the replicas are not up to date")


def missing(marks: "np.ndarray[Any, Any]", rows: int) -> int:
    """How many batches some row lacks; none may be there twice, or where it does not belong."""
    marks = marks.reshape(TABLE, WORKERS, STEPS)
    assert ((marks == 0) | (marks == 1)).all(), "applied twice"
    found = 0
    for worker in range(WORKERS):
        for batch in range(1, STEPS + 1):
            mine = copies_program.rows_of(worker, batch, rows)
            found += not (marks[mine, worker, batch - 1] == 1).all()
            assert not np.delete(marks[:, worker, batch - 1], mine).any()
    return found


@COUNTED
@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("rows", [TABLE, 5], ids=["dense", "rows"])
@pytest.mark.parametrize("mode", ["Async", "Sync"])
def test_a_node_is_killed(tmp_path: Path, mode: str, rows: int, rule: str) -> None:
    cell = ["Async", "Sync"].index(mode) + 2 * (rows < TABLE) + 4 * (rule == "adam")
    plain: Arrays = {}
    if mode == "Sync":
        _, plain = run(tmp_path / "plain", mode, rows, rule, [])
    for seed in range(SEEDS):
        draw = random.Random(cell + 8 * seed)
        step = draw.randrange(8, STEPS - 8)
        roles = VICTIMS[(cell + seed) % len(VICTIMS)]
        kills = [f"{role}-{draw.randrange(2)}@step={step}" for role in roles]
        report, found = run(tmp_path / str(seed), mode, rows, rule, kills)
        pushes = report["pushes"]
        assert {r["outcome"] for r in report["recoveries"]} == {"Succeeded"}, kills
        assert pushes["lost"] == missing(found["marks"], rows), (kills, pushes)
        if mode == "Sync" or "worker" not in roles or "server" not in roles:
            assert (pushes["lost"], pushes["mixed"]) == (0, 0), (kills, pushes)
        for name in plain:
            assert found[name].tobytes() == plain[name].tobytes(), (name, kills)
