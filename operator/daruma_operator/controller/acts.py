"""What a pass may do, as data. Every act may be repeated."""

from dataclasses import dataclass

from daruma_operator.substrate.protocol import PodPlan
from daruma_trainer.contract import Membership, Restore


@dataclass(frozen=True, slots=True)
class CreatePod:
    """Make an incarnation's pod."""

    plan: PodPlan


@dataclass(frozen=True, slots=True)
class DeletePod:
    """End and remove the pod of this uid."""

    name: str
    uid: str
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class PutMembership:
    """Tell a member who is in."""

    member: str
    agent: str
    membership: Membership


@dataclass(frozen=True, slots=True)
class PostRestore:
    """Tell a server where its slots come from."""

    member: str
    agent: str
    restore: Restore


@dataclass(frozen=True, slots=True)
class PostCheckpoint:
    """Tell a server to save its part of the final cut."""

    member: str
    agent: str
    number: str


Act = CreatePod | DeletePod | PutMembership | PostRestore | PostCheckpoint
