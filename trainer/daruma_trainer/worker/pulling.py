"""What a worker asks servers for, and takes of what they answer; a replica may answer for one.

For the I/O thread alone, under the client's lock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from daruma_trainer.contract import SLOTS
from daruma_trainer.wire import (
    ALL_WORKERS,
    ENTER,
    OWN,
    PARTIAL,
    PULL,
    Frame,
    Header,
    Kind,
    Slots,
    bitmap,
    decode_state,
)
from daruma_trainer.worker.copies import Group
from daruma_trainer.worker.reading import Readers

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client
    from daruma_trainer.worker.sessions import Session, Sessions


@dataclass(slots=True)
class Wanted:
    """A pull that the training thread waits for."""

    min_step: int
    all_workers: bool = False
    """Whether `min_step` is a batch that every worker has to have reached (`Async` as well)."""
    missing: Slots = field(default_factory=lambda: np.ones(SLOTS, np.bool_))
    before: bool = False
    """Whether slots are wanted as they were when `min_step` was this worker's last batch there."""
    unkept: bool = False
    """Of such slots: a server says that nobody has them any more."""
    earlier: "Wanted | None" = None
    """The pull before this one: what answers this answers that too."""


class Puller:
    """From each server that takes pushes now; another is asked in its next session."""

    def __init__(self, sessions: "Sessions", worker: "Client", readers: Readers) -> None:
        self._sessions, self._worker, self._readers = sessions, worker, readers

    def ask(self, server: int) -> None:
        """Ask this server for what the training thread waits for."""
        wanted, session = self._worker.wanted, self._sessions.synced(server)
        if wanted is None or session is None:
            return
        copy = self._sessions.copy
        for group in copy.groups_of(server):
            if wanted.missing[group.mask].any():
                flags = ALL_WORKERS * wanted.all_workers | ENTER * (not self._worker.resumed)
                meta = PULL.pack(wanted.min_step, self._worker.announced, flags)
                meta += bitmap(group.mask & wanted.missing if wanted.before else group.mask)
                kind = Kind.BEFORE if wanted.before else Kind.PULL
                take = partial(self._on_state, wanted)
                ask = partial(self._sessions.ask, session, kind, [meta], take, patient=True)
                if not self._ask_replica(server, session, group, wanted, ask):
                    ask()

    def _ask_replica(
        self, server: int, session: "Session", group: Group, wanted: Wanted,
        ask: Callable[[], None],
    ) -> bool:  # fmt: skip
        """Let a replica answer a pull; `ask`: put it to the server. False: no replica can."""
        worker, copy, token = self._worker, self._sessions.copy, session.token
        if wanted.before or wanted.all_workers or worker.rebuilds or not worker.resumed:
            return False

        def take(header: Header, frames: Sequence[Frame]) -> bool:
            if session.token != token:
                return True  # all was asked for again
            if copy.outdates(decode_state(frames)):
                return False
            self._on_state(wanted, session, header, frames)
            return True

        def instead() -> None:
            if session.token == token and wanted.missing[group.mask].any():
                ask()

        meta = PULL.pack(worker.batch, worker.announced, OWN) + bitmap(group.mask)
        return self._readers.ask(server, worker.header(Kind.PULL), [meta], take, instead)

    def _on_state(
        self, wanted: Wanted, session: "Session", header: Header, frames: Sequence[Frame]
    ) -> None:
        worker, copy = self._worker, self._sessions.copy
        if not worker.resumed:
            worker.position.hear(session.link.peer.index, header.flags)
        state = decode_state(frames)
        some = bool(header.flags & PARTIAL)
        taken = copy.take(state, partial=some)
        settings = self._sessions.membership.settings
        if settings.covers and not settings.chain and not some:
            # This copy counts: others' pushes in it are on one node more.
            have = [state.update.to_bytes(8, "little") + bitmap(taken)]
            whole = replace(worker.header(Kind.HAVE), incarnation=header.incarnation)
            session.link.send(whole, have)
        slots = np.flatnonzero(taken)
        self._sessions.pushes.note_state(slots, copy.last[slots, worker.me.index])
        wanted.missing &= ~taken
        if wanted.earlier is not None:
            wanted.earlier.missing &= ~taken
