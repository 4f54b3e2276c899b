"""What a decision may look at, gathered. `Seen` is plain data; nothing in it asks anybody."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.status import MemberStatus
from daruma_operator.substrate.protocol import PodFacts, PodState
from daruma_trainer.contract import Report, Restore, Role, View, agent_address, member_id


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest that is known of what one member said."""

    age: float
    """Seconds since it said so."""
    report: Report
    offered: int | None = None
    """Epoch in which it said itself what copies it holds, if not in the report's; 0: it did not."""

    @property
    def copies_epoch(self) -> int:
        """Epoch in which it held the report's copies."""
        return self.report.epoch if self.offered is None else self.offered


@dataclass(frozen=True)
class Seen:
    """Everything that `decide` may look at but the clock."""

    job: TrainingJob
    pods: tuple[PodFacts, ...]
    heard: Mapping[str, Heard] = field(default_factory=dict)
    """By member id; members of the past too, for a while."""
    reached: frozenset[str] = frozenset()
    """Members that answered when they were last asked."""
    failing: Mapping[str, float] = field(default_factory=dict)
    """Members that do not answer the operator: seconds since the first question in vain."""
    refused: frozenset[str] = frozenset()
    """Those of them whose hosts refuse the connection: nobody listens there."""
    delivered: Mapping[str, int] = field(default_factory=dict)
    """The newest epoch that each member accepted from this operator."""
    planned: Mapping[str, Restore] = field(default_factory=dict)
    """The restore plan that each server accepted last from this operator."""
    saving: Mapping[str, str] = field(default_factory=dict)
    """The number of the final cut that each server was told to take."""
    denied: frozenset[str] = frozenset()
    """Those of `failing` that are there, but do not take the operator's token."""
    began: datetime | None = None
    """When this operator began to look after the job."""

    def report(self, member: str) -> Report | None:
        """Return what a member said last."""
        heard = self.heard.get(member)
        return None if heard is None else heard.report

    def reported(self, member: str, state: str) -> bool:
        """Whether a member said last that it is in a state."""
        report = self.report(member)
        return report is not None and report.state == state

    def pod(self, name: str) -> PodFacts | None:
        """Return a pod by name."""
        return self._by_name.get(name)

    @property
    def doubted(self) -> bool:
        """Whether a member that counts, and was heard before, is suspected or does not answer."""
        status = self.job.status
        members = {
            member_id(m.role, m.index, m.incarnation) for m in (*status.members, *status.replicas)
        }
        if any(m in self.heard for m in members & self.failing.keys()):
            return True
        detect = self.job.spec.recovery.timeouts.detect_seconds
        if any(m.startswith("server-") and self.silent(m) > detect for m in members):
            return True
        return any(
            suspect.id in members
            for member in members & self.heard.keys()
            for suspect in self.heard[member].report.suspects
        )

    def silent(self, member: str) -> float:
        """Return for how long nothing new was heard of a member, from itself or its siblings."""
        heard = self.heard.get(member)
        return 0.0 if heard is None else heard.age

    def suspected(self, member: str) -> float | None:
        """Return for how long a member that was heard of suspects this one, or None."""
        ages = (age for other, age in self.suspicions.get(member, ()) if other != member)
        return max(ages, default=None)

    # Each of a thousand members is asked for, several times a pass.

    @cached_property
    def suspicions(self) -> Mapping[str, Sequence[tuple[str, float]]]:
        """By member who suspects it, and for how long: (member, seconds)."""
        found: dict[str, list[tuple[str, float]]] = {}
        for other, heard in self.heard.items():
            for suspect in heard.report.suspects:
                found.setdefault(suspect.id, []).append((other, heard.age + suspect.age))
        return found

    @cached_property
    def _by_name(self) -> Mapping[str, PodFacts]:
        return {pod.name: pod for pod in self.pods}


def merge(views: Iterable[tuple[float, View]]) -> dict[str, Heard]:
    """Merge views of known ages: of each member its last words, from itself or handed on.

    Which are the last, its own clock says: an age begins when the words came here or there, so what
    was long on its way looks younger than what came at once.

    Copies are in a member's own view alone. Others may have heard of a newer epoch from it by now:
    it keeps what it offered until the recovery ends, and may offer in the newer one what it did not
    before.
    """
    found: dict[str, Heard] = {}
    own: dict[str, Report] = {}

    def take(age: float, report: Report) -> None:
        known = found.get(report.id)
        if known is None or (report.at, known.age) > (known.report.at, age):
            found[report.id] = Heard(age, report)

    for age, view in views:
        take(age + view.still, view.own)
        own[view.own.id] = view.own
        for told, report in view.others.values():
            take(age + told, report)
    for member, heard in found.items():
        mine = own.get(member)
        if mine is None:
            found[member] = Heard(heard.age, heard.report, 0)
        elif heard.report is not mine:
            copied = replace(heard.report, copies=mine.copies) if mine.copies else heard.report
            found[member] = Heard(heard.age, copied, mine.epoch)
    return found


def agent_of(seen: Seen, member: MemberStatus) -> str | None:
    """Return `host:port` of a member's agent, if the pod that it lives in runs."""
    pod = seen.pod(member.pod)
    if pod is None or not runs(pod):
        return None
    address = member.address if member.guest else pod.address
    return None if address is None else agent_address(address)


def newest_pods(pods: Iterable[PodFacts]) -> dict[tuple[Role, int], PodFacts]:
    """Of each seat the pod with the highest incarnation."""
    found: dict[tuple[Role, int], PodFacts] = {}
    for pod in pods:
        known = found.get((pod.role, pod.index))
        if known is None or pod.incarnation > known.incarnation:
            found[pod.role, pod.index] = pod
    return found


def runs(pod: PodFacts | None) -> bool:
    """Whether a pod's process can be spoken to."""
    return pod is not None and pod.state is PodState.RUNNING and not pod.deleting
