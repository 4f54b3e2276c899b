"""What a worker gives of its copy to restoring servers, beside its training.

For the I/O thread alone.
"""

import logging
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from daruma_trainer.contract import ContractError
from daruma_trainer.links import Link
from daruma_trainer.wire import Kind, encode_state

if TYPE_CHECKING:
    from daruma_trainer.worker.client import Client
    from daruma_trainer.worker.sessions import Sessions

LOG = logging.getLogger("daruma")


class Giver:
    """Parts of a worker's copy that restoring servers asked for."""

    def __init__(self, sessions: "Sessions", worker: "Client") -> None:
        self._sessions, self._worker = sessions, worker
        self.asked: deque[tuple[Link, int, bytes]] = deque()
        """By whom, in which request, and for what."""

    def give(self) -> None:
        """Give the first that asked a message's worth.

        One between two turns, and without the lock, so that training goes on: this thread alone
        writes the copy. A rollback meanwhile makes another generation, and the server drops this.
        """
        link, request, wanted = self.asked.popleft()
        with self._worker.lock:
            if link not in self._sessions.links:
                return
            reply = replace(self._worker.header(Kind.COPY), request=request)
        try:
            states = self._sessions.copy.fetched(wanted)
        except ContractError as error:
            LOG.warning("did not give %s what it asked for: %s", link.peer.id, error)
            return
        for state in states:
            link.send(replace(reply, incarnation=link.peer.incarnation), encode_state(state))
