"""A job that several tests hurt, one after the other, and what must hold after each."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
from members import incarnations, restarts
from testjobs import END, STEPS, JobNamespace

from daruma_trainer.contract import Role

ENOUGH_STEPS = 120
"""What a job must have before it to be hurt once more: a recovery may take seconds."""
MORE_STEPS = 5
"""A job trains again when it made so many."""
SECONDS = 180.0


def recoveries(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of those that ended."""
    found: list[dict[str, Any]] = status.get("recoveries", [])
    return found


class LongJob:
    """One job at a time: when a test made it end, the next has another."""

    def __init__(
        self,
        jobs: JobNamespace,
        stem: str,
        calm: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        enough: int = ENOUGH_STEPS,
        **manifest: Any,
    ) -> None:
        self.jobs = jobs
        self.stem = stem
        self._calm = calm
        """Entered around each loss."""
        self._enough = enough
        self._steps = manifest.get("steps", STEPS)
        self._manifest = manifest
        self._number = 0
        self._furthest = 0

    @property
    def name(self) -> str:
        """Name of the present one."""
        return f"{self.stem}-{self._number}"

    def status(self) -> dict[str, Any]:
        """Return its status; its step must never go back."""
        status = self.jobs.status(self.name)
        step = (status.get("progress") or {}).get("step", 0)
        if step < self._furthest:
            raise AssertionError(f"{self.name} went back from step {self._furthest} to {step}")
        self._furthest = step
        return status

    def trains(self) -> dict[str, Any]:
        """Wait until it makes steps, whatever was before; returns its status then."""
        if not self._number or self._almost_over():
            self._number += 1
            self._furthest = 0
            self.jobs.cluster.apply(self.jobs.manifest(self.name, **self._manifest))
        until = self.jobs.cluster.until
        until(lambda: self.status().get("phase") == "Running", f"{self.name} runs", SECONDS)
        goal = self.jobs.step_of(self.name) + MORE_STEPS
        until(
            lambda: self.jobs.step_of(self.name) >= goal, f"{self.name} is at step {goal}", SECONDS
        )
        return self.status()

    def _almost_over(self) -> bool:
        # What the server says: status may be ten seconds behind it.
        ended = self.status().get("phase") in END
        return ended or self.jobs.step_of(self.name) > self._steps - self._enough

    @contextmanager
    def losing(self, *seats: str) -> Iterator[str]:
        """Have it train, lose members in the block (`server-1`), and check how it went on.

        Nobody else was touched, and status tells what it cost.
        """
        with self._calm():
            yield from self._losing(seats)

    def _losing(self, seats: tuple[str, ...]) -> Iterator[str]:
        before = self.trains()
        # Not those of an earlier loss that are on their way out.
        counted = {m["pod"] for m in before["members"]}
        pods = {p: uid for p, uid in self.jobs.pods(self.name).items() if p in counted}
        yield self.name
        after = self.jobs.cluster.until(
            lambda: self._recovered(before, seats), f"{self.name} recovers {seats}", SECONDS
        )
        lost = tuple(f"{self.name}-{seat}-" for seat in seats)
        now, members = self.jobs.pods(self.name), {m["pod"] for m in after["members"]}
        for pod, uid in pods.items():
            assert (pod in members) is not pod.startswith(lost), f"{pod}: {members}"
            if not pod.startswith(lost):
                assert now.get(pod) == uid, f"{pod} is another one"
        for record in recoveries(after):
            assert record["outcome"] == "Succeeded"
            spent = sum(v or 0 for v in record["phases"].values())
            assert spent == pytest.approx(record["seconds"], abs=0.01)
        for role in ("server", "worker"):
            times = restarts(after, f"{role}s") - restarts(before, f"{role}s")
            assert times == sum(seat.startswith(role) for seat in seats)

    def _recovered(self, before: dict[str, Any], seats: tuple[str, ...]) -> dict[str, Any] | None:
        status = self.status()
        known = {r["id"] for r in recoveries(before)}
        new = [r for r in recoveries(status) if r["id"] not in known]
        lost = {f"{x['role'].lower()}-{x['index']}" for r in new for x in r["losses"]}
        if status["phase"] in END:
            raise AssertionError(f"{self.name} ended: {json.dumps(status)[:3000]}")
        return status if status["phase"] == "Running" and lost == set(seats) else None

    def replaced(self, server: int, number: int) -> None:
        """Wait until it is decided that a server's incarnation is not the last."""
        self.jobs.cluster.until(
            lambda: incarnations(self.status(), Role.SERVER)[server] > number,
            f"server {server} is being replaced",
            SECONDS,
        )

    def ended(self) -> dict[str, Any]:
        """Wait until it succeeds; returns its status."""
        if not self._number:
            self.trains()
        status = self.jobs.ended(self.name)
        assert status["progress"]["step"] >= self._steps
        return status
