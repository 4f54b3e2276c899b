"""One run: a job of real processes, faults at their times, and what there was to see."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import START_SECONDS, BenchError
from daruma_trainer.bench.availability.arms import STORE, WORKERS, Arm, Fault, Scenario, manifest
from daruma_trainer.bench.availability.sampling import Sampler
from daruma_trainer.bench.availability.store import Bucket, bucket
from daruma_trainer.bench.availability.trace import Trace, read_traces, snapshots, utilisation
from daruma_trainer.bench.holding import hold, release
from daruma_trainer.bench.members import processes
from daruma_trainer.bench.recovery import HAND_BACK
from daruma_trainer.contract import Role

LOOK_SECONDS = 0.1
END_SECONDS = 60.0
RECORD = ("cause", "role", "indexes", "strategy", "rung", "placement", "reason", "seconds",
          "phases", "sources", "pushes", "rework", "outcome")  # fmt: skip
"""What is kept of a recovery's record."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long and how fine."""

    seconds: float
    """Of training, from both workers' first step."""
    updates: int
    """Between saves, or replications."""
    evaluate: int
    """Updates between evaluations."""
    points: int
    """Evaluations at most: above that, evenly chosen ones."""
    data: str = "digits"
    command: tuple[str, ...] = ("python", "-m", "daruma_trainer.bench.availability.worker")


@dataclass(frozen=True, slots=True)
class Outage:
    """Something was away; monotonic seconds."""

    fault: Fault
    begin: float
    end: float | None
    """None: it was replaced at once."""


@dataclass(slots=True)
class Seen:
    """What a run left."""

    began: float
    ended: float
    sampler: Sampler
    outages: list[Outage] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


Score = Callable[[Sequence[Path]], list[tuple[float, float]]]


def run(arm: Arm, scenario: Scenario, seed: int, size: Size, score: Score) -> dict[str, Any]:
    """Run one job; returns plain JSON values. BenchError: it could not be done, or failed."""
    with (
        tempfile.TemporaryDirectory(prefix="daruma-bench-") as name,
        contextlib.ExitStack() as kept,
    ):
        folder = Path(name)
        store = kept.enter_context(bucket()) if scenario.bucket else None
        notes = folder / "notes"
        notes.mkdir()
        # Worker 0 makes as many of the updates between evaluations as every other worker.
        command = [*size.command, str(notes), str(arm.steps(size.evaluate)),
                   "--data", size.data, "--seed", str(seed), "--steps", "100000000"]  # fmt: skip
        uri = store.uri if store else "file:///bench"
        made = manifest(arm, command, uri, size.updates)
        seen = _train(folder, made, scenario, size, store)
        found = {"arm": arm.name, "scenario": scenario.name, "seed": seed, "seconds": size.seconds}
        return found | summary(seen, notes, size.points, score)


def summary(seen: Seen, notes: Path, points: int, score: Score) -> dict[str, Any]:
    """Return what a run came to."""
    traces = read_traces(notes, WORKERS)
    began, ended = seen.began, seen.ended
    files = snapshots(notes, began, ended, points)
    at = np.array([t for t, _ in files] + [ended])
    applied = sum((t.applied(at) for t in traces), np.zeros(len(at)))
    computed = sum((t.computed(at) for t in traces), np.zeros(len(at)))
    scores = score([file for _, file in files])
    recoveries = [
        {k: r.get(k) for k in RECORD} for r in seen.report["recoveries"] if r["cause"] != HAND_BACK
    ]
    windows = _windows(seen, recoveries)
    length = sum(b - a for a, b in windows)
    away = sum(utilisation(traces, a, b) * (b - a) for a, b in windows)
    return {
        "curve": [
            [round(t - began, 3), int(n), round(accuracy, 5), round(loss, 5)]
            for t, n, (accuracy, loss) in zip(at, applied, scores, strict=False)
        ],
        "applied": int(applied[-1]),
        "computed": int(computed[-1]),
        "pushes": seen.report["pushes"],
        "utilisation": utilisation(traces, began, ended),
        "utilisation_outage": away / length if length else None,
        "utilisation_before": _before(traces, seen),
        "outages": [[round(a - began, 3), round(b - began, 3)] for a, b in windows],
        "aside": sum(t.aside() for t in traces) / (ended - began),
        "bytes": dict(seen.sampler.bytes),
        "memory": _memory(seen, windows),
        "kills": sum(o.fault.what != STORE for o in seen.outages),
        "recoveries": recoveries,
    }


def _before(traces: Sequence[Trace], seen: Seen) -> float | None:
    """The workers' utilisation until the first fault."""
    return utilisation(traces, seen.began, seen.outages[0].begin) if seen.outages else None


def _windows(seen: Seen, recoveries: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return from when to when something was away, the run's end at the latest.

    What was replaced at once was away until its recovery ended.
    """
    # A recovery that has not ended has no record.
    seconds = iter([float(r["seconds"] or 0.0) for r in recoveries])
    windows: list[tuple[float, float]] = []
    for outage in seen.outages:
        took = 0.0 if outage.fault.what == STORE else next(seconds, math.inf)
        end = outage.begin + took if outage.end is None else outage.end
        windows.append((outage.begin, min(end, seen.ended)))
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(windows):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return [(a, b) for a, b in joined if b > a]


def _memory(seen: Seen, windows: Sequence[tuple[float, float]]) -> dict[str, int | None]:
    """Return bytes: peaks of each role, and what outages added to workers that outlived them."""
    peak = {
        role: max((b for _, m, b in seen.sampler.memory if m.startswith(role)), default=0)
        for role in ("server", "worker")
    }
    added: list[int] = []
    highest: list[int] = []
    for member in {m for _, m, _ in seen.sampler.memory if m.startswith("worker")}:
        own = [(t, b) for t, m, b in seen.sampler.memory if m == member]
        for begin, end in windows:
            before = [b for t, b in own if seen.began <= t < begin]
            during = [b for t, b in own if begin <= t <= end]
            if before and during:
                # Moments of a step count in both, but a long outage has more of them to see.
                added.append(round(np.percentile(during, 95) - np.percentile(before, 95)))
                highest.append(max(during) - max(before))
    return {
        **peak, "added": max(added, default=None), "added_highest": max(highest, default=None)
    }  # fmt: skip


def _train(
    folder: Path, made: Mapping[str, Any], scenario: Scenario, size: Size, store: Bucket | None
) -> Seen:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    out = folder / "run"
    with _started(folder, made, environment | (store.environment if store else {})) as process:
        began = _until_trained(folder, process)
        seen = Seen(began, began + size.seconds, Sampler(out))
        _go_through(seen, scenario, store, process)
        # Once to interrupt, once more to kill: what the run saves at its end is not looked at.
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        process.wait(END_SECONDS)
    try:
        seen.report = json.loads((out / "report.json").read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"the run left no report: {error}") from error
    return seen


@contextlib.contextmanager
def _started(
    folder: Path, made: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "job.yaml").write_text(json.dumps(made))
    command = [sys.executable, "-m", "daruma_trainer.bench.holding", str(folder / "job.yaml")]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--out", str(folder / "run")],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=dict(environment),
        )
    try:
        yield process
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"the run did not end within {END_SECONDS:.0f} s") from error
    except BenchError as error:
        raise BenchError(f"{error}: {_last_words(folder)}") from error
    finally:
        process.kill()
        process.wait()


def _last_words(folder: Path) -> str:
    return " | ".join((folder / "output").read_text(errors="replace").splitlines()[-5:])


def _until_trained(folder: Path, process: subprocess.Popen[bytes]) -> float:
    """Return when the last of the workers had made its first step."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"`daruma run` ended with {process.returncode}")
        began = [t.began() for t in read_traces(folder / "notes", WORKERS)]
        found = [t for t in began if t is not None]
        if len(found) == WORKERS:
            return max(found)
        time.sleep(0.02)
    raise BenchError(f"the job did not train within {START_SECONDS:.0f} s")


def _go_through(
    seen: Seen, scenario: Scenario, store: Bucket | None, process: subprocess.Popen[bytes]
) -> None:
    """Do what the scenario says, and look on until the run's time is over."""
    length = seen.ended - seen.began
    todo: list[tuple[float, bool, Fault]] = []
    for fault in scenario.faults:
        todo.append((seen.began + fault.begin * length, True, fault))
        if fault.end is not None:
            todo.append((seen.began + fault.end * length, False, fault))
    todo.sort(key=lambda t: t[0], reverse=True)
    while (now := time.monotonic()) < seen.ended or todo:
        if process.poll() is not None:
            raise BenchError(f"the job ended after {now - seen.began:.1f} s")
        while todo and todo[-1][0] <= now:
            _, begins, fault = todo.pop()
            (_begin if begins else _end)(seen, fault, store)
        seen.sampler.look()
        due = min(todo[-1][0] if todo else seen.ended, now + LOOK_SECONDS)
        time.sleep(max(0.0, due - time.monotonic()))
    seen.sampler.scrape()


def _begin(seen: Seen, fault: Fault, store: Bucket | None) -> None:
    if fault.what == STORE and store is not None:
        store.away(True)
        seen.outages.append(Outage(fault, time.monotonic(), None))
        return
    role = Role(fault.what)
    out = seen.sampler.out
    victims = [p for p in processes(out) if (p.role, p.index) == (role, fault.index)]
    if not victims:
        raise BenchError(f"{role.value} {fault.index} did not run when it was to be killed")
    seen.sampler.scrape()
    if fault.end is not None:
        hold(out, role, fault.index)
    seen.outages.append(Outage(fault, victims[-1].kill(), None))


def _end(seen: Seen, fault: Fault, store: Bucket | None) -> None:
    if fault.what == STORE and store is not None:
        store.away(False)
    else:
        release(seen.sampler.out, Role(fault.what), fault.index)
    seen.outages = [
        Outage(fault, o.begin, time.monotonic()) if o.fault == fault else o for o in seen.outages
    ]
