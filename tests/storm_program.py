"""The program of the storm: each batch leaves a digit in every row, so that one that was done twice
is seen, and one that is missing: `python storm_program.py STEPS THINK_MS CALM SUM`.

Where SUM is `add` it trains a regression, too, which tells whether what recoveries brought back is
what training had reached. (Blocks of `Partial` come from saves of their own: of a batch's two
tables it may lose one, and digits alone would not tell which batches are lost.)
"""

import sys
import time
from pathlib import Path

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import Rule
from daruma_trainer.worker.job import Job

ROWS = 512
PER_FLOAT = 12
"""Digits of base 4 that a float32 keeps exactly."""


COLUMNS = 4


def truth() -> Floats:
    """What the regression is to find from zero; (ROWS, COLUMNS), each 1 or -1."""
    return np.random.default_rng(0).choice((-1.0, 1.0), (ROWS, COLUMNS)).astype(np.float32)


def rate(steps: int) -> float:
    """Of the regression: so small that what a storm's end undoes is not made good after it."""
    return 10 / steps


def width(steps: int) -> int:
    """How many columns a worker's digits take."""
    return -(-steps // PER_FLOAT)


def digit(worker: int, batch: int, steps: int) -> tuple[int, float]:
    """Where a batch, counted from 0, leaves its digit: the column, and what is added there."""
    return worker * width(steps) + batch // PER_FLOAT, 4.0 ** (batch % PER_FLOAT)


def digits_of(values: Floats, workers: int, steps: int) -> Ints:
    """Read a table: how often each row has each batch; shape (rows, workers, steps)."""
    whole = values.reshape(ROWS, workers, width(steps), 1).astype(np.int64)
    digits = whole // 4 ** np.arange(PER_FLOAT) % 4
    return digits.reshape(ROWS, workers, -1)[:, :, :steps]


def part(job: Job, rows: Ints, steps: int) -> Floats:
    """What this worker's batches so far have added to these rows."""
    made = np.zeros(job.workers * width(steps), np.float32)
    for batch in range(job.batch):
        column, value = digit(job.index, batch, steps)
        made[column] += value
    return np.tile(made, (len(rows), 1))


def last_batch(calm: Path) -> int | None:
    """Where all workers are to end, once the storm is over."""
    return int(calm.read_text()) if calm.exists() else None


def main(steps: int, think_ms: float, calm: Path, kind: str) -> None:
    """Train until the storm is over, and then to the batch that `calm` says, at most `steps`.

    `kind`: `add`; `rebuilt`, a sum that is made again; `sgd`, the same as gradients: their mean.
    """
    with daruma.join() as job:
        rule: str | Rule = daruma.SGD() if kind == "sgd" else "add"
        table = job.table("digits", (ROWS, job.workers * width(steps)), rule)
        if kind == "rebuilt":
            table.on_restored(lambda rows: part(job, rows, steps))
        # Least squares with orthonormal inputs: each push takes the same share off the error.
        regression = kind == "add"
        if regression:
            weights, wanted = job.table("weights", (ROWS, COLUMNS), daruma.SGD()), truth()
        scale = -float(job.workers) if kind == "sgd" else 1.0
        for _ in job.batches((np.arange(8),), 1, steps=steps):
            last = last_batch(calm)
            if last is not None and job.batch >= last:
                break
            if last is None:
                # Slower and slower: the last batch is not to come before the storm's end.
                time.sleep(think_ms / 1000 * steps / (steps - job.batch))
            mark = np.zeros((ROWS, job.workers * width(steps)), np.float32)
            column, value = digit(job.index, job.batch, steps)
            mark[:, column] = scale * value
            changes = [table.change(None, mark, lr=1.0)]
            if regression:
                gradient = weights.values() - wanted
                changes.append(weights.change(None, gradient, lr=rate(steps)))
            job.push(*changes)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
