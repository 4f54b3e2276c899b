"""A worker of this benchmark: the public program, with what it does noted from outside.

    python -m daruma_trainer.bench.availability.worker FOLDER EVERY [arguments of fashion]

The program is not changed: torch calls hooks before and after each `optimizer.step()`. What they
note goes to FOLDER (`trace.STEP`); worker 0 also leaves a copy of its parameters, as pulled in that
step, every EVERY batches. What that takes is noted, too.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from daruma_trainer.bench.availability.trace import SNAPSHOT, STEP, TRACE
from daruma_trainer.contract import ENV_INCARNATION, ENV_INDEX
from daruma_trainer.programs import fashion


class Tracer:
    """Notes when steps begin and end, on the machine's monotonic clock."""

    def __init__(self, folder: Path, index: int, incarnation: int, every: int) -> None:
        self._folder = folder
        self._every = every if index == 0 else 0
        self._file = (folder / TRACE.format(index, incarnation)).open("wb", buffering=0)
        self._record = np.zeros(1, STEP)
        self._steps = 0

    def before(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """A hook: `step` begins."""
        self._record["begin"] = time.monotonic()
        self._record["end"] = np.nan
        self._file.write(self._record.tobytes())

    def after(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """A hook: `step` is over."""
        record, client = self._record, optimizer._job._client
        now = time.monotonic()
        record["end"], record["blocked"] = now, client.blocked_seconds
        record["batch"], record["acked"] = client.batch, client.pushes.acked
        self._file.write(record.tobytes())
        if self._every and self._steps % self._every == 0:
            self._copy(optimizer, now)
            record["aside"] += time.monotonic() - now
        self._steps += 1

    def _copy(self, optimizer: Optimizer, now: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            flat = torch.cat([p.reshape(-1) for p in parameters])
        file = self._folder / SNAPSHOT.format(now)
        # The run may be killed while it is written.
        flat.numpy().tofile(file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)


def main(arguments: Sequence[str]) -> int:
    """Train as one worker of a job."""
    tracer = Tracer(
        Path(arguments[0]),
        int(os.environ[ENV_INDEX]),
        int(os.environ[ENV_INCARNATION]),
        int(arguments[1]),
    )
    register_optimizer_step_pre_hook(tracer.before)
    register_optimizer_step_post_hook(tracer.after)
    return fashion.main(arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
