"""How far the shard moved, and when: what the price of a failure is estimated from.

A random sample of the parameters is noted every so many steps. When there are too many notes,
every second one goes and the interval doubles, so that they always reach over the whole training.
"""

import math
from itertools import pairwise

import numpy as np

from daruma_trainer.contract import Move
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.shard import Shard

SAMPLE = 16_384
"""Parameters that are noted: all of a small shard."""
NOTES = 16
"""Intervals that are kept; one more note than that."""


class Motion:
    """The notes of one incarnation of a shard."""

    def __init__(self, interval: float, seed: int) -> None:
        self._first = max(1.0, interval)
        self._seed = seed
        self._chosen: list[Ints] = []
        self._scale = 1.0
        self.forget()

    def forget(self) -> None:
        """Begin anew: the parameters jumped (a rollback)."""
        self._interval = self._first
        self._turn: int | None = None
        self._notes: list[tuple[int, Floats]] = []
        self.moves: tuple[Move, ...] = ()

    def tick(self, shard: Shard, step: int) -> None:
        """Note where the parameters are, if it is time."""
        turn = int(step / self._interval)
        if turn == self._turn or not shard.tables:
            return
        if len(self._chosen) != len(shard.tables):
            self._choose(shard)
        self._turn = turn
        values = [t.data.reshape(-1)[c] for t, c in zip(shard.tables, self._chosen, strict=True)]
        self._notes.append((step, np.concatenate(values)))
        if len(self._notes) > NOTES + 1:
            self._notes = self._notes[::2]
            self._interval *= 2
            self._turn = int(step / self._interval)
        self.moves = tuple(
            Move(a, b, self._scale * float(np.linalg.norm(new - old)))
            for (a, old), (b, new) in pairwise(self._notes)
        )

    def _choose(self, shard: Shard) -> None:
        """Draw the sample, the same share of every table."""
        self.forget()
        sizes = [t.data.size for t in shard.tables]
        share = min(1.0, SAMPLE / max(1, sum(sizes)))
        rng = np.random.default_rng(self._seed)
        self._chosen = [
            np.sort(rng.choice(n, math.ceil(n * share), replace=False)).astype(np.int64)
            for n in sizes
        ]
        drawn = sum(len(c) for c in self._chosen)
        self._scale = math.sqrt(sum(sizes) / drawn) if drawn else 1.0
