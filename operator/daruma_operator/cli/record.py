"""What a run leaves behind: samples while it goes on, `report.json` at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import Phase, Pushes
from daruma_trainer.contract import Report

MOST_SAMPLES = 2000
"""Above this every second sample is dropped, so a run of any length has a bounded report."""


@dataclass(slots=True)
class Recorder:
    """Keeps what views said. `seconds` are since the run began."""

    loss: list[tuple[int, float, float | None]] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    step: int = 0
    _batches: dict[str, int] = field(default_factory=dict)
    """The last acknowledged batch by worker index; numbers go on across incarnations."""
    _duplicates: dict[str, int] = field(default_factory=dict)
    """By server incarnation: a new one counts from 0."""
    _recoveries: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _every: int = 1
    _seen: int = 0

    def note(self, job: TrainingJob, reports: Mapping[str, Report], seconds: float) -> None:
        """Take in one look at the job; `reports` by member id."""
        progress = job.status.progress
        if progress is not None and progress.step > self.step:
            self.step = progress.step
            loss = mean_loss(reports)
            if loss is not None:
                self._sample(loss, seconds)
        for member in sorted(reports, reverse=True):
            report = reports[member]
            seat = member.rpartition("-")[0]
            if member.startswith("worker-"):
                # Sorted backwards, so that worker 0, which evaluates, has the last word.
                self.metrics.update({k: _number(v) for k, v in report.metrics.items()})
                self._batches[seat] = max(self._batches.get(seat, 0), report.step)
            else:
                self._duplicates[member] = max(self._duplicates.get(member, 0), report.duplicate)
        for record in job.status.recoveries:
            self._recoveries[record.id] = record.model_dump(mode="json", by_alias=True)

    def report(self, job: TrainingJob, seconds: float, *, interrupted: bool) -> dict[str, Any]:
        """Return `report.json`'s content (docs/guides/run.md describes it)."""
        status = (interrupted_job(job, self.step) if interrupted else job).status
        recoveries = [self._recoveries[i] for i in sorted(self._recoveries)]
        return {
            "job": f"{job.namespace}/{job.name}",
            "phase": str(status.phase),
            "reason": status.reason,
            "message": status.message,
            "interrupted": interrupted,
            "steps": self.step,
            "loss": [list(sample) for sample in self.loss],
            "metrics": dict(self.metrics),
            "recoveries": recoveries,
            "seconds": round(seconds, 3),
            "pushes": self._pushes(status.pushes),
            "result": (
                None
                if status.result is None
                else status.result.model_dump(mode="json", by_alias=True)
            ),
        }

    def _pushes(self, counted: Pushes) -> dict[str, int]:
        """Every batch of every worker was applied, lost or skipped."""
        missing = counted.lost + counted.skipped
        return {
            "applied": max(0, sum(self._batches.values()) - missing),
            **counted.model_dump(mode="json", by_alias=True),
            "duplicate": sum(self._duplicates.values()),
        }

    def _sample(self, loss: float, seconds: float) -> None:
        self._seen += 1
        if self._seen % self._every:
            return
        self.loss.append((self.step, round(seconds, 3), _number(loss)))
        if len(self.loss) > MOST_SAMPLES:
            del self.loss[::2]
            self._every *= 2


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if isfinite(value) else None


def interrupted_job(job: TrainingJob, step: int) -> TrainingJob:
    """Return a job as Ctrl-C leaves it.

    Its workers were told to end, so that they did so well is no success; where it failed meanwhile,
    that is what became of it.
    """
    status = job.status
    if status.phase is Phase.FAILED:
        return job
    total = None if status.progress is None else status.progress.total_steps
    text = f"interrupted at step {step}" + (f" of {total}" if total else "")
    if status.result is not None:
        text += f"; spec.checkpoint.restoreFrom: {status.result.uri} goes on from there"
    elif status.initialised:
        text += "; no result was saved"
    update = {"phase": Phase.FAILED, "reason": "Interrupted", "message": text}
    return job.model_copy(update={"status": status.model_copy(update=update)})


def mean_loss(reports: Mapping[str, Report]) -> float | None:
    """Return the mean of what the workers reported last, or None if none did."""
    losses = [r.loss for r in reports.values() if r.loss is not None]
    return sum(losses) / len(losses) if losses else None
