"""What replicas cost while nothing fails.

    daruma bench replication [--quick] [--json FILE] [--write FILE]

A job of 2 servers and 2 workers under `daruma run`, each server with half of one dense table. A
worker pushes a gradient of the whole table, pulls it, and sleeps for `think`: it computes nothing,
so the cores are the servers', their replicas' and the wire's. Replicas live beside the servers on
this one machine: what they take of the cores is part of what is measured, as it would not be on
nodes of their own.

Each way to replicate runs for a while, in turn, for some rounds; a round begins when all replicas
are up to date. The *step rate* is batches a second that are acknowledged and, where the way says
so, covered, of both workers together; *of none* is its ratio to the rate without replicas of the
same rule and round. *Bytes* are what servers sent to replicas in that time, per byte that workers
pushed. *CPU* is the CPU time of servers and replicas per step, from /proc. What is shown is the
median of the rounds, with the lowest and highest.
"""

import http.client
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import START_SECONDS, BenchError
from daruma_trainer.bench.cli import Result, conclude, machine, method, parser_of, today
from daruma_trainer.bench.local import LocalRun
from daruma_trainer.bench.members import Process
from daruma_trainer.contract import Role, agent_address

COLS = 256
SERVERS = WORKERS = 2
STEPS = 3
MANIFEST = f"""\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{{{name: bench-replication}}}}
spec:
  program:
    image: none
    command: [python, -m, daruma_trainer.bench.replication]
    args: [--push, "{{rows}}", "{{think}}", "{{rule}}"]
  servers: {{{{replicas: {SERVERS}}}}}
  workers: {{{{replicas: {WORKERS}}}}}
  checkpoint: {{{{every: 0}}}}
  recovery: {{recovery}}
"""
WAYS = {
    "none": "{strategy: Freshest}",
    "chain, ack None": "{strategy: Chain, chain: {replicas: 2, ack: None}}",
    "chain, ack Next": "{strategy: Chain, chain: {replicas: 2, ack: Next}}",
    "chain, ack Tail": "{strategy: Chain, chain: {replicas: 2, ack: Tail}}",
    "copies 2": "{strategy: Freshest, copies: 2}",
}
"""By name, spec.recovery."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    """Megabytes of a shard."""
    thinks: tuple[float, ...]
    rules: tuple[str, ...]
    ways: tuple[str, ...]
    rounds: int
    seconds: float

    @classmethod
    def of(cls, *, quick: bool) -> "Plan":
        """Return the quick one or the whole."""
        if quick:
            return cls((10,), (0.05,), ("sgd",), ("none", "chain, ack Next", "copies 2"), 1, 4.0)
        return cls((10, 100), (0.05, 0.0), ("sgd", "momentum"), tuple(WAYS), 3, 10.0)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    if arguments[:1] == ["--push"]:
        return _push(*arguments[1:])
    parser = parser_of("replication", __doc__, "one small size, one round, fewer ways")
    options = parser.parse_args(arguments)
    return conclude(options, lambda: measure(Plan.of(quick=options.quick)), page)


def measure(plan: Plan) -> Result:
    """Take all measurements. BenchError: a job does not run."""
    rows = [
        {"mb": mb, "think": think, "rule": rule, "way": way, **_run(mb, think, rule, way, plan)}
        for mb in plan.sizes
        for think in plan.thinks
        for rule in plan.rules
        for _ in range(plan.rounds)
        for way in plan.ways
    ]
    return {
        "benchmark": "replication",
        "machine": f"{machine()}, numpy {np.__version__}",
        "date": today(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "rows": rows,
    }


def page(result: Result) -> str:
    """Return the result as a page in Markdown."""
    lines = [
        "# What replicas cost",
        "",
        "Made by `daruma bench replication --write`; edit the benchmark, not this page.",
        "",
        f"{result['rounds']} rounds of {result['seconds']:g} s each, {result['date']}, "
        f"{result['machine']}; load average at the end {result['load']}.",
        "",
        "| shard MB | think ms | rule | way | steps/s | of none | bytes | CPU s/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = result["rows"]
    for key in dict.fromkeys((r["mb"], r["think"], r["rule"], r["way"]) for r in rows):
        mb, think, rule, way = key
        mine = [r for r in rows if (r["mb"], r["think"], r["rule"], r["way"]) == key]
        base = [r for r in rows if (r["mb"], r["think"], r["rule"], r["way"]) == (*key[:3], "none")]
        ratios = [a["rate"] / b["rate"] for a, b in zip(mine, base, strict=True) if b["rate"]]
        cells = [
            f"{mb}", f"{1000 * think:g}", rule, way,
            _spread([r["rate"] for r in mine], 1), _spread(ratios, 2),
            _spread([r["bytes"] for r in mine], 3), _spread([r["cpu"] for r in mine], 3),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## How it is measured", "", method(__doc__), ""])


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f}–{high:.{digits}f})"


def _run(mb: int, think: float, rule: str, way: str, plan: Plan) -> dict[str, float]:
    rows = mb * SERVERS * 1_000_000 // (4 * COLS)
    manifest = MANIFEST.format(rows=rows, think=think, rule=rule, recovery=WAYS[way])
    run = LocalRun(manifest, WORKERS, STEPS)
    with run.running():
        members = run.members()
        servers = [p for p in members if p.role is Role.SERVER]
        _until_whole(servers, chained="chain" in way)
        before, since = _sample(members, servers), time.monotonic()
        time.sleep(plan.seconds)
        after, seconds = _sample(members, servers), time.monotonic() - since
    steps, pushed, sent, cpu = (b - a for a, b in zip(before, after, strict=True))
    if not steps or not pushed:
        raise BenchError(f"{way}: no step in {seconds:.0f} s")
    return {"rate": steps / seconds, "bytes": sent / pushed, "cpu": cpu / steps}


def _until_whole(servers: Sequence[Process], *, chained: bool) -> None:
    """Wait until every server that is to have a replica counts on it."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        views = [p.view()[1] for p in servers]
        followed = {told.follows for v in views for _, told in v.others.values()}
        if not chained or followed.issuperset(p.id for p in servers):
            return
        time.sleep(0.1)
    raise BenchError(f"the replicas were not up to date within {START_SECONDS:.0f} s")


def _sample(
    members: Sequence[Process], servers: Sequence[Process]
) -> tuple[float, float, float, float]:
    """Batches covered, bytes pushed, bytes sent to replicas, CPU seconds of the servers."""
    workers = [p for p in members if p.role is Role.WORKER]
    steps = sum(p.view()[1].own.step for p in workers)
    pushed = sum(_metric(p, "daruma_push_bytes_total") for p in servers)
    sent = sum(_metric(p, "daruma_replica_bytes") for p in servers)
    return steps, pushed, sent, sum(_cpu(p.pid) for p in servers)


def _metric(member: Process, name: str) -> float:
    host, _, port = agent_address(member.address).rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5.0)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
    return sum(float(value) for value in values)


def _cpu(pid: int) -> float:
    """CPU seconds of a process and of its children: the replicas in a server's pod."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if pid in (int(folder.name), int(fields[1])):
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def _push(rows: str, think: str, rule: str) -> int:
    """What a worker of the job runs."""
    import daruma_trainer as daruma

    gradient: Any = np.random.default_rng(0).random((int(rows), COLS), np.float32)
    with daruma.join() as job:
        made = daruma.SGD(momentum=0.9 if rule == "momentum" else 0.0)
        table = job.table("t", gradient.shape, rule=made)
        while job.stopped is None:
            table.push(None, gradient, lr=1e-6)
            time.sleep(float(think))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
