"""The operator of a simulated job: what `controller.replicating` and `losing` decide, in short.

It looks, decides and tells when it is told to.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from daruma_operator.recovery.plan import plan_slots
from daruma_trainer.agent import Command
from daruma_trainer.contract import (
    SLOTS,
    Member,
    Membership,
    Report,
    Restore,
    Role,
    Source,
    SourceKind,
    slots_from_hex,
    slots_to_hex,
)

if TYPE_CHECKING:
    from simulated_job import SimulatedJob

UID = "uid"
WORKERS = 2
COPIES_SECONDS = 1.0
"""How long the operator waits for workers to say what they have."""


class Operator:
    """Status, and what follows from it."""

    def __init__(self, job: "SimulatedJob") -> None:
        self.job = job
        self.epoch = 1
        self.members: dict[tuple[Role, int], Member] = {}
        self.replicas: tuple[Member, ...] = ()
        self.initialised = False
        self.recovery: int | None = None
        self.planned = 0
        self.since = 0.0
        """When the last loss was seen."""
        self.seen: dict[str, Report] = {}
        self.suspected: set[str] = set()
        self.told: dict[str, int] = {}

    @property
    def head(self) -> Member:
        return self.members[Role.SERVER, 0]

    @property
    def everybody(self) -> list[Member]:
        return [*self.members.values(), *self.replicas]

    @property
    def membership(self) -> Membership:
        return Membership(
            UID, "ns", "job", self.epoch, 1, WORKERS, tuple(self.members.values()),
            self.job.settings, self.initialised, recovery=self.recovery, replicas=self.replicas,
        )  # fmt: skip

    def begin(self) -> None:
        for role, count in ((Role.SERVER, 1), (Role.WORKER, WORKERS)):
            for index in range(count):
                self.members[role, index] = self._make(role, index)
        self._addresses()

    def look(self, chosen: Callable[[Member], bool]) -> None:
        """Read the reports of some members."""
        for member in self.everybody:
            if chosen(member) and self.job.reaches("operator", member.id):
                report = self.job.report(member)
                if report is not None:
                    self.seen[member.id] = report

    def act(self, *, hurry: bool = False) -> None:
        """Decide once. `hurry`: wait no longer for workers that said nothing."""
        self._addresses()
        self._keep_up()
        self._lose()
        head = self.seen.get(self.head.id)
        if head is None:
            return
        if not self.initialised:
            if head.initialised:
                self.initialised = True
                self.epoch += 1
            return
        if self.recovery is not None:
            self._recover(head, hurry=hurry)
        else:
            self._replicate()

    def tell(self, member: Member) -> None:
        """Give a member the newest membership."""
        if self.told.get(member.id) == self.epoch or not self.job.reaches("operator", member.id):
            return
        self.told[member.id] = self.epoch
        if member.id in self.job.servers:
            self.job.servers[member.id].obey(self.membership)
        elif member.id in self.job.workers:
            self.job.workers[member.id]._command(Command("membership", self.membership))

    def gone(self, member: Member) -> bool:
        return member.id in self.suspected or not self.job.alive(member.id)

    def _make(self, role: Role, index: int) -> Member:
        node = self.job.node_of(role, index, self.epoch)
        member = Member(role, index, self.epoch, f"pod-{role}-{index}-{self.epoch}", None, node)
        self.job.start(member)
        return member

    def _addresses(self) -> None:
        """Members that were made in an earlier pass have an address by now."""
        new = [m for m in self.everybody if m.address is None]
        if not new:
            return
        addressed = {m.id: replace(m, address=f"{m.id}:7070") for m in new}
        self.members = {seat: addressed.get(m.id, m) for seat, m in self.members.items()}
        self.replicas = tuple(addressed.get(m.id, m) for m in self.replicas)
        self.epoch += 1

    def _keep_up(self) -> None:
        kept = tuple(
            m for m in self.replicas if not self.gone(m) and m.incarnation > self.head.incarnation
        )
        if kept != self.replicas:
            self.replicas = kept
            self.epoch += 1

    def _lose(self) -> None:
        lost = [m for m in self.members.values() if self.gone(m)]
        if not lost:
            return
        self.epoch += 1
        self.recovery, self.planned = self.recovery or self.epoch, 0
        self.since = self.job.now
        for member in lost:
            chosen = self._candidate(member) if member.role is Role.SERVER else None
            if chosen is not None:
                self.replicas = tuple(m for m in self.replicas if m != chosen)
            self.members[member.role, member.index] = chosen or self._make(
                member.role, member.index
            )

    def _candidate(self, lost: Member) -> Member | None:
        for member in sorted(self.replicas, key=lambda m: m.incarnation):
            report = self.seen.get(member.id)
            if member.address is None or report is None or not self.job.alive(member.id):
                continue
            if report.follows is not None or not self.job.settings.chain:
                return member
        return None

    def _recover(self, head: Report, *, hurry: bool) -> None:
        if head.epoch < self.epoch:
            return
        if head.state == "Ready":
            self.recovery = None
            self.epoch += 1
            return
        if head.restore is not None and head.restore.missing and self.planned == self.epoch:
            self.epoch += 1
            return
        if self.planned == self.epoch or head.state != "Restoring":
            return
        workers = [m for m in self.members.values() if m.role is Role.WORKER]
        asked = [*workers, self.head]
        reports = {m.id: self.seen[m.id] for m in asked if m.id in self.seen}
        since = self.recovery or 0
        copies = {i: r.copies for i, r in reports.items() if r.epoch >= since and r.copies}
        silent = [m for m in workers if m.id not in copies]
        if any(self.job.has_copy(m) for m in silent):
            if not hurry and self.job.now - self.since < COPIES_SECONDS:
                return
            self.job.fail(len(silent))
        kinds = {SourceKind.REPLICA, SourceKind.PEER}
        plan = plan_slots(range(SLOTS), kinds, copies, stored=False, replica=self.head.id)
        sources = plan.sources
        if plan.unsourced:
            self.job.broken("no source for some slots")
            found = {s for source in sources for s in slots_from_hex(source.slots)}
            rest = [s for s in range(SLOTS) if s not in found]
            sources = (*sources, Source(SourceKind.INITIAL, slots_to_hex(rest)))
        self.planned = self.epoch
        order = Restore(since, self.epoch, self.head.id, sources)
        self.job.servers[self.head.id].obey(order)

    def _replicate(self) -> None:
        while 1 + len(self.replicas) < self.job.settings.replicas:
            self.epoch += 1
            self.replicas = (*self.replicas, self._make(Role.SERVER, 0))
