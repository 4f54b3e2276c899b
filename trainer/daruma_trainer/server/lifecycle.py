"""What becomes of the shard that this incarnation owns: begun, saved, restored, rolled back, ended.

Called from the serve loop alone; what takes long runs on the store's thread, and its result comes
back through `post`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np

from daruma_trainer.agent import Outcome
from daruma_trainer.checkpoint.loading import load
from daruma_trainer.checkpoint.manifest import Cut
from daruma_trainer.checkpoint.reading import Unread
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.contract import ExitCode, Membership, Move, Report, Restore, SavedState
from daruma_trainer.errors import (
    ConfigurationError,
    MissingError,
    StoreAwayError,
    StoreError,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.server.background import Background
from daruma_trainer.server.cuts import FIRST, Cuts
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.handover import pack
from daruma_trainer.server.motion import Motion
from daruma_trainer.server.restoring import AGAIN_SECONDS, Restorer
from daruma_trainer.server.saving import Saver, Written
from daruma_trainer.server.seats import Seats
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import Kind

LOG = logging.getLogger("daruma.server")
NOTE_STEPS = 12
"""Steps between two notes of the motion where nothing is saved; as often as saves by default."""


class Surroundings(Protocol):
    """What the shard's life needs of the loop."""

    def post(self, call: Callable[[], None]) -> None:
        """Run something on the loop's thread."""

    def stop(self, code: int) -> None:
        """End the loop."""

    def publish(self) -> None:
        """Show what is known now: something important changed."""

    def fetch(self, member: str, ids: Ints, number: int) -> bool:
        """Ask a worker for its copy of slots; False if it is not connected."""

    def tell_workers(self, kind: Kind, message: dict[str, Any]) -> None:
        """Send something to every worker that is connected."""

    def tell_cut(self, index: int, message: dict[str, Any]) -> None:
        """Send a CUT message to the server of an index."""

    @property
    def counted_on(self) -> bool:
        """Whether the server before this replica waited for it."""


class Lifecycle:
    """One incarnation's hold on its shard. All is None until the first membership."""

    def __init__(self, identity: Identity, around: Surroundings) -> None:
        self.me = identity
        self._around = around
        self.plane: DataPlane | None = None
        self.store: Store | None = None
        self.saver: Saver | None = None
        self.restorer: Restorer | None = None
        self.cuts: Cuts | None = None
        self.initialised = False
        self.replica = False
        """Whether another incarnation is the one that serves, and this one follows it."""
        self.generation = 0
        self.rolling = False
        """Whether a rollback is being loaded."""
        self.frozen = False
        """Whether a successor takes the slots over: nothing changes any more."""
        self.error: str | None = None
        self.older: SavedState | None = None
        """Where the cut to go back to is damaged: the newest before it."""
        self.final: str | None = None
        """Set where there is no store to save the result to."""
        self._motion: Motion | None = None
        self._membership: Membership | None = None
        self._background: Background | None = None
        self._first: str | None = None
        self._first_after = 0.0
        self._later: tuple[float, Callable[[], None]] | None = None
        """When a store that could not be asked for a cut is asked again, and how."""

    def adopt(self, new: Membership, *, replica: bool) -> None:
        """Follow a newer membership, in which this incarnation is still in."""
        first = self._membership is None
        self._membership = new
        if first:
            self.replica = replica
            self._begin(new)
        if self.plane is None:
            return
        if replica:
            self._follow_generation(self.plane, new)
            return
        if self.replica:
            self._promote(self.plane, new)
        self.plane.follow(new)
        if self.cuts is not None and self.saver is not None:
            self.saver.follow(new.settings)
            self.cuts.follow_membership(new)
        self.initialised |= new.initialised and bool(self.plane.slots.ready.all())
        if new.rollback.generation > self.generation:
            self._roll_back(self.plane, new)

    @property
    def restoring(self) -> bool:
        """Whether slots are on their way."""
        report = None if self.restorer is None else self.restorer.report
        return report is not None and not report.done

    @property
    def waiting(self) -> str | None:
        """Why the store cannot be asked for what is to be restored; it is asked again."""
        return None if self.restorer is None else self.restorer.waiting

    @property
    def moves(self) -> tuple[Move, ...]:
        """How far the shard moved so far."""
        return () if self._motion is None else self._motion.moves

    def tick(self) -> None:
        """What follows from what was just handled."""
        plane = self.plane
        if plane is None or self.frozen or self.replica:
            return
        if self.restorer is not None and self.restoring:
            self.restorer.tick()
        if self._later is not None and time.monotonic() >= self._later[0]:
            _, again = self._later
            self._later = None
            again()
        if not self.rolling and plane.slots.ready.all() and plane.shard.tables:
            self._initialise()
            if self._motion is not None:
                self._motion.tick(plane.shard, plane.step)
            if self.saver is not None:
                self.saver.tick()
            if self.cuts is not None:
                self.cuts.tick()

    def freeze(self) -> None:
        """Serve no more and change no more: the successor is to find what was last acknowledged."""
        self.frozen = True

    def hand_over(self) -> Iterator[bytes | bytearray] | None:
        """Give the frozen shard; None if it is not frozen or not whole. From any thread."""
        plane, membership = self.plane, self._membership
        if not self.frozen or plane is None or membership is None or not plane.slots.ready.all():
            return None
        return pack(plane, membership.job_uid, self.me.index)

    @property
    def pending(self) -> bool:
        """Whether there is work for when nothing is to be served."""
        return self.saver is not None and self.saver.pending and not self.frozen

    def work(self, *, idle: bool) -> None:
        """Do a slice of it. `idle`: there is nothing to serve first."""
        if self.saver is not None and not self.frozen:
            self.saver.work(idle=idle)

    def take_final(self, number: str) -> None:
        """Save this shard's part of the job's result, where there is a store."""
        if self.cuts is not None and self._membership and self._membership.settings.final:
            self.cuts.take_final(number)
        else:
            self.final = ""
            self._around.publish()

    def heard(self, report: Report) -> None:
        """Take what a member says of its step and of cuts."""
        server = report.id.startswith("server-") and report.state == "Ready"
        if self.plane is not None and server and report.generation == self.generation:
            self.plane.steps.heard(report.step)
        if self.cuts is None:
            return
        if report.final is not None and not self.cuts.final:
            self.cuts.heard_final(report.final)
        if report.cut is not None and self.cuts.coordinator != self.me.index:
            self.cuts.follow(report.cut.path)

    def close(self, seconds: float) -> None:
        """Let saves that were begun end, but wait no longer than this."""
        if self._background is not None:
            self._background.close(seconds)

    def _begin(self, membership: Membership) -> None:
        """Make the shard; the first membership says which slots are ours."""
        plane = DataPlane(membership, self.me.index, self.me.incarnation)
        if self.replica:
            plane.slots.state[:] = SlotState.RESTORING
            self.plane = plane
            return
        self._equip(plane, membership)

    def _equip(self, plane: DataPlane, membership: Membership) -> None:
        """Make what serves and saves a shard."""
        settings = membership.settings
        self._motion = Motion(settings.every * settings.fraction or NOTE_STEPS, self.me.index)
        background = self._background = Background(self._around.post)
        if settings.store is not None:
            try:
                self.store = open_store(settings.store, membership.prefix, there=membership.saved)
            except (ConfigurationError, MissingError) as error:
                LOG.error("%s", error)
                wrong = isinstance(error, ConfigurationError)
                self._around.stop(ExitCode.USAGE if wrong else ExitCode.MISSING)
                return
            self.saver = Saver(plane, self.store, background, membership, self.me.index)
            # A disk that they fill up would refuse the first save.
            self.saver.files.sweep([m.incarnation for m in membership.handing])
            self.cuts = Cuts(
                plane, self.saver, self.store, background, self.me.index,
                self._around.tell_cut, membership,
            )  # fmt: skip
        if settings.restore_from is not None and not membership.initialised:
            self._warm_start(plane, background, settings.restore_from)
        self.restorer = Restorer(
            plane, self.store, background, membership.prefix, self.me,
            self._around.fetch, self._all_back,
        )  # fmt: skip
        self.plane = plane

    def _follow_generation(self, plane: DataPlane, membership: Membership) -> None:
        """A replica of before a rollback has nothing that counts any more."""
        if membership.rollback.generation > self.generation:
            self.generation = membership.rollback.generation
            plane.slots.state[:] = SlotState.RESTORING

    def _promote(self, plane: DataPlane, membership: Membership) -> None:
        """Serve what this replica has; what else there is, fresher or missing, the plan says.

        A replica that its predecessor counted on has all that it acknowledged: it serves at once.
        """
        self.replica = False
        # Who entered at the head since this replica began, it was not told.
        plane.steps.seats = Seats(membership)
        self._equip(plane, membership)
        if self.plane is None or self.restorer is None:
            return  # no store, though one is configured: this process ends
        mine = np.flatnonzero(plane.slots.ready)
        plane.slots.state[:] = SlotState.RESTORING
        if self._around.counted_on:
            plane.restored(mine)
            plane.sums.inexact = True
        self.restorer.promoted(mine, membership.recovery, served=self._around.counted_on)
        LOG.info("promoted: %s of %s slots are here", len(mine), len(plane.slots.ids))

    def _warm_start(self, plane: DataPlane, background: Background, uri: str) -> None:
        """Take another job's result for initial values, whatever its number of servers was."""
        plane.beginning.warm = ""

        def read() -> dict[str, Floats]:
            return load(uri)

        def done(tables: dict[str, Floats] | None, error: StoreError | None) -> None:
            if isinstance(error, StoreAwayError):
                LOG.warning("restoreFrom is read again: %s", error)
                again = partial(background.submit, read, done)
                self._later = time.monotonic() + AGAIN_SECONDS, again
                return
            plane.beginning.warm = f"restoreFrom: {error}" if tables is None else tables

        background.submit(read, done)

    def _initialise(self) -> None:
        """Every slot is Ready: save all of it once, before the job counts as initialised."""
        if self.initialised or self._first is not None or time.monotonic() < self._first_after:
            return
        if self.saver is None or self.cuts is None or self._membership is None:
            self.initialised = True
            return
        self._first = "saving"
        if self._membership.settings.cuts and not self._membership.initialised:
            self.cuts.take(FIRST)

        def done(written: Written | None, error: str | None) -> None:
            if written is None:
                LOG.error("the first save failed: %s", error)
                self._first, self._first_after = None, time.monotonic() + AGAIN_SECONDS
                return
            self.initialised = True
            self._around.publish()

        self.saver.save_all("running", "", done)

    def restore(self, plan: Restore) -> Outcome:
        """Begin to bring lost slots back, or go on with a newer plan."""
        if plan.member != self.me.id or self.restorer is None:
            return Outcome(HTTPStatus.CONFLICT, f"this is {self.me.id}")
        epoch = 0 if self._membership is None else self._membership.epoch
        if plan.epoch != epoch:
            # One that a newer decision overtook on its way would write over what that brings back.
            message = f"a plan of epoch {plan.epoch}: {self.me.id} is at epoch {epoch}"
            return Outcome(HTTPStatus.CONFLICT, message)
        self.restorer.begin(plan)
        self._around.publish()
        return Outcome()

    def _all_back(self) -> None:
        """All lost slots are in memory. With a store they are saved before the first is Ready."""
        plane, saver = self.plane, self.saver
        if plane is None:
            return
        lost = (plane.slots.state != SlotState.READY).nonzero()[0]
        generation = self.generation

        def serve(_written: Written | None = None, error: str | None = None) -> None:
            if self.generation != generation:
                return  # rolled back meanwhile: these slots are of a lineage that is no more
            if error is not None:
                LOG.error("the first save after the restore failed: %s", error)
            # After an exact hand-over too: the predecessor's sums may have lacked parts of
            # workers, and which those were does not come along.
            plane.sums.inexact = True
            if self.restorer is None or not self.restorer.handed_over:
                plane.unheard = set(range(plane.workers))
            plane.restored(lost)
            self.initialised = True
            self._around.tell_workers(Kind.READY, {})
            self._around.publish()

        if saver is not None:
            self._first = "saving"
            saver.save_all("running", "", serve)
        else:
            serve()

    def _roll_back(self, plane: DataPlane, membership: Membership) -> None:
        """Go back to the membership's cut before anything is answered at its generation."""
        restorer = self.restorer
        if restorer is not None:
            restorer.drop()
        self.generation = membership.rollback.generation
        plane.slots.state[:] = SlotState.RESTORING
        plane.barrier.drop()
        plane.steps.left.clear()
        plane.steps.ended.clear()
        plane.hold = None
        plane.waiting.clear()
        if self._motion is not None:
            self._motion.forget()
        plane.pulls.clear()
        plane.sums.rolled_back()
        if restorer is None or membership.rollback.cut is None:
            # A newcomer after a rollback that is over: it waits for its restore.
            return
        self.rolling = True
        # What went wrong with another cut says nothing of this one.
        self.error = self.older = None
        if self.cuts is not None:
            self.cuts.roll_back()
        self._load_cut()

    def _load_cut(self) -> None:
        """Load the membership's cut; again, for as long as the store cannot be asked."""
        self._later = None
        name = None if self._membership is None else self._membership.rollback.cut
        if self.restorer is not None and name is not None:
            self.restorer.load_cut(name, partial(self._cut_loaded, name))

    def _cut_loaded(self, name: str, cut: Cut | Unread) -> None:
        if isinstance(cut, Unread):
            LOG.warning("cannot load %s: %s", name, cut.problem)
            if cut.away:
                self._later = time.monotonic() + AGAIN_SECONDS, self._load_cut
            else:
                self.error, self.older = f"cannot load {name}: {cut.problem}", cut.older
            self._around.publish()
            return
        generation = self.generation

        def serve() -> None:
            # A newer rollback may have begun while this one was saved.
            if self.generation == generation:
                self.rolling = False
                self.initialised = True
                self._around.publish()

        if self.plane is not None:
            self.plane.rolled_back(cut.step)
        if self.cuts is not None:
            self.cuts.rolled_back(name, cut)
        if self.saver is not None:
            self.saver.rolled_back(cut.step, serve)
