"""What replicas cost while nothing fails.

    daruma bench replication [--quick] [--json FILE] [--write FILE]

Jobs under `daruma run`, each server with an equal part of one dense table: a *shard* of so many MB.
A worker pushes a gradient of the whole table, pulls it, and sleeps for `think`: it computes
nothing, so the cores are the servers', their replicas', the workers' side of the wire and the
kernel's copies. A step of one worker is a push and a pull of every shard.

Each way to replicate runs for a while; that begins when all replicas are up to date. *Steps/s* are
batches a second that are acknowledged and, where the way says so, covered, of all workers together;
*of none* is its ratio to the rate without replicas, all else equal. *Bytes* are what servers sent
to their next replicas in that time, per byte that workers pushed (those after the next get as many
again; under Sync the pushes of a step go on as one update). *CPU* is the CPU time per step and
shard, from /proc: of its server, of its replicas, and of the worker for it. *Cores* is how many of
the machine's cores all of these had in use.

**Why it costs what it costs.** A server sends the frames of an update on as they came, without
copying them, and a worker waits for nothing but the bound on its uncovered pushes. What is left is
the update itself, once for each replica: the kernel's copies out of one process and into the next,
and the arithmetic. On nodes of their own replicas take that from nobody. On this machine they share
its cores with everybody else: where *cores* is near to what the machine has without replicas
already, steps are as many as its cores have CPU time for, and *of none* is the ratio of the CPU
times of a step. Where cores are free without replicas (one worker; time to think), they take the
replicas' work.

The cells are those that say something: all ways for plain SGD, where an update costs least and so
replicas weigh most; momentum and Adam where workers' copies cover nothing; a longer chain beside a
job of as many servers without one; one worker; Sync, also where all workers are needed
(`minReplicas` = `replicas`), which allows one uncovered push instead of two. Every one takes some
seconds, once.

**Bars.** Bytes of `copies: 2` are in parts of those of the same job's chain of 2 with `Tail`, rates
of a chain of 2 with `Next` in parts of the same job's without replicas. Of a worker's pushes one
may lie on the edge of the seconds that are measured, its bytes counted on one side only: so many
parts in a hundred (±) are in doubt, and a bar within that is not resolved. With momentum and Adam
both send every update once; that is the bar itself.
"""

import http.client
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import START_SECONDS, BenchError
from daruma_trainer.bench.bars import Verdict, judge, table
from daruma_trainer.bench.bars import row as bar_row
from daruma_trainer.bench.cli import Result, conclude, machine, method, parser_of, today
from daruma_trainer.bench.local import LocalRun
from daruma_trainer.bench.members import Process
from daruma_trainer.bench.pushing import COLS
from daruma_trainer.contract import Role, agent_address

Row = Mapping[str, Any]
"""What was measured of one job and way."""
STEPS = 3
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: bench-replication}}
spec:
  program:
    image: none
    command: [python, -m, daruma_trainer.bench.pushing]
    args: ["{rows}", "{think}", "{rule}"]
  servers: {{replicas: {servers}}}
  workers: {{replicas: {workers}, minReplicas: {least}}}
  consistency: {{mode: {mode}}}
  checkpoint: {{every: 0}}
  recovery: {recovery}
"""
WAYS = {
    "none": "{strategy: Freshest}",
    "chain, ack None": "{strategy: Chain, chain: {replicas: 2, ack: None}}",
    "chain, ack Next": "{strategy: Chain, chain: {replicas: 2, ack: Next}}",
    "chain, ack Tail": "{strategy: Chain, chain: {replicas: 2, ack: Tail}}",
    "chain, ack Tail, pulls Any": "{strategy: Chain, chain: {replicas: 2, ack: Tail, pulls: Any}}",
    "chain of 3, ack Tail": "{strategy: Chain, chain: {replicas: 3, ack: Tail}}",
    "copies 2": "{strategy: Freshest, copies: 2}",
}
"""By name, spec.recovery."""
ALL = "Sync, all needed"
NONE, NEXT, TAIL, COPIES = "none", "chain, ack Next", "chain, ack Tail", "copies 2"
BAR_MB = 100
"""Megabytes of a shard for which the bars were set."""
BYTES = {"sgd": 0.1, "momentum": 1.0, "adam": 1.0}
"""By rule, most bytes that copies take, in parts of the chain's (Tail)."""
RATES = {0.05: 0.7, 0.0: 0.55}
"""By seconds of think, least rate of a chain (Next), in parts of that without."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is replicated, but for the way."""

    mb: int
    """Megabytes of a shard."""
    think: float
    """Seconds."""
    rule: str = "sgd"
    servers: int = 2
    workers: int = 2
    consistency: str = "Async"
    """Async, Sync or ALL."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: of each job which ways, and for how long each."""

    ways: tuple[tuple[Job, tuple[str, ...]], ...]
    seconds: float

    @classmethod
    def of(cls, *, quick: bool) -> "Plan":
        """Return the quick one or the whole."""
        some = (NONE, NEXT, TAIL, COPIES)
        if quick:
            return cls(((Job(10, 0.05), some),), 4.0)
        all_of_2 = tuple(way for way in WAYS if "of 3" not in way)
        ways: list[tuple[Job, tuple[str, ...]]] = []
        for think in (0.05, 0.0):
            ways += [
                (Job(BAR_MB, think, workers=1), (NONE, NEXT)),
                (Job(BAR_MB, think), all_of_2),
                (Job(BAR_MB, think, servers=3), (NONE, "chain of 3, ack Tail")),
                (Job(BAR_MB, think, "momentum"), some),
                (Job(BAR_MB, think, "adam"), some),
            ]
        covered = (NONE, TAIL, COPIES)
        ways += [
            (Job(BAR_MB, 0.05, rule, consistency=mode), covered)
            for mode, rule in (("Sync", "sgd"), ("Sync", "momentum"), (ALL, "sgd"))
        ]
        return cls(tuple(ways), 10.0)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    parser = parser_of("replication", __doc__, "one small size, one round, fewer ways")
    options = parser.parse_args(arguments)
    return conclude(options, lambda: measure(Plan.of(quick=options.quick)), page)


def measure(plan: Plan) -> Result:
    """Take all measurements. BenchError: a job does not run."""
    rows = [
        {**asdict(job), "way": way, **_run(job, way, plan.seconds)}
        for job, ways in plan.ways
        for way in ways
    ]
    return {
        "benchmark": "replication",
        "machine": f"{machine()}, numpy {np.__version__}",
        "date": today(),
        "load": round(os.getloadavg()[0], 1),
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
        f"{result['seconds']:g} s each, {result['date']}, {result['machine']}; load average at "
        f"the end {result['load']}.",
        "",
        *_bars(result),
        "| consistency | shards | MB | workers | think ms | rule | way | steps/s | of none | bytes "
        "| CPU ms: server | replicas | worker | cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        base = _same_job(result["rows"], row, NONE)
        cells = [
            row["consistency"], f"{row['servers']}", f"{row['mb']}", f"{row['workers']}",
            f"{1000 * row['think']:g}", row["rule"], row["way"], f"{row['rate']:.2f}",
            f"{row['rate'] / base['rate']:.2f}" if base else "", f"{row['bytes']:.3f}",
            *(f"{1000 * row[who]:.0f}" for who in ("server", "replicas", "worker")),
            f"{row['cores']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## How it is measured", "", method(__doc__), ""])


def _same_job(rows: Sequence[Row], row: Row, way: str) -> Row | None:
    """Return what was measured of this row's job another way."""
    names = [field.name for field in fields(Job)]
    found = [r for r in rows if r["way"] == way and all(r[name] == row[name] for name in names)]
    return found[0] if found else None


def _bars(result: Result) -> list[str]:
    rows = result["rows"]
    found = [*_bytes_bars(result), *(_rate_bar(rows, row) for row in rows if row["way"] == NEXT)]
    made = [line for line in found if line is not None]
    small = any(row["mb"] < BAR_MB for row in rows)
    return table(made, *([f"Too small to judge by: bars are of {BAR_MB} MB."] if small else []))


def _bytes_bars(result: Result) -> list[str]:
    made = []
    for row in result["rows"]:
        chain = _same_job(result["rows"], row, TAIL)
        if row["way"] != COPIES or chain is None:
            continue
        bar, part = BYTES[row["rule"]], row["bytes"] / chain["bytes"]
        # So many pushes of each worker were counted, of the fewer.
        edge = part * row["workers"] / (min(row["rate"], chain["rate"]) * result["seconds"])
        verdict = judge(bar - part, edge)
        what = f"{_named(row)}: bytes of `copies: 2`, of the chain's with `Tail`"
        made.append(_bar(what, f"≤ {bar:.0%}", f"{part:.1%} ± {edge:.1%}", verdict, bar - part))
    return made


def _rate_bar(rows: Sequence[Row], row: Row) -> str | None:
    """Return the bar of one chain with `Next`; None: there is none for it."""
    base = _same_job(rows, row, NONE)
    if base is None or row["think"] not in RATES:
        return None
    bar, part = RATES[row["think"]], row["rate"] / base["rate"]
    what = f"{_named(row)}: rate of a chain of 2 with `Next`, of that without replicas"
    return _bar(what, f"≥ {bar:.0%}", f"{part:.1%}", judge(part - bar, 0.0), part - bar)


def _bar(what: str, bar: str, measured: str, verdict: Verdict, slack: float) -> str:
    return bar_row(what, bar, measured, f"{verdict}, by {100 * abs(slack):.1f} points")


def _named(row: Row) -> str:
    workers = f"{row['workers']} worker{'s' if row['workers'] > 1 else ''}"
    return f"{row['consistency']}, {row['rule']}, {workers}, {1000 * row['think']:g} ms of think"


def _run(job: Job, way: str, for_seconds: float) -> dict[str, float]:
    rows = job.mb * job.servers * 1_000_000 // (4 * COLS)
    least = job.workers if job.consistency == ALL else 1
    mode = job.consistency.partition(",")[0]
    manifest = MANIFEST.format(**asdict(job), rows=rows, recovery=WAYS[way], least=least, mode=mode)
    run = LocalRun(manifest, job.workers, STEPS)
    with run.running():
        members = run.members()
        servers = [p for p in members if p.role is Role.SERVER]
        replicas = job.servers * (3 if "of 3" in way else 2 if "chain" in way else 1) - job.servers
        _until_whole(servers, replicas)
        before, since = _sample(members), time.monotonic()
        time.sleep(for_seconds)
        after, seconds = _sample(members), time.monotonic() - since
    took = {name: after[name] - before[name] for name in before}
    if not took["steps"] or not took["pushed"]:
        raise BenchError(f"{way}: no step in {seconds:.0f} s")
    parts = took["steps"] * job.servers
    cpu = {who: took[who] / parts for who in ("server", "replicas", "worker")}
    return {
        "rate": took["steps"] / seconds,
        "bytes": took["sent"] / took["pushed"],
        **cpu,
        "cores": sum(cpu.values()) * parts / seconds,
    }


def _until_whole(servers: Sequence[Process], replicas: int) -> None:
    """Wait until so many replicas are counted on by the one before them."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        views = [p.view()[1] for p in servers]
        following = {told.id for v in views for _, told in v.others.values() if told.follows}
        if len(following) >= replicas:
            return
        time.sleep(0.1)
    raise BenchError(f"the replicas were not up to date within {START_SECONDS:.0f} s")


def _sample(members: Sequence[Process]) -> dict[str, float]:
    """Batches covered, bytes pushed, bytes sent to replicas, CPU seconds by role."""
    workers = [p for p in members if p.role is Role.WORKER]
    servers = [p for p in members if p.role is Role.SERVER]
    return {
        "steps": sum(p.view()[1].own.step for p in workers),
        "pushed": sum(_metric(p, "daruma_push_bytes_total") for p in servers),
        "sent": sum(_metric(p, "daruma_replica_bytes") for p in servers),
        "server": sum(_cpu(p.pid)[0] for p in servers),
        "replicas": sum(_cpu(p.pid)[1] for p in servers),
        "worker": sum(_cpu(p.pid)[0] for p in workers),
    }


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


def _cpu(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, and of its children: the replicas in a server's pod."""
    own = children = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        own += used * (pid == int(folder.name))
        children += used * (pid == int(fields[1]))
    return own, children
