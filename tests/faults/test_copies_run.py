"""`daruma run` with `copies: 2`, and a server, a worker or both killed at a random step.

Real processes and the real operator; `tests/trainer/test_copies_killed.py` has the same story with
a simulated network, very often. A killed server's guests, so other servers' replicas, go with it.
"""

import contextlib
import http.client
import json
import math
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
from daruma_trainer.contract import SLOTS, Role
from daruma_trainer.layout import TableSpec, choose_block_rows
from daruma_trainer.rules import Adam, rule_to_json
from daruma_trainer.server.shard import Shard
from daruma_trainer.wire import TablePush
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
    command: [{command}, gate]
  servers: {{replicas: 2}}
  workers: {{replicas: 2, minReplicas: {least}}}
  consistency: {{mode: {mode}}}
  recovery: {{strategy: Freshest, copies: 2}}
"""
SEEDS, COUNTED = counted("a node killed under `daruma run` with copies: 2, in each cell", 1, 20)
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Arrays = dict[str, "np.ndarray[Any, Any]"]


def run(folder: Path, mode: str, program: list[str], kills: list[str]) -> tuple[Any, Arrays]:
    """Return the report and the tables of a job whose members are killed so."""
    folder.mkdir()
    command = ", ".join(json.dumps(word) for word in ["python", *program])
    text = MANIFEST.format(
        command=command, mode=mode, least=WORKERS if mode == "Sync" else 1,
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
    program = [copies_program.__file__, rule, str(rows), str(STEPS)]
    plain: Arrays = {}
    if mode == "Sync":
        _, plain = run(tmp_path / "plain", mode, program, [])
    for seed in range(SEEDS):
        draw = random.Random(cell + 8 * seed)
        step = draw.randrange(8, STEPS - 8)
        roles = VICTIMS[(cell + seed) % len(VICTIMS)]
        kills = [f"{role}-{draw.randrange(2)}@step={step}" for role in roles]
        report, found = run(tmp_path / str(seed), mode, program, kills)
        pushes = report["pushes"]
        assert {r["outcome"] for r in report["recoveries"]} == {"Succeeded"}, kills
        assert pushes["lost"] == missing(found["marks"], rows), (kills, pushes)
        if mode == "Sync" or "worker" not in roles or "server" not in roles:
            assert (pushes["lost"], pushes["mixed"]) == (0, 0), (kills, pushes)
        for name in plain:
            assert found[name].tobytes() == plain[name].tobytes(), (name, kills)


def test_an_embedding_with_sparse_gradients_loses_a_server(tmp_path: Path) -> None:
    """Bit for bit what one process makes of the same steps."""
    import embedding_program  # with torch, which takes seconds: only who runs this pays for it

    program = [embedding_program.__file__, str(STEPS)]
    report, found = run(tmp_path / "job", "Sync", program, ["server-0@step=20"])
    assert {r["outcome"] for r in report["recoveries"]} == {"Succeeded"}
    assert (report["pushes"]["lost"], report["pushes"]["mixed"]) == (0, 0)
    for name, values in trained(embedding_program).items():
        np.testing.assert_array_equal(found[name], values)


def trained(program: Any) -> Arrays:
    """Return the parameters after all steps of both workers, made by one shard."""
    import torch  # as above

    torch.set_num_threads(1)
    net = program.Net()
    slots = np.arange(SLOTS)
    shard = Shard("any", slots)
    named = dict(net.named_parameters())
    values = {name: param.detach().numpy().copy() for name, param in named.items()}
    for i, (name, array) in enumerate(values.items()):
        block_rows = choose_block_rows(len(array), math.prod(array.shape[1:]), SERVERS)
        shard.create(TableSpec(i, name, array.shape, block_rows, rule_to_json(Adam())))
        rows = shard.tables[i].layout.rows
        shard.set_values(slots, {i: array[rows].reshape(-1)})
    for batch in range(1, STEPS + 1):
        sums = {name: np.zeros_like(array) for name, array in values.items()}
        for worker in range(WORKERS):
            net.zero_grad()
            net.loss(worker, batch).backward()
            for name, param in named.items():
                assert param.grad is not None
                sums[name] += param.grad.to_dense().numpy()
        parts = []
        for i, name in enumerate(sums):
            mean = sums[name] * np.float32(1 / WORKERS)
            words = torch.cat([program.words_of(w, batch) for w in range(WORKERS)])
            looked_at = np.unique(words.numpy()) if named[name] is net.words.weight else None
            order = shard.tables[i].layout.rows if looked_at is None else looked_at
            parts.append(TablePush(i, program.RATE, mean[order], looked_at))
        shard.apply(parts, slots, slots)
        for i, (name, array) in enumerate(values.items()):
            table = shard.tables[i]
            array[table.layout.rows] = table.data.reshape(-1, *array.shape[1:])
            with torch.no_grad():
                named[name].copy_(torch.from_numpy(array))
    return values
