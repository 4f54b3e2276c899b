"""Which ways to save and to recover are compared. An arm is one of them after one failure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from daruma_trainer.checkpoint.selection import Selection

SERVERS = 4
LOST = (1, 2, 3)
"""Servers lost of four."""
UNDISTURBED = "undisturbed"


class Strategy(StrEnum):
    """spec.recovery.strategy, where it exists."""

    FULL = "FullCheckpoint"
    PARTIAL = "Partial"
    FRESHEST = "Freshest"


class Copy(StrEnum):
    """How old a worker's copy of a lost server's slots is."""

    SYNC = "Sync"
    """The last complete pull is the state of the step."""
    ASYNC = "Async"
    """Each lost server's slots: of this step, or of the one before, with equal chance."""
    OLDEST = "Async, oldest"
    """One step old, and the pushes of that step are lost: the worst that a peer can give."""
    COVERED = "Async, copies 2"
    """`copies: 2`: a worker keeps a push until it is on two nodes. One step old, and the push of
    that step is made again."""


class Ack(StrEnum):
    """spec.recovery.chain.ack: what a replica has of a server that is lost."""

    NONE = "None"
    """With `every: C`: everything up to C updates ago at most. What came since is lost."""
    TAIL = "Tail"
    """Everything but the last update, which was not acknowledged: its worker pushes it again."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What one server saves, and when."""

    strategy: Strategy
    every: int
    """C, in steps."""
    fraction: float = 1.0
    selection: Selection = Selection.PRIORITY

    @property
    def name(self) -> str:
        """The arm's name without what was lost."""
        if self.strategy is Strategy.FULL:
            return f"FullCheckpoint C={self.every}"
        how = "all" if self.fraction == 1 else f"{self.selection} r={fraction_name(self.fraction)}"
        return f"Partial {how} C={self.every}"


@dataclass(frozen=True, slots=True)
class Replication:
    """What a server's replica gets."""

    ack: Ack | None = None
    """Of a chain; None: `copies: 2` of Freshest."""
    every: int = 1
    """Updates; more than one only where nothing is acknowledged."""

    @property
    def name(self) -> str:
        """What the table of standing costs calls it."""
        if self.ack is None:
            return "Freshest, copies 2"
        return f"Chain {self.ack}" + (f" C={self.every}" if self.ack is Ack.NONE else "")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a way to save or to replicate costs while nothing fails, all servers together."""

    steps: int = 0
    data: int = 0
    """Bytes of blocks saved or sent."""
    manifests: int = 0
    """Bytes."""
    held_up: float = 0.0
    """Seconds of CPU of the serve loops."""
    background: float = 0.0
    """Seconds of CPU of the store's threads, or of the replicas."""
    memory: int = 0
    """Bytes kept."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to recover from the loss of so many servers."""

    saving: Saving
    lost: int = 0
    """Servers; 0 where it does not matter, because everything goes back."""
    source: Copy | Ack | None = None
    """A peer's copy (Freshest: what has moments gets them from `saving`, or with `copies: 2` from
    a replica), a replica (Chain), or None: `saving` alone."""

    @property
    def name(self) -> str:
        """What the tables and the JSON call it, without the lost part."""
        if self.source is None:
            return self.saving.name
        strategy = "Chain" if isinstance(self.source, Ack) else "Freshest"
        return f"{strategy} {self.source} C={self.saving.every}"

    @property
    def key(self) -> str:
        """The name with what was lost."""
        return f"{self.name} lost={self.lost}/{SERVERS}" if self.lost else self.name


def fraction_name(value: float) -> str:
    """Write 0.125 as 1/8."""
    return "1" if value == 1 else f"1/{round(1 / value)}"


@dataclass(frozen=True, slots=True)
class Grid:
    """What is compared."""

    every: tuple[int, ...] = (8, 40, 96)
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    selections: tuple[Selection, ...] = tuple(Selection)
    young_daly: int = 0
    """FullCheckpoint's interval after Young and Daly, in steps; 0: not measured."""

    def savings(self) -> list[Saving]:
        """All ways to save."""
        full = {*self.every, *([self.young_daly] if self.young_daly else [])}
        found = [Saving(Strategy.FULL, c) for c in sorted(full)]
        for c in self.every:
            for r in self.fractions:
                # With r = 1 everything is saved, whatever the selection.
                ways = self.selections if r < 1 else (Selection.PRIORITY,)
                found += [Saving(Strategy.PARTIAL, c, r, how) for how in ways]
        return found

    def replications(self) -> list[Replication]:
        """All ways to replicate."""
        lazy = [Replication(Ack.NONE, c) for c in self.every]
        return [Replication(), *lazy, Replication(Ack.TAIL)]

    def arms(self) -> list[Arm]:
        """All ways to recover."""
        found: list[Arm] = []
        for saving in self.savings():
            if saving.strategy is Strategy.FULL:
                found.append(Arm(saving))
            else:
                found += [Arm(saving, lost) for lost in LOST]
        smallest = min(self.fractions)
        for c in self.every:
            moments = Saving(Strategy.PARTIAL, c, smallest, Selection.PRIORITY)
            found += [Arm(moments, lost, source) for source in (*Copy, *Ack) for lost in LOST]
        return found


def servers_of(order: Sequence[int], lost: int) -> list[int]:
    """The servers that are lost: the first of a failure's random order, the same for all arms."""
    return sorted(order[:lost])
