"""What is compared: the second paper's five systems done right, and ours; and what fails."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daruma_operator.api.load import parse_manifest
from daruma_operator.errors import ManifestError
from daruma_trainer.contract import Role

SERVERS = 2
WORKERS = 2
JOB = "bench-availability"

PENDING = {"replay": {"maxPending": 65_535}}
"""So that workers train through the longest outage. They take O(model) memory, however many."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One system: how workers wait for each other, what is kept, how it recovers."""

    name: str
    mode: str
    """spec.consistency.mode."""
    recovery: Mapping[str, Any]
    """spec.recovery."""
    fraction: float = 0.125
    """spec.checkpoint.fraction."""
    saves: bool = True
    """Whether it saves while it trains; chains have their replicas."""

    def steps(self, updates: int) -> int:
        """Return how many steps make so many updates of the parameters.

        A step is one update under Sync, and one of each worker under Async.
        """
        return max(1, updates if self.mode == "Sync" else updates // WORKERS)


def arms(updates: int) -> list[Arm]:
    """Return all systems, those that the CRD does not know yet too.

    `updates`: they save, or send to a replica, every so many updates of the parameters.
    """
    chain = {"strategy": "Chain", "chain": {"replicas": 2, "ack": "None", "every": updates}}
    full = {"strategy": "FullCheckpoint"}
    return [
        Arm("sync checkpoint", "Sync", full, fraction=1.0),
        Arm("async checkpoint", "Async", full, fraction=1.0),
        Arm("sync chain", "Sync", chain, saves=False),
        Arm("async chain", "Async", chain, saves=False),
        Arm("stateless", "Async", {"strategy": "Stateless", **PENDING}),
        Arm("freshest", "Async", {"strategy": "Freshest", **PENDING}),
        Arm("freshest 2 copies", "Async", {"strategy": "Freshest", "copies": 2, **PENDING}),
    ]


def manifest(arm: Arm, command: Sequence[str], store: str, updates: int) -> dict[str, Any]:
    """Return the arm's TrainingJob."""
    every = arm.steps(updates) if arm.saves else 0
    # Whatever every is, a partial save is of one step at least.
    fraction = max(arm.fraction, 1 / every) if every else arm.fraction
    return {
        "apiVersion": "daruma.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": JOB},
        "spec": {
            "program": {"image": "none", "command": list(command)},
            "servers": {"replicas": SERVERS},
            "workers": {"replicas": WORKERS},
            "consistency": {"mode": arm.mode},
            "checkpoint": {"store": store, "every": every, "fraction": fraction},
            "recovery": dict(arm.recovery),
            "runPolicy": {"backoffLimit": 100},
        },
    }


def refusal(arm: Arm, updates: int) -> str | None:
    """Say why this version of Daruma cannot run an arm; None: it can."""
    made = manifest(arm, ["python"], "file:///bench", updates)
    try:
        parse_manifest(json.dumps(made), arm.name, local=True)
    except ManifestError as error:
        return "; ".join(line.removeprefix(f"{arm.name}: ") for line in str(error).splitlines())
    return None


STORE = "store"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something is away from `begin` to `end`, as shares of the run."""

    what: Role | str
    """A role, or STORE."""
    begin: float
    end: float | None
    """None: as fast as it recovers."""
    index: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens during a run."""

    name: str
    title: str
    faults: tuple[Fault, ...] = field(default=())
    seconds: float | None = None
    """How long its runs train; None: as long as all others."""
    arms: tuple[str, ...] = ()
    """Those that it is for; (): all."""

    @property
    def bucket(self) -> bool:
        """Whether the store is one that can be away."""
        return any(f.what == STORE for f in self.faults)


# Cao et al. killed at 30 s and 80 s of about 120 s, and were back at 50 s and 100 s.
FIRST, SECOND = (0.25, 0.42), (0.67, 0.83)
_SERVERS = Fault(Role.SERVER, *FIRST, 1), Fault(Role.SERVER, *SECOND, 0)
_WORKERS = Fault(Role.WORKER, *FIRST, 1), Fault(Role.WORKER, *SECOND, 1)
_STORES = Fault(STORE, *FIRST), Fault(STORE, *SECOND)
THROUGH = ("stateless", "freshest")
"""Arms whose workers train through an outage. With 2 copies or a chain there is hardly one."""
AROUND = (6.0, 9.0)
"""Seconds before and after an outage of a given length."""


def outage(seconds: float, *arms: str) -> Scenario:
    """A server is killed, and its replacement is held away for so many seconds."""
    before, after = AROUND
    whole = before + seconds + after
    fault = Fault(Role.SERVER, before / whole, (before + seconds) / whole, 1)
    title = f"one server is killed, and held away for {seconds:g} s"
    return Scenario(f"outage-{seconds:g}", title, (fault,), whole, arms)


SCENARIOS = (
    Scenario("none", "nothing fails"),
    Scenario("server", "one server is killed, and held away", _SERVERS[:1]),
    Scenario("servers", "two servers are killed, one after the other, and held away", _SERVERS),
    Scenario(
        "servers-at-once",
        "two servers are killed, one after the other, and replaced as fast as it goes",
        (Fault(Role.SERVER, FIRST[0], None, 1), Fault(Role.SERVER, SECOND[0], None, 0)),
    ),
    Scenario("worker", "one worker is killed, and held away", _WORKERS[:1]),
    Scenario("workers", "one worker is killed twice, and held away", _WORKERS),
    Scenario("store", "the store hangs", _STORES[:1]),
    Scenario("stores", "the store hangs twice", _STORES),
    Scenario(
        "store-and-server",
        "the store hangs, and meanwhile a server is killed that is replaced as fast as it goes",
        (Fault(STORE, *FIRST), Fault(Role.SERVER, 0.29, None, 1)),
    ),
    outage(5, *THROUGH),
    outage(20),
    outage(60, *THROUGH),
)
