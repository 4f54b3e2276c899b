"""What a worker does while servers are away: it goes on without them, or waits.

Under `Sync` it waits; `Async` computes on what was pulled last, and `Bounded` while that has enough
of the others. The limits of spec.recovery.replay hold for both.
"""

import time
from typing import TYPE_CHECKING

import numpy as np

from daruma_trainer.contract import SLOTS, Role, WorkersMeanwhile
from daruma_trainer.wire import Slots

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client
    from daruma_trainer.worker.sessions import Sessions


class Meanwhile:
    """Of one worker, by what its connections are like now. Under the client's lock."""

    def __init__(self, sessions: "Sessions", worker: "Client") -> None:
        self._sessions, self._worker = sessions, worker

    @property
    def replays(self) -> bool:
        """Whether this worker goes on while a server is away."""
        settings = self._sessions.membership.settings
        waits = self._consistency == "Sync" or (
            self._consistency == "Bounded" and not settings.max_staleness
        )
        return settings.meanwhile is WorkersMeanwhile.REPLAY and not waits

    @property
    def _consistency(self) -> str:
        return self._sessions.membership.settings.consistency

    def away(self, batch: int) -> Slots:
        """Slots whose server cannot be reached, of a worker that may go on without them.

        Under `Bounded` only while its copy of them has this batch of all others.
        """
        mask = np.zeros(SLOTS, np.bool_)
        if self.replays and self._worker.resumed:
            now, sessions = time.monotonic(), self._sessions
            members = sessions.membership.of(Role.WORKER)
            own = self._worker.me.index
            others = [m.index for m in members if m.address and m.index != own]
            for server in sessions.away():
                if sessions.pushes.may_accumulate(server, now):
                    slots = sessions.copy.slots_of(server)
                    if self._consistency == "Async" or sessions.copy.knows(slots, others, batch):
                        mask |= slots
        return mask

    def may_merge(self, server: int, batch: int, now: float) -> bool:
        """Whether this worker's batch may be made one with others that a server lacks.

        Where its predecessor's push of that batch reached some slots, it goes out by itself.
        """
        copy = self._sessions.copy
        slots = copy.slots_of(server)
        new = (copy.last[slots, self._worker.me.index] < batch).all()
        return bool(new) and self._sessions.pushes.may_accumulate(server, now)

    @property
    def crowded(self) -> bool:
        """Whether more pushes than allowed wait to be covered by a server that is there.

        Where steps are repeated, by any server: this worker waits for it anyhow.
        """
        sessions = self._sessions
        repeats, limit = sessions.membership.repeats, sessions.membership.max_uncovered
        return any(
            (repeats or sessions.synced(server) is not None)
            and sessions.pushes.uncovered(server) > limit
            for server in range(sessions.membership.servers)
        )

    def runs_ahead(self) -> bool:
        """Whether this worker computes on while answers are under way: some server is away.

        What the others answer is then there for the step after next. Not where a limit makes it
        wait for a server. Takes the lock.
        """
        with self._worker.lock:
            sessions, now = self._sessions, time.monotonic()
            free = self._consistency == "Async" and self.replays
            away = sessions.away() if free and self._worker.resumed else []
            return bool(away) and all(sessions.pushes.may_accumulate(s, now) for s in away)
