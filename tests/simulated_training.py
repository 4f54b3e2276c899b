"""What a simulated job trains: each batch leaves a mark of its own, and gradients.

So of each slot it can be said what it should be, from what it says it has.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.applied import holes
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.rules import SGD, Add, rule_to_json
from daruma_trainer.server.data import DataPlane
from daruma_trainer.worker.pushes import Update

WORKERS = 2
BATCHES = 40
"""Of each worker, at most."""
ROWS = 4
TABLES = 2
"""At first."""
RATES = (0.5, 0.125, 0.25)
"""By batch, in turn: what is made with another one's is seen."""


@dataclass
class Training:
    """The tables and the batches."""

    momentum: float
    single: bool
    """Whether every other batch pushes single rows: its mark in all, its gradients of some."""
    sync: bool

    def marks(self) -> TableSpec:
        """A row has an element for each batch of each worker."""
        return _spec(0, BATCHES * WORKERS, Add())

    def weights(self, number: int) -> TableSpec:
        return _spec(number, 3, SGD(momentum=self.momentum))

    def initial(self, spec: TableSpec) -> Floats:
        return np.full((spec.rows, spec.cols), spec.id, np.float32)

    def updates(self, specs: list[TableSpec], worker: int, batch: int) -> tuple[Update, ...]:
        """What a batch of a worker is."""
        mark = np.zeros((ROWS, specs[0].cols), np.float32)
        mark[:, worker * BATCHES + batch - 1] = 1.0
        rows: Ints | None = np.arange(ROWS) if self.single and batch % 2 else None
        given = self._given(batch)
        chosen = slice(None) if given is None else given
        weights = (
            Update(s.id, rate(batch), gradient(s, worker, batch)[chosen], given) for s in specs[1:]
        )
        return (Update(0, 0.0, mark, rows), *weights)

    def _given(self, batch: int) -> Ints | None:
        """Of which rows a batch has gradients; None: of all."""
        return np.arange(batch // 2 % 2, ROWS, 2) if self.single and batch % 2 else None

    def wrong(self, plane: DataPlane) -> str | None:
        """Say which weights are not what the batches that their slot has make of the first ones.

        For plain SGD of which no batch was lost or skipped.
        """
        slots, table = plane.slots, plane.shard.tables[1]
        rows = table.layout.rows
        share = 1 / WORKERS if self.sync else 1.0
        for k in np.flatnonzero(np.diff(table.layout.slot_rows) * (slots.ready & plane.given)):
            mine = slice(*table.layout.slot_rows[k : k + 2].tolist())
            has = np.stack(
                [batches_of(*entry) for entry in zip(slots.last[k], slots.window[k], strict=True)]
            )
            moved = np.tensordot(has, self._ways[:, :, rows[mine]], 2)
            expected = self.initial(table.layout.table)[rows[mine]] - share * moved
            if not np.allclose(table.data[mine], expected, atol=1e-4):
                return f"slot {slots.ids[k]} of {has}: {table.data[mine]}, not {expected}"
        return None

    def __post_init__(self) -> None:
        spec = self.weights(1)
        batches = range(1, BATCHES + 1)
        ways = [[rate(b) * gradient(spec, w, b) for b in batches] for w in range(WORKERS)]
        self._ways = np.array(ways)
        for b in batches:
            given = self._given(b)
            if given is not None:
                self._ways[:, b - 1, np.setdiff1d(np.arange(ROWS), given)] = 0.0


def rate(batch: int) -> float:
    return RATES[batch % len(RATES)]


def gradient(spec: TableSpec, worker: int, batch: int) -> Floats:
    base = np.arange(spec.rows * spec.cols, dtype=np.float32).reshape(spec.rows, spec.cols)
    return np.asarray(np.cos(base + np.float32(batch + worker / 3)), np.float32)


def batches_of(last: int, window: int) -> NDArray[np.float64]:
    """Which batches an entry says were applied; shape (batches,)."""
    batches = np.arange(1, BATCHES + 1)
    missing = holes(int(last), int(window), 1, int(last))
    return ((batches <= last) & ~np.isin(batches, missing)).astype(np.float64)


def _spec(number: int, cols: int, rule: Any) -> TableSpec:
    return TableSpec(number, f"t{number}", (ROWS, cols), 1, rule_to_json(rule))
