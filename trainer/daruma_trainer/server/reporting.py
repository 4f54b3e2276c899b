"""What a server says of itself, and what others told it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from daruma_trainer.agent import ViewCell
from daruma_trainer.contract import Report
from daruma_trainer.server.slots import SlotState

if TYPE_CHECKING:
    from daruma_trainer.server.serve import Server

QUICK_SECONDS = 0.1
"""At most one new view in this time, unless something important changed: mere progress shall not
keep the operator busy."""
KEPT_SECONDS = 120.0
"""The last words of a member that was lost are kept so long: they price its recovery."""


@dataclass(slots=True)
class Reports:
    """The newest report of each other member."""

    _heard: dict[str, tuple[float, Report]] = field(default_factory=dict)

    def take(self, report: Report) -> bool:
        """Keep a report; True if it says something that the operator waits for.

        Without the copies that it offers: the operator asks each member for its own, and all of
        them from every server would be many times as long as all the rest.
        """
        report = replace(report, copies=()) if report.copies else report
        before = self._heard.get(report.id)
        if before is not None and report.at < before[1].at:
            return False  # it comes from a connection that was replaced
        self._heard[report.id] = (time.monotonic(), report)
        if before is None:
            return True
        old = before[1]
        return (
            (
                old.state, old.epoch, old.final, old.acked_epoch, old.error, old.waiting,
                old.stop, old.follows,
            )
            != (
                report.state, report.epoch, report.final, report.acked_epoch, report.error,
                report.waiting, report.stop, report.follows,
            )
            or {s.id for s in old.suspects} != {s.id for s in report.suspects}
            # The result's metrics: the worker ends as soon as we answer.
            or (report.state == "Left" and old.metrics != report.metrics)
        )  # fmt: skip

    def finished(self, members: Iterable[str], generation: int) -> bool:
        """Whether all these workers reached the end of their batches, in this generation."""
        heard = [self._heard.get(member) for member in members]
        return all(
            h is not None and h[1].state in ("Finished", "Left") and h[1].generation == generation
            for h in heard
        )

    def gap(self, members: set[str]) -> float:
        """How far what these workers have pending would move the parameters, at most."""
        return sum(report.gap for i, (_, report) in self._heard.items() if i in members)

    def forget(self, members: set[str]) -> None:
        """Drop the last words of those that are long gone."""
        limit = time.monotonic() - KEPT_SECONDS
        for gone in [i for i, (at, _) in self._heard.items() if i not in members and at < limit]:
            del self._heard[gone]

    def others(self, own_id: str) -> dict[str, tuple[float, Report]]:
        """Return who said what, and when (monotonic)."""
        return {i: heard for i, heard in self._heard.items() if i != own_id}


class Board:
    """Where the operator looks: what was shown last, and when there is something new to show."""

    def __init__(self, own_id: str) -> None:
        self.cell = ViewCell(Report(own_id, 0, "Joining"))
        self._shown: tuple[object, ...] = ()
        self._shown_at = 0.0

    def show(
        self, epoch: int, own: Report, others: dict[str, tuple[float, Report]], *, now: bool
    ) -> bool:
        """Show what is known, where something important changed or it is time; True if it was.

        `others`: who said what, and when (monotonic). `now`: something important did change.
        """
        important = (
            own.state, own.epoch, own.initialised, own.final, own.restore, own.suspects, own.error,
            own.waiting, own.guests, own.copies, own.follows,
        )  # fmt: skip
        now = now or important != self._shown
        if not now and time.monotonic() - self._shown_at < QUICK_SECONDS:
            return False
        self._shown, self._shown_at = important, time.monotonic()
        self.cell.publish(epoch, own, others)
        return True


def report_of(server: "Server") -> Report:
    """Say what this server is at."""
    life = server.life
    plane, saver, cuts = life.plane, life.saver, life.cuts
    make = partial(
        Report,
        server.me.id,
        0 if server.membership is None else server.membership.epoch,
        at=time.monotonic(),
        generation=life.generation,
        initialised=life.initialised,
        suspects=server.suspects(),
        stale=server.stale,
        error=life.error,
        older=life.older,
        waiting=life.waiting,
        guests=server.guests.report,
    )
    if plane is None:
        return make("Joining", final=life.final)
    ready = int(plane.slots.ready.sum())
    if life.replica:
        state = "Replica"
    elif life.frozen:
        state = "Frozen"
    elif life.rolling or (plane.slots.state == SlotState.RESTORING).any():
        state = "Restoring"
    else:
        whole = ready == len(plane.slots.ids) and (plane.shard.tables or plane.steps.slotless)
        state = "Ready" if whole else "Empty"
    now = time.monotonic()
    running = saver.newest if saver else None
    cut = cuts.newest if cuts else None
    return make(
        state,
        step=plane.step,
        ready=ready,
        running=replace(running, age=now - saver.newest_at) if saver and running else None,
        cut=replace(cut, age=now - cuts.newest_at) if cuts and cut else None,
        save_error=saver.error if saver else None,
        final=cuts.final if cuts and cuts.final is not None else life.final,
        restore=life.restorer.report if life.restorer else None,
        copies=life.restorer.offered if life.restorer else (),
        follows=server.replicator.follows,
        update_norm=plane.shard.update_norm,
        moves=life.moves,
        applied=plane.counts.applied,
        duplicate=plane.counts.duplicate,
        lost=plane.lost,
    )
