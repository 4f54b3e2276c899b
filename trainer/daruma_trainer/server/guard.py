"""Whose requests a server answers: fencing, before the shard sees anything of them.

A request names the incarnation and the generation that it is meant for; its sender must be in the
newest membership, and this server the one that serves the shard.
"""

from collections.abc import Callable

from daruma_trainer.contract import Membership, Role
from daruma_trainer.identity import Identity
from daruma_trainer.server.fencing import Fence
from daruma_trainer.server.lifecycle import Lifecycle
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.server.replies import Reply, refuse, worker_of
from daruma_trainer.wire import Header, Kind, Refusal


class Guard:
    """Of one incarnation of one server."""

    def __init__(
        self,
        me: Identity,
        life: Lifecycle,
        replicator: Replicator,
        fence: Fence,
        ask: Callable[[bytes], None],
    ) -> None:
        """`ask`: ask a member for the membership that it has, which is newer."""
        self._me, self._life, self._replicator = me, life, replicator
        self._fence, self._ask = fence, ask
        self.stale = 0
        """Requests meant for, or of, a replaced member."""

    def refusal(
        self, membership: Membership | None, identity: bytes, header: Header
    ) -> Reply | None:
        """Refuse what is meant for somebody else, or comes from somebody who does not count."""
        life = self._life
        if membership is None or life.plane is None:
            return refuse(Refusal.UNSURE, "no membership yet")
        if header.incarnation != self._me.incarnation:
            self.stale += 1
            return refuse(Refusal.STALE_INCARNATION, f"this is {self._me.id}")
        if header.epoch > membership.epoch:
            self._ask(identity)
            return refuse(Refusal.UNSURE, "a newer membership is on its way")
        index = worker_of(identity.decode())
        sender = membership.member(Role.WORKER, index)
        if sender is None or sender.id != identity.decode():
            self.stale += 1
            return refuse(Refusal.STALE_INCARNATION, f"worker {index} was replaced")
        if header.generation != life.generation or life.rolling:
            return refuse(Refusal.WRONG_GENERATION, f"this is generation {life.generation}")
        if life.frozen or (life.replica and not self._reads(header, membership)):
            what = "hands its slots over" if life.frozen else "is a replica"
            return refuse(Refusal.STALE_INCARNATION, f"{self._me.id} {what}")
        if not self._fence.sure():
            return refuse(Refusal.UNSURE, "asking for the newest membership")
        return None

    def _reads(self, header: Header, membership: Membership) -> bool:
        """Whether a replica answers this: a pull, once the one before counts on it."""
        reads = header.kind is Kind.PULL and membership.settings.pulls_from_replicas
        return reads and self._replicator.counted_on
