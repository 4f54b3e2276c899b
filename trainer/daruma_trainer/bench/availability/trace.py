"""What workers noted of a run: who worked when, and how many gradients were applied."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STEP = np.dtype(
    [("begin", "<f8"), ("end", "<f8"), ("blocked", "<f8"), ("aside", "<f8"), ("batch", "<i8"),
     ("acked", "<i8")]
)  # fmt: skip
"""Times are monotonic seconds of the machine. A step is noted twice: `end` is NaN where it begins.

blocked: seconds that the program waited in `step`, since it began. aside: seconds that copies of
the parameters took. batch, acked: the worker's last batch, and its last that all slots have."""
TRACE = "worker-{}-{}.steps"
SNAPSHOT = "{:.6f}.f32"
Numbers = NDArray[np.float64]
Steps = NDArray[np.void]
"""(records,) of STEP."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One seat's steps, over all its incarnations."""

    lives: Sequence[Steps]
    """Oldest first."""

    def began(self) -> float | None:
        """Return when the first step ended; None: none did."""
        ends = [steps["end"][~np.isnan(steps["end"])] for steps in self.lives]
        return float(ends[0][0]) if ends and len(ends[0]) else None

    def busy(self, begin: float, end: float) -> float:
        """Return the seconds of an interval in which the worker was not blocked.

        From the end of a step to the point in the next from which it only waited. Before an
        incarnation's first step it is not busy: it starts.
        """
        total = 0.0
        for steps in self.lives:
            done = steps[~np.isnan(steps["end"])]
            if not len(done):
                continue
            waited = np.diff(done["blocked"], prepend=0.0)
            # What it waited before its first step, for its place, is no part of that step.
            waited[0] = min(waited[0], done["end"][0] - done["begin"][0])
            since = np.concatenate([[done["begin"][0]], done["end"][:-1]])
            until = done["end"] - waited
            if np.isnan(steps["end"][-1]):
                # Its last step never ended.
                since = np.append(since, done["end"][-1])
                until = np.append(until, steps["begin"][-1])
            total += float(np.maximum(np.minimum(until, end) - np.maximum(since, begin), 0).sum())
        return total

    def computed(self, times: Numbers) -> Numbers:
        """Return how many gradients it had handed to `step` by each time."""
        ends = np.concatenate([s["begin"][np.isnan(s["end"])] for s in self.lives] or [[]])
        return np.searchsorted(np.sort(ends), times, side="right").astype(np.float64)

    def applied(self, times: Numbers) -> Numbers:
        """Return how many of its gradients all slots had by each time.

        Those that were made again after a rollback count again.
        """
        done = [s[~np.isnan(s["end"])] for s in self.lives]
        ends = np.concatenate([s["end"] for s in done] or [[]])
        acked = np.concatenate([s["acked"] for s in done] or [[]])
        if not len(ends):
            return np.zeros(len(times))
        more = np.maximum(np.diff(acked, prepend=0), 0)
        total = np.concatenate([[0], np.cumsum(more)])
        return total[np.searchsorted(ends, times, side="right")].astype(np.float64)

    def aside(self) -> float:
        """Return the seconds that copying parameters took."""
        return sum(float(steps["aside"].max(initial=0.0)) for steps in self.lives)


def read_traces(folder: Path, workers: int) -> list[Trace]:
    """Return each worker's trace; a record that a kill cut short is left out."""
    traces = []
    for index in range(workers):
        files = sorted(
            folder.glob(TRACE.format(index, "*")), key=lambda f: int(f.stem.split("-")[2])
        )
        lives = []
        for file in files:
            data = file.read_bytes()
            lives.append(np.frombuffer(data[: len(data) // STEP.itemsize * STEP.itemsize], STEP))
        traces.append(Trace([steps for steps in lives if len(steps)]))
    return traces


def utilisation(traces: Sequence[Trace], begin: float, end: float) -> float:
    """Return the share of all workers' time in an interval that they were not blocked or away."""
    return sum(t.busy(begin, end) for t in traces) / (len(traces) * (end - begin))


def snapshots(folder: Path, begin: float, end: float, most: int) -> list[tuple[float, Path]]:
    """Return copies of the parameters with their times: at most so many, the last among them."""
    found = sorted((float(f.name.removesuffix(".f32")), f) for f in folder.glob("*.f32"))
    found = [(at, file) for at, file in found if begin <= at <= end]
    if len(found) <= most:
        return found
    chosen = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[i] for i in chosen]
