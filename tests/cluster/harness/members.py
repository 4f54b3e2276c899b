"""Members of a job on a cluster: which there are, how one dies, and what must hold afterwards."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from testjobs import STEPS, JobNamespace

from daruma_trainer.contract import Role

Check = Callable[[str, dict[str, str], set[str], dict[str, Any]], None]
"""A job's name, its pods before, the seats that were lost, its status at the end."""


def incarnations(status: dict[str, Any], role: Role) -> dict[int, int]:
    """Return the newest incarnation of each index."""
    return {m["index"]: m["incarnation"] for m in status["members"] if m["role"] == role.value}


def restarts(status: dict[str, Any], what: str) -> int:
    """Return how often something was replaced."""
    return int(status["restarts"][what])


def kill(jobs: JobNamespace, name: str, role: Role, index: int) -> None:
    """kill -9 of the process of a member's newest incarnation."""
    number = incarnations(jobs.status(name), role)[index]
    jobs.cluster.kill(
        signal.SIGKILL, JOB=name, ROLE=role.value, INDEX=str(index), INCARNATION=str(number)
    )


def check_recovered(
    jobs: JobNamespace,
    name: str,
    before: dict[str, str],
    lost: Iterable[str],
    status: dict[str, Any],
    steps: int = STEPS,
) -> None:
    """The job went on: nobody but the lost was replaced, and status tells what it cost."""
    seats = tuple(f"{name}-{seat}-" for seat in lost)
    kept = {pod: uid for pod, uid in before.items() if not pod.startswith(seats)}
    now = jobs.pods(name)
    # Servers of a job that succeeded are gone; those that are there are the same pods.
    assert {pod: now.get(pod, uid) for pod, uid in kept.items()} == kept
    assert set(kept) <= {m["pod"] for m in status["members"]}, "a survivor was replaced"
    assert not {m["pod"] for m in status["members"] if m["pod"].startswith(seats)} & set(before)
    for record in status["recoveries"]:
        assert record["outcome"] == "Succeeded"
        spent = sum(v or 0 for v in record["phases"].values())
        assert spent == pytest.approx(record["seconds"], abs=0.01)
    counted = [restarts(status, what) for what in ("servers", "workers", "disruptions")]
    assert sum(counted) >= len(seats)
    assert status["progress"]["step"] >= steps
