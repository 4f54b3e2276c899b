"""At which batch a worker goes on, and what that leaves out. Pure bookkeeping."""

import numpy as np

from daruma_trainer.applied import complete_until
from daruma_trainer.contract import Membership, Role
from daruma_trainer.identity import Identity
from daruma_trainer.stretches import Stretches
from daruma_trainer.wire import UNHEARD, WAS_VACANT
from daruma_trainer.worker.copies import HostCopy


class Position:
    """Of one incarnation; what it says of batches is counted in its report."""

    def __init__(self) -> None:
        self.after: int | None = None
        """The batch that this life began after, or went back to in a rollback."""
        self.was_vacant = False
        """Whether steps were made before this worker took its seat."""
        self.mixed: set[int] = set()
        """Batches made of values of two steps, as nobody had those of one (`Sync`)."""
        self._unheard: set[int] = set()
        """Servers that were restored when no life of this worker could tell them what it had."""
        self.skipped = Stretches()
        """Batches that nobody made: the others had gone on without it."""

    def hear(self, server: int, flags: int) -> None:
        """Take what a server's answer to a pull says, before there is a position."""
        self.was_vacant |= bool(flags & WAS_VACANT)
        if flags & UNHEARD:
            self._unheard.add(server)
        else:
            self._unheard.discard(server)

    def forget(self) -> None:
        """A rollback: what was heard is of a lineage that is no more."""
        self.was_vacant = False
        self._unheard.clear()

    def choose(self, copy: HostCopy, membership: Membership, me: Identity) -> int:
        """After a complete pull: return the batch to go on after.

        That is the last one before the first that some slot lacks. Slots of servers that are
        younger than this worker, or were not told since what its lives had, were lost with its
        predecessor, or after it: what they lack nobody computes again (the floor), but for the
        step that everybody is at (`Sync`). Where the
        others have gone on without this worker, further than the consistency allows, it joins them
        where they are.
        """
        older = [
            m.index
            for m in membership.of(Role.SERVER)
            if m.incarnation < me.incarnation and m.index not in self._unheard
        ]
        known = np.isin(copy.owner, older)
        entries = zip(
            copy.last[:, me.index].tolist(), copy.window[:, me.index].tolist(), strict=True
        )
        done = np.array([complete_until(*entry) for entry in entries])
        one_step = membership.settings.consistency == "Sync" and done.max() - done.min() <= 1
        if one_step and not membership.elastic:
            known[:] = True
        batch = int(done[known].min() if known.any() else done.max())
        # A rollback may have brought back what was skipped.
        self.skipped = self.skipped.up_to(batch)
        front = int(copy.last.max())
        if membership.elastic and front - batch > self._leeway(membership):
            self.skipped |= Stretches.of((batch + 1, front))
            batch = front
        self.after = batch if self.after is None else min(self.after, batch)
        self.mixed = {b for b in self.mixed if b <= batch}
        return batch

    def _leeway(self, membership: Membership) -> int:
        """How far behind the newest batch of all a worker may go on."""
        bounded = membership.settings.consistency == "Bounded"
        # Who makes a batch is one further than those it knows of are behind; but where a seat was
        # vacant, somebody may be making the next one already.
        return membership.settings.max_staleness + (bounded and not self.was_vacant)
