"""The servers' update rules on many arms at once.

`daruma_trainer.rules` applies one step counter to one flat array. After a recovery the blocks of
an arm have counters of their own, and there are a hundred arms: here the counter is an array. A
test holds these against the real kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from daruma_trainer.bench.rework.problems import Table, Values
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import SGD, Adam, Add, Assign


@dataclass(slots=True)
class Arms:
    """Everything that servers hold, for many arms: parameters, optimizer state, step counters."""

    values: Values
    moments: list[tuple[Floats, ...]]
    """For each table the optimizer's arrays, each (arms, rows, cols)."""
    steps: list[Ints]
    """For each table (arms, rows): the updates that each row's block had."""

    def take(self, keep: Ints) -> "Arms":
        """Return some of the arms."""
        return Arms(
            [v[keep] for v in self.values],
            [tuple(m[keep] for m in state) for state in self.moments],
            [s[keep] for s in self.steps],
        )


def join(parts: list[Arms]) -> Arms:
    """Put arms after one another."""
    tables = range(len(parts[0].values))
    return Arms(
        [np.concatenate([p.values[t] for p in parts]) for t in tables],
        [
            tuple(np.concatenate(same) for same in zip(*(p.moments[t] for p in parts), strict=True))
            for t in tables
        ],
        [np.concatenate([p.steps[t] for p in parts]) for t in tables],
    )


def apply(arms: Arms, pushes: Values, tables: tuple[Table, ...], lr: float) -> None:
    """Change all arms by one push of whole tables, as servers with a single worker's step would.

    What follows the tables is derived of them, and comes with the push.
    """
    for t, table in enumerate(tables):
        arms.steps[t] += 1
        kernel = _KERNELS.get(type(table.rule))
        if kernel is None:
            raise TypeError(f"no kernel for rule {table.rule.name}")
        kernel(table.rule, arms, t, pushes[t], lr)
    arms.values[len(tables) :] = pushes[len(tables) :]


def _sgd(rule: SGD, arms: Arms, t: int, push: Floats, lr: float) -> None:
    if rule.momentum or rule.weight_decay:
        raise TypeError("only plain SGD is computed for many arms")
    arms.values[t] -= push * np.float32(lr)


def _adam(rule: Adam, arms: Arms, t: int, push: Floats, lr: float) -> None:
    if rule.weight_decay:
        raise TypeError("Adam is computed for many arms without weight decay only")
    m, v = arms.moments[t]
    steps = arms.steps[t][:, :, None]
    size = (lr / (1 - rule.beta1**steps)).astype(np.float32)
    root = (1 / np.sqrt(1 - rule.beta2**steps)).astype(np.float32)
    m += (push - m) * np.float32(1 - rule.beta1)
    v *= np.float32(rule.beta2)
    v += push * push * np.float32(1 - rule.beta2)
    arms.values[t] -= m / (np.sqrt(v) * root + np.float32(rule.eps)) * size


def _assign(_rule: Assign, arms: Arms, t: int, push: Floats, _lr: float) -> None:
    arms.values[t] = push


def _add(_rule: Add, arms: Arms, t: int, push: Floats, _lr: float) -> None:
    arms.values[t] += push


_KERNELS: dict[type, Callable[..., None]] = {SGD: _sgd, Adam: _adam, Assign: _assign, Add: _add}
