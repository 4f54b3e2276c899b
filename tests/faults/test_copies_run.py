"""`daruma run` with `copies: 2`, and a server, a worker or both killed at a random step.

Real processes and the real operator; `tests/trainer/test_copies_killed.py` has the same story with
a simulated network, very often. A killed server's guests, so other servers' replicas, go with it.
"""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import copies_program
from copies_program import TABLE, WORKERS
from daruma_trainer.contract import SLOTS
from daruma_trainer.layout import TableSpec, choose_block_rows
from daruma_trainer.rules import Adam, rule_to_json
from daruma_trainer.server.shard import Shard
from daruma_trainer.wire import TablePush
from killed_runs import STEPS, Arrays, Killed, missing
from soak import counted

SERVERS = 2
VICTIMS = (("server",), ("worker",), ("server", "worker"))
SEEDS, COUNTED = counted("a node killed under `daruma run` with copies: 2, in each cell", 1, 20)
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def run(folder: Path, mode: str, program: list[str], kills: list[str]) -> tuple[Any, Arrays]:
    """Return the report and the tables of a job whose members are killed so."""
    job = Killed("{strategy: Freshest, copies: 2}", mode, program, servers=2, replicas=2)
    return job.run(folder, kills)


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
