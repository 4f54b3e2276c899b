"""Sums that this worker's program can make again, where a server lost what was added to them.

The other half of `server.rebuilding`. For the program's thread alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.pushes import Update

Rebuilder = Callable[[Ints], ArrayLike]
"""Rows of a table to what this worker's pushes so far have added to them."""


class Rebuilders:
    """By table, how its sum is made again."""

    def __init__(self, client: Client, specs: Sequence[TableSpec]) -> None:
        self._client = client
        self._specs = specs
        self._by_table: dict[int, Rebuilder] = {}

    def add(self, spec: TableSpec, fn: Rebuilder, *, sync: bool) -> None:
        """See Table.on_restored. The table has been made."""
        if self._client.initial[spec.id].any():
            raise ConfigurationError(
                f"table {spec.name!r} begins with values of its own, and a sum that is made again "
                "begins at zero: push them as the part of one worker instead of `initial`"
            )
        self._by_table[spec.id] = fn
        # Under Sync a worker keeps its push until it has pulled what came of it: copies are exact.
        if not sync:
            self._client.register(spec.id)

    def check(self, spec: TableSpec, *, sync: bool) -> None:
        """Refuse a sum that a recovery would leave wrong for ever."""
        membership = self._client.membership
        if membership is None or not membership.settings.inexact:
            return
        if sync or spec.id not in self._by_table:
            raise ConfigurationError(
                f"table {spec.name!r} has rule add, and this job's strategy restores lost slots "
                "from the running checkpoint, which lacks what was added since: call "
                "table.on_restored(fn) before its first push (Async), or take a strategy with "
                "other sources (Freshest, Stateless, FullCheckpoint)"
            )

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait as `Client.wait` does, and meanwhile make again what a restored server asks for."""
        client = self._client
        while True:
            client.wait(lambda: ready() or bool(client.due), seconds, what)
            generation, due = client.take_due()
            if not due:
                return
            for server, table, rows in due:
                client.rebuild(server, self._part(self._specs[table], rows), generation)

    def _part(self, spec: TableSpec, rows: Ints) -> Update:
        part: Floats = np.array(self._by_table[spec.id](rows), np.float32, order="C")
        if part.size != len(rows) * spec.cols:
            raise ConfigurationError(
                f"table {spec.name!r}: on_restored gave {part.shape} for {len(rows)} rows"
            )
        return Update(spec.id, 1.0, part.reshape(-1, spec.cols), rows)
