"""A program whose batches leave marks, and whose gradients depend on what was pulled.

    python copies_program.py RULE ROWS STEPS GATE

`RULE`: momentum or adam; `ROWS`: how many rows of its marks a batch is about, of all 16.
`GATE`: a file; until it is there nobody goes on after the fifth batch.
"""

import sys
import time
from pathlib import Path

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.layout import Ints
from daruma_trainer.rules import Rule

WORKERS, TABLE = 2, 16
RULES: dict[str, Rule] = {"momentum": daruma.SGD(momentum=0.9), "adam": daruma.Adam()}


def rows_of(worker: int, batch: int, rows: int) -> Ints:
    """Which rows have the mark of a batch."""
    return np.sort(np.random.default_rng((worker, batch)).choice(TABLE, rows, replace=False))


def main(rule: str, rows: int, steps: int, gate: Path) -> None:
    """Train."""
    base = np.arange(TABLE * 4, dtype=np.float32).reshape(TABLE, 4)
    with daruma.join() as job:
        marks = job.table("marks", (TABLE, WORKERS * steps))
        weights = job.table("weights", (TABLE, 4), rule=RULES[rule], initial=np.cos(base))
        while job.batch < steps:
            batch = job.batch + 1
            while batch > 5 and not gate.exists():
                time.sleep(0.01)
            values = weights.values()
            # All of it matters to all of it: values of two steps would be seen.
            gradient = np.sin(base + batch + job.index / 3) + 0.1 * values + 0.01 * values.sum()
            mine = rows_of(job.index, batch, rows)
            mark = np.zeros((rows, WORKERS * steps), np.float32)
            mark[:, job.index * steps + batch - 1] = 1.0
            job.push(
                marks.change(None if rows == TABLE else mine, mark),
                weights.change(None, gradient, lr=0.01),
            )
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
