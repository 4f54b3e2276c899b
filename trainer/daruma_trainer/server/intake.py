"""Write into the tables what was read: of a save, of a cut, or of a shard that is handed over.

The store's thread reads, and the tables belong to the loop's thread; what is large comes across in
chunks, each of which waits until it is taken: what it lies in is used for the next.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.checkpoint.manifest import Manifest
from daruma_trainer.checkpoint.reading import Found, read_slots
from daruma_trainer.checkpoint.segment import Blocks
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import ContractError
from daruma_trainer.errors import StoreError
from daruma_trainer.layout import Ints, runs
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.handover import fetch
from daruma_trainer.server.shard import TableArrays

TAKE_SECONDS = 30.0
"""How long a chunk may wait for the loop to take it."""


class Intake:
    """One read: `read` and `take_over` are for the store's thread, the rest is for the loop's.

    What comes once `wanted()` is false is dropped: a newer plan may have given its slots to another
    source meanwhile.
    """

    def __init__(
        self,
        plane: DataPlane,
        background: Background,
        wanted: Callable[[], bool],
        *,
        moments_only: bool = False,
    ) -> None:
        self._plane = plane
        self._background = background
        self._wanted = wanted
        self._moments_only = moments_only
        self._got: list[NDArray[np.bool_]] = []
        """For each table which blocks came."""
        self.problem: str | None = None
        self.size = 0
        """Bytes of parameters."""

    def read(self, store: Store, where: tuple[str, int, int], k: Ints) -> Found:
        """Read the slots `k` from saves; `where` as for `read_slots`."""
        return read_slots(store, where, self._plane.slots.ids[k], self._announce, self._hand)

    def take_over(self, agent: str, token: str) -> Found:
        """Take all that a predecessor hands over."""
        manifest, blocks, damaged = fetch(agent, token)
        self._announce(manifest)
        self._hand(blocks)
        return Found(manifest, tuple(damaged))

    def whole(self, k: Ints) -> NDArray[np.bool_]:
        """Of which of the slots `k` every block came."""
        found = np.ones(len(k), np.bool_)
        # A table that was made since the save is not in it: its first values come again.
        for got, table in zip(self._got, self._plane.shard.tables, strict=False):
            lacking = np.concatenate([[0], np.cumsum(~got)])[table.layout.slot_blocks]
            found &= lacking[k + 1] == lacking[k]
        return found

    def _announce(self, manifest: Manifest) -> None:
        self._background.post(lambda: self._begin(manifest))

    def _hand(self, blocks: list[Blocks]) -> None:
        taken = threading.Event()

        def take() -> None:
            self._take(blocks)
            taken.set()

        self._background.post(take)
        if not taken.wait(TAKE_SECONDS):
            raise StoreError(f"the serve loop took nothing for {TAKE_SECONDS:.0f} s")

    def _begin(self, manifest: Manifest) -> None:
        if self._wanted():
            self.problem = make_tables(self._plane, manifest)
            tables = self._plane.shard.tables[: len(manifest.tables)]
            self._got = [np.zeros(len(t.steps), np.bool_) for t in tables]

    def _take(self, blocks: list[Blocks]) -> None:
        if self.problem or not self._wanted():
            return
        for table, index in set_blocks(self._plane, blocks, moments_only=self._moments_only):
            self._got[table][index] = True
        self.size += sum(b.values[:, 0].nbytes for b in blocks)


def make_tables(plane: DataPlane, manifest: Manifest) -> str | None:
    """Make the tables of a save; says what is wrong where they are not the job's."""
    for spec in manifest.tables:
        try:
            refused = plane.add_table(spec) is not None
        except ContractError as error:
            return f"table {spec.name!r} of the checkpoint: {error}"
        if refused:
            return f"table {spec.name!r} of the checkpoint is not the job's"
    return None


def set_slots(plane: DataPlane, manifest: Manifest, k: Ints) -> None:
    """Give the slots `k` the positions and the `applied` that they have in a save."""
    slots, saved = plane.slots, manifest.slots
    where = np.searchsorted(saved.ids, slots.ids[k])
    slots.position[k] = saved.position[where]
    workers = min(slots.last.shape[1], saved.last.shape[1])
    slots.last[k, :workers] = saved.last[where, :workers]
    slots.window[k, :workers] = saved.window[where, :workers]


def set_blocks(
    plane: DataPlane, blocks: Sequence[Blocks], *, moments_only: bool
) -> list[tuple[int, Ints]]:
    """Write blocks into the tables; returns which fitted, as indices by table."""
    tables = plane.shard.tables
    return [
        (some.table, _set(tables[some.table], some, moments_only))
        for some in blocks
        if some.table < len(tables)
    ]


def _set(table: TableArrays, some: Blocks, moments_only: bool) -> Ints:
    at = table.layout.index_of(some.blocks)
    fits = np.zeros(len(at), np.bool_)
    arrays = (table.data, *table.state)
    _, parts, size = some.values.shape
    for stretch in table.layout.stretches:
        if stretch.size != size or parts != len(arrays):
            continue
        here = (at >= stretch.first) & (at < stretch.stop)
        for a, b in runs(here):
            for n, array in enumerate(arrays):
                if n or not moments_only:
                    stretch.of(array)[at[a:b] - stretch.first] = some.values[a:b, n]
        fits |= here
    found = at[fits]
    table.steps[found] = some.head["steps"][fits]
    if not moments_only:
        table.changed[found] = True
    return found
