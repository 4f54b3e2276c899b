"""What a worker says to each server: tables, initial values, resync, pushes, pulls; in this order.

A session is with one incarnation of one server. Whatever breaks is mended in one way: it begins
anew, and every step of that is idempotent. For the I/O thread alone, under the client's lock.
"""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import zmq

from daruma_trainer.contract import (
    SLOTS,
    Member,
    Membership,
    Replay,
    Role,
    Settings,
    Suspect,
    slots_to_hex,
)
from daruma_trainer.errors import ConfigurationError, TableMismatchError
from daruma_trainer.links import Answer, Link
from daruma_trainer.rules import Rule, rule_from_json
from daruma_trainer.wire import (
    ALL_WORKERS,
    ENTER,
    OWN,
    PARTIAL,
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    Slots,
    TablePush,
    bitmap,
    decode_json,
    decode_state,
    encode_json,
    encode_push,
    from_bitmap,
)
from daruma_trainer.worker.accumulating import Accumulation
from daruma_trainer.worker.copies import Group, HostCopy
from daruma_trainer.worker.pushes import Held, Pushes, Update
from daruma_trainer.worker.reading import Readers

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client

RETRY_SECONDS = 0.03
FORGOTTEN_SECONDS = 120.0
"""An unanswered request of this age is forgotten; what it was for was sent again long before."""


class Stage(Enum):
    """How far the session with a server's incarnation is."""

    TABLES = "tables"
    PROBE = "probe"
    """Waiting for its slots to be Ready."""
    RESYNC = "resync"
    SYNCED = "synced"


@dataclass(slots=True)
class Session:
    """With one incarnation of one server."""

    link: Link
    stage: Stage = Stage.TABLES
    awaited: int = 0
    """Answers still to come before the next stage."""
    retry_at: float | None = None
    wanting: set[int] = field(default_factory=set)
    """Tables whose initial values this server still wants."""
    token: int = 0
    """Raised at each new beginning, so that answers to the old one are passed over."""
    fresh: bool = True
    """Whether this incarnation has taken no push of ours yet."""


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


class Sessions:
    """With all servers of the newest membership that have an address."""

    def __init__(
        self,
        worker: "Client",
        membership: Membership,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
    ) -> None:
        self._worker = worker
        self._context, self._poller = context, poller
        self.membership = membership
        settings = membership.settings
        relays = settings.consistency == "Sync" and not membership.elastic
        self.copy = HostCopy(
            membership.job_uid,
            membership.servers,
            membership.workers,
            keeps_for=worker.me.index if relays and membership.workers > 1 else None,
        )
        self.pushes = Pushes(replay_of(settings))
        self.by_server: dict[int, Session] = {}
        self._readers = Readers(worker.me.index, self._link)
        self._rules: list[Rule] = []

    def close(self) -> None:
        """Close all connections."""
        for session in self.by_server.values():
            session.link.close()
        self.by_server.clear()
        self._readers.close()

    def synced(self, server: int) -> bool:
        """Whether a server takes pushes now."""
        session = self.by_server.get(server)
        return session is not None and session.stage is Stage.SYNCED

    @property
    def links(self) -> list[Link]:
        """Connections that are open."""
        return [session.link for session in self.by_server.values()]

    def away(self) -> list[int]:
        """Return the servers that take no pushes now."""
        return [s for s in range(self.membership.servers) if not self.synced(s)]

    def may_merge(self, server: int, batch: int, now: float) -> bool:
        """Whether this worker's batch may be made one with others that a server lacks.

        Where its predecessor's push of that batch reached some slots, it goes out by itself.
        """
        slots = self.copy.slots_of(server)
        new = (self.copy.last[slots, self._worker.me.index] < batch).all()
        return bool(new) and self.pushes.may_accumulate(server, now)

    @property
    def unsettled(self) -> bool:
        """Whether a server is to be asked again when it is time."""
        return any(session.retry_at is not None for session in self.by_server.values())

    def turn(
        self,
        ready: Container[object],
        unasked: Callable[[Link, Header, Sequence[Frame]], None],
    ) -> None:
        """Take in what has come (`ready`: Link.receive), and go on where something is due."""
        now = time.monotonic()
        for server, session in list(self.by_server.items()):
            for event in session.link.receive(ready, unasked):
                if event == "disconnected":
                    self._worker.lost_server()
                    if session.stage is not Stage.TABLES:
                        self._begin(session)
                elif event == "connected":
                    session.retry_at = 0.0
            if session.retry_at is not None and now >= session.retry_at:
                session.retry_at = None
                self._advance(server, session)
        self._readers.turn(ready, unasked)

    def report(self, body: Sequence[Frame], answer: Answer) -> None:
        """Send this worker's report to all servers."""
        for session in self.by_server.values():
            session.link.expire(FORGOTTEN_SECONDS, self.membership.settings.progress_seconds)
            session.link.request(self._worker.header(Kind.REPORT), body, answer)

    def suspects(self) -> tuple[Suspect, ...]:
        """Return servers that seem to be away."""
        seconds = self.membership.settings.suspect_seconds
        found = (session.link.suspect(seconds) for session in self.by_server.values())
        return tuple(suspect for suspect in found if suspect is not None)

    def begin_all(self) -> None:
        """Begin anew with every server."""
        for session in self.by_server.values():
            self._begin(session)

    def ready_again(self, link: Link) -> None:
        """A server says that slots became Ready: no need to wait for the next try."""
        for session in self.by_server.values():
            if session.link is link and session.stage is not Stage.SYNCED:
                self._begin(session)

    def follow(self) -> None:
        """Open and close connections as the membership says."""
        self._readers.follow(self.membership)  # first: one that is promoted is a server now
        wanted = {m.index: m for m in self.membership.of(Role.SERVER) if m.address is not None}
        for index, session in list(self.by_server.items()):
            if index not in wanted or wanted[index] != session.link.peer:
                self._worker.lost_server()
                session.link.close()
                del self.by_server[index]
        for index, member in wanted.items():
            if index not in self.by_server:
                self.by_server[index] = Session(self._link(member), retry_at=0.0)

    def _link(self, member: Member, first: int = 0) -> Link:
        me = self._worker.me
        return Link(self._context, me.id, me.token, member, self._poller, first)

    def _begin(self, session: Session) -> None:
        session.token += 1
        session.stage = Stage.TABLES
        session.retry_at = 0.0
        session.wanting.clear()

    def _retry(self, session: Session) -> None:
        """Something was refused: begin again in a moment."""
        self._begin(session)
        session.retry_at = time.monotonic() + RETRY_SECONDS

    def _advance(self, server: int, session: Session) -> None:
        """Take the session's next step. Called again whenever the last one is answered."""
        copy = self.copy
        if not copy.specs or self._worker.announced < len(copy.specs):
            return
        if session.stage is Stage.TABLES:
            session.token += 1
            session.awaited = len(copy.specs)
            for spec in copy.specs:
                body = [encode_json(spec.to_json())]
                answer = partial(self._on_created, server, spec.id)
                self._ask(session, Kind.CREATE, body, answer)
        elif session.stage is Stage.PROBE:
            lowest = min(m.index for m in self.membership.of(Role.WORKER))
            if self._worker.me.index == lowest:
                self._send_initial(server, session)
            session.awaited = 1
            meta = PULL.pack(0, 0, 0) + bitmap(copy.slots_of(server))
            self._ask(session, Kind.PULL, [meta], partial(self._on_step, server, Stage.RESYNC))
        elif session.stage is Stage.RESYNC:
            if not self._worker.resumed:
                # The first pull decides at which batch this worker goes on; nothing is held yet.
                session.stage = Stage.SYNCED
                self.send_pulls(server)
                return
            if session.fresh:
                # Its predecessor's acknowledgements went with it: what is held goes out again. From
                # now on, as the server counts it as none that is lost.
                self.pushes.hold_again(server, copy.slots_of(server))
            raw = {
                "worker": self._worker.me.index,
                "done": self._worker.batch,
                "held": self.pushes.unsent(server),
                "slots": slots_to_hex(np.flatnonzero(copy.slots_of(server)).tolist()),
                "rebuilds": sorted(self._worker.rebuilds),
                "entered": self._worker.position.entered,
                "left_off": self._worker.position.left_off,
            }
            session.awaited = 1
            answer = partial(self._on_resync, server)
            self._ask(session, Kind.RESYNC, [encode_json(raw)], answer)

    def _ask(
        self,
        session: Session,
        kind: Kind,
        body: Sequence[Frame],
        then: Callable[[Session, Header, Sequence[Frame]], None],
        *,
        patient: bool = False,
    ) -> None:
        token = session.token

        def answer(header: Header, frames: Sequence[Frame]) -> None:
            if session.token != token:
                return
            if header.kind is Kind.REFUSED:
                self._refused(session, header, frames)
            else:
                then(session, header, frames)

        if not session.link.request(self._worker.header(kind), body, answer, patient=patient):
            self._retry(session)

    def _on_created(
        self, server: int, table: int, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        if decode_json(frames[1]).get("wanted"):
            session.wanting.add(table)
        self._on_step(server, Stage.PROBE, session, header, frames)

    def _on_step(
        self, server: int, stage: Stage, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        del header, frames
        session.awaited -= 1
        if session.awaited == 0:
            session.stage = stage
            self._advance(server, session)

    def _on_resync(
        self, server: int, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        del header
        raw = decode_json(frames[1])
        self.pushes.lost |= {int(b) for b in raw.get("lost", [])}
        due = self._worker.rebuilds & {int(t) for t in raw.get("rebuild", [])}
        self._worker.due.pop(server, None)
        if due:
            self._worker.due[server] = due
        session.stage = Stage.SYNCED
        if session.fresh:
            session.fresh = False
            wanted, settings = self._worker.wanted, self.membership.settings
            if settings.consistency == "Sync" and not settings.covers and wanted is not None:
                # What is held is in a step by then, nothing else says.
                mine = self.copy.slots_of(server)
                wanted.missing |= mine & (bool(self.pushes.held) and not wanted.before)
        self.pushes.seal(server, self.copy.moved(server), self.rules)
        # In the order of their batches: a slot takes what is older than its window for applied.
        under_way: list[tuple[int, Callable[[], None]]] = [
            (h.batch, partial(self.send_held, server, h)) for h in self.pushes.held.values()
        ]
        under_way += [
            (done.first, partial(self._send_sealed, server, session, done))
            for done in self.pushes.sealed.get(server, [])
        ]
        for _, send in sorted(under_way, key=lambda item: item[0]):
            send()
        self.send_pulls(server)

    def _refused(self, session: Session, header: Header, frames: Sequence[Frame]) -> None:
        message = str(decode_json(frames[1]).get("message", ""))
        if header.flags == Refusal.NOT_KEPT and self._worker.wanted is not None:
            self._worker.wanted.unkept = True
            return
        if header.flags == Refusal.TABLE_MISMATCH:
            raise TableMismatchError(message)
        if header.flags in (Refusal.MALFORMED, Refusal.TOO_LARGE, Refusal.OVERLAP):
            raise ConfigurationError(f"{session.link.peer.id} refused: {message}")
        self._retry(session)

    def _send_initial(self, server: int, session: Session) -> None:
        """INIT for each table that wants it. Answers are not waited for: a pull shows what came."""
        for group in self._groups(server):
            for table, values in zip(group.layout.tables, self._worker.initial, strict=True):
                if table.table.id not in session.wanting:
                    continue
                part = TablePush(table.table.id, 0.0, values[table.rows])
                push = Push(self._worker.me.index, 1, 1, 1, 0, group.mask, (part,))
                session.link.request(self._worker.header(Kind.INIT), encode_push(push), None)

    def send_held(self, server: int, held: Held) -> None:
        """Send the parts of a held batch that this server has not acknowledged."""
        session = self.by_server.get(server)
        if session is None or session.stage is not Stage.SYNCED:
            return  # it goes out when the session is there again
        groups = self._groups(server)
        for number, group in enumerate(groups):
            if held.unacked[group.mask].any():
                answer = partial(self._on_ack, held.batch, group.mask)
                parts = parts_of(held, groups, number)
                push = Push(
                    self._worker.me.index,
                    held.batch,
                    held.batch,
                    1,
                    self.pushes.acked,
                    group.mask,
                    parts,
                )
                self._ask(session, Kind.PUSH, encode_push(push), answer, patient=True)

    def _send_sealed(self, server: int, session: Session, done: Accumulation) -> None:
        groups = self._groups(server)
        for group, parts in zip(groups, done.cut(groups), strict=True):
            push = Push(
                self._worker.me.index, done.first, done.last, done.count, self.pushes.acked,
                group.mask, parts,
            )  # fmt: skip
            answer = partial(self._on_sealed, server, done.first, done.last)
            self._ask(session, Kind.PUSH, encode_push(push), answer, patient=True)

    def send_rebuilt(self, server: int, parts: Sequence[Update], batch: int) -> None:
        """Send this worker's part of sums that a server cleared, as of a batch.

        It goes before all later batches. What breaks off is asked for again by the next resync.
        """
        session = self.by_server.get(server)
        if session is None or session.stage is not Stage.SYNCED:
            return
        for group in self._groups(server):
            tables = []
            for part in parts:
                rows = np.empty(0, np.int64) if part.rows is None else part.rows
                mine = np.isin(rows, group.layout.tables[part.table].rows)
                tables.append(TablePush(part.table, part.lr, part.values[mine], rows[mine]))
            push = Push(
                self._worker.me.index, batch + 1, batch + 1, 1, self.pushes.acked, group.mask,
                tuple(tables),
            )  # fmt: skip
            self._ask(session, Kind.REBUILD, encode_push(push), lambda _s, _h, _f: None)

    def send_pulls(self, server: int) -> None:
        """Ask this server for what the training thread waits for."""
        wanted, session = self._worker.wanted, self.by_server.get(server)
        if wanted is None or session is None or session.stage is not Stage.SYNCED:
            return
        for group in self._groups(server):
            if wanted.missing[group.mask].any():
                flags = ALL_WORKERS * wanted.all_workers | ENTER * (not self._worker.resumed)
                meta = PULL.pack(wanted.min_step, len(self.copy.specs), flags)
                meta += bitmap(group.mask & wanted.missing if wanted.before else group.mask)
                kind = Kind.BEFORE if wanted.before else Kind.PULL
                ask = partial(
                    self._ask, session, kind, [meta], partial(self._on_state, wanted), patient=True
                )
                if not self._read(server, session, group, wanted, ask):
                    ask()

    def _read(
        self, server: int, session: Session, group: Group, wanted: Wanted, ask: Callable[[], None]
    ) -> bool:
        """Let a replica answer a pull; `ask`: put it to the server. False: no replica can."""
        worker, token = self._worker, session.token
        if wanted.before or wanted.all_workers or worker.rebuilds or not worker.resumed:
            return False

        def take(header: Header, frames: Sequence[Frame]) -> bool:
            if session.token != token:
                return True  # all was asked for again
            if self.copy.outdates(decode_state(frames)):
                return False
            self._on_state(wanted, session, header, frames)
            return True

        def instead() -> None:
            if session.token == token and wanted.missing[group.mask].any():
                ask()

        meta = PULL.pack(worker.batch, len(self.copy.specs), OWN) + bitmap(group.mask)
        return self._readers.ask(server, worker.header(Kind.PULL), [meta], take, instead)

    def _on_ack(
        self, batch: int, mask: Slots, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        del header
        applied = from_bitmap(frames[1][: SLOTS // 8])
        overlap = from_bitmap(frames[1][SLOTS // 8 :])
        if overlap.any():
            self.pushes.lost.add(batch)
        self.pushes.note_applied(batch, applied | overlap)
        if self.membership.settings.consistency != "Sync" and not (applied | overlap)[mask].all():
            self._retry(session)

    def _on_sealed(
        self,
        server: int,
        first: int,
        last: int,
        session: Session,
        header: Header,
        frames: Sequence[Frame],
    ) -> None:
        del session, header
        overlap = from_bitmap(frames[1][SLOTS // 8 :]).any()
        if overlap:
            self.pushes.lost |= set(range(first, last + 1))
        if overlap or not self.membership.settings.covers:
            self.pushes.drop_sealed(server, last)

    def _on_state(
        self, wanted: Wanted, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        if not self._worker.resumed:
            self._worker.position.hear(session.link.peer.index, header.flags)
        state = decode_state(frames)
        partial = bool(header.flags & PARTIAL)
        taken = self.copy.take(state, partial=partial)
        settings = self.membership.settings
        if settings.covers and not settings.chain and not partial:
            # This copy counts: others' pushes in it are on one node more.
            have = [state.update.to_bytes(8, "little") + bitmap(taken)]
            whole = replace(self._worker.header(Kind.HAVE), incarnation=header.incarnation)
            session.link.send(whole, have)
        slots = np.flatnonzero(taken)
        self.pushes.note_state(slots, self.copy.last[slots, self._worker.me.index])
        wanted.missing &= ~taken
        if wanted.earlier is not None:
            wanted.earlier.missing &= ~taken

    def _groups(self, server: int) -> list[Group]:
        return self.copy.groups_of(server)

    @property
    def rules(self) -> list[Rule]:
        """The tables' update rules."""
        while len(self._rules) < len(self.copy.specs):
            self._rules.append(rule_from_json(self.copy.specs[len(self._rules)].rule))
        return self._rules


def replay_of(settings: Settings) -> Replay:
    """Return the limits of what a worker accumulates: under `Bounded` also its staleness."""
    if settings.consistency != "Bounded":
        return settings.replay
    most = min(settings.replay.max_pending, settings.max_staleness)
    return replace(settings.replay, max_pending=most)


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
