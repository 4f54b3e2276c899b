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
    Rollback,
    Source,
    SourceKind,
    place,
    slots_from_hex,
    slots_to_hex,
)
from simulated_training import WORKERS

if TYPE_CHECKING:
    from simulated_job import SimulatedJob

UID = "uid"
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
        self.rollback = Rollback()
        self.recovery: int | None = None
        self.planned: dict[str, int] = {}
        """By server: the epoch of its plan."""
        self.since = 0.0
        """When the last loss was seen."""
        self.seen: dict[str, Report] = {}
        self.suspected: set[str] = set()
        self.told: dict[str, int] = {}

    @property
    def heads(self) -> list[Member]:
        return [self.members[Role.SERVER, i] for i in range(self.job.count)]

    def chain(self, index: int) -> list[Member]:
        """A server and its replicas, in the order in which updates go."""
        after = [m for m in self.replicas if m.index == index]
        head = self.members[Role.SERVER, index]
        return [head, *sorted(after, key=lambda m: m.incarnation)]

    @property
    def everybody(self) -> list[Member]:
        return [*self.members.values(), *self.replicas]

    @property
    def membership(self) -> Membership:
        return Membership(
            UID, "ns", "job", self.epoch, self.job.count, WORKERS, tuple(self.members.values()),
            self.job.settings, self.initialised, rollback=self.rollback,
            recovery=self.recovery, replicas=self.replicas,
        )  # fmt: skip

    def begin(self) -> None:
        for role, count in ((Role.SERVER, self.job.count), (Role.WORKER, WORKERS)):
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
        heads = {m: self.seen[m.id] for m in self.heads if m.id in self.seen}
        if len(heads) < self.job.count:
            return
        if not self.initialised:
            if all(report.initialised for report in heads.values()):
                self.initialised = True
                self.epoch += 1
            return
        if self.recovery is not None:
            self._recover(heads, hurry=hurry)
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

    def _make(self, role: Role, index: int, host: Member | None = None) -> Member:
        node = self.job.node_of(role, index, self.epoch) if host is None else host.node
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
        heads = {m.index: m.incarnation for m in self.heads}
        kept = tuple(
            m for m in self.replicas if not self.gone(m) and m.incarnation > heads[m.index]
        )
        if kept != self.replicas:
            self.replicas = kept
            self.epoch += 1

    def _lose(self) -> None:
        lost = [m for m in self.members.values() if self.gone(m)]
        if not lost:
            return
        self.epoch += 1
        self.recovery = self.recovery or self.epoch
        self.since = self.job.now
        for member in lost:
            chosen = self._candidate(member) if member.role is Role.SERVER else None
            if chosen is not None:
                self.replicas = tuple(m for m in self.replicas if m != chosen)
            self.members[member.role, member.index] = chosen or self._make(
                member.role, member.index
            )

        if self.rollback.cut is not None and any(m.role is Role.SERVER for m in lost):
            self.roll_back()

    def _candidate(self, lost: Member) -> Member | None:
        for member in self.chain(lost.index)[1:]:
            report = self.seen.get(member.id)
            if member.address is None or report is None or not self.job.alive(member.id):
                continue
            if report.follows is not None or not self.job.settings.chain:
                return member
        return None

    def _recover(self, heads: dict[Member, Report], *, hurry: bool) -> None:
        if any(report.epoch < self.epoch for report in heads.values()):
            return
        if all(report.state == "Ready" for report in heads.values()):
            self.recovery = None
            # Who comes later restores from the survivors; nobody goes back to this cut again.
            self.rollback = replace(self.rollback, cut=None)
            self.epoch += 1
            return
        planned = [report for m, report in heads.items() if self.planned.get(m.id) == self.epoch]
        if any(report.restore is not None and report.restore.missing for report in planned):
            self.epoch += 1
            return
        for member, report in heads.items():
            if report.state == "Restoring" and self.planned.get(member.id) != self.epoch:
                self._plan(member, hurry=hurry)

    def roll_back(self) -> None:
        """Send everybody back to the newest cut."""
        self.epoch += 1
        self.recovery, self.since = self.recovery or self.epoch, self.job.now
        self.rollback = Rollback(self.rollback.generation + 1, "cut")
        self.job.rolled_back()

    def _plan(self, head: Member, *, hurry: bool) -> None:
        workers = [m for m in self.members.values() if m.role is Role.WORKER]
        reports = {m.id: self.seen[m.id] for m in [*workers, head] if m.id in self.seen}
        since = self.recovery or 0
        copies = {i: r.copies for i, r in reports.items() if r.epoch >= since}
        silent = [m for m in workers if m.id not in copies]
        if any(self.job.has_copy(m) for m in silent):
            if not hurry and self.job.now - self.since < COPIES_SECONDS:
                return
            self.job.fail(len(silent))
        kinds = {SourceKind.REPLICA}
        if not self.job.settings.chain:
            kinds.add(SourceKind.PEER)
        owners = place(UID, self.job.count)
        lost = [s for s in range(SLOTS) if owners[s] == head.index]
        plan = plan_slots(lost, kinds, copies, stored=False, replica=head.id)
        sources = plan.sources
        if plan.unsourced:
            self.job.broken(head.index)
            if self.job.cut is not None:
                self.roll_back()
                return
            found = {s for source in sources for s in slots_from_hex(source.slots)}
            rest = [s for s in lost if s not in found]
            sources = (*sources, Source(SourceKind.INITIAL, slots_to_hex(rest)))
        self.planned[head.id] = self.epoch
        order = Restore(since, self.epoch, head.id, sources)
        self.job.servers[head.id].obey(order)

    def _replicate(self) -> None:
        """Make the replicas that are missing, in the next server's pod where there is one."""
        for index in range(self.job.count):
            while len(chain := self.chain(index)) < self.job.settings.replicas:
                self.epoch += 1
                nodes = {m.node for m in chain}
                host = self.members[Role.SERVER, (index + 1) % self.job.count]
                shares = host.node not in nodes and not self.gone(host)
                made = self._make(Role.SERVER, index, host if shares else None)
                self.replicas = (*self.replicas, made)
