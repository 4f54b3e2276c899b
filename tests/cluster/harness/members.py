"""Members of a job on a cluster: which there are, and how one dies."""

import signal
from typing import Any

from testjobs import JobNamespace

from daruma_trainer.contract import Role


def incarnations(status: dict[str, Any], role: Role) -> dict[int, int]:
    """Return the newest incarnation of each index."""
    return {m["index"]: m["incarnation"] for m in status["members"] if m["role"] == role.value}


def restarts(status: dict[str, Any], what: str) -> int:
    """Return how often something was replaced."""
    return int(status["restarts"][what])


def seat(jobs: JobNamespace, name: str, role: Role, index: int) -> dict[str, str]:
    """Return what tells a member's newest incarnation from all processes (`Cluster.pids`)."""
    number = incarnations(jobs.status(name), role)[index]
    return {
        "NAMESPACE": jobs.name, "JOB": name, "ROLE": role.value, "INDEX": str(index),
        "INCARNATION": str(number),
    }  # fmt: skip


def kill(jobs: JobNamespace, name: str, role: Role, index: int) -> None:
    """kill -9 of the process of a member's newest incarnation."""
    jobs.cluster.kill(signal.SIGKILL, **seat(jobs, name, role, index))
