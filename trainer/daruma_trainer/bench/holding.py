"""`daruma run` whose members can be kept away, as by a cluster that has no room for them.

    python -m daruma_trainer.bench.holding FILE --out DIR

A member that is to be made while `DIR/hold/<role>-<index>` exists is a pod that waits for a place,
until that file is gone. For benchmarks, which write and remove it (`hold`, `release`); nothing that
users call looks at it.
"""

import argparse
import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from daruma_operator.api.job import TrainingJob
from daruma_operator.cli.run import RunOptions, run
from daruma_operator.errors import DarumaError
from daruma_operator.substrate.ports import Ports
from daruma_operator.substrate.processes import ProcessSubstrate
from daruma_operator.substrate.protocol import PodFacts, PodPlan, PodState
from daruma_trainer.contract import ExitCode, Role

HELD_SECONDS = 600.0
"""At most: who was to release it may have died."""
_LOOK_SECONDS = 0.005


def hold(out: Path, role: Role, index: int) -> None:
    """Let no successor of this member be made from now on."""
    mark = _mark(out, role, index)
    mark.parent.mkdir(exist_ok=True)
    mark.touch()


def release(out: Path, role: Role, index: int) -> None:
    """Let it be made; repeats are harmless."""
    _mark(out, role, index).unlink(missing_ok=True)


def _mark(out: Path, role: Role, index: int) -> Path:
    return out / "hold" / f"{role.value.lower()}-{index}"


@dataclass(slots=True)
class _Held:
    facts: PodFacts
    task: asyncio.Task[None]
    begun: bool = False
    """It is being started: whoever wants it gone has to wait for that."""


class HeldSubstrate(ProcessSubstrate):
    """Processes of this machine, some of which wait for a place."""

    def __init__(
        self, job: TrainingJob, out: Path, environment: Mapping[str, str], ports: Ports
    ) -> None:
        super().__init__(job, out, environment, ports)
        self._folder = out
        self._held: dict[str, _Held] = {}

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        """See the Protocol."""
        if plan.name in self._held:
            return
        if not _mark(self._folder, plan.role, plan.index).exists():
            await super().create_pod(job, plan)
            return
        facts = PodFacts(
            plan.name,
            f"{plan.name}-{secrets.token_hex(4)}",
            plan.role,
            plan.index,
            plan.incarnation,
            PodState.WAITING,
            reason="Unschedulable",
            created_at=datetime.now(UTC),
        )
        self._held[plan.name] = _Held(facts, asyncio.create_task(self._later(job, plan)))

    async def list_pods(self, job: TrainingJob) -> Sequence[PodFacts]:
        """See the Protocol."""
        return [*await super().list_pods(job), *(h.facts for h in self._held.values())]

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        """See the Protocol; one that is being started is there, and deleted, a pass later."""
        held = self._held.get(name)
        if held is None:
            await super().delete_pod(job, name, uid, grace_seconds)
        elif held.facts.uid == uid and not held.begun:
            del self._held[name]
            held.task.cancel()

    async def close(self, grace_seconds: float) -> None:
        """End what still runs and what still waits; repeats are harmless."""
        for held in list(self._held.values()):
            if not held.begun:
                held.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await held.task
        self._held.clear()
        await super().close(grace_seconds)

    async def _later(self, job: TrainingJob, plan: PodPlan) -> None:
        mark = _mark(self._folder, plan.role, plan.index)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELD_SECONDS):
                while mark.exists():
                    await asyncio.sleep(_LOOK_SECONDS)
        self._held[plan.name].begun = True
        await super().create_pod(job, plan)
        # No wait between its being there and this: at no time are there two, or none.
        del self._held[plan.name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="daruma_trainer.bench.holding", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        return run(RunOptions(options.file, options.out), os.environ, HeldSubstrate)
    except DarumaError as error:
        print(f"daruma: {error}", file=sys.stderr)
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
