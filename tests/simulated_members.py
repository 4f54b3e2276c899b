"""The real servers and workers, whose loops are turned by hand, in a simulated job."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from daruma_trainer.agent import Command
from daruma_trainer.contract import ContractError, Member, Membership, Restore, Role
from daruma_trainer.errors import DarumaError, ReplacedError
from daruma_trainer.identity import Identity
from daruma_trainer.server.data import DataPlane, Reply
from daruma_trainer.server.serve import BATCH, Server
from daruma_trainer.wire import Frame, Header, Kind, decode_json
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.sessions import Wanted
from simulated_network import Everything

if TYPE_CHECKING:
    from simulated_job import SimulatedJob

BATCHES = 40
"""Of each worker, at most."""


class SimulatedServer(Server):
    """A server's loop, turned by hand."""

    _door: Any

    def __init__(self, job: "SimulatedJob", member: Member) -> None:
        super().__init__(Identity("ns", "job", Role.SERVER, 0, member.incarnation, ""))
        self.job = job

    def spin(self, messages: int = BATCH) -> None:
        """Go once round the loop, as `run` does."""
        self._door.allowed = messages
        self._fence.turn()
        self._run_inbox()
        self._serve()
        self._siblings.turn({}, self._from_sibling)
        self.replicator.turn(Everything())
        self._after()
        self.job.record(self)

    def obey(self, body: Membership | Restore) -> None:
        """Take an operator's command at the next turn."""
        kind = "membership" if isinstance(body, Membership) else "restore"

        def obey() -> None:
            self._obey(Command(kind, body))

        self.post(obey)

    @property
    def ended(self) -> bool:
        return self._exit is not None

    @property
    def plane(self) -> DataPlane | None:
        return self.life.plane

    @property
    def epoch(self) -> int:
        return self._epoch

    def end(self) -> None:
        self._close()

    def _dispatch(self, identity: bytes, frames: Sequence[Frame]) -> None:
        super()._dispatch(identity, frames)
        self.job.record(self)

    def _reply(self, identity: bytes, request: Header, reply: Reply) -> None:
        if request.kind is Kind.RESYNC and reply.kind is Kind.OK:
            worker = int(identity.decode().split("-")[1])
            lost = decode_json(reply.body[0])["lost"]
            self.job.reported |= {(worker, b) for b in lost}
        super()._reply(identity, request, reply)

    def tell(self, member: str, kind: Kind, body: Sequence[Frame]) -> bool:
        if kind is Kind.COVERED:
            worker = int(member.split("-")[1])
            self.job.emitted(self, worker, int(decode_json(body[0])["batch"]))
        return super().tell(member, kind, body)


class SimulatedWorker(Client):
    """A worker's I/O thread and program, turned by hand."""

    def __init__(self, job: "SimulatedJob", member: Member) -> None:
        super().__init__(Identity("ns", "job", Role.WORKER, member.index, member.incarnation, ""))
        self.job = job
        self.begun = False
        self.pulling: Wanted | None = None
        """What the program waits for."""
        self.patient = False
        """Whether it waits for servers that are away, too."""

    @property
    def idle(self) -> bool:
        return self.begun and self.resumed and self.pulling is None and self.batch < BATCHES

    @property
    def ended(self) -> bool:
        return isinstance(self.failure, ReplacedError)

    def spin(self) -> None:
        """Go once round the I/O loop; then let the program look."""
        with self.lock:
            try:
                self._turn({})
            except DarumaError as error:
                self.failure = error
            except ContractError:
                pass
        while self._asked:
            self._give(*self._asked.popleft())
        if self.failure is not None and not self.ended:
            raise self.failure
        self._program()

    def step(self) -> None:
        """The program pushes a batch and waits for what follows from it."""
        sync = self.job.settings.consistency == "Sync"
        self.push(self.job.updates(self.me.index, self.batch + 1), self.generation)
        self.pulling = self.pull(self.batch if sync else 0)

    def refresh(self) -> None:
        """Pull the newest values."""
        self.pulling = self.pull(0)

    def add_tables(self) -> None:
        """Declare what tables there are by now, and wait for them."""
        for spec in self.job.specs[len(self._live.copy.specs) :]:
            self.add_table(spec, self.job.initial(spec))
        self.announce()
        self.pulling, self.patient = self.pull(0), True

    def end(self) -> None:
        if self._sessions is not None:
            self._sessions.close()
        self._context.destroy(linger=0)

    def _program(self) -> None:
        if self.membership is None or self.ended:
            return
        if not self.begun:
            self.begun = True
            self.add_tables()
        if self.pulling is None:
            return
        if not self.resumed:
            if not self.pulling.missing.any() and self.resume(self.generation):
                self.pulling, self.patient = None, False
            return
        sync = self.job.settings.consistency == "Sync"
        away = self.away(self.batch if sync else 0)
        missing = self.pulling.missing & ~(away & (not self.patient))
        if not missing.any() and (self.patient or not self.crowded):
            if self.copy is not None:
                own = self.copy.last[~self.pulling.missing, self.me.index]
                assert (own >= self.batch).all(), "a pull without an own push"
            self.pulling, self.patient = None, False

    def _unasked(self, link: Any, header: Header, frames: Sequence[Frame]) -> None:
        if header.kind is Kind.COVERED:
            batch = int(decode_json(frames[1])["batch"])
            self.job.promised(link.peer, self.me.index, batch)
        super()._unasked(link, header, frames)
