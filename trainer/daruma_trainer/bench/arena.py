"""What a benchmark of recoveries needs of the place where its job runs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from daruma_trainer.bench.members import Process
from daruma_trainer.contract import Role

START_SECONDS = 300.0
STEPS = 100
"""A job whose workers made more of them each trains."""
CHAIN = "Chain"
"""The strategy whose replicas have everything, and are up to date only then."""


class BenchError(Exception):
    """The measurement cannot be made; the message says why."""


class Arena(Protocol):
    """A job that trains until the benchmark is done with it."""

    where: str
    """What is killed, as the page says it."""
    placement: str
    """What brings lost slots back: one of `--placement`."""
    replicas: int
    """Of each shard, its server not counted."""

    def running(self) -> AbstractContextManager[None]:
        """Start the job and wait until it trains; end it. BenchError: it does not."""

    def members(self) -> Sequence[Process]:
        """Return the members that run now."""

    def records(self) -> Sequence[dict[str, Any]]:
        """Return the recoveries as the job recorded them, oldest first; after the job's end."""


def trains(members: Sequence[Process], workers: int, steps: int = STEPS) -> bool:
    """Whether all workers are at it. OSError, HTTPException: one cannot be asked."""
    found = [p for p in members if p.role is Role.WORKER]
    return len(found) == workers and all(p.view()[1].own.step > steps for p in found)


def placement_of(recovery: Mapping[str, Any]) -> str:
    """Name what brings lost slots back under a spec.recovery, as `--placement` does."""
    if recovery.get("strategy") == CHAIN:
        return CHAIN
    copied = int(recovery.get("copies", 1)) > 1
    return "Copies" if copied else str(recovery.get("placement", "Replace"))


def replicas_of(recovery: Mapping[str, Any]) -> int:
    """Return how many replicas a shard has under a spec.recovery, its server not counted."""
    chained = recovery.get("strategy") == CHAIN
    held = recovery.get("chain", {}).get("replicas", 2) if chained else 1
    return max(int(held), int(recovery.get("copies", 1))) - 1
