"""What a worker says of itself. For the I/O thread, under the client's lock."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from daruma_trainer.contract import Report, Role
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import Slots
from daruma_trainer.worker.sessions import Sessions

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client

MAX_STRETCHES = 200
"""Of lost batches that a report names."""


class Reporter:
    """Makes reports, and knows what the last one said."""

    def __init__(self) -> None:
        self._acked_epoch, self._acked_at = 0, 0.0
        self._shown: tuple[object, ...] = ()
        self._lost = Stretches(), ""

    def report(self, client: "Client", sessions: Sessions | None) -> Report:
        """Say what this worker is at; `sessions` is None before the first membership."""
        report = Report(
            client.me.id, client.epoch, client.state, generation=client.generation,
            loss=client.loss, total_steps=client.total_steps, stop=client.own_stop,
            metrics=dict(client.values),
            error=None if client.failure is None else str(client.failure), at=time.monotonic(),
        )  # fmt: skip
        if sessions is None:
            return report
        pushes, now = sessions.pushes, time.monotonic()
        if pushes.acked_epoch > self._acked_epoch:
            self._acked_epoch, self._acked_at = pushes.acked_epoch, now
        recovers = sessions.membership.recovery is not None
        return replace(
            report,
            step=pushes.acked,
            suspects=sessions.suspects(),
            copies=sessions.copy.versions(_offered(sessions)) if recovers else (),
            acked_epoch=pushes.acked_epoch,
            acked_age=now - self._acked_at if pushes.acked_epoch else None,
            pending=pushes.pending,
            gap=pushes.gap,
            outage=client.outages.report(client.blocked_seconds, client.epoch, pushes.widest),
            replayed=pushes.replayed,
            lost=len(pushes.lost),
            lost_batches=self._lost_batches(pushes.lost),
            after=client.position.after,
            skipped=len(client.position.skipped),
            skipped_batches=client.position.skipped.text(MAX_STRETCHES),
            mixed=len(client.position.mixed),
        )

    def _lost_batches(self, lost: Stretches) -> str:
        if lost is not self._lost[0]:
            self._lost = lost, lost.text(MAX_STRETCHES)
        return self._lost[1]

    def is_news(self, own: Report) -> bool:
        """Whether a report says something that servers should hear before the next heartbeat."""
        shown = (
            own.state, own.epoch, own.acked_epoch, own.copies, own.stop, own.error,
            own.skipped, own.mixed,
            {s.id for s in own.suspects},
        )  # fmt: skip
        before, self._shown = self._shown, shown
        return shown != before


def _offered(sessions: Sessions) -> Slots:
    """Slots that may have been lost: of servers that are away, or of all if none is.

    Away are those, too, that the newest membership replaces, though they are connected still.
    What is pulled meanwhile of the others changes with every step: to tell that would be a report a
    step, from each worker to each server and on to the operator.
    """
    named = set(sessions.membership.of(Role.SERVER))
    replaced = [i for i, s in sessions.by_server.items() if s.link.peer not in named]
    away: Slots = np.isin(sessions.copy.owner, [*sessions.away(), *replaced])
    return away if away.any() else ~away
