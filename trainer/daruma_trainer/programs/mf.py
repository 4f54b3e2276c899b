"""Matrix factorisation by alternating least squares, as in SCAR's evaluation.

    python -m daruma_trainer.programs.mf --data synthetic:300,200,5,12000 --iterations 20

Ratings are users · items. An iteration has two phases: every worker solves the users that are its
own with the items as they are, then its own items with the users (Zhou et al. 2008, with weighted
regularisation). Nothing is kept from one phase to the next but the two tables, so a worker's
position is its phase. Reports the root mean square error: `train_rmse`, `test_rmse`.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.programs.common import parser_of, read_or_exit
from daruma_trainer.programs.data import Ratings, ratings


@dataclass(frozen=True, slots=True)
class Part:
    """The ratings of some rows of one side, row by row."""

    rows: Ints
    """(n,): which rows have ratings."""
    starts: Ints
    """(n + 1,): where each row's ratings begin."""
    others: Ints
    """The row of the other side that each rating is of."""
    values: Floats


def part_of(rows: Ints, others: Ints, values: Floats, worker: int, workers: int) -> Part:
    """Gather the ratings of a worker's rows: every `workers`-th one."""
    mine = np.flatnonzero(rows % workers == worker)
    mine = mine[np.argsort(rows[mine], kind="stable")]
    found, starts = np.unique(rows[mine], return_index=True)
    return Part(found, np.append(starts, len(mine)), others[mine], values[mine])


def solve(part: Part, other: Floats, regularisation: float) -> Floats:
    """Return the factors of a part's rows that are best for the other side as it is.

    Row r minimises Σ (value − factor · other)² + regularisation · n_r · |factor|².
    """
    rank = other.shape[1]
    left = np.empty((len(part.rows), rank, rank))
    right = np.empty((len(part.rows), rank))
    wide = other.astype(np.float64)
    for i, (a, b) in enumerate(zip(part.starts[:-1], part.starts[1:], strict=True)):
        against = wide[part.others[a:b]]
        left[i] = against.T @ against
        left[i].flat[:: rank + 1] += regularisation * (b - a)
        right[i] = part.values[a:b] @ against
    return np.linalg.solve(left, right[..., None])[..., 0].astype(np.float32)


def rmse(data: Ratings, users: Floats, items: Floats, mean: float) -> float:
    """Return the root mean square error of all ratings; `mean` is added to every product."""
    guess = np.einsum("nk,nk->n", users[data.users], items[data.items]) + mean
    return float(np.sqrt(np.mean((data.values - guess) ** 2))) if len(data) else 0.0


def main() -> int:
    """Train as one worker of a job."""
    parser = parser_of(
        __doc__, "synthetic:300,200,5,12000", "synthetic:USERS,ITEMS,RANK,RATINGS or a path"
    )
    parser.add_argument("--iterations", type=int, default=20, help="two phases each")
    parser.add_argument("--rank", type=int, default=5)
    parser.add_argument("--regularisation", type=float, default=0.02)
    options = parser.parse_args()
    train, test = read_or_exit("mf", lambda: ratings(options.data, options.seed))
    mean = float(train.values.mean())
    start = np.random.default_rng(options.seed).normal(size=(train.shape[1], options.rank))
    with daruma.join() as job:
        users = job.table("users", (train.shape[0], options.rank), "assign")
        items = job.table("items", (train.shape[1], options.rank), "assign", initial=start)
        who, centred = (job.index, job.workers), train.values - np.float32(mean)
        parts = (
            part_of(train.users, train.items, centred, *who),
            part_of(train.items, train.users, centred, *who),
        )

        def score() -> dict[str, float]:
            state = (users.values(), items.values(), mean)
            return {"train_rmse": rmse(train, *state), "test_rmse": rmse(test, *state)}

        job.evaluate(score)
        for phase in job.phases(2 * options.iterations):
            ours, fixed = (users, items) if phase % 2 == 0 else (items, users)
            part = parts[phase % 2]
            solved = solve(part, fixed.values(), options.regularisation)
            time.sleep(options.think_ms / 1000)
            ours.push(part.rows, solved)
            if job.index == 0:
                job.report(loss=score()["train_rmse"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
