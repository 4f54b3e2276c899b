"""What a replica takes in from the server before it in the chain."""

from collections.abc import Sequence

import numpy as np

from daruma_trainer.layout import Ints, TableSpec
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replication.messages import Versions
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import MalformedError, Push, Slots, State


class OutOfOrderError(Exception):
    """A message is missing: the stream has to begin anew."""


class Inflow:
    """Of one stream into one replica's shard. A replica's slot is Ready once it came whole."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._source = ""
        self._number = 0
        self._newest = "", 0
        """Who sent the last request that counts, and its number."""

    def is_newer(self, source: str, request: int) -> bool:
        """Whether a message was sent after all that came from there: else it comes again.

        The stream's own numbers begin anew with it.
        """
        sender, newest = self._newest
        if source == sender and request <= newest:
            return False
        self._newest = source, request
        return True

    def begin(self, source: str, tables: Sequence[TableSpec]) -> Versions:
        """Begin a stream; returns what is here."""
        for spec in tables:
            if refused := self._plane.add_table(spec):
                raise MalformedError(
                    f"table {spec.name!r} is another here: {bytes(refused.body[0])!r}"
                )
        self._source, self._number = source, 0
        slots = self._plane.slots
        ready = slots.ready
        # A table that is new has nothing here yet.
        return Versions(
            np.where(ready & self._plane.given, slots.lineage, 0), slots.position.copy()
        )

    def update(
        self, source: str, number: int, mask: Slots, workers: Sequence[int], push: Push
    ) -> Ints:
        """Make an update for the slots of `mask`; `workers`: whose batch it is (Sync: several).

        Returns the slots, as indices.
        """
        self.expect(source, number)
        plane = self._plane
        k = plane.slots.index_of(np.flatnonzero(push.slots))
        if (k < 0).any():
            raise MalformedError("an update of slots of another shard")
        problem = plane.shard.check(push.tables, k)
        if problem or max(workers, default=0) >= plane.workers:
            raise MalformedError(problem or f"an update of workers {workers}")
        new = np.flatnonzero(mask[plane.slots.ids[k]])
        plane.shard.apply(push.tables, k, new)
        for worker in workers:
            plane.slots.mark(k[new], worker, push.first, push.last)
        plane.slots.position[k[new]] += 1
        return np.asarray(k[new])

    def whole(self, source: str, number: int, state: State) -> Ints:
        """Take whole slots; returns them, as indices."""
        self.expect(source, number)
        plane = self._plane
        k = plane.slots.index_of(np.flatnonzero(state.slots))
        if (k < 0).any() or state.last.shape[1] != plane.workers:
            raise MalformedError("slots of another shard")
        try:
            plane.shard.set_whole(k, state.values, state.steps)
        except ValueError as error:
            raise MalformedError(str(error)) from error
        slots = plane.slots
        slots.lineage[k], slots.position[k] = state.lineage, state.position
        slots.last[k], slots.window[k] = state.last[state.vector], state.window[state.vector]
        slots.state[k] = SlotState.READY
        plane.note_given(k)
        return k

    def expect(self, source: str, number: int) -> None:
        """Check that a message is the next of its stream."""
        if source != self._source or number != self._number + 1:
            raise OutOfOrderError(f"message {number} of {source} after {self._number}")
        self._number = number
