"""What a worker pushes: batches, what it accumulated while a server was away, sums made again.

For the I/O thread alone, under the client's lock. A part that is not acknowledged goes out again
with the next session; a server takes each once.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from daruma_trainer.contract import SLOTS
from daruma_trainer.wire import (
    Frame,
    Header,
    Kind,
    Push,
    Slots,
    TablePush,
    encode_push,
    from_bitmap,
)
from daruma_trainer.worker.accumulating import Accumulation
from daruma_trainer.worker.copies import Group
from daruma_trainer.worker.pushes import Held, Update

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client
    from daruma_trainer.worker.sessions import Session, Sessions


class Sender:
    """To each server that takes pushes now; what another lacks goes out with its next session."""

    def __init__(self, sessions: "Sessions", worker: "Client") -> None:
        self._sessions, self._worker = sessions, worker

    def held(self, server: int, held: Held) -> None:
        """Send the parts of a held batch that this server has not acknowledged."""
        session = self._sessions.synced(server)
        if session is None:
            return
        groups = self._sessions.copy.groups_of(server)
        for number, group in enumerate(groups):
            if held.unacked[group.mask].any():
                parts = parts_of(held, groups, number)
                push = self._push(held.batch, held.batch, 1, group, parts)
                answer = partial(self._on_held, held.batch, group.mask)
                self._sessions.ask(session, Kind.PUSH, push, answer, patient=True)

    def sealed(self, server: int, done: Accumulation) -> None:
        """Send the parts of what was accumulated for a server that it has not acknowledged."""
        session = self._sessions.synced(server)
        if session is None:
            return
        groups = self._sessions.copy.groups_of(server)
        for group, parts in zip(groups, done.cut(groups), strict=True):
            if done.unacked[group.mask].any():
                push = self._push(done.first, done.last, done.count, group, parts)
                answer = partial(self._on_sealed, server, done, group.mask)
                self._sessions.ask(session, Kind.PUSH, push, answer, patient=True)

    def rebuilt(self, server: int, parts: Sequence[Update], batch: int) -> None:
        """Send this worker's part of sums that a server cleared, as of a batch.

        It goes before all later batches. What breaks off is asked for again by the next resync.
        """
        session = self._sessions.synced(server)
        if session is None:
            return
        for group in self._sessions.copy.groups_of(server):
            tables = []
            for part in parts:
                rows = np.empty(0, np.int64) if part.rows is None else part.rows
                mine = np.isin(rows, group.layout.tables[part.table].rows)
                tables.append(TablePush(part.table, part.lr, part.values[mine], rows[mine]))
            push = self._push(batch + 1, batch + 1, 1, group, tables)
            self._sessions.ask(session, Kind.REBUILD, push, lambda _s, _h, _f: None)

    def _push(
        self, first: int, last: int, count: int, group: Group, parts: Sequence[TablePush]
    ) -> list[Frame]:
        me, acked = self._worker.me.index, self._sessions.pushes.acked
        return encode_push(Push(me, first, last, count, acked, group.mask, tuple(parts)))

    def _on_held(
        self, batch: int, mask: Slots, session: "Session", header: Header, frames: Sequence[Frame]
    ) -> None:
        del header
        done, overlap = _acknowledged(frames)
        pushes, settings = self._sessions.pushes, self._sessions.membership.settings
        if overlap:
            pushes.lose(batch, batch)
        pushes.note_applied(batch, done)
        if settings.consistency != "Sync" and not done[mask].all():
            self._sessions.retry(session)

    def _on_sealed(
        self,
        server: int,
        done: Accumulation,
        mask: Slots,
        session: "Session",
        header: Header,
        frames: Sequence[Frame],
    ) -> None:
        del header
        taken, overlap = _acknowledged(frames)
        pushes = self._sessions.pushes
        done.unacked &= ~taken
        if overlap:
            done.overlaps = True
            pushes.lose(done.first, done.last)
        if done.unacked[mask].any():
            self._sessions.retry(session)
        elif done.unacked[self._sessions.copy.slots_of(server)].any():
            return  # its other messages are under way
        elif done.overlaps or not self._sessions.membership.settings.covers:
            pushes.drop_sealed(server, done.last)
        else:
            pushes.keep_sealed(done)


def _acknowledged(frames: Sequence[Frame]) -> tuple[Slots, bool]:
    """Return the slots that are done with a push, and whether any had some of it already."""
    applied = from_bitmap(frames[1][: SLOTS // 8])
    overlap = from_bitmap(frames[1][SLOTS // 8 :])
    return applied | overlap, bool(overlap.any())


def parts_of(held: Held, groups: Sequence[Group], number: int) -> tuple[TablePush, ...]:
    """Cut a batch down to one of a server's messages, with what rides along."""
    group, parts = groups[number], []
    for update in held.updates:
        layout = group.layout.tables[update.table]
        if update.rows is None:
            parts.append(TablePush(update.table, update.lr, update.values[layout.rows]))
            continue
        # None of them, too: all servers are to know that the batch has the table, and its rate.
        mine = layout.find(update.rows) >= 0
        rows = update.rows[mine]
        parts.append(TablePush(update.table, update.lr, update.values[mine], rows))
    ride = held.rides.get(group.server)
    if ride is not None:
        ride.board(groups, number, parts)
    return tuple(parts)
