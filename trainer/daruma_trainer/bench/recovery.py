"""How long a job stands still when a parameter server is killed.

    daruma bench recovery [--quick] [--json FILE] [--write docs/benchmarks/recovery.md]

A job of 4 servers and 2 workers (multinomial logistic regression on scikit-learn's digits, Async,
strategy Freshest) runs under `daruma run`. One server after the other gets SIGKILL from this
process, which notes its own monotonic clock just before (t0). All workers' agents are long-polled;
a worker reports the newest epoch E such that a batch *first sent after E was seen* has been applied
by all slots, and how long ago the first such acknowledgement came. The first report with an epoch
above the one before the kill gives t1 = arrival of the report − that age. Nothing is acknowledged
by all slots before the lost ones are restored, so t1 − t0 is the time from the kill to the first
new step; the age takes out what the report's way to here adds, but for its transfer (< 1 ms).

The phases are the operator's own, from report.json: detect, replace, restore, resume. It has no
clock of the kill, so its detect begins when a member first saw the connection break; `unseen` is
what the sum of its phases lacks to t1 − t0. Members write bytecode, as an installed package has it:
PYTHONDONTWRITEBYTECODE is taken out of their environment.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daruma_trainer.bench.members import Process, processes
from daruma_trainer.contract import ExitCode, Role

SERVERS, WORKERS = 4, 2
START_SECONDS = 60.0
RECOVERY_SECONDS = 60.0
SETTLE_SECONDS = 1.0
"""Between recoveries: long enough for the record to be closed and the pushes to flow again."""
PHASES = ("detect", "replace", "restore", "resume")

MANIFEST = f"""\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {{name: bench-recovery}}
spec:
  program:
    image: none
    command: [python, -m, daruma_trainer.programs.mlr]
    args: [--steps, "1000000", --think-ms, "5"]
  servers: {{replicas: {SERVERS}}}
  workers: {{replicas: {WORKERS}}}
  checkpoint: {{store: "file:///bench", every: 96, fraction: 0.125}}
  recovery: {{strategy: Freshest}}
  runPolicy: {{backoffLimit: 100}}
"""
JOB = "bench-recovery"


class BenchError(Exception):
    """The measurement cannot be made; the message says why."""


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
    parser = argparse.ArgumentParser(
        prog="daruma bench recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="3 kills instead of 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page of it there")
    options = parser.parse_args(arguments)
    try:
        samples = measure(3 if options.quick else 10)
    except BenchError as error:
        print(f"daruma bench: {error}", file=sys.stderr)
        return ExitCode.FAILED
    result = summary(samples)
    print(page(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(page(result))
    return ExitCode.OK


def measure(kills: int) -> list[Sample]:
    """Kill servers one after the other. BenchError: the job did not start or did not go on."""
    with tempfile.TemporaryDirectory(prefix="daruma-bench-") as folder:
        out = Path(folder) / "run"
        with _running(Path(folder), out) as run:
            _until_trained(run)
            times = [_kill_one(run, n % SERVERS) for n in range(kills)]
        records = json.loads((out / "report.json").read_text())["recoveries"]
    if len(records) != kills:
        raise BenchError(f"{kills} servers were killed, but {len(records)} recoveries recorded")
    return [
        Sample(n % SERVERS, seconds, {p: float(record["phases"].get(p) or 0.0) for p in PHASES})
        for n, (seconds, record) in enumerate(zip(times, records, strict=True))
    ]


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the samples with their median and spread, and what machine it was."""
    seconds = [s.seconds for s in samples]
    return {
        "benchmark": "recovery",
        "where": "daruma run",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}",
        "store": _filesystem(Path(tempfile.gettempdir())),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "kills": len(samples),
        "seconds": _spread(seconds),
        "phases": {p: _spread([s.phases[p] for s in samples]) for p in PHASES},
        "unseen": _spread([s.unseen for s in samples]),
        "samples": [s.to_json() for s in samples],
    }


def page(result: dict[str, Any]) -> str:
    """Return the result as a page in Markdown."""
    how = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    lines = [
        "# Time to recover",
        "",
        "Made by `daruma bench recovery --write`; edit the benchmark, not this page.",
        "",
        f"{result['kills']} kills of a server's process under `{result['where']}`, "
        f"{result['date']}, {result['machine']}; store on {result['store']} "
        f"(TMPDIR); load average at the end {result['load']} "
        "(what is more than the members themselves was other work on the machine).",
        "",
        "| seconds | median | min | max |",
        "|---|---|---|---|",
        _row("**kill → first new step**", result["seconds"]),
        *(_row(p, result["phases"][p]) for p in PHASES),
        _row("unseen", result["unseen"]),
        "",
        "## How it is measured",
        "",
        how.strip(),
        "",
    ]
    return "\n".join(lines)


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


@contextlib.contextmanager
def _running(folder: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    manifest = folder / "job.yaml"
    manifest.write_text(MANIFEST)
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", str(manifest)]
    with (folder / "output").open("wb") as output:
        run = subprocess.Popen(
            [*command, "--out", str(out)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        )
    try:
        yield run
        run.send_signal(signal.SIGINT)
        run.wait(60.0)
    except subprocess.TimeoutExpired as error:
        raise BenchError("`daruma run` did not end after SIGINT") from error
    except BenchError as error:
        raise BenchError(f"{error}\n{(folder / 'output').read_text()[-2000:]}") from error
    finally:
        run.kill()
        run.wait()


def _until_trained(run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if run.poll() is not None:
            raise BenchError(f"`daruma run` ended with {run.returncode}")
        workers = [p for p in processes(JOB, run.pid) if p.role is Role.WORKER]
        with contextlib.suppress(OSError, http.client.HTTPException):
            if len(workers) == WORKERS and all(p.view()[1].own.step > 100 for p in workers):
                return
        time.sleep(0.1)
    raise BenchError(f"the job did not train within {START_SECONDS:.0f} s")


def _kill_one(run: subprocess.Popen[bytes], server: int) -> float:
    time.sleep(SETTLE_SECONDS)
    members = processes(JOB, run.pid)
    victims = [p for p in members if (p.role, p.index) == (Role.SERVER, server)]
    workers = [p for p in members if p.role is Role.WORKER]
    if len(victims) != 1 or len(workers) != WORKERS:
        raise BenchError(f"server {server} or a worker does not run: {[p.id for p in members]}")
    views = [p.view()[1] for p in workers]
    epoch = max(v.own.epoch for v in views)
    killed = victims[0].kill()
    with ThreadPoolExecutor(len(workers)) as pool:
        waits = [
            pool.submit(_first_step, p, v.version, epoch, killed)
            for p, v in zip(workers, views, strict=True)
        ]
        done, _ = wait(waits, return_when=FIRST_COMPLETED)
        first = min(w.result() for w in done)
        return min([first, *(w.result() for w in waits)]) - killed


def _first_step(worker: Process, version: int, epoch: int, killed: float) -> float:
    """Return when this worker's first batch of a later epoch was acknowledged by all slots."""
    while time.monotonic() < killed + RECOVERY_SECONDS:
        at, view = worker.view(version, wait=5.0)
        version = view.version
        if view.own.acked_epoch > epoch and view.own.acked_age is not None:
            return at - view.own.acked_age
    raise BenchError(f"{worker.id} made no step within {RECOVERY_SECONDS:.0f} s after the kill")
