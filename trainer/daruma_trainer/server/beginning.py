"""How a shard comes to its tables, and each of its slots to values of them.

The values are the workers' or another job's result. A table may be younger than others, and a
source that slots were restored from may not have had it: then its first values are asked for again.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from daruma_trainer.layout import Floats, Ints, TableLayout, TableSpec
from daruma_trainer.server.replies import Reply, refuse
from daruma_trainer.server.shard import Shard, TableTooLargeError
from daruma_trainer.server.slots import Slots, SlotState
from daruma_trainer.wire import Frame, Kind, Refusal, decode_json, decode_push, encode_json
from daruma_trainer.wire import Slots as SlotMask


class Beginning:
    """Of one shard."""

    def __init__(self, shard: Shard, slots: Slots, incarnation: int) -> None:
        self._shard, self._slots = shard, slots
        self._incarnation = incarnation
        self.warm: dict[str, Floats] | str | None = None
        """spec.checkpoint.restoreFrom: tables by name; "" while they are read, or what went wrong.
        None: workers give the initial values."""
        self._given: list[SlotMask] = []
        """For each table, which of this shard's slots have values of it."""
        self._lacking = False
        """Whether some slot lacks some table's."""

    def create(self, frames: Sequence[Frame]) -> Reply:
        """CREATE: the first wins, an equal one is a no-op, a different one is refused."""
        spec = TableSpec.from_json(decode_json(frames[1]))
        if isinstance(self.warm, str):
            refusal = Refusal.MALFORMED if self.warm else Refusal.UNSURE
            return refuse(refusal, self.warm or "reading the checkpoint to start from")
        if self.warm is not None and getattr(self.warm.get(spec.name), "shape", ()) != spec.shape:
            return refuse(
                Refusal.TABLE_MISMATCH,
                f"restoreFrom has no table {spec.name!r} of shape {spec.shape}: it has "
                f"{ {name: values.shape for name, values in self.warm.items()} }",
            )
        return self.add_table(spec) or Reply(
            Kind.OK, [encode_json({"wanted": self.wants_values(spec.id)})]
        )

    def add_table(self, spec: TableSpec) -> Reply | None:
        """Make a table unless it is there; a refusal if another one has its number."""
        known = len(self._shard.specs)
        if spec.id < known:
            if self._shard.specs[spec.id] == spec:
                return None
            return refuse(
                Refusal.TABLE_MISMATCH,
                f"table {spec.id} is {self._shard.specs[spec.id]}, not {spec}: "
                "every worker has to make the same tables in the same order",
            )
        if spec.id > known:
            return refuse(Refusal.TABLE_MISMATCH, f"table {spec.id} before table {known}")
        try:
            self._shard.create(spec)
        except TableTooLargeError as error:
            return refuse(Refusal.TOO_LARGE, str(error))
        self._given.append(np.zeros(len(self._slots.ids), np.bool_))
        self._lacking = True
        return None

    def wants_values(self, table: int) -> bool:
        """Whether initial values are still to come. Of slots on their way nobody knows yet."""
        return bool((~self._given[table] & (self._slots.state != SlotState.RESTORING)).any())

    def init(self, frames: Sequence[Frame]) -> Reply:
        """INIT: initial values, idempotent, for slots that are not initialised yet."""
        push = decode_push(frames)
        k = self._slots.owned(push.slots)
        if k is None:
            return refuse(Refusal.NOT_OWNER, "slots of another server")
        problem = self._shard.check(push.tables, k)
        if problem or len(push.tables) != 1 or push.tables[0].rows is not None:
            return refuse(Refusal.MALFORMED, problem or "one dense table at a time")
        part = push.tables[0]
        given = self._given[part.table]
        lacks = ~given[k] & (self._slots.state[k] != SlotState.RESTORING)
        todo = k[lacks]
        if len(todo):
            spec = self._shard.specs[part.table]
            if isinstance(self.warm, dict):
                rows = TableLayout(self._shard.uid, spec, self._slots.ids[todo]).rows
                values = self.warm[spec.name].reshape(-1, spec.cols)[rows]
            else:
                mine = np.repeat(lacks, np.diff(self._shard.row_offsets(part.table, k)))
                values = part.values.reshape(-1, spec.cols)[mine]
            self._shard.set_values(todo, {part.table: values})
            given[todo] = True
            self._lacking = not self.given.all()
            self.open_slots()
        return Reply(Kind.OK, [b"{}"])

    def open_slots(self) -> None:
        """Empty → Ready, where all tables have their initial values."""
        full = np.logical_and.reduce(self._given) if self._given else np.False_
        now = (self._slots.state == SlotState.EMPTY) & full
        self._slots.state[now] = SlotState.READY
        self._slots.lineage[now] = self._incarnation

    @property
    def given(self) -> SlotMask:
        """Which slots have the values of every table; shape (n,)."""
        n = len(self._slots.ids)
        return np.logical_and.reduce(self._given, axis=0) if self._given else np.zeros(n, np.bool_)

    @property
    def complete_tables(self) -> int:
        """How many tables have values in every slot: of a later one there is nothing to save."""
        found = (number for number, given in enumerate(self._given) if not given.all())
        return next(found, len(self._given))

    def note_given(self, k: Ints, tables: int | None = None) -> None:
        """The slots `k` have values of the first so many tables (None: of all), and of no other."""
        for number, given in enumerate(self._given):
            given[k] = tables is None or number < tables
        self._lacking = not self.given.all()

    def lacks(self, tables: Iterable[int], k: Ints) -> bool:
        """Whether one of the slots `k` has no values of one of these tables yet."""
        return self._lacking and not all(self._given[t][k].all() for t in tables)

    def has_later(self, tables: int, k: Ints) -> bool:
        """Whether one of the slots `k` has values of a table after the first so many."""
        return any(given[k].any() for given in self._given[tables:])
