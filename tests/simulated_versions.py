"""What a slot of each version is, seen on any server of a simulated job: the same everywhere."""

from typing import Any

import numpy as np

from daruma_trainer.layout import slot_of_blocks
from daruma_trainer.server.data import DataPlane
from simulated_operator import UID
from simulated_training import ROWS, TABLES

EMPTY_SLOTS = (0, 1023)
"""Of slots without blocks these two are looked at."""
IDS = np.unique(
    [*EMPTY_SLOTS, *(s for t in range(TABLES + 1) for s in slot_of_blocks(UID, t, ROWS))]
)


class Versions:
    """All that were seen."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[bytes]] = {}
        """(generation, slot, tables, lineage, position): what a slot of that version is."""
        self._last: dict[str, bytes] = {}
        """By server: what it had when it was looked at last."""

    def record(self, server: str, plane: DataPlane, generation: int) -> None:
        """A slot of one version is the same wherever it is."""
        if len(plane.shard.tables) < TABLES:
            return
        slots, tables = plane.slots, plane.shard.tables
        arrays: list[np.ndarray[Any, Any]] = []
        for table in tables:
            arrays += [table.data, *table.state, table.steps]
        given = slots.ready & plane.given
        parts = (given, slots.lineage, slots.position, slots.last, slots.window)
        chosen = slots.index_of(IDS)
        chosen = chosen[chosen >= 0]
        arrays += [a[chosen] for a in parts]
        now = b"".join(a.tobytes() for a in arrays)
        if self._last.get(server) == now:
            return
        self._last[server] = now
        for k in chosen.tolist():
            if given[k]:
                self._compare(plane, k, generation)

    def _compare(self, plane: DataPlane, k: int, generation: int) -> None:
        slots = plane.slots
        version = int(slots.lineage[k]), int(slots.position[k])
        key = (generation, int(slots.ids[k]), len(plane.shard.tables), *version)
        content = [slots.last[k].tobytes(), slots.window[k].tobytes()]
        for table in plane.shard.tables:
            rows = slice(*table.layout.slot_rows[k : k + 2].tolist())
            blocks = slice(*table.layout.slot_blocks[k : k + 2].tolist())
            content += [a[rows].tobytes() for a in (table.data, *table.state)]
            content.append(table.steps[blocks].tobytes())
        known = self._known.setdefault(key, content)
        if known != content:
            raise AssertionError(f"two states of slot {key}: {known} {content}")
