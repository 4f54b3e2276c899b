"""The serve loop: one thread that owns all of a server's state.

It takes requests from workers and siblings, commands from the agent and results from the store's
thread, in turn. Everything else in this package is called from here and from nowhere else.
"""

import contextlib
import logging
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from http import HTTPStatus
from typing import Any

import zmq

from daruma_trainer.agent import COMMAND_SECONDS, Agent, Command, Outcome, ViewCell
from daruma_trainer.checkpoint.export import load_state, open_cut
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.contract import (
    ContractError,
    ExitCode,
    Member,
    Membership,
    Report,
    Restore,
    Role,
)
from daruma_trainer.errors import ConfigurationError, StoreError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.links import Link, open_socket
from daruma_trainer.server.authentication import Gate
from daruma_trainer.server.background import Background
from daruma_trainer.server.cuts import FIRST, Cuts
from daruma_trainer.server.data import DataPlane, Reply, refuse, worker_of
from daruma_trainer.server.fencing import Fence
from daruma_trainer.server.metrics import exposition
from daruma_trainer.server.reporting import Reports, report_of
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.server.saving import Saver, Written
from daruma_trainer.server.slots import SlotState
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
AGAIN_SECONDS = 1.0
"""Between two tries to save for the first time."""
QUICK_SECONDS = 0.1
"""At most one new view in this time, unless something important changed: mere progress shall not
keep the operator busy."""
BATCH = 64
"""Requests handled before commands and timers get their turn."""
DATA = frozenset({Kind.CREATE, Kind.INIT, Kind.PUSH, Kind.PULL, Kind.RESYNC})


class Server:
    """One incarnation of one server. `run` returns its exit code."""

    def __init__(self, identity: Identity) -> None:
        self.me = identity
        self.membership: Membership | None = None
        self.plane: DataPlane | None = None
        self.store: Store | None = None
        self.saver: Saver | None = None
        self.restorer: Restorer | None = None
        self.cuts: Cuts | None = None
        self.background: Background | None = None
        self.initialised = False
        self.generation = 0
        self.stale = 0
        self._rolling = False
        self._first: str | None = None
        self._first_after = 0.0
        self._relink_due = False
        self._exit: int | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, identity.token)
        self._router = open_socket(self._context, zmq.ROUTER)
        self._router.router_handover = True
        self._router.router_mandatory = True
        self._gate.guard(self._router)
        host, port = identity.listen
        self._router.bind(f"tcp://{host}:{port}")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._poller = zmq.Poller()
        for socket in (self._router, self._gate.socket, self._wake):
            self._poller.register(socket, zmq.POLLIN)
        self._links: dict[str, Link] = {}
        self._connected: dict[str, float] = {}
        self.reports = Reports()
        self._fence = Fence(self._ask_around)
        self._cell = ViewCell(Report(identity.id, 0, "Joining"))
        self._published = 0.0
        self._shown: tuple[object, ...] = ()
        self._agent = Agent(
            identity.agent_listen, identity.token, self._cell, self.command, self._scrape
        )

    # The loop

    def run(self) -> int:
        """Serve until told to stop or replaced; returns the exit code."""
        beat = 0.0
        try:
            while self._exit is None:
                ready = dict(self._poller.poll(self._timeout(beat)))
                self._fence.turn()
                if self._gate.socket in ready:
                    self._gate.answer()
                if self._wake in ready:
                    self._run_inbox()
                if self._router in ready:
                    self._serve()
                for link in self._links.values():
                    link.receive(self._from_sibling)
                self._relink()
                if time.monotonic() - beat > HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    self._tell_siblings()
                self._after()
        finally:
            self._close()
        return self._exit

    def stop(self, code: int = ExitCode.OK) -> None:
        """End the loop after the request in progress. Safe to call from a signal handler."""
        self._exit = code
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def post(self, call: Callable[[], None]) -> None:
        """Run something on the loop's thread. Safe from any thread."""
        self._inbox.put(call)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def command(self, command: Command) -> Outcome:
        """Run an operator's command on the loop's thread and wait for what became of it."""
        future: Future[Outcome] = Future()

        def obey() -> None:
            future.set_result(self._obey(command))

        self.post(obey)
        try:
            return future.result(COMMAND_SECONDS)
        except FutureTimeoutError:
            return Outcome(HTTPStatus.SERVICE_UNAVAILABLE, "the serve loop is busy: try again")

    def _timeout(self, beat: float) -> int:
        restoring = self.restorer is not None and self.restorer.plan is not None
        busy = self._rolling or (restoring and not self.initialised)
        rest = HEARTBEAT_SECONDS - (time.monotonic() - beat)
        return max(0, int(1000 * min(rest, 0.02 if busy else rest)))

    def _run_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while True:
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return
            call()

    def _after(self) -> None:
        """What follows from what was just handled."""
        plane = self.plane
        if plane is None:
            return
        if self.restorer is not None and self.restorer.report and not self.restorer.report.done:
            self.restorer.tick()
        if not self._rolling and plane.slots.ready.all() and plane.shard.tables:
            self._initialise()
            if self.saver is not None:
                self.saver.tick()
            if self.cuts is not None:
                self.cuts.tick()
        if plane.waiting and plane.hold is None:
            for waiting in plane.take_waiting():
                self._dispatch_data(waiting.identity, waiting.header, waiting.frames)
        self._publish()

    # Requests

    def _serve(self) -> None:
        for _ in range(BATCH):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._fence.turn()
            parts = [frame.buffer for frame in frames]
            identity = bytes(parts[0])
            if len(frames) < 2 or self._gate.user_of(frames[1]) != identity:
                continue  # a peer that took another's name: nothing of it is read
            try:
                self._dispatch(identity, parts[1:])
            except ContractError as error:
                header = self._header(Kind.REFUSED)
                with contextlib.suppress(ContractError):
                    header = Header.decode(parts[1:])
                self._reply(identity, header, refuse(Refusal.MALFORMED, str(error)))

    def _dispatch(self, identity: bytes, frames: Sequence[Frame]) -> None:
        header = Header.decode(frames)
        member = identity.decode()
        self._connected[member] = time.monotonic()
        if header.kind in DATA:
            self._dispatch_data(identity, header, frames)
        elif header.kind is Kind.COPY:
            if self.restorer is not None:
                self.restorer.on_copy(member, header.request, decode_state(frames))
        elif header.kind is Kind.REPORT:
            self._take_report(member, Report.from_json(decode_json(frames[1])))
            self._reply(identity, header, Reply(Kind.OK, [b"{}"]))
        elif header.kind is Kind.EPOCH:
            self._tell_membership(identity, header.request)
        elif header.kind is Kind.MEMBERSHIP:
            self._take_membership(member, frames)
        elif header.kind is Kind.CUT:
            if self.cuts is not None and member in self._members():
                self.cuts.receive(decode_json(frames[1]))
        elif header.kind is Kind.HELLO:
            self._reply(identity, header, Reply(Kind.OK, [b"{}"]))
        else:
            raise MalformedError(f"{header.kind.name} is no request")
        self._fence.heard()

    def _dispatch_data(self, identity: bytes, header: Header, frames: Sequence[Frame]) -> None:
        reply = self._guard(identity, header)
        if reply is None and self.plane is not None:
            handlers: dict[Kind, Callable[[], Reply | None]] = {
                Kind.CREATE: lambda: self._create(frames),
                Kind.INIT: lambda: self._plane.init(frames),
                Kind.PUSH: lambda: self._plane.push(identity, header, frames),
                Kind.PULL: lambda: self._plane.pull(identity, header, frames),
                Kind.RESYNC: lambda: self._plane.resync(identity, frames),
            }
            reply = handlers[header.kind]()
        if reply is not None:
            self._reply(identity, header, reply)

    def _guard(self, identity: bytes, header: Header) -> Reply | None:
        """Refuse what is meant for somebody else, or comes from somebody who does not count."""
        membership = self.membership
        if membership is None or self.plane is None:
            return refuse(Refusal.UNSURE, "no membership yet")
        if header.incarnation != self.me.incarnation:
            self.stale += 1
            return refuse(Refusal.STALE_INCARNATION, f"this is {self.me.id}")
        if header.epoch > membership.epoch:
            self._send(identity, self._header(Kind.EPOCH), [b"{}"])
            return refuse(Refusal.UNSURE, "a newer membership is on its way")
        index = worker_of(identity.decode())
        sender = membership.member(Role.WORKER, index)
        if sender is None or sender.id != identity.decode():
            self.stale += 1
            return refuse(Refusal.STALE_INCARNATION, f"worker {index} was replaced")
        if header.generation != self.generation or self._rolling:
            return refuse(Refusal.WRONG_GENERATION, f"this is generation {self.generation}")
        if not self._fence.sure():
            return refuse(Refusal.UNSURE, "asking for the newest membership")
        return None

    def _create(self, frames: Sequence[Frame]) -> Reply:
        reply = self._plane.create(frames)
        if self.restorer is not None and self.restorer.report and not self.restorer.report.done:
            self.restorer.tick()
        return reply

    def _reply(self, identity: bytes, request: Header, reply: Reply) -> None:
        header = Header(
            reply.kind, request.request, self._epoch, self.me.incarnation, self.generation,
            reply.flags,
        )  # fmt: skip
        self._send(identity, header, reply.body)
        if request.epoch < self._epoch:
            self._tell_membership(identity, 0)

    def _send(self, identity: bytes, header: Header, body: Sequence[Frame]) -> bool:
        try:
            self._router.send_multipart([identity, header.encode(), *body], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            return False  # gone, or it does not read: it will ask again
        return True

    def _from_sibling(self, link: Link, header: Header, frames: Sequence[Frame]) -> None:
        """What a sibling sends unasked over the connection that this server opened to it."""
        with contextlib.suppress(ContractError):
            if header.kind is Kind.MEMBERSHIP:
                self._take_membership(link.peer.id, frames)

    # Membership

    def _header(self, kind: Kind, request: int = 0) -> Header:
        return Header(kind, request, self._epoch, self.me.incarnation, self.generation)

    @property
    def _epoch(self) -> int:
        return 0 if self.membership is None else self.membership.epoch

    @property
    def _plane(self) -> DataPlane:
        if self.plane is None:
            raise ContractError("no membership yet")
        return self.plane

    def _members(self) -> set[str]:
        return set() if self.membership is None else {m.id for m in self.membership.members}

    def _obey(self, command: Command) -> Outcome:
        if isinstance(command.body, Membership):
            return self._adopt(command.body)
        if self.plane is None:
            return Outcome(HTTPStatus.CONFLICT, "a membership has to come first")
        if isinstance(command.body, Restore):
            return self._restore(command.body)
        if self.cuts is not None and self.membership and self.membership.settings.final:
            self.cuts.take_final(command.body["number"])
        else:
            self._final_without_store()
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
        if mine is None or mine.incarnation != self.me.incarnation:
            LOG.warning("replaced by %s in epoch %s", mine and mine.id, new.epoch)
            self.stop(ExitCode.STALE)
            return Outcome(HTTPStatus.CONFLICT, "this incarnation was replaced")
        self.membership = new
        if old is None:
            self._begin(new)
        if self.cuts is not None:
            self.cuts.membership = new
        self.initialised |= new.initialised and bool(self._plane.slots.ready.all())
        if new.rollback.generation > self.generation:
            self._roll_back(new)
        self._relink_due = True
        for identity in [i for i in self._connected if i in self._members()]:
            self._tell_membership(identity.encode(), 0)
        self._publish(now=True)
        return Outcome()

    def _begin(self, membership: Membership) -> None:
        """Make the shard; the first membership says which slots are ours."""
        self.plane = DataPlane(membership, self.me.index, self.me.incarnation)
        settings = membership.settings
        if settings.store is not None:
            try:
                self.store = open_store(settings.store)
            except ConfigurationError as error:
                LOG.error("%s", error)
                self.stop(ExitCode.USAGE)
                return
            self.background = Background(self.post)
            self.saver = Saver(self.plane, self.store, self.background, membership, self.me.index)
            self.cuts = Cuts(
                self.plane, self.saver, self.store, self.background, self.me.index,
                self._tell_cut, membership,
            )  # fmt: skip
        if settings.restore_from is not None and not membership.initialised:
            self._warm_start(self.plane, settings.restore_from)
        self.restorer = Restorer(
            self.plane, self.store, self.background, membership.prefix, self.me.index,
            self._fetch, self._all_back,
        )  # fmt: skip
        self.generation = 0

    def _warm_start(self, plane: DataPlane, uri: str) -> None:
        """Take another job's result for initial values, whatever its number of servers was."""
        plane.warm = ""
        background = self.background = self.background or Background(self.post)

        def read() -> dict[str, Floats]:
            return load_state(*open_cut(uri))

        def done(tables: dict[str, Floats] | None, error: StoreError | None) -> None:
            plane.warm = f"restoreFrom: {error}" if tables is None else tables

        background.submit(read, done)

    def _relink(self) -> None:
        """Follow the membership; not while a link is being read, since this closes links."""
        membership = self.membership
        if membership is None or not self._relink_due:
            return
        self._relink_due = False
        wanted = {
            m.id: m
            for m in membership.of(Role.SERVER)
            if m.index != self.me.index and m.address is not None
        }
        for gone in [i for i in self._links if i not in wanted]:
            self._links.pop(gone).close()
        for peer_id, member in wanted.items():
            if peer_id not in self._links:
                self._links[peer_id] = self._link(member)

    def _link(self, member: Member) -> Link:
        return Link(self._context, self.me.id, self.me.token, member, self._poller)

    def _tell_membership(self, identity: bytes, request: int) -> None:
        if self.membership is not None:
            header = self._header(Kind.MEMBERSHIP, request)
            self._send(identity, header, [encode_json(self.membership.to_json())])

    def _ask_around(self, count: int) -> list[str]:
        """Ask members for their newest membership: siblings first, then workers."""
        asked: list[str] = []
        for peer_id, link in self._links.items():
            if len(asked) < count and link.connected:
                answer = partial(self._answer_epoch, peer_id)
                link.request(self._header(Kind.EPOCH), [b"{}"], answer)
                asked.append(peer_id)
        header = self._header(Kind.EPOCH)
        for member in [m for m in self._connected if m.startswith("worker-")]:
            if len(asked) < count and self._send(member.encode(), header, [b"{}"]):
                asked.append(member)
        return asked

    def _answer_epoch(self, member: str, header: Header, frames: Sequence[Frame]) -> None:
        if header.kind is Kind.MEMBERSHIP:
            with contextlib.suppress(ContractError):
                self._take_membership(member, frames)

    # Saving and restoring

    def _initialise(self) -> None:
        """Every slot is Ready: save all of it once, before the job counts as initialised."""
        if self.initialised or self._first is not None or time.monotonic() < self._first_after:
            return
        if self.saver is None or self.cuts is None or self.membership is None:
            self.initialised = True
            return
        self._first = "saving"
        if self.membership.settings.cuts and not self.membership.initialised:
            self.cuts.take(FIRST)

        def done(written: Written | None, error: str | None) -> None:
            if written is None:
                LOG.error("the first save failed: %s", error)
                self._first, self._first_after = None, time.monotonic() + AGAIN_SECONDS
                return
            self.initialised = True
            self._publish(now=True)

        self.saver.save_all("running", "", done)

    def _restore(self, plan: Restore) -> Outcome:
        if plan.incarnation != self.me.incarnation or self.restorer is None:
            return Outcome(HTTPStatus.CONFLICT, f"this is {self.me.id}")
        self.restorer.begin(plan)
        self._publish(now=True)
        return Outcome()

    def _fetch(self, member: str, ids: Ints, number: int) -> bool:
        if member not in self._connected:
            return False
        header = self._header(Kind.FETCH, number)
        return self._send(member.encode(), header, [bitmap(mask_of(ids))])

    def _all_back(self) -> None:
        """All lost slots are in memory. With a store they are saved before the first is Ready."""
        plane, saver = self._plane, self.saver
        lost = (plane.slots.state != SlotState.READY).nonzero()[0]

        def serve(_written: Written | None = None, error: str | None = None) -> None:
            if error is not None:
                LOG.error("the first save after the restore failed: %s", error)
            plane.restored(lost)
            self.initialised = True
            self._tell_workers(Kind.READY, {})
            self._publish(now=True)

        if saver is not None:
            self._first = "saving"
            saver.save_all("running", "", serve)
        else:
            serve()

    def _roll_back(self, membership: Membership) -> None:
        """Go back to the membership's cut before anything is answered at its generation."""
        plane, restorer = self._plane, self.restorer
        self.generation = membership.rollback.generation
        plane.slots.state[:] = SlotState.RESTORING
        plane.barrier.drop()
        plane.left.clear()
        plane.ended.clear()
        plane.hold = None
        plane.waiting.clear()
        if restorer is None or membership.rollback.cut is None:
            # A newcomer after a rollback that is over: it waits for its restore.
            return
        self._rolling = True

        def done(cut: Any, error: str | None) -> None:
            if cut is None:
                self.reports.error = f"cannot load the cut: {error}"
                LOG.error("cannot load %s: %s", membership.rollback.cut, error)
                self._publish(now=True)
                return
            plane.step = cut.step
            if self.cuts is not None:
                self.cuts.rolled_back(cut.step)
            if self.saver is not None:
                self.saver.rolled_back(cut.step, serve)

        def serve() -> None:
            # A newer rollback may have begun while this one was loaded or saved.
            if self.generation == membership.rollback.generation:
                self._rolling = False
                self.initialised = True
                self._publish(now=True)

        restorer.load_cut(membership.rollback.cut, done)

    def _tell_cut(self, index: int, message: dict[str, Any]) -> None:
        for link in self._links.values():
            if link.peer.index == index:
                link.request(self._header(Kind.CUT), [encode_json(message)], None)

    def _final_without_store(self) -> None:
        self.reports.final = ""
        self._publish(now=True)

    # Reports

    def _take_report(self, member: str, report: Report) -> None:
        if report.id != member:
            raise MalformedError(f"{member} reports as {report.id[:80]}")
        important = self.reports.take(report)
        if self.plane is not None and member in self._members():
            if member.startswith("worker-"):
                self._take_end(member, report)
            if report.final is not None and self.cuts is not None and not self.cuts.final:
                self.cuts.heard_final(report.final)
            if report.cut is not None and self.cuts is not None and not self._coordinates:
                self.cuts.follow(report.cut.path)
        if report.stop is not None:
            self._tell_workers(Kind.STOP, {"reason": report.stop})
        if important:
            self._publish(now=True)

    def _take_end(self, worker: str, report: Report) -> None:
        """A worker may have reached the end of its batches, or of its program."""
        index = worker_of(worker)
        if report.state in ("Finished", "Left") and report.generation == self.generation:
            self._plane.ended[index] = report.step
            workers = [m.id for m in self.membership.of(Role.WORKER)] if self.membership else []
            if self.reports.finished(workers, self.generation):
                self._tell_workers(Kind.FINISHED, {})
        if report.state == "Left":
            self._plane.worker_left(index, report.step)

    def _tell_workers(self, kind: Kind, message: dict[str, Any]) -> None:
        header = self._header(kind)
        for member in [m for m in self._connected if m.startswith("worker-")]:
            self._send(member.encode(), header, [encode_json(message)])

    def _tell_siblings(self) -> None:
        body = [encode_json(report_of(self).to_json())]
        for link in self._links.values():
            link.expire(5.0)
            link.request(self._header(Kind.REPORT), body, None)
        self.reports.forget(self._members())
        self._publish()

    def _publish(self, *, now: bool = False) -> None:
        """Show what is known, at once where something important changed."""
        own = report_of(self)
        shown = (
            own.state,
            own.epoch,
            own.initialised,
            own.final,
            own.restore,
            own.suspects,
            own.error,
        )
        now = now or shown != self._shown
        if not now and time.monotonic() - self._published < QUICK_SECONDS:
            return
        self._shown, self._published = shown, time.monotonic()
        self._cell.publish(self._epoch, own, self.reports.others(self.me.id))
        if own.final is not None:
            self._tell_workers(Kind.RELEASED, {"final": own.final})

    def suspects(self) -> list[Any]:
        """Siblings that this server cannot reach."""
        seconds = self.membership.settings.suspect_seconds if self.membership else 1.0
        found = (link.suspect(seconds) for link in self._links.values())
        return [s for s in found if s is not None]

    @property
    def _coordinates(self) -> bool:
        return self.cuts is not None and self.cuts.coordinator == self.me.index

    @property
    def rolling(self) -> bool:
        """Whether a rollback is being loaded."""
        return self._rolling

    def _scrape(self) -> bytes:
        return exposition(self)

    def _close(self) -> None:
        if self.background is not None:
            # One that was replaced has nothing to save that counts.
            self.background.close(0.0 if self._exit == ExitCode.STALE else 5.0)
        self._agent.close()
        for link in self._links.values():
            link.close()
        self._router.close(linger=200)
        self._gate.close()
        self._context.destroy(linger=200)
        os.close(self._wake)
