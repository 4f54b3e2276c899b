"""What an outage adds to a worker's memory, however long it lasts.

    daruma bench memory [--quick] [--json FILE] [--write FILE]

A job under `daruma run`: two servers, two workers, one table, Async, no checkpoints. The table is
so large that nothing else in a worker counts. A worker pushes a gradient (of the whole table, or of
every tenth row from a place that moves), pulls, and sleeps 20 ms. One server is killed and its
replacement held away, for 5, 20 and 60 s, one outage after the other in one run: what an earlier
one left behind counts against the later ones.

*Before* is a worker's highest resident memory in the 10 s before the first outage, *during* its
highest from a kill until 5 s after all that it kept is replayed; both are the kernel's own peaks
(VmHWM, set back before each), so nothing is missed. *Added* is their difference, in models, of the
worker where it is larger: a model is the table's parameters, without moments.

The bar is 1.1 models and as many more as pushes may be uncovered (`maxUncovered`, 2), whatever
`copies` is: so it was set. With `copies: 1` nothing waits to be covered, and a worker keeps a push
only until its slots have applied it; the two models are slack there, that nothing in the design
asks for. The sum that is kept for the lost server is half a model here; the rest is pushes to the
other one, of which a worker that runs ahead has more under way, and memory that was freed but stays
with the process. *Without slack* is the same number beside 1.1 alone. With `copies: 2` pushes that
wait are kept, before the outage as during it; and it is hardly one: a replica serves in the lost
server's place until that has its own pod, to which the slots return before the next outage begins.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import START_SECONDS, BenchError
from daruma_trainer.bench.bars import ADDED, LEAN, judge
from daruma_trainer.bench.cli import Result, conclude, machine, method, parser_of, today
from daruma_trainer.bench.holding import hold, release
from daruma_trainer.bench.local import HELD_RUN, LocalRun
from daruma_trainer.bench.members import Process
from daruma_trainer.bench.pushing import COLS
from daruma_trainer.bench.recovery import until_whole
from daruma_trainer.contract import Role

SHARE = 10
"""One row in so many is in a gradient of single rows."""
THINK_SECONDS = 0.02
LOST = 1
"""Index of the server that is killed."""
SERVERS, WORKERS = 2, 2
STEPS = 10
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: bench-memory}}
spec:
  program:
    image: none
    command: [python, -m, daruma_trainer.bench.pushing]
    args: ["{rows}", "{think}", "{rule}", "{share}"]
  servers: {{replicas: {servers}}}
  workers: {{replicas: {workers}}}
  checkpoint: {{every: 0}}
  recovery: {{strategy: {strategy}, copies: {copies}, replay: {{maxPending: 65535}}}}
  runPolicy: {{backoffLimit: 100}}
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One job."""

    strategy: str
    rule: str
    gradients: str = "dense"
    """Or "rows"."""
    copies: int = 1


CELLS = (
    Cell("Stateless", "sgd"),
    Cell("Stateless", "adam"),
    Cell("Stateless", "adam", "rows"),
    Cell("Freshest", "sgd"),
    Cell("Freshest", "momentum"),
    Cell("Freshest", "adam", "rows"),
    Cell("Freshest", "sgd", copies=2),
    Cell("Freshest", "momentum", copies=2),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    cells: tuple[Cell, ...]
    mb: int
    """Megabytes of the table."""
    outages: tuple[float, ...]
    """Seconds, in this order."""
    before: float
    """Seconds in which the memory is taken that the outages add to."""
    after: float
    """Seconds after the replay that count, too."""

    @classmethod
    def of(cls, *, quick: bool) -> "Plan":
        """Return the quick one or the whole."""
        if quick:
            return cls(CELLS[:1], 20, (2.0, 5.0), 3.0, 1.0)
        return cls(CELLS, 100, (5.0, 20.0, 60.0), 10.0, 5.0)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    options = parser_of("memory", __doc__, "one cell, a small table, short").parse_args(arguments)
    return conclude(options, lambda: measure(Plan.of(quick=options.quick)), page)


def measure(plan: Plan) -> Result:
    """Take all measurements. BenchError: a job does not run, or does not recover."""
    return {
        "benchmark": "memory",
        "machine": f"{machine()}, numpy {np.__version__}",
        "date": today(),
        "mb": plan.mb,
        "outages": plan.outages,
        "rows": [{**asdict(cell), **_run(cell, plan)} for cell in plan.cells],
        "load": round(os.getloadavg()[0], 1),
    }


def page(result: Result) -> str:
    """Return the result as a page in Markdown."""
    outages = [f"{seconds:g} s" for seconds in result["outages"]]
    head = ["strategy", "copies", "rule", "gradients", "before, MB",
            *(f"added, {o}" for o in outages),
            *(f"batches, {o}" for o in outages), f"≤ {ADDED:g}",
            f"without slack: ≤ {LEAN:g}"]  # fmt: skip
    lines = [
        "# What an outage adds to a worker's memory",
        "",
        "Made by `daruma bench memory --write`; edit the benchmark, not this page.",
        "",
        f"A table of {result['mb']} MB, {result['date']}, {result['machine']}; load average at the "
        f"end {result['load']}. *Added* is in models; *batches* is how many the worker that made "
        "most of them made in the outage.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in result["rows"]:
        lean = _met(row, LEAN) if row["copies"] == 1 else "–"
        cells = [
            row["strategy"], str(row["copies"]), row["rule"], row["gradients"],
            f"{row['before'] / 1e6:.0f}",
            *(f"{added:.2f}" for added in row["added"]),
            *(str(batches) for batches in row["batches"]), _met(row, ADDED), lean,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## How it is measured", "", method(__doc__), ""])


def _met(row: Mapping[str, Any], bar: float) -> str:
    slack = bar - max(row["added"])
    return f"{judge(slack, 0.0)}, by {abs(slack):.2f}"


def _run(cell: Cell, plan: Plan) -> dict[str, Any]:
    model = plan.mb * 1_000_000
    manifest = MANIFEST.format(
        strategy=cell.strategy, copies=cell.copies, rule=cell.rule,
        servers=SERVERS, workers=WORKERS, rows=model // (4 * COLS),
        think=THINK_SECONDS, share=SHARE if cell.gradients == "rows" else 1,
    )  # fmt: skip
    run = LocalRun(manifest, WORKERS, STEPS, HELD_RUN)
    replicas = cell.copies - 1
    with run.running():
        until_whole(run.members, SERVERS, replicas, chained=False)
        workers = [p for p in run.members() if p.role is Role.WORKER]
        _set_back(workers)
        time.sleep(plan.before)
        before = [_peak(worker) for worker in workers]
        added, batches = [], []
        for seconds in plan.outages:
            _set_back(workers)
            batches.append(_outage(run, workers, seconds))
            until_whole(run.members, SERVERS, replicas, chained=False)
            time.sleep(plan.after)
            during = [_peak(worker) for worker in workers]
            added.append(max(d - b for d, b in zip(during, before, strict=True)) / model)
    return {"before": max(before), "added": added, "batches": batches}


def _outage(run: LocalRun, workers: Sequence[Process], seconds: float) -> int:
    """Go through one; returns how many batches a worker made until all was replayed, at most."""
    (victim,) = [p for p in run.members() if (p.role, p.index) == (Role.SERVER, LOST)]
    before = [worker.view()[1] for worker in workers]
    epoch = max(view.own.epoch for view in before)
    hold(run.out, Role.SERVER, LOST)
    victim.kill()
    time.sleep(seconds)
    release(run.out, Role.SERVER, LOST)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        after = [worker.view()[1] for worker in workers]
        # A batch that was first sent after the recovery is acknowledged by all: so is the replay.
        if all(view.own.acked_epoch > epoch for view in after):
            return max(a.own.step - b.own.step for a, b in zip(after, before, strict=True))
        time.sleep(0.1)
    raise BenchError(f"the job did not recover within {START_SECONDS:.0f} s")


def _set_back(workers: Sequence[Process]) -> None:
    """Let the kernel's peaks begin anew (proc(5): clear_refs)."""
    for worker in workers:
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5")


def _peak(worker: Process) -> int:
    """Return the highest resident bytes since."""
    try:
        status = Path(f"/proc/{worker.pid}/status").read_text()
    except OSError as error:
        raise BenchError(f"{worker.id} has ended: {error}") from error
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise BenchError(f"{worker.id}: the kernel tells no peak of its memory")
    return int(found[1]) * 1024
