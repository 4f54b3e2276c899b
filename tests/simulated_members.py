"""The real servers and workers, whose loops are turned by hand, in a simulated job."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from daruma_trainer.agent import Command
from daruma_trainer.contract import ContractError, Member, Membership, Restore, Role
from daruma_trainer.errors import DarumaError, ReplacedError
from daruma_trainer.identity import Identity
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.replies import Reply
from daruma_trainer.server.serve import BATCH, Server
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import Frame, Header, Kind, decode_json
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.footing import RELAY_AGAIN_SECONDS, RELAY_SECONDS, pace
from daruma_trainer.worker.pulling import Wanted
from simulated_network import Everything
from simulated_training import BATCHES

if TYPE_CHECKING:
    from simulated_job import SimulatedJob


class SimulatedServer(Server):
    """A server's loop, turned by hand."""

    _door: Any

    def __init__(self, job: "SimulatedJob", member: Member) -> None:
        super().__init__(Identity("ns", "job", Role.SERVER, member.index, member.incarnation, ""))
        self.job = job
        self.void: set[tuple[int, int]] = set()
        """(worker, batch) that it counted as lost before a rollback to a cut that may have them."""
        self.life._load_cut = self._load_cut  # type: ignore[method-assign]

    def _load_cut(self) -> None:
        """Go back to the job's cut: there is no store, so it comes from a variable, in a while."""
        generation = self.generation

        def load() -> None:
            if self.plane is not None and self.generation == generation:
                self.job.load_cut(self.plane, self.me.index)
                self.void = {(w, b) for w, lost in self.plane._lost.items() for b in lost}
                self.job.void |= self.void
                self.life.rolling, self.life.initialised = False, True

        self.post(load)

    @property
    def generation(self) -> int:
        return self.life.generation

    def spin(self, messages: int = BATCH) -> None:
        """Go once round the loop, as `run` does."""
        self._door.allowed = messages
        self._fence.turn()
        self._inbox.turn(Everything())
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
        current = self.generation == self.job.operator.rollback.generation
        if request.kind is Kind.RESYNC and reply.kind is Kind.OK and current:
            lost = Stretches.read(decode_json(reply.body[0])["lost"])
            self.job.lose(self, identity.decode(), list(lost))
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
        self.began_at = 0
        """The batch that it went on after."""
        self.patient = False
        """Whether it waits for servers that are away, too."""
        self._waits = False
        """Whether it pushed, and waits before it pulls (`Job._until_covered`)."""
        self._generation = 0
        """Of the first pull of its program, or of the last one after a rollback."""
        self._again = self._ends = 0.0
        """When it asks again for what servers have overwritten, and when it gives that up."""

    @property
    def idle(self) -> bool:
        busy = self.pulling is not None or self._waits
        return self.begun and self.resumed and not busy and self.batch < BATCHES

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
        while self._sessions is not None and self._sessions.giver.asked:
            self._sessions.giver.give()
        if self.failure is not None and not self.ended:
            raise self.failure
        self._program()

    def step(self) -> None:
        """The program pushes a batch and waits for what follows from it."""
        specs = self._live.copy.specs
        updates = self.job.training.updates(specs, self.me.index, self.batch + 1)
        self.push(updates, self.generation)
        self._waits = True
        self._program()

    def refresh(self) -> None:
        """Pull the newest values."""
        self.pulling = self.pull(0)

    def add_tables(self) -> None:
        """Declare what tables there are by now, and wait for them."""
        for spec in self.job.specs[len(self._live.copy.specs) :]:
            self.add_table(spec, self.job.training.initial(spec))
        self.announce()
        self.pulling, self.patient = self.pull(0), True

    def end(self) -> None:
        if self._sessions is not None:
            self._sessions.close()
        self._loop.context.destroy(linger=0)

    def _program(self) -> None:
        if self.membership is None or self.ended:
            return
        if not self.begun:
            self.begun = True
            self.add_tables()
        if not self.resumed and self._generation != self.generation:
            self._generation = self.generation
            self.pulling, self.patient, self._waits = self.pull(0), True, False
        if self._waits and not (self._live.membership.repeats and self.meanwhile.crowded):
            self._waits, self.pulling = False, self.pull(pace(self))
        elif self.pulling is not None:
            self._pulled(self.pulling)

    def _pulled(self, pulling: Wanted) -> None:
        """Go on if what the program waits for has come."""
        if not self.resumed:
            if not pulling.missing.any() and self.resume(self.generation):
                self.job.resumed(self)
                enters = self._live.membership.elastic and self.batch
                self.pulling = self.pull(pace(self)) if enters else self._before()
            return
        away = self.meanwhile.away(pace(self)) & (not self.patient)
        if pulling.before and (pulling.unkept or self.job.now > self._ends):
            self.position.mixed.add(self.batch + 1)
            self.job.mixed()
            self.pulling = None
        elif not (pulling.missing & ~away).any() and (self.patient or not self.meanwhile.crowded):
            if self.copy is not None and not (pulling.before or self.patient):
                own = self.copy.last[~pulling.missing, self.me.index]
                assert (own >= self.batch).all(), "a pull without an own push"
            self.pulling = None if pulling.before else self._before()
            self.job.aligned(self)
        elif pulling.before and self.job.now > self._again:
            self.pulling = self._before()
        self.patient &= self.pulling is not None

    def _before(self) -> Wanted | None:
        """Under `Sync`: what some slots were at this worker's last batch (footing.align)."""
        if self.batch + 1 in self.position.mixed:
            return None
        self._again = self.job.now + RELAY_AGAIN_SECONDS
        if self.pulling is None or not self.pulling.before:
            self._ends = self.job.now + RELAY_SECONDS
        return self.pull_before()

    def _unasked(self, link: Any, header: Header, frames: Sequence[Frame]) -> None:
        if header.kind is Kind.COVERED:
            batch = int(decode_json(frames[1])["batch"])
            if header.generation == self.job.operator.rollback.generation:
                self.job.promised(link.peer, self.me.index, batch)
        super()._unasked(link, header, frames)
