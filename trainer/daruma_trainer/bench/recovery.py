"""How long a job stands still when a parameter server is killed.

    daruma bench recovery [--quick] [--json FILE] [--write FILE] [--cluster JOB.yaml]
                          [--placement Replace|Adopt|Copies|Chain]

Without `--cluster` a job of 4 servers and 2 workers (multinomial logistic regression on
scikit-learn's digits, Async, strategy Freshest) runs under `daruma run`; with it, the given job
runs on the cluster of KUBECONFIG. One server after the other gets SIGKILL from this process, which
notes its own monotonic clock just before (t0). All workers' agents are long-polled; a worker
reports the newest epoch E such that a batch *first sent after E was seen* has been applied by all
slots, and how long ago the first such acknowledgement came. The first report with an epoch above
the one before the kill gives t1 = arrival of the report − that age. Nothing is acknowledged by all
slots before the lost ones are restored, so t1 − t0 is the time from the kill to the first new
step; the age takes out what the report's way to here adds, but for its transfer (< 1 ms).

The phases are the operator's own, as the job records them: detect, replace, restore, resume. It
has no clock of the kill, so its detect begins when a member first saw the connection break;
`unseen` is what the sum of its phases lacks to t1 − t0; *from detection* is t1 − t0 without detect.
`unseen` is below zero where the phases end after t1: one ends when the operator has seen its end,
a little late; and where the epoch rises again in a recovery (a replica in the lost pod is found to
be lost too, or another gets its address), the record ends with a step of the newest epoch, while t1
is the first step of any epoch after the kill.
A server is killed when all servers have their slots again, with `Adopt` after the hand-back, whose
own record is not counted, and with replicas when each server's are up to date. `Copies` is
`Freshest` with `copies: 2`, `Chain` has chains of 3 with `ack: Next`. Under `daruma run` members
write bytecode, as an installed package has it: PYTHONDONTWRITEBYTECODE is taken out of their
environment.
"""

import contextlib
import http.client
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import CHAIN, Arena, BenchError
from daruma_trainer.bench.bars import Verdict, row, table
from daruma_trainer.bench.cli import Result, conclude, machine, method, parser_of, today
from daruma_trainer.bench.cluster import ClusterArena
from daruma_trainer.bench.local import RECOVERY, LocalArena
from daruma_trainer.bench.members import Process
from daruma_trainer.contract import Role, View

RECOVERY_SECONDS = 60.0
SETTLE_SECONDS = 1.0
"""Between recoveries: long enough for the record to be closed and the pushes to flow again."""
HAND_BACK = "HandBack"
"""Cause of the record of an adopted seat that got its pod again."""
PHASES = ("detect", "replace", "restore", "resume")


@dataclass(frozen=True, slots=True)
class Sample:
    """One kill. Times in seconds."""

    server: int
    seconds: float
    phases: dict[str, float]

    @property
    def unseen(self) -> float:
        """What the phases lack to the whole."""
        return self.seconds - sum(self.phases.values())

    @property
    def detected(self) -> float:
        """From detection to the first new step."""
        return self.seconds - self.phases["detect"]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "server": self.server,
            "seconds": round(self.seconds, 4),
            "phases": {k: round(v, 4) for k, v in self.phases.items()},
            "unseen": round(self.unseen, 4),
        }


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    parser = parser_of("recovery", __doc__, "3 kills instead of 10")
    parser.add_argument(
        "--placement",
        choices=tuple(RECOVERY),
        default="Replace",
        help="what brings lost slots back, under `daruma run`; with --cluster the job says it",
    )
    parser.add_argument(
        "--cluster", type=Path, metavar="JOB.yaml", help="on Kubernetes: the job to run there"
    )
    options = parser.parse_args(arguments)

    def measured() -> Result:
        arena: Arena = LocalArena(options.placement)
        if options.cluster:
            arena = ClusterArena(options.cluster)
        return summary(measure(arena, 3 if options.quick else 10), arena)

    return conclude(options, measured, page)


def measure(arena: Arena, kills: int) -> list[Sample]:
    """Kill servers one after the other. BenchError: the job did not start or did not go on."""
    with arena.running():
        servers = sum(p.role is Role.SERVER for p in arena.members())
        victims = [n % servers for n in range(kills)]
        times = [_kill_one(arena, servers, index) for index in victims]
        _until_all_whole(arena, servers)
    records = [r for r in arena.records() if r["cause"] != HAND_BACK]
    if len(records) != kills:
        told = "\n".join(f"{r['cause']} {r['reason']}: {r['losses']}" for r in records)
        raise BenchError(
            f"{kills} servers were killed, but {len(records)} recoveries recorded:\n{told}"
        )
    return [
        Sample(index, seconds, {p: float(record["phases"].get(p) or 0.0) for p in PHASES})
        for index, seconds, record in zip(victims, times, records, strict=True)
    ]


def summary(samples: Sequence[Sample], arena: Arena) -> Result:
    """Return the samples with their median and spread, and what machine it was."""
    seconds = [s.seconds for s in samples]
    return {
        "benchmark": "recovery",
        "cluster": isinstance(arena, ClusterArena),
        "where": arena.where,
        "placement": arena.placement,
        "machine": machine(),
        "store": _filesystem(Path(tempfile.gettempdir())),
        "load": round(os.getloadavg()[0], 1),
        "date": today(),
        "kills": len(samples),
        "seconds": _spread(seconds),
        "detected": _spread([s.detected for s in samples]),
        "phases": {p: _spread([s.phases[p] for s in samples]) for p in PHASES},
        "unseen": _spread([s.unseen for s in samples]),
        "samples": [s.to_json() for s in samples],
    }


def page(result: Result) -> str:
    """Return the result as a page in Markdown."""
    lines = [
        "# Time to recover",
        "",
        "Made by `daruma bench recovery --write`; edit the benchmark, not this page.",
        "",
        f"{result['kills']} kills of {result['where']}, placement {result['placement']}, "
        f"{result['date']}, {result['machine']}; store on {result['store']} "
        f"(TMPDIR); load average at the end {result['load']} "
        "(what is more than the members themselves was other work on the machine).",
        "",
        *_bars(result),
        "| seconds | median | min | max |",
        "|---|---|---|---|",
        _row("**kill → first new step**", result["seconds"]),
        _row("from detection", result["detected"]),
        *(_row(p, result["phases"][p]) for p in PHASES),
        _row("unseen", result["unseen"]),
        "",
        "## How it is measured",
        "",
        method(__doc__),
        "",
    ]
    return "\n".join(lines)


def _bars(result: Result) -> list[str]:
    """What was promised of chains."""
    if result["placement"] != CHAIN:
        return []
    where, bar = ("on a cluster", 1.5) if result["cluster"] else ("under `daruma run`", 0.3)
    times = [s["seconds"] for s in result["samples"]]
    late = sum(t > bar for t in times)
    rows = []
    for name in ("median", "max"):
        found = result["seconds"][name]
        verdict = Verdict.MET if found <= bar else Verdict.NOT_MET
        of = f"; {late} of {len(times)} kills took longer" if name == "max" else ""
        what = f"kill → first new step {where}, {name}"
        said = f"{verdict}, by {abs(bar - found):.3f} s{of}"
        rows.append(row(what, f"≤ {bar:g} s", f"{found:.3f} s", said))
    return table(rows)


def _filesystem(folder: Path) -> str:
    """Return the type of the file system that a folder lies on."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split(" ")
        if folder.resolve().is_relative_to(mount):
            best = max(best, (mount, kind), key=lambda found: len(found[0]))
    return best[1]


def _row(name: str, spread: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{spread[k]:.3f}" for k in ("median", "min", "max")) + " |"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _until_all_whole(arena: Arena, servers: int) -> None:
    until_whole(arena.members, servers, arena.replicas, chained=arena.placement == CHAIN)


def until_whole(
    members: Callable[[], Sequence[Process]], servers: int, replicas: int, *, chained: bool
) -> None:
    """Wait until each server holds its slots in a pod of its own and has all its replicas.

    And some more, until pushes flow again. `members`: returns those that run now.
    """
    deadline = time.monotonic() + RECOVERY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            views = [p.view()[1] for p in members() if p.role is Role.SERVER]
            guests = sum(len(v.own.guests) for v in views)
            there = (len(views), guests) == (servers, servers * replicas)
            if there and all(_whole(v, chained=chained) for v in views):
                time.sleep(SETTLE_SECONDS)
                return
        time.sleep(0.1)
    raise BenchError(f"not all servers were back within {RECOVERY_SECONDS:.0f} s")


def _whole(view: View, *, chained: bool) -> bool:
    """Whether a server serves, and all that live in its pod are replicas, of chains up to date."""
    guests = [view.others.get(guest.id) for guest in view.own.guests]
    return view.own.state == "Ready" and all(
        told is not None
        and told[1].state == "Replica"
        and (told[1].follows is not None or not chained)
        for told in guests
    )


def _kill_one(arena: Arena, servers: int, server: int) -> float:
    _until_all_whole(arena, servers)
    members = arena.members()
    victims = [p for p in members if (p.role, p.index) == (Role.SERVER, server)]
    workers = [p for p in members if p.role is Role.WORKER]
    if len(victims) != 1 or not workers:
        raise BenchError(f"server {server} or a worker does not run: {[p.id for p in members]}")
    views = [p.view()[1] for p in workers]
    epoch = max(v.own.epoch for v in views)
    killed = victims[0].kill()
    with ThreadPoolExecutor(len(workers)) as pool:
        waits = [
            pool.submit(_first_step, p, v.version, epoch, killed)
            for p, v in zip(workers, views, strict=True)
        ]
        return min(w.result() for w in waits) - killed


def _first_step(worker: Process, version: int, epoch: int, killed: float) -> float:
    """Return when this worker's first batch of a later epoch was acknowledged by all slots."""
    while time.monotonic() < killed + RECOVERY_SECONDS:
        at, view = worker.view(version, wait=5.0)
        version = view.version
        if view.own.acked_epoch > epoch and view.own.acked_age is not None:
            return at - view.own.acked_age
    raise BenchError(f"{worker.id} made no step within {RECOVERY_SECONDS:.0f} s after the kill")
