"""What a worker's two threads share, and what each of them does with it, under one lock.

The training thread hands over batches and waits; the I/O thread (`loop`) owns the connections, and
everything that has to go on by itself. What is said to each server is in `sessions`.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus

import numpy as np

from daruma_trainer.agent import Agent, Command, Outcome, ViewCell
from daruma_trainer.contract import ContractError, Membership, Report, Role
from daruma_trainer.errors import DarumaError, GaveUpError, ReplacedError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, Ints, TableSpec
from daruma_trainer.links import Answer, Link
from daruma_trainer.wire import Frame, Header, Kind, MalformedError, decode_json, encode_json
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.loop import Loop
from daruma_trainer.worker.meanwhile import Meanwhile
from daruma_trainer.worker.metrics import exposition
from daruma_trainer.worker.outages import Outages
from daruma_trainer.worker.position import Position
from daruma_trainer.worker.pulling import Wanted
from daruma_trainer.worker.pushes import Held, Pushes, Update
from daruma_trainer.worker.reporting import Reporter
from daruma_trainer.worker.sessions import Sessions, replay_of
from daruma_trainer.worker.waiting import waited_for

LOG = logging.getLogger("daruma")
HEARTBEAT_SECONDS = 0.25
TICK_MS = 20
"""How often is looked whether it is time to ask a server again."""
CALM_MS = 100
"""And where nobody is: whether a server has left a request unanswered for too long. All else comes
with a message, or `wake`."""


class Client:
    """Everything of a worker but the user's program. Close it when the program ends."""

    def __init__(self, identity: Identity) -> None:
        self.me = identity
        self.lock = threading.Condition()
        self.membership: Membership | None = None
        self.initial: list[Floats] = []
        self.state = "Joining"
        self.batch = 0
        self.generation = 0
        self.released = False
        self.finished = -1
        """The generation in which all workers reached the end of their batches."""
        self._answers = 0
        self.stopped: str | None = None
        self.own_stop: str | None = None
        self.loss: float | None = None
        self.total_steps: int | None = None
        self.values: dict[str, float] = {}
        self.failure: DarumaError | None = None
        self.blocked_seconds = 0.0
        self.outages = Outages()
        self.wanted: Wanted | None = None
        self.rebuilds: set[int] = set()
        """Tables whose sums the program can make again."""
        self.due: dict[int, set[int]] = {}
        """By server: tables that it cleared, and that lack this worker's part."""
        self.resumed = False
        self.position = Position()
        self._reporter = Reporter()
        self._sessions: Sessions | None = None
        self._todo: list[Callable[[], None]] = []
        """Sends that the training thread wants: sockets belong to the I/O thread alone."""
        self.announced = 0
        """Number of tables that the servers were told of."""
        self._follow_later = False
        self._loop = Loop(self._go_round, self._ended)
        self._beat = 0.0
        """When the last heartbeat was."""
        self.cell = ViewCell(self._report())
        self._agent = Agent(
            identity.agent_listen, identity.token, self.cell, self._command,
            lambda: exposition(self),
        )  # fmt: skip
        self._loop.start()

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
                    why = waited_for(self.membership, self._sessions, self.wanted)
                    message = f"{self.me.id}: {what} did not come within {seconds:g} s: {why}"
                    raise GaveUpError(message)
                self.lock.wait(min(left, 1.0))
            if self.failure is not None:
                raise self.failure

    def add_table(self, spec: TableSpec, initial: Floats) -> None:
        """Declare a table; `announce` makes all declared ones on every server."""
        with self.lock:
            self._live.copy.add(spec)
            self.initial.append(initial)

    def announce(self) -> None:
        """Make the declared tables on every server.

        All at once: a server whose first tables have their values is open for business, and
        nobody shall pull a later one before its values have come.
        """
        with self.lock:
            sessions = self._live
            if self.announced == len(sessions.copy.specs):
                return
            sessions.copy.arrange()
            self.announced = len(sessions.copy.specs)
            sessions.begin_all()
        self.wake()

    def pull(self, min_step: int, *, all_workers: bool = False) -> Wanted:
        """Ask for every slot; wait for `missing` to be empty.

        `all_workers`: no slot answers before every worker's batch `min_step` has reached it.
        """
        with self.lock:
            sessions = self._live
            earlier, self.wanted = self.wanted, Wanted(min_step, all_workers)
            if earlier is not None:
                earlier.earlier = None
            wanted = self.wanted
            wanted.earlier = earlier
            self._todo += [partial(sessions.puller.ask, server) for server in sessions.by_server]
        self.wake()
        return wanted

    def pull_before(self) -> Wanted | None:
        """Ask for slots that are further than this worker's last batch, as they were; None: no slot
        is. `unkept` says that nobody has that any more.
        """
        with self.lock:
            sessions = self._live
            further = sessions.copy.last[:, self.me.index] > self.batch
            if not further.any() or sessions.membership.settings.consistency != "Sync":
                return None
            wanted = self.wanted = Wanted(self.batch, missing=further, before=True)
            self._todo += [partial(sessions.puller.ask, server) for server in sessions.by_server]
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
            sessions, pushes = self._live, self._live.pushes
            pushes.begin(self.batch)
            covers = sessions.membership.settings.covers
            servers = sessions.copy.servers
            held = Held(self.batch, self.epoch, updates, set(servers) if covers else set())
            pushes.hold(held)
            now = time.monotonic()
            replay = sessions.meanwhile.replays
            for server in servers:
                if sessions.synced(server) is not None:
                    pushes.ride(held, server, sessions.copy)
                    self._todo.append(partial(sessions.sender.held, server, held))
                elif replay and sessions.meanwhile.may_merge(server, self.batch, now):
                    pushes.accumulate(held, server, sessions.copy, now, sessions.rules)
                elif replay:
                    pushes.hold_back(server)
        self.wake()

    def register(self, table: int) -> None:
        """Tell all servers that this worker can make its part of a sum again."""
        with self.lock:
            self.rebuilds.add(table)
            self._live.begin_all()
        self.wake()

    def take_due(self) -> tuple[int, list[tuple[int, int, Ints]]]:
        """Return what has to be made again, and forget it: generation, (server, table, rows)."""
        with self.lock:
            due, self.due = self.due, {}
            found = []
            for server, tables in due.items():
                layouts = [g.layout for g in self._live.copy.groups if g.server == server]
                for t in sorted(tables):
                    rows = [layout.tables[t].rows for layout in layouts]
                    found.append((server, t, np.sort(np.concatenate(rows))))
            return self.generation, found

    def rebuild(self, server: int, part: Update, generation: int) -> None:
        """Send a part of a sum, as of the last batch.

        One of another generation is dropped: it is of batches that are made again.
        """
        with self.lock:
            if generation != self.generation:
                return
            send = partial(self._live.sender.rebuilt, server, (part,), self.batch)
            self._todo.append(send)
        self.wake()

    def resume(self, generation: int) -> bool:
        """After a complete pull: go on where `Position.choose` says.

        False: a rollback to another generation came meanwhile, so the pull has to be made again.
        """
        with self.lock:
            if generation != self.generation:
                return False
            sessions = self._live
            self.batch = self.position.choose(sessions.copy, sessions.membership, self.me)
            sessions.pushes.drop_all(self.batch)
            # What a rollback has this worker make again, or skip, is not lost any more.
            lost = sessions.pushes.lost.up_to(self.batch)
            sessions.pushes.lost = lost - self.position.skipped
            self.resumed = True
            sessions.begin_all()
        self.wake()
        return True

    def say(self) -> None:
        """Send the report now; `said` becomes true once all servers have it."""
        with self.lock:
            self._answers = 0
            self._todo.append(partial(self._heartbeat, self._heard))
        self.wake()

    @property
    def said(self) -> bool:
        """Whether all servers have what `say` sent: the operator may listen to any of them."""
        return self._sessions is not None and self._answers >= len(self._sessions.by_server)

    @property
    def meanwhile(self) -> Meanwhile:
        """Whether this worker goes on while servers are away; only once there is a membership."""
        return self._live.meanwhile

    def enter(self, state: str) -> None:
        """Be at something else (Report.state), and say so now."""
        with self.lock:
            changes, self.state = state != self.state, state
        if changes:
            self.wake()

    def wake(self) -> None:
        """Let the I/O thread look again."""
        self._loop.wake()

    def close(self) -> None:
        """Stop the I/O thread and the agent."""
        self._loop.close()
        self._agent.close()

    def lost_server(self, server: int) -> None:
        """A connection to a server that counted broke, or its server is gone."""
        if self.resumed and not self.outages.on and server in self._live.copy.servers:
            self.outages.begin(self.blocked_seconds)
            self._live.pushes.widest = self._live.pushes.view_gap

    def stepped(self, *, complete: bool, seconds: float) -> None:
        """The program waited so long for servers, and has what follows: of all of them or not."""
        with self.lock:
            self.blocked_seconds += seconds
            if complete and not self._live.away():
                self.outages.end(self.blocked_seconds, self.epoch, self._live.pushes.widest)

    # The I/O thread

    def _ended(self) -> None:
        with self.lock:
            if not self._loop.closing:
                # The traceback is in the log; nobody shall wait for a thread that is gone.
                self.failure = GaveUpError(
                    f"{self.me.id}: its I/O thread broke; the traceback is in this log"
                )
            self.lock.notify_all()
        if self._sessions is not None:
            self._sessions.close()

    def _go_round(self, ready: Container[object]) -> int:
        """Take in what came, and do what is due; returns for how many ms to wait then."""
        with self.lock:
            try:
                self._turn(ready)
            except DarumaError as error:
                self.failure = error
            except ContractError as error:
                LOG.warning("passed over a message: %s", error)
            if time.monotonic() - self._beat >= HEARTBEAT_SECONDS:
                self._beat = time.monotonic()
                self._heartbeat()
            if self._reporter.is_news(self._report()):
                self._heartbeat()
            self.lock.notify_all()
        sessions = self._sessions
        if sessions is not None and sessions.giver.asked:
            sessions.giver.give()
            if sessions.giver.asked:
                return 0
        if sessions is not None and sessions.unsettled:
            return TICK_MS
        rest = math.ceil(1000 * (HEARTBEAT_SECONDS - (time.monotonic() - self._beat)))
        return min(max(rest, 0), CALM_MS)

    def _turn(self, ready: Container[object]) -> None:
        if self._sessions is None:
            return
        if self._follow_later:
            self._follow_later = False
            self._sessions.follow()
        todo, self._todo = self._todo, []
        for send in todo:
            send()
        self._sessions.turn(ready, self._unasked)

    def _heard(self, header: Header, frames: Sequence[Frame]) -> None:
        self._answers += 1
        self._told(header, frames)

    def _told(self, header: Header, frames: Sequence[Frame]) -> None:
        """A server's answer to a report: what the other workers have pending."""
        gap = decode_json(frames[1]).get("gap") if header.kind is Kind.OK else None
        if isinstance(gap, int | float):
            self._live.pushes.note_others(float(gap))

    def _heartbeat(self, answer: Answer | None = None) -> None:
        own = self._report()
        self.cell.publish(self.epoch, own, {})
        if self._sessions is not None:
            self._sessions.report([encode_json(own.to_json())], answer or self._told)

    def _report(self) -> Report:
        return self._reporter.report(self, self._sessions)

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
        if self._sessions is None:
            self._sessions = Sessions(self, new, self._loop.context, self._loop.poller)
        self._sessions.membership = new
        self._sessions.pushes.limits = replay_of(new.settings)
        if old is not None and old.settings.covers and not new.settings.covers:
            self._sessions.pushes.cover_nothing()
            self._sessions.begin_all()  # replays that were applied are sent again, and let go
        if new.rollback.generation > self.generation:
            self._roll_back(new.rollback.generation)
        self.wake()
        self._follow_later = True
        self.lock.notify_all()
        return Outcome()

    def _roll_back(self, generation: int) -> None:
        """Drop all that is under way; the batch number follows from the next complete pull."""
        self.generation = generation
        self.resumed = False
        self.due.clear()
        self._live.pushes.drop_all(0)
        # A copy of before it must not outrank what the servers have now.
        self._live.copy.forget()
        self.position.forget()
        if self.wanted is not None:
            # What was pulled before is of a lineage that is no more.
            self.wanted.missing[:] = True
        self._live.begin_all()

    def _unasked(self, link: Link, header: Header, frames: Sequence[Frame]) -> None:
        """What a server sends by itself."""
        if header.kind is Kind.MEMBERSHIP:
            self._adopt(Membership.from_json(decode_json(frames[1])))
        elif header.kind is Kind.FETCH:
            self._live.giver.asked.append((link, header.request, bytes(frames[1])))
        elif header.kind is Kind.EPOCH and self.membership is not None:
            reply = replace(self.header(Kind.MEMBERSHIP), incarnation=link.peer.incarnation)
            link.send(reply, [encode_json(self.membership.to_json())])
        elif header.kind is Kind.COVERED:
            server, batch = link.peer.index, decode_json(frames[1]).get("batch")
            if not isinstance(batch, int):
                raise MalformedError("what is covered has no batch")
            self._live.pushes.note_covered(server, self._live.copy.slots_of(server), batch)
        elif header.kind is Kind.READY:
            self._live.ready_again(link)
        elif header.kind is Kind.RELEASED:
            self.released = True
        elif header.kind is Kind.FINISHED:
            self.finished = header.generation
        elif header.kind is Kind.STOP:
            self.stopped = str(decode_json(frames[1]).get("reason"))[:1000]

    # Shorthands

    def header(self, kind: Kind) -> Header:
        """Return a header of this worker's epoch and generation; the link adds the rest."""
        return Header(kind, 0, self.epoch, 0, self.generation)

    @property
    def epoch(self) -> int:
        """Of the newest membership; 0 before the first."""
        return 0 if self.membership is None else self.membership.epoch

    @property
    def _live(self) -> Sessions:
        if self._sessions is None:
            raise ContractError("no membership yet")
        return self._sessions

    @property
    def copy(self) -> HostCopy | None:
        """The host copy; None before the first membership."""
        return None if self._sessions is None else self._sessions.copy

    @property
    def pushes(self) -> Pushes | None:
        """What is under way; None before the first membership."""
        return None if self._sessions is None else self._sessions.pushes
