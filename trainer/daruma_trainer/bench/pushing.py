"""A worker that computes nothing: it pushes a gradient, pulls, and sleeps, until it is stopped.

    python -m daruma_trainer.bench.pushing ROWS THINK RULE [SHARE]

For benchmarks of what the rest costs. One table of so many rows; `THINK`: seconds of sleep; `RULE`:
one of RULES; `SHARE`: a gradient has one row in so many, from a place that moves (1: all of them,
in one array).
"""

import sys
import time
from typing import Any

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.rules import SGD, Adam, Rule

COLS = 256
RULES: dict[str, Rule] = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam()}


def main(rows: int, think: float, rule: str, share: int = 1) -> None:
    """Push until the job is stopped."""
    gradient: Any = np.random.default_rng(0).random((rows // share, COLS), np.float32)
    with daruma.join() as job:
        table = job.table("t", (rows, COLS), rule=RULES[rule])
        while job.stopped is None:
            at = None if share == 1 else np.arange(len(gradient)) * share + job.batch % share
            table.push(at, gradient, lr=1e-6)
            time.sleep(think)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
