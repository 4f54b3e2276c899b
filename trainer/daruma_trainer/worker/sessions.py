"""What a worker says to each server: tables, initial values, resync; then pushes and pulls.

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
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import (
    PULL,
    Frame,
    Header,
    Kind,
    Push,
    Refusal,
    TablePush,
    bitmap,
    decode_json,
    encode_json,
    encode_push,
)
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.giving import Giver
from daruma_trainer.worker.meanwhile import Meanwhile
from daruma_trainer.worker.pulling import Puller
from daruma_trainer.worker.pushes import Pushes
from daruma_trainer.worker.reading import Readers
from daruma_trainer.worker.sending import Sender

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
        self.copy = HostCopy(
            membership.job_uid,
            membership.servers,
            membership.workers,
            keeps_for=worker.me.index if membership.repeats else None,
        )
        self.pushes = Pushes(replay_of(settings))
        self.by_server: dict[int, Session] = {}
        self._readers = Readers(worker.me.index, self._link)
        self.sender = Sender(self, worker)
        self.puller = Puller(self, worker, self._readers)
        self.giver = Giver(self, worker)
        self.meanwhile = Meanwhile(self, worker)
        self._rules: list[Rule] = []

    def close(self) -> None:
        """Close all connections."""
        for session in self.by_server.values():
            session.link.close()
        self.by_server.clear()
        self._readers.close()

    def synced(self, server: int) -> Session | None:
        """Return the session with a server that takes pushes now; None: it does not."""
        session = self.by_server.get(server)
        return session if session is not None and session.stage is Stage.SYNCED else None

    @property
    def links(self) -> list[Link]:
        """Connections that are open."""
        return [session.link for session in self.by_server.values()]

    def away(self) -> list[int]:
        """Return the servers with slots that take no pushes now."""
        return [s for s in self.copy.servers if self.synced(s) is None]

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
                    self._worker.lost_server(server)
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
                self._worker.lost_server(index)
                session.token += 1  # what was asked for in it is asked for in the next
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

    def retry(self, session: Session) -> None:
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
                self.ask(session, Kind.CREATE, body, answer)
        elif session.stage is Stage.PROBE:
            lowest = min(m.index for m in self.membership.of(Role.WORKER))
            if self._worker.me.index == lowest:
                self._send_initial(server, session)
            session.awaited = 1
            meta = PULL.pack(0, 0, 0) + bitmap(copy.slots_of(server))
            self.ask(session, Kind.PULL, [meta], partial(self._on_step, server, Stage.RESYNC))
        elif session.stage is Stage.RESYNC:
            if not self._worker.resumed:
                # The first pull decides at which batch this worker goes on; nothing is held yet.
                session.stage = Stage.SYNCED
                self.puller.ask(server)
                return
            if session.fresh:
                # Its predecessor's acknowledgements went with it: what is held goes out again. From
                # now on, as the server counts it as none that is lost.
                self.pushes.hold_again(server, copy.slots_of(server))
            raw = {
                "worker": self._worker.me.index,
                "done": self._worker.batch,
                "held": self.pushes.unsent(server).text(),
                "slots": slots_to_hex(np.flatnonzero(copy.slots_of(server)).tolist()),
                "rebuilds": sorted(self._worker.rebuilds),
                "skipped": self._worker.position.skipped.text(),
            }
            session.awaited = 1
            answer = partial(self._on_resync, server)
            self.ask(session, Kind.RESYNC, [encode_json(raw)], answer)

    def ask(
        self,
        session: Session,
        kind: Kind,
        body: Sequence[Frame],
        then: Callable[[Session, Header, Sequence[Frame]], None],
        *,
        patient: bool = False,
    ) -> None:
        """Put a request to a server; what answers it in this session goes to `then`."""
        token = session.token

        def answer(header: Header, frames: Sequence[Frame]) -> None:
            if session.token != token:
                return
            if header.kind is Kind.REFUSED:
                self._refused(session, header, frames)
            else:
                then(session, header, frames)

        if not session.link.request(self._worker.header(kind), body, answer, patient=patient):
            self.retry(session)

    def _on_created(
        self, server: int, table: int, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        if decode_json(frames[1]).get("wanted"):
            session.wanting.add(table)
        # Without slots there is nothing to wait for.
        following = Stage.PROBE if server in self.copy.servers else Stage.RESYNC
        self._on_step(server, following, session, header, frames)

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
        self.pushes.lost |= Stretches.read(str(raw.get("lost", "")))
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
            (h.batch, partial(self.sender.held, server, h)) for h in self.pushes.held.values()
        ]
        under_way += [
            (done.first, partial(self.sender.sealed, server, done))
            for done in self.pushes.sealed.get(server, [])
        ]
        for _, send in sorted(under_way, key=lambda item: item[0]):
            send()
        self.puller.ask(server)

    def _refused(self, session: Session, header: Header, frames: Sequence[Frame]) -> None:
        message = str(decode_json(frames[1]).get("message", ""))
        if header.flags == Refusal.NOT_KEPT and self._worker.wanted is not None:
            self._worker.wanted.unkept = True
            return
        if header.flags == Refusal.TABLE_MISMATCH:
            raise TableMismatchError(message)
        if header.flags in (Refusal.MALFORMED, Refusal.TOO_LARGE, Refusal.OVERLAP):
            raise ConfigurationError(f"{session.link.peer.id} refused: {message}")
        self.retry(session)

    def _send_initial(self, server: int, session: Session) -> None:
        """INIT for each table that wants it. Answers are not waited for: a pull shows what came."""
        for group in self.copy.groups_of(server):
            for table, values in zip(group.layout.tables, self._worker.initial, strict=True):
                if table.table.id not in session.wanting:
                    continue
                part = TablePush(table.table.id, 0.0, values[table.rows])
                push = Push(self._worker.me.index, 1, 1, 1, 0, group.mask, (part,))
                session.link.request(self._worker.header(Kind.INIT), encode_push(push), None)

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
