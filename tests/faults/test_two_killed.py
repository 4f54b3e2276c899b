"""`daruma run` with everything on three nodes, and two of them killed at once, at a random step.

Two servers: with them go the head and a replica of each of their shards, whichever they are, and a
replica of the third. What was covered is with the one that is left.
"""

import random
from pathlib import Path

import pytest

import copies_program
from copies_program import TABLE
from killed_runs import STEPS, Arrays, Killed, missing
from soak import counted

RECOVERY = {
    "tail": "{strategy: Chain, chain: {replicas: 3, ack: Tail}}",
    "copies": "{strategy: Freshest, copies: 3}",
}
SEEDS, COUNTED = counted("two nodes of three killed under `daruma run`, in each cell", 1, 20)
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@COUNTED
@pytest.mark.parametrize("victims", ["two servers", "server and worker"])
@pytest.mark.parametrize("mode", ["Async", "Sync"])
@pytest.mark.parametrize("kept", sorted(RECOVERY))
def test_two_are_killed_at_once(tmp_path: Path, kept: str, mode: str, victims: str) -> None:
    program = [copies_program.__file__, "momentum", str(TABLE), str(STEPS)]
    job = Killed(RECOVERY[kept], mode, program, servers=3, replicas=3)
    plain: Arrays = {}
    if mode == "Sync":
        _, plain = job.run(tmp_path / "plain", [])
    for seed in range(SEEDS):
        draw = random.Random(f"{kept}, {mode}, {victims}, {seed}")
        step = draw.randrange(8, STEPS - 8)
        servers, worker = draw.sample(range(3), 2), draw.randrange(2)
        lost = [f"server-{index}" for index in servers]
        if victims == "server and worker":
            lost[1] = f"worker-{worker}"
        kills = [f"{member}@step={step}" for member in lost]
        report, found = job.run(tmp_path / str(seed), kills)
        pushes = report["pushes"]
        assert {r["outcome"] for r in report["recoveries"]} == {"Succeeded"}, kills
        assert pushes["lost"] == missing(found["marks"], TABLE), (kills, pushes)
        if mode == "Sync" or victims == "two servers":
            assert (pushes["lost"], pushes["mixed"]) == (0, 0), (kills, pushes)
        for name in plain:
            assert found[name].tobytes() == plain[name].tobytes(), (name, kills)
