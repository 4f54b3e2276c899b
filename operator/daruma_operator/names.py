"""Names that the operator gives."""

from daruma_operator.substrate.protocol import PodPlan
from daruma_trainer.contract import Role, member_id

KEY_SECRET = "daruma-operator-key"  # noqa: S105 - a name
"""Holds the operator's key, in its own namespace: every job's token follows from it."""


def pod_name(job: str, role: Role, index: int, incarnation: int) -> str:
    """Name a pod for its incarnation, so that a replacement never waits for a name.

    >>> pod_name("mlr", Role.SERVER, 1, 6)
    'mlr-server-1-6'
    """
    return f"{job}-{member_id(role, index, incarnation)}"


def pod_plan(job: str, role: Role, index: int, incarnation: int) -> PodPlan:
    """Return the plan of an incarnation's pod."""
    return PodPlan(pod_name(job, role, index, incarnation), role, index, incarnation)


def seat(role: Role, index: int) -> str:
    """Name a member whatever its incarnation: `server-1`."""
    return f"{role.value.lower()}-{index}"


def cut_number(epoch: int, step: int) -> str:
    """Name a cut as the trainer does: names sort as (epoch, step)."""
    return f"{epoch:08d}-{step:010d}"
