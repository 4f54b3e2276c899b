"""Which workers' seats are vacant: lost, and not yet taken again (elastic membership).

A seat is vacant from the membership that fences its worker until the replacement's first pull, so
that a lost worker is not waited for a moment longer than it takes to know, and its replacement not
before it can work. What this server does not know, since it began later than the replacement, it
takes for occupied: it waits rather than make a step without somebody who is there.
"""

from collections.abc import Collection

from daruma_trainer.contract import Membership, Role


class Seats:
    """The workers' seats, as one server knows them."""

    def __init__(self, membership: Membership) -> None:
        self._elastic = membership.elastic
        self._replicas = membership.workers
        self._least = membership.settings.min_replicas
        self._incarnations: dict[int, int] = {}
        self.away: set[int] = set()
        """Whose workers were lost and whose replacements did not pull yet, elastic or not."""
        self.entering: set[int] = set()
        """Taken again; which batch comes next is not known before the resync."""
        self.follow(membership)

    def follow(self, new: Membership) -> None:
        """Note whose worker was replaced."""
        for member in new.of(Role.WORKER):
            known = self._incarnations.get(member.index)
            lost = member.address is None if known is None else known != member.incarnation
            if lost:
                self.away.add(member.index)
            self._incarnations[member.index] = member.incarnation

    @property
    def vacant(self) -> set[int]:
        """Seats without which steps are made."""
        return self.away if self._elastic else set()

    def take(self, worker: int) -> bool:
        """Take a seat, with the worker's first pull; True: it was vacant."""
        if worker in self.vacant:
            self.entering.add(worker)
        self.away.discard(worker)
        return worker in self.entering

    def too_few(self, working: Collection[int], ended: int) -> bool:
        """Whether fewer work than the others may go on with; `ended` need nobody any more."""
        return self._elastic and len(working) < min(self._least, self._replicas - ended)
