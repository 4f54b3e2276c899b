"""The worker's I/O thread: it owns the connections, and everything that has to go on by itself.

The training thread hands over batches and waits; the two share state under one lock. Whatever
breaks is mended in one way: the server's session begins anew (tables, initial values, resync, what
is held), and every step of that is idempotent.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from http import HTTPStatus

import numpy as np
import zmq

from daruma_trainer.agent import Agent, Command, Outcome, ViewCell
from daruma_trainer.applied import complete_until
from daruma_trainer.contract import (
    SLOTS,
    ContractError,
    Member,
    Membership,
    Report,
    Role,
    WorkersMeanwhile,
    slots_to_hex,
)
from daruma_trainer.errors import (
    ConfigurationError,
    DarumaError,
    GaveUpError,
    ReplacedError,
    TableMismatchError,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, TableSpec
from daruma_trainer.links import Answer, Link
from daruma_trainer.wire import (
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
    encode_state,
    from_bitmap,
)
from daruma_trainer.worker.copies import Group, HostCopy
from daruma_trainer.worker.metrics import exposition
from daruma_trainer.worker.pushes import Accumulation, Held, Pushes, Update

LOG = logging.getLogger("daruma")
HEARTBEAT_SECONDS = 0.25
RETRY_SECONDS = 0.03
TICK_MS = 20


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


@dataclass(slots=True)
class Wanted:
    """A pull that the training thread waits for."""

    min_step: int
    missing: Slots = field(default_factory=lambda: np.ones(SLOTS, np.bool_))


class Client:
    """Everything of a worker but the user's program. Close it when the program ends."""

    def __init__(self, identity: Identity) -> None:
        self.me = identity
        self.lock = threading.Condition()
        self.membership: Membership | None = None
        self.copy: HostCopy | None = None
        self.pushes: Pushes | None = None
        self.initial: list[Floats] = []
        self.state = "Joining"
        self.batch = 0
        self.generation = 0
        self.released = False
        self.finished = -1
        """The generation in which all workers reached the end of their batches."""
        self.said = False
        self.stopped: str | None = None
        self.own_stop: str | None = None
        self.loss: float | None = None
        self.total_steps: int | None = None
        self.values: dict[str, float] = {}
        self.failure: DarumaError | None = None
        self.blocked_seconds = 0.0
        self.wanted: Wanted | None = None
        self.resumed = False
        self._acked_epoch_at: tuple[int, float] = (0, 0.0)
        self._sessions: dict[int, Session] = {}
        self._todo: list[Callable[[], None]] = []
        """Sends that the training thread wants: sockets belong to the I/O thread alone."""
        self._announced = 0
        """Number of tables that the servers were told of."""
        self._shown: tuple[object, ...] = ()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller.register(self._wake, zmq.POLLIN)
        self._closing = False
        self.cell = ViewCell(self._report())
        self._agent = Agent(
            identity.agent_listen, identity.token, self.cell, self._command,
            lambda: exposition(self),
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="daruma-io", daemon=True)
        self._thread.start()

    # For the training thread

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until `ready()`, or raise: GaveUpError after `seconds`, or what went wrong."""
        end = time.monotonic() + seconds
        with self.lock:
            while not ready():
                if self.failure is not None:
                    raise self.failure
                left = end - time.monotonic()
                if left <= 0:
                    raise GaveUpError(f"{self.me.id}: {what} did not happen within {seconds:g} s")
                self.lock.wait(min(left, 1.0))
            if self.failure is not None:
                raise self.failure

    def add_table(self, spec: TableSpec, initial: Floats) -> None:
        """Declare a table; `announce` makes all declared ones on every server."""
        with self.lock:
            self._copy.add(spec)
            self.initial.append(initial)

    def announce(self) -> None:
        """Make the declared tables on every server.

        All at once: a server whose first tables have their values is open for business, and
        nobody shall pull a later one before its values have come.
        """
        with self.lock:
            if self._announced == len(self._copy.specs):
                return
            self._copy.arrange()
            self._announced = len(self._copy.specs)
            for session in self._sessions.values():
                self._begin(session)
        self.wake()

    def pull(self, min_step: int) -> Wanted:
        """Ask for every slot; wait for `missing` to be empty."""
        with self.lock:
            wanted = self.wanted = Wanted(min_step)
            self._todo += [partial(self._send_pulls, server) for server in self._sessions]
        self.wake()
        return wanted

    def push(self, updates: tuple[Update, ...], generation: int) -> None:
        """Give a batch the next number and send it to whoever can be reached.

        One of another generation is dropped: a rollback came since it was computed.
        """
        with self.lock:
            if generation != self.generation:
                return
            self.batch += 1
            pushes = self._pushes
            pushes.begin(self.batch)
            held = Held(self.batch, self._epoch, updates)
            pushes.hold(held)
            now = time.monotonic()
            replay = self.replays
            for server in range(self._membership.servers):
                session = self._sessions.get(server)
                reachable = session is not None and session.stage is Stage.SYNCED
                if reachable:
                    self._todo.append(partial(self._send_held, server, held))
                elif replay and pushes.may_accumulate(server, now):
                    mask = self._copy.slots_of(server)
                    pushes.accumulate(held, server, mask, now, self._rules)
        self.wake()

    def resume(self, generation: int) -> bool:
        """After a complete pull: go on at the first batch that some slot lacks.

        False: a rollback to another generation came meanwhile, so the pull has to be made again.
        Slots of servers that are younger than this worker were lost with its predecessor, or
        after it: what they lack nobody can compute again (the floor, protocol "Losing workers").
        """
        with self.lock:
            if generation != self.generation:
                return False
            copy, me = self._copy, self.me
            older = [
                m.index for m in self._membership.of(Role.SERVER) if m.incarnation < me.incarnation
            ]
            known = np.isin(copy.owner, older)
            entries = zip(
                copy.last[:, me.index].tolist(), copy.window[:, me.index].tolist(), strict=True
            )
            done = np.array([complete_until(*entry) for entry in entries])
            self.batch = int(done[known].min() if known.any() else done.max())
            self._pushes.drop_all(self.batch)
            self.resumed = True
            for session in self._sessions.values():
                self._begin(session)
        self.wake()
        return True

    def say(self) -> None:
        """Send the report now; `said` becomes true once a server has it."""
        with self.lock:
            self.said = False
            self._todo.append(partial(self._heartbeat, self._heard))
        self.wake()

    @property
    def replays(self) -> bool:
        """Whether this worker goes on while a server is away."""
        settings = self._membership.settings
        return settings.consistency == "Async" and settings.meanwhile is WorkersMeanwhile.REPLAY

    def away(self) -> Slots:
        """Slots whose server cannot be reached, of a worker that may go on without them."""
        mask = np.zeros(SLOTS, np.bool_)
        if self.replays and self._pushes is not None and self.resumed:
            now = time.monotonic()
            for server in range(self._membership.servers):
                session = self._sessions.get(server)
                synced = session is not None and session.stage is Stage.SYNCED
                if not synced and self._pushes.may_accumulate(server, now):
                    mask |= self._copy.slots_of(server)
        return mask

    def wake(self) -> None:
        """Let the I/O thread look again."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Stop the I/O thread and the agent."""
        self._closing = True
        self.wake()
        self._thread.join(5.0)
        self._agent.close()

    # The I/O thread

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            with self.lock:
                if not self._closing:
                    # The traceback is in the log; nobody shall wait for a thread that is gone.
                    self.failure = GaveUpError(f"{self.me.id}: its I/O thread broke")
                self.lock.notify_all()
            for session in self._sessions.values():
                session.link.close()
            self._context.destroy(linger=0)

    def _loop(self) -> None:
        beat = 0.0
        while not self._closing:
            ready = dict(self._poller.poll(TICK_MS))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            with self.lock:
                try:
                    self._turn()
                except DarumaError as error:
                    self.failure = error
                except ContractError as error:
                    LOG.warning("passed over a message: %s", error)
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    self._heartbeat()
                self._publish()
                self.lock.notify_all()

    def _turn(self) -> None:
        if self._relink_later:
            self._relink_later = False
            self._relink()
        todo, self._todo = self._todo, []
        for send in todo:
            send()
        now = time.monotonic()
        for server, session in list(self._sessions.items()):
            for event in session.link.receive(self._unasked):
                if event == "disconnected" and session.stage is not Stage.TABLES:
                    self._begin(session)
                elif event == "connected":
                    session.retry_at = 0.0
            if session.retry_at is not None and now >= session.retry_at:
                session.retry_at = None
                self._advance(server, session)

    def _heard(self, _header: Header, _frames: Sequence[Frame]) -> None:
        self.said = True

    def _heartbeat(self, answer: Answer = lambda _header, _frames: None) -> None:
        own = self._report()
        self.cell.publish(self._epoch, own, {})
        body = [encode_json(own.to_json())]
        for session in self._sessions.values():
            session.link.expire(120.0)
            session.link.request(self._header(Kind.REPORT), body, answer)

    def _publish(self) -> None:
        own = self._report()
        shown = (
            own.state, own.epoch, own.acked_epoch, own.copies, own.stop, own.error,
            {s.id for s in own.suspects},
        )  # fmt: skip
        if shown != self._shown:
            self._shown = shown
            self._heartbeat()

    def _report(self) -> Report:
        pushes, membership, copy = self.pushes, self.membership, self.copy
        epoch = 0 if membership is None else membership.epoch
        report = Report(
            self.me.id, epoch, self.state, generation=self.generation, loss=self.loss,
            total_steps=self.total_steps, stop=self.own_stop, metrics=dict(self.values),
            error=None if self.failure is None else str(self.failure),
        )  # fmt: skip
        if pushes is None or copy is None or membership is None:
            return report
        if pushes.acked_epoch > self._acked_epoch_at[0]:
            self._acked_epoch_at = (pushes.acked_epoch, time.monotonic())
        seconds = membership.settings.suspect_seconds
        suspects = [s.link.suspect(seconds) for s in self._sessions.values()]
        return replace(
            report,
            step=pushes.acked,
            suspects=tuple(s for s in suspects if s is not None),
            copies=copy.versions() if membership.recovery is not None else (),
            acked_epoch=pushes.acked_epoch,
            acked_age=time.monotonic() - self._acked_epoch_at[1] if pushes.acked_epoch else None,
            pending=pushes.pending,
            replayed=pushes.replayed,
            lost=len(pushes.lost),
        )

    # Membership

    def _command(self, command: Command) -> Outcome:
        if not isinstance(command.body, Membership):
            return Outcome(HTTPStatus.CONFLICT, "a worker takes memberships alone")
        with self.lock:
            return self._adopt(command.body)

    def _adopt(self, new: Membership) -> Outcome:
        old = self.membership
        if old is not None and new.epoch <= old.epoch:
            known = Outcome(HTTPStatus.CONFLICT, f"this worker is at epoch {old.epoch} already")
            return Outcome() if new == old else known
        if new.name != self.me.job or new.namespace != self.me.namespace:
            return Outcome(HTTPStatus.CONFLICT, f"this worker is of job {self.me.job}")
        mine = new.member(Role.WORKER, self.me.index)
        if mine is None or mine.incarnation != self.me.incarnation:
            self.failure = ReplacedError(f"{self.me.id} was replaced in epoch {new.epoch}")
            self.lock.notify_all()
            return Outcome(HTTPStatus.CONFLICT, "this incarnation was replaced")
        self.membership = new
        if old is None:
            self.copy = HostCopy(new.job_uid, new.servers, new.workers)
            self.pushes = Pushes(new.settings.replay)
        if new.rollback.generation > self.generation:
            self._roll_back(new.rollback.generation)
        self.wake()
        self._relink_later = True
        self.lock.notify_all()
        return Outcome()

    _relink_later = False

    def _relink(self) -> None:
        wanted = {m.index: m for m in self._membership.of(Role.SERVER) if m.address is not None}
        for index, session in list(self._sessions.items()):
            if index not in wanted or wanted[index] != session.link.peer:
                session.link.close()
                del self._sessions[index]
        for index, member in wanted.items():
            if index not in self._sessions:
                self._sessions[index] = Session(self._link(member), retry_at=0.0)

    def _link(self, member: Member) -> Link:
        return Link(self._context, self.me.id, self.me.token, member, self._poller)

    def _roll_back(self, generation: int) -> None:
        """Drop all that is under way; the batch number follows from the next complete pull."""
        self.generation = generation
        self.resumed = False
        self._pushes.drop_all(0)
        if self.wanted is not None:
            # What was pulled before is of a lineage that is no more.
            self.wanted.missing[:] = True
        for session in self._sessions.values():
            self._begin(session)

    # Sessions

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
        copy = self._copy
        if not copy.specs or self._announced < len(copy.specs):
            return
        if session.stage is Stage.TABLES:
            session.token += 1
            session.awaited = len(copy.specs)
            for spec in copy.specs:
                body = [encode_json(spec.to_json())]
                answer = partial(self._on_created, server, spec.id)
                self._ask(session, Kind.CREATE, body, answer)
        elif session.stage is Stage.PROBE:
            lowest = min(m.index for m in self._membership.of(Role.WORKER))
            if self.me.index == lowest:
                self._send_initial(server, session)
            session.awaited = 1
            meta = PULL.pack(0, 0, 0) + bitmap(copy.slots_of(server))
            self._ask(session, Kind.PULL, [meta], partial(self._on_step, server, Stage.RESYNC))
        elif session.stage is Stage.RESYNC:
            if not self.resumed:
                # The first pull decides at which batch this worker goes on; nothing is held yet.
                session.stage = Stage.SYNCED
                self._send_pulls(server)
                return
            raw = {
                "worker": self.me.index,
                "done": self.batch,
                "held": self._pushes.unsent(server),
                "slots": slots_to_hex(np.flatnonzero(copy.slots_of(server)).tolist()),
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

        if not session.link.request(self._header(kind), body, answer, patient=patient):
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
        self._pushes.lost |= {int(b) for b in decode_json(frames[1]).get("lost", [])}
        session.stage = Stage.SYNCED
        self._pushes.seal(server, self._copy.moved, self._rules)
        # In the order of their batches: a slot takes what is older than its window for applied.
        under_way: list[tuple[int, Callable[[], None]]] = [
            (h.batch, partial(self._send_held, server, h)) for h in self._pushes.held.values()
        ]
        under_way += [
            (done.first, partial(self._send_sealed, server, session, done))
            for done in self._pushes.sealed.get(server, [])
        ]
        for _, send in sorted(under_way, key=lambda item: item[0]):
            send()
        self._send_pulls(server)

    def _refused(self, session: Session, header: Header, frames: Sequence[Frame]) -> None:
        message = str(decode_json(frames[1]).get("message", ""))
        if header.flags == Refusal.TABLE_MISMATCH:
            raise TableMismatchError(message)
        if header.flags in (Refusal.MALFORMED, Refusal.TOO_LARGE, Refusal.OVERLAP):
            raise ConfigurationError(f"{session.link.peer.id} refused: {message}")
        self._retry(session)

    def _send_initial(self, server: int, session: Session) -> None:
        """INIT for each table that wants it. Answers are not waited for: a pull shows what came."""
        for group in self._groups(server):
            for table, values in zip(group.layout.tables, self.initial, strict=True):
                if table.table.id not in session.wanting:
                    continue
                part = TablePush(table.table.id, 0.0, values[table.rows])
                push = Push(self.me.index, 1, 1, 1, 0, group.mask, (part,))
                session.link.request(self._header(Kind.INIT), encode_push(push), None)

    def _send_held(self, server: int, held: Held) -> None:
        session = self._sessions.get(server)
        if session is None or session.stage is not Stage.SYNCED:
            return  # it goes out when the session is there again
        for group in self._groups(server):
            if held.unacked[group.mask].any():
                answer = partial(self._on_ack, held.batch, group.mask)
                parts = _parts(held.updates, group)
                push = Push(
                    self.me.index, held.batch, held.batch, 1, self._pushes.acked, group.mask, parts
                )
                self._ask(session, Kind.PUSH, encode_push(push), answer, patient=True)

    def _send_sealed(self, server: int, session: Session, done: Accumulation) -> None:
        for group in self._groups(server):
            parts = _parts(tuple(done.tables.values()), group)
            push = Push(
                self.me.index, done.first, done.last, done.count, self._pushes.acked,
                group.mask, parts,
            )  # fmt: skip
            answer = partial(self._on_sealed, server, done.first, done.last)
            self._ask(session, Kind.PUSH, encode_push(push), answer, patient=True)

    def _send_pulls(self, server: int) -> None:
        wanted, session = self.wanted, self._sessions.get(server)
        if wanted is None or session is None or session.stage is not Stage.SYNCED:
            return
        for group in self._groups(server):
            if wanted.missing[group.mask].any():
                meta = PULL.pack(wanted.min_step, len(self._copy.specs), 0) + bitmap(group.mask)
                answer = partial(self._on_state, wanted)
                self._ask(session, Kind.PULL, [meta], answer, patient=True)

    def _on_ack(
        self, batch: int, mask: Slots, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        del header
        applied = from_bitmap(frames[1][: SLOTS // 8])
        overlap = from_bitmap(frames[1][SLOTS // 8 :])
        if overlap.any():
            self._pushes.lost.add(batch)
        self._pushes.note_applied(batch, applied | overlap)
        if self._membership.settings.consistency == "Async" and not (applied | overlap)[mask].all():
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
        if from_bitmap(frames[1][SLOTS // 8 :]).any():
            self._pushes.lost |= set(range(first, last + 1))
        self._pushes.drop_sealed(server, last)

    def _on_state(
        self, wanted: Wanted, session: Session, header: Header, frames: Sequence[Frame]
    ) -> None:
        del session, header
        state = decode_state(frames)
        taken = self._copy.take(state)
        slots = np.flatnonzero(taken)
        self._pushes.note_state(slots, self._copy.last[slots, self.me.index])
        wanted.missing &= ~taken

    def _unasked(self, link: Link, header: Header, frames: Sequence[Frame]) -> None:
        """What a server sends by itself."""
        if header.kind is Kind.MEMBERSHIP:
            self._adopt(Membership.from_json(decode_json(frames[1])))
        elif header.kind is Kind.FETCH:
            state = self._copy.give(from_bitmap(frames[1]))
            reply = replace(self._header(Kind.COPY), request=header.request)
            link.send(replace(reply, incarnation=link.peer.incarnation), encode_state(state))
        elif header.kind is Kind.EPOCH and self.membership is not None:
            reply = replace(self._header(Kind.MEMBERSHIP), incarnation=link.peer.incarnation)
            link.send(reply, [encode_json(self.membership.to_json())])
        elif header.kind is Kind.READY:
            for session in self._sessions.values():
                if session.link is link and session.stage is not Stage.SYNCED:
                    self._begin(session)
        elif header.kind is Kind.RELEASED:
            self.released = True
        elif header.kind is Kind.FINISHED:
            self.finished = header.generation
        elif header.kind is Kind.STOP:
            self.stopped = str(decode_json(frames[1]).get("reason"))[:1000]

    # Shorthands

    def _groups(self, server: int) -> list[Group]:
        return [group for group in self._copy.groups if group.server == server]

    def _header(self, kind: Kind) -> Header:
        return Header(kind, 0, self._epoch, 0, self.generation)

    @property
    def _epoch(self) -> int:
        return 0 if self.membership is None else self.membership.epoch

    @property
    def _membership(self) -> Membership:
        if self.membership is None:
            raise ContractError("no membership yet")
        return self.membership

    @property
    def _copy(self) -> HostCopy:
        if self.copy is None:
            raise ContractError("no membership yet")
        return self.copy

    @property
    def _pushes(self) -> Pushes:
        if self.pushes is None:
            raise ContractError("no membership yet")
        return self.pushes

    @property
    def _rules(self) -> list[str]:
        return [decode_json(spec.rule.encode())["rule"] for spec in self._copy.specs]


def _parts(updates: tuple[Update, ...], group: Group) -> tuple[TablePush, ...]:
    """Cut a batch's updates down to one message's slots."""
    parts = []
    for update in updates:
        layout = group.layout.tables[update.table]
        if update.rows is None:
            parts.append(TablePush(update.table, update.lr, update.values[layout.rows]))
            continue
        mine = np.isin(update.rows, layout.rows)
        if mine.any():
            rows = update.rows[mine]
            parts.append(TablePush(update.table, update.lr, update.values[mine], rows))
    return tuple(parts)
