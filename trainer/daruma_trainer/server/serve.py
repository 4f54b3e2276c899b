"""The serve loop: one thread that owns all of a server's state.

It takes requests from workers and siblings, commands from the agent and results from the store's
thread, in turn. Everything else in this package is called from here and from nowhere else.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import zmq

from daruma_trainer.agent import Agent, Command, Outcome
from daruma_trainer.contract import (
    ContractError,
    ExitCode,
    Member,
    Membership,
    Report,
    Restore,
    Role,
    Settings,
    Suspect,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints
from daruma_trainer.links import Link
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.door import LINGER_MS, Door
from daruma_trainer.server.fencing import Fence
from daruma_trainer.server.guard import Guard
from daruma_trainer.server.guests import Guests
from daruma_trainer.server.inbox import Inbox
from daruma_trainer.server.lifecycle import Lifecycle
from daruma_trainer.server.metrics import exposition
from daruma_trainer.server.relaying import FIRST as RELAYED
from daruma_trainer.server.relaying import Relay
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.server.replies import Reply, refuse, worker_of
from daruma_trainer.server.reporting import Board, Reports, report_of
from daruma_trainer.server.siblings import Siblings
from daruma_trainer.wire import (
    Frame,
    Header,
    Kind,
    MalformedError,
    Refusal,
    bitmap,
    decode_json,
    decode_state,
    encode_json,
    mask_of,
)

LOG = logging.getLogger("daruma.server")
HEARTBEAT_SECONDS = 0.25
SAVE_SECONDS = 5.0
"""How long a server that is told to end waits for saves that it began."""
BATCH = 64
"""Requests handled before commands and timers get their turn."""
DATA = frozenset(
    {Kind.CREATE, Kind.INIT, Kind.PUSH, Kind.PULL, Kind.RESYNC, Kind.REBUILD, Kind.BEFORE}
)
STREAM = frozenset({Kind.FOLLOW, Kind.UPDATE, Kind.WHOLE})


class Server:
    """One incarnation of one server. `run` returns its exit code."""

    def __init__(self, identity: Identity) -> None:
        self.me = identity
        self.membership: Membership | None = None
        self.life = Lifecycle(identity, self)
        self._exit: int | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._door = Door(identity, self._context, self._poller)
        self._siblings = Siblings(identity, self._context, self._poller)
        self._streams = 0
        """How many connections were made to next replicas."""
        self.replicator = Replicator(identity, self._connect, self)
        self._inbox = Inbox(self._poller)
        self.reports = Reports()
        self._relay = Relay(self._question)
        self._fence = Fence(self._ask_around)
        self._guard = Guard(identity, self.life, self.replicator, self._fence, self._ask_newer)
        self._board = Board(identity.id)
        self.guests = Guests(identity, os.environ)
        self._agent = Agent(
            identity.agent_listen, identity.token, self._board.cell, self.command, self._scrape,
            self.life.hand_over,
        )  # fmt: skip

    # The loop

    def run(self) -> int:
        """Serve until told to stop or replaced; returns the exit code."""
        beat = 0.0
        try:
            while self._exit is None:
                ready = dict(self._poller.poll(self._timeout(beat)))
                self._fence.turn()
                comes = self._door.let_in(ready)
                self._inbox.turn(ready)
                if comes:
                    self._serve()
                self._siblings.turn(ready, self._from_sibling)
                self.replicator.turn(ready)
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    self._tell_siblings()
                self._after()
                self.life.work(idle=not ready)
        finally:
            self._close()
        return self._exit

    def stop(self, code: int = ExitCode.OK) -> None:
        """End the loop after the request in progress. Safe to call from a signal handler."""
        self._exit = code
        self._inbox.wake()

    def post(self, call: Callable[[], None]) -> None:
        """Run something on the loop's thread. Safe from any thread."""
        self._inbox.put(call)

    def command(self, command: Command) -> Outcome:
        """Run an operator's command on the loop's thread and wait for what became of it."""
        return self._inbox.ask(lambda: self._obey(command))

    def _timeout(self, beat: float) -> int:
        if self.life.pending:
            return 0
        busy = self.life.rolling or self.life.restoring or self.replicator.busy
        rest = HEARTBEAT_SECONDS - (time.monotonic() - beat)
        return max(0, int(1000 * min(rest, 0.02 if busy else rest)))

    def _after(self) -> None:
        """What follows from what was just handled."""
        self.guests.tick()
        self.life.tick()
        plane = self.life.plane
        if plane is not None:
            for waiting in plane.take_waiting():
                self._dispatch_data(waiting.identity, waiting.header, waiting.frames)
        self._show()

    # Requests

    def _serve(self) -> None:
        for _ in range(BATCH):
            message = self._door.receive()
            if message is None:
                return
            self._fence.turn()
            identity, frames = message
            if not frames:
                continue
            try:
                self._dispatch(identity, frames)
            except ContractError as error:
                header = self._header(Kind.REFUSED)
                with contextlib.suppress(ContractError):
                    header = Header.decode(frames)
                self._reply(identity, header, refuse(Refusal.MALFORMED, str(error)))

    def _dispatch(self, identity: bytes, frames: Sequence[Frame]) -> None:
        header = Header.decode(frames)
        member = identity.decode()
        self._door.members.add(member)
        if header.kind in DATA:
            self._dispatch_data(identity, header, frames)
        elif header.kind in STREAM:
            reply = self.replicator.take(member, header, frames)
            if reply is not None:
                self._reply(identity, header, reply)
        elif header.kind is Kind.REPORT:
            self._take_report(member, Report.from_json(decode_json(frames[1])))
            others = {"gap": self.reports.gap(self._members() - {member})}
            self._reply(identity, header, Reply(Kind.OK, [encode_json(others)]))
        elif header.kind is Kind.EPOCH:
            self._tell_membership(identity, header.request)
        elif header.kind is Kind.MEMBERSHIP:
            self._take_membership(member, frames)
        elif header.kind is Kind.HELLO:
            self._reply(identity, header, Reply(Kind.OK, [b"{}"]))
        else:
            self._take_word(member, header, frames)
        self._fence.heard()

    def _take_word(self, member: str, header: Header, frames: Sequence[Frame]) -> None:
        """What nobody waits for an answer to."""
        life = self.life
        current = header.generation == life.generation
        if header.kind is Kind.COPY:
            self._take_copy(member, header, frames)
        elif header.kind is Kind.CUT:
            siblings = self._members() if not life.frozen else set()
            if life.cuts is not None and member in siblings:
                life.cuts.receive(decode_json(frames[1]), header.generation)
        elif header.kind is Kind.HAVE:
            meant = header.incarnation == self.me.incarnation and member in self._members()
            if current and meant:
                self.replicator.has(member, frames)
        else:
            raise MalformedError(f"{header.kind.name} is no request")

    def _dispatch_data(self, identity: bytes, header: Header, frames: Sequence[Frame]) -> None:
        plane, members = self.life.plane, self.membership
        reply = self._guard.refusal(members, identity, header)
        if reply is None and plane is not None and members is not None:
            handlers: dict[Kind, Callable[[], Reply | None]] = {
                Kind.CREATE: lambda: plane.beginning.create(frames),
                Kind.INIT: lambda: plane.beginning.init(frames),
                Kind.PUSH: lambda: plane.push(identity, header, frames),
                Kind.PULL: lambda: plane.pull(identity, header, frames),
                Kind.RESYNC: lambda: plane.resync(identity, frames),
                Kind.REBUILD: lambda: plane.rebuild(identity, frames),
                Kind.BEFORE: lambda: self._relay.ask(identity, header, frames, members),
            }
            reply = handlers[header.kind]()
        if reply is not None:
            self._reply(identity, header, reply)

    def _question(self, member: str, number: int, body: bytes) -> bool:
        return self._door.send(member.encode(), self._header(Kind.FETCH, number), [body])

    def _take_copy(self, member: str, header: Header, frames: Sequence[Frame]) -> None:
        """A worker's copy: for a restore, or for another worker (Relay)."""
        if header.generation != self.life.generation:
            return  # what was asked for before a rollback is of a lineage that is no more
        if header.request < RELAYED:
            if self.life.restorer is not None:
                self.life.restorer.on_copy(member, header.request, decode_state(frames))
            return
        found = self._relay.answer(member, header.request, frames)
        if found is not None and found[1].generation == header.generation:
            self._reply(*found)

    def _reply(self, identity: bytes, request: Header, reply: Reply) -> None:
        header = Header(
            reply.kind, request.request, self._epoch, self.me.incarnation, self.life.generation,
            reply.flags,
        )  # fmt: skip
        self._door.send(identity, header, reply.body)
        if request.epoch < self._epoch:
            self._tell_membership(identity, 0)

    def _from_sibling(self, link: Link, header: Header, frames: Sequence[Frame]) -> None:
        """What a sibling sends unasked over the connection that this server opened to it."""
        with contextlib.suppress(ContractError):
            if header.kind is Kind.MEMBERSHIP:
                self._take_membership(link.peer.id, frames)

    # Membership

    def _header(self, kind: Kind, request: int = 0) -> Header:
        return Header(kind, request, self._epoch, self.me.incarnation, self.life.generation)

    @property
    def _epoch(self) -> int:
        return 0 if self.membership is None else self.membership.epoch

    def _members(self) -> set[str]:
        return set() if self.membership is None else {m.id for m in self.membership.members}

    def _obey(self, command: Command) -> Outcome:
        if isinstance(command.body, Membership):
            return self._adopt(command.body)
        if self.life.plane is None:
            return Outcome(HTTPStatus.CONFLICT, "a membership has to come first")
        if isinstance(command.body, Restore):
            return self.life.restore(command.body)
        self.life.take_final(command.body["number"])
        return Outcome()

    def _take_membership(self, member: str, frames: Sequence[Frame]) -> None:
        outcome = self._adopt(Membership.from_json(decode_json(frames[1])))
        if self._exit is None and outcome.status == HTTPStatus.NO_CONTENT:
            self._fence.answered(member)

    def _adopt(self, new: Membership) -> Outcome:
        """Take a membership if it is newer; the same again is no error."""
        old = self.membership
        if old is not None and new.epoch <= old.epoch:
            known = Outcome(HTTPStatus.CONFLICT, f"this server is at epoch {old.epoch} already")
            return Outcome() if new == old else known
        if new.name != self.me.job or new.namespace != self.me.namespace:
            return Outcome(HTTPStatus.CONFLICT, f"this server is of job {self.me.job}")
        mine = new.member(Role.SERVER, self.me.index)
        handing = any(m.id == self.me.id for m in new.handing)
        replica = any(m.id == self.me.id for m in new.replicas)
        if (
            not handing
            and not replica
            and (mine is None or mine.incarnation != self.me.incarnation)
        ):
            LOG.warning("replaced by %s in epoch %s", mine and mine.id, new.epoch)
            self.stop(ExitCode.STALE)
            return Outcome(HTTPStatus.CONFLICT, "this incarnation was replaced")
        self.membership = new
        if handing:
            self.life.freeze()
        elif mine is not None:
            if not replica:
                self.guests.follow(new, mine)
            self.life.adopt(new, replica=replica)
            if self.life.plane is not None:
                self.replicator.attach(self.life.plane)
            self.replicator.follow(new)
        self._siblings.follow(new)
        for identity in self._door.members & self._members():
            self._tell_membership(identity.encode(), 0)
        self.publish()
        return Outcome()

    def _tell_membership(self, identity: bytes, request: int) -> None:
        if self.membership is not None:
            header = self._header(Kind.MEMBERSHIP, request)
            self._door.send(identity, header, [encode_json(self.membership.to_json())])

    def _ask_around(self, count: int) -> list[str]:
        """Ask members for their newest membership: siblings first, then workers."""
        header = self._header(Kind.EPOCH)
        asked = self._siblings.ask(count, header, [b"{}"], self._answer_epoch)
        for member in self._door.workers:
            if len(asked) < count and self._door.send(member.encode(), header, [b"{}"]):
                asked.append(member)
        return asked

    def _ask_newer(self, identity: bytes) -> None:
        """Ask who knows of a newer membership for it."""
        self._door.send(identity, self._header(Kind.EPOCH), [b"{}"])

    def _answer_epoch(self, member: str, header: Header, frames: Sequence[Frame]) -> None:
        if header.kind is Kind.MEMBERSHIP:
            with contextlib.suppress(ContractError):
                self._take_membership(member, frames)

    # For replication

    def _connect(self, peer: Member) -> Link:
        # Its requests have numbers above those of every link before: what is sent twice is known.
        self._streams += 1
        first = self._streams << 32
        return Link(self._context, self.me.id, self.me.token, peer, self._poller, first)

    def stream_header(self, kind: Kind) -> Header:
        """See Surroundings of replication."""
        return self._header(kind)

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        """See Surroundings of replication."""
        return self._door.send(member.encode(), self._header(kind), body)

    def answer(self, member: bytes, request: Header, reply: Reply) -> None:
        """See Surroundings of replication."""
        self._reply(member, request, reply)

    # For the shard's life

    def fetch(self, member: str, ids: Ints, number: int) -> bool:
        """See Surroundings."""
        if member not in self._door.members:
            return False
        header = self._header(Kind.FETCH, number)
        return self._door.send(member.encode(), header, [bitmap(mask_of(ids))])

    @property
    def counted_on(self) -> bool:
        """See Surroundings."""
        return self.replicator.counted_on

    def tell_cut(self, index: int, message: dict[str, Any]) -> None:
        """See Surroundings."""
        self._siblings.tell(index, self._header(Kind.CUT), [encode_json(message)])

    def tell_workers(self, kind: Kind, message: dict[str, Any]) -> None:
        """See Surroundings."""
        header = self._header(kind)
        for member in self._door.workers:
            self._door.send(member.encode(), header, [encode_json(message)])

    def publish(self) -> None:
        """See Surroundings."""
        self._show(now=True)

    # Reports

    def _take_report(self, member: str, report: Report) -> None:
        if report.id != member:
            raise MalformedError(f"{member} reports as {report.id[:80]}")
        important = self.reports.take(report)
        plane = self.life.plane
        if plane is not None and member in self._members() and not self.life.frozen:
            if member.startswith("worker-"):
                self._take_end(plane, member, report)
            self.life.heard(report)
        if report.stop is not None:
            self.tell_workers(Kind.STOP, {"reason": report.stop})
        if important:
            self.publish()

    def _take_end(self, plane: DataPlane, worker: str, report: Report) -> None:
        """A worker may have reached the end of its batches, or of its program."""
        index, generation = worker_of(worker), self.life.generation
        if report.state in ("Finished", "Left") and report.generation == generation:
            plane.steps.ended[index] = report.step
            plane.advance()
            workers = [m.id for m in self.membership.of(Role.WORKER)] if self.membership else []
            if self.reports.finished(workers, generation):
                self.tell_workers(Kind.FINISHED, {})
        if report.state == "Left":
            plane.worker_left(index, report.step)

    def _tell_siblings(self) -> None:
        report = encode_json(report_of(self).to_json())
        self._siblings.report(self._header(Kind.REPORT), [report])
        self.reports.forget(self._members())
        self._show()

    def _show(self, *, now: bool = False) -> None:
        own = report_of(self)
        shown = self._board.show(self._epoch, own, self.reports.others(self.me.id), now=now)
        if shown and own.final is not None:
            self.tell_workers(Kind.RELEASED, {"final": own.final})

    @property
    def stale(self) -> int:
        """Requests meant for, or of, a replaced member."""
        return self._guard.stale

    def suspects(self) -> tuple[Suspect, ...]:
        """Siblings that this server cannot reach."""
        settings = Settings() if self.membership is None else self.membership.settings
        seconds = settings.suspect_seconds
        return (*self._siblings.suspects(seconds), *self.replicator.suspects(seconds))

    def _scrape(self) -> bytes:
        return exposition(self)

    def _close(self) -> None:
        self.guests.close()
        # One that was replaced has nothing to save that counts; and one that broke is to be
        # replaced now: its agent answers until it is gone.
        self.life.close(0.0 if self._exit in (ExitCode.STALE, None) else SAVE_SECONDS)
        self._agent.close()
        self._siblings.close()
        self.replicator.close()
        self._door.close()
        self._context.destroy(linger=LINGER_MS)
        self._inbox.close()
