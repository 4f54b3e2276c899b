"""Cuts over all shards, without the operator.

The coordinator is the live server of the lowest index that has slots. Under `Async` it names a
batch per worker a little ahead; every shard applies up to those, holds later pushes back for at
most two seconds, and copies itself. Under `Sync` every shard copies itself at the same step. Each
tells the coordinator its manifest; the cut exists when the coordinator has written the cut's file.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from daruma_trainer.checkpoint.manifest import Cut, cut_name, cut_number
from daruma_trainer.checkpoint.reading import saved_state
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import ContractError, Membership, Role, SavedState, place
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.saving import Saver, Written
from daruma_trainer.server.slots import SlotState
from daruma_trainer.server.steps import EVERYTHING

LOG = logging.getLogger("daruma.server")
HOLD_SECONDS = 2.0
AHEAD = 3
"""How far ahead of the newest batch a cut is laid: a worker may be a push and a pull further than
the coordinator has seen, and one more while the word travels."""
FIRST = cut_number(0, 0)
"""The cut of the initial values."""
MAX_OPEN = 16
AGAIN_SECONDS = 1.0
"""Between two tries to save the job's result."""


@dataclass(slots=True)
class Cuts:
    """One server's part in cuts, and the coordinator's where it is that."""

    plane: DataPlane
    saver: Saver
    store: Store
    background: Background
    index: int
    tell: Callable[[int, dict[str, Any]], None]
    """Send a CUT message to the server of an index."""
    membership: Membership
    newest: SavedState | None = None
    newest_at: float = 0.0
    final: str | None = None
    abandoned: int = 0
    _taken: set[str] = field(default_factory=set)
    """Cuts that this shard was copied for: the last one, and those that may be asked for again."""
    _parts: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    _holding: str = ""
    _held_since: float | None = None
    _turn: int = 0
    _final_number: str = ""
    _followed: str = ""
    _writing: int = 0
    """Copies of this shard that are on their way to the store."""
    _final_part: dict[str, Any] | None = None
    _final_after: float = 0.0
    """When a part of the result that could not be saved is tried again."""
    _rolling: bool = False
    _rollbacks: int = 0
    _void: tuple[str, str] | None = None
    """Cuts between these two names are of an abandoned lineage."""
    _owners: frozenset[int] = field(init=False)
    """Servers that have slots."""

    def __post_init__(self) -> None:
        self._owners = frozenset(place(self.membership.job_uid, self.membership.servers))

    @property
    def coordinator(self) -> int:
        """Index of the live server that coordinates."""
        live = {m.index for m in self.membership.of(Role.SERVER) if m.address}
        return min(live & self._owners, default=self.index)

    def follow_membership(self, new: Membership) -> None:
        """Take a newer membership; the job's owner may have edited how often cuts are taken."""
        every = new.settings.every
        if every != self.membership.settings.every:
            self._turn = self.plane.step // every if every else 0
        self.membership = new

    def tick(self) -> None:
        """After pushes: begin the cut that is due, take the one that is complete, or give it up."""
        settings, plane = self.membership.settings, self.plane
        if self._holding:
            self._settle()
        self._end()
        if self._writing:
            return  # a store that is slower than cuts come gets fewer of them
        if not (settings.cuts and settings.every) or not plane.slots.ready.all():
            return
        turn = plane.step // settings.every
        if turn <= self._turn or plane.steps.slotless:
            return
        if plane.sync:
            if plane.step % settings.every == 0:
                self._turn = turn
                self._take_step()
        elif self.index == self.coordinator and not self._holding:
            self._turn = turn
            self._lay_ahead()

    def _take_step(self) -> None:
        """Take the cut of this step (Sync), as all do that have slots; others are told to."""
        number = cut_number(self.membership.epoch, self.plane.step)
        order = {"op": "begin", "number": number, "batches": list(self.plane.steps.complete())}
        for member in self.membership.of(Role.SERVER):
            if self.index == self.coordinator and member.index not in self._owners:
                self.tell(member.index, order)
        self.take(number)

    def _lay_ahead(self) -> None:
        """Name a batch of each worker that all shards go to."""
        plane, ended = self.plane, self.plane.steps.ended
        ahead = [
            ended[w] if w in ended else int(plane.slots.last[:, w].max()) + AHEAD
            for w in range(plane.workers)
        ]
        order = {
            "op": "begin",
            "number": cut_number(self.membership.epoch, plane.step),
            "batches": ahead,
        }
        for member in self.membership.of(Role.SERVER):
            if member.index != self.index:
                self.tell(member.index, order)
        self.receive(order, self.membership.rollback.generation)

    def receive(self, raw: dict[str, Any], generation: int) -> None:
        """Take a CUT message of a sibling's generation; ContractError if it is none."""
        if self._rolling or generation != self.membership.rollback.generation:
            return  # its batches are of a lineage that is no more, or not yet this one's
        try:
            number = str(raw["number"])[:64]
            if raw["op"] == "begin":
                batches = tuple(int(b) for b in raw["batches"])
                if len(batches) == self.plane.workers and not self._holding:
                    self._begin(number, batches)
            elif raw["op"] == "part":
                self._part(number, *self._checked(raw))
            elif raw["op"] == "abandon" and self._holding == number:
                self._release()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ContractError(f"not a cut message: {error!r}") from error

    def _checked(self, raw: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return a part's shard, and what a cut says of it; before it is put beside others."""
        index, batches = int(raw["index"]), [int(b) for b in raw["batches"]]
        if not 0 <= index < self.membership.servers or len(batches) != self.plane.workers:
            raise ValueError(f"a part of shard {index}, of {len(batches)} workers")
        return index, {
            "manifest": str(raw["manifest"]), "size": int(raw["size"]), "step": int(raw["step"]),
            "batches": batches,
        }  # fmt: skip

    def take(self, number: str) -> None:
        """Copy and save this shard for a cut, once."""
        if number in self._taken:
            if self._final_part is not None and self._final_part["number"] == number:
                self._hand_in(self._final_part)  # the coordinator may not have heard it
            return
        # Numbers ascend: none of those before it comes again, but the first and the result's.
        self._taken = {number} | self._taken & {FIRST, self._final_number}
        self._writing += 1
        step = EVERYTHING if self.plane.steps.slotless else self.plane.step
        batches = self.plane.steps.complete()
        rollbacks = self._rollbacks

        def done(written: Written | None, error: str | None) -> None:
            self._writing -= 1
            if rollbacks != self._rollbacks:
                return
            if written is None:
                LOG.warning("the cut %s was not saved: %s", number, error)
                self._taken.discard(number)
                return
            part = {
                "op": "part", "number": number, "index": self.index, "manifest": written.name,
                "size": written.size, "step": step, "batches": list(batches),
            }  # fmt: skip
            if number == self._final_number:
                self._final_part = part
            self._hand_in(part)

        self.saver.save_all("cut", number, done)

    def _hand_in(self, part: dict[str, Any]) -> None:
        if self.coordinator != self.index:
            self.tell(self.coordinator, part)
        elif self.final is None:
            self._part(part["number"], self.index, part)

    def take_final(self, number: str) -> None:
        """Take the cut that is the job's result, as soon as it can be; the operator names it."""
        if number in self._taken:
            self.take(number)
        self._final_number, self._final_after = number, 0.0
        self._end()

    def _end(self) -> None:
        """Take this shard's part of the result, again where that failed.

        Not before it is whole: workers that have left still give what a restore lost of sums.
        """
        number, plane = self._final_number, self.plane
        if not number or number in self._taken or time.monotonic() < self._final_after:
            return
        if plane.sums.lacking(plane.workers) or (plane.slots.state == SlotState.RESTORING).any():
            return
        self._final_after = time.monotonic() + AGAIN_SECONDS
        self.take(number)

    def heard_final(self, path: str) -> None:
        """A sibling says that the final cut is durable."""
        self.final = path

    def roll_back(self) -> None:
        """A rollback begins: whatever is in the making, or was made since its cut, is void."""
        self._release()
        self._taken.clear()
        self._parts.clear()
        self._final_number, self._final_part = "", None
        self.newest = None
        self._rolling = True
        self._rollbacks += 1

    def rolled_back(self, name: str, cut: Cut) -> None:
        """Go on counting from the cut's step; it is the newest there is."""
        self._rolling = False
        if self.index == self.coordinator:
            # The others would not hear when it is no more.
            self.newest, self.newest_at = saved_state(name, cut), time.monotonic()
        self._void = cut.number, cut_number(self.membership.epoch, 0)
        every = self.membership.settings.every
        self._turn = cut.step // every if every else 0

    def _begin(self, number: str, batches: tuple[int, ...]) -> None:
        late = any((self.plane.slots.last[:, w] > b).any() for w, b in enumerate(batches))
        if late or self._writing:
            self._abandon(number)
            return
        self.plane.hold = batches
        self._holding, self._held_since = number, None
        self._settle()

    def _settle(self) -> None:
        hold = self.plane.hold
        if hold is None:
            return
        # A lost worker's last batch may be in some slots and not in others: nobody adds to it now.
        waited = [w for w in range(self.plane.workers) if w not in self.plane.steps.seats.away]
        done = self.plane.steps.complete()
        there = all(done[w] >= hold[w] for w in waited)
        if there and not self.plane.sums.lacking(self.plane.workers):
            self.take(self._holding)
            self._release()
            return
        now = time.monotonic()
        if self.plane.waiting and self._held_since is None:
            self._held_since = now
        if self._held_since is not None and now - self._held_since > HOLD_SECONDS:
            self._abandon(self._holding)

    def _abandon(self, number: str) -> None:
        self.abandoned += 1
        LOG.info("the cut %s was given up: a worker did not get that far in time", number)
        for member in self.membership.of(Role.SERVER):
            if member.index != self.index:
                self.tell(member.index, {"op": "abandon", "number": number})
        self._release()

    def _release(self) -> None:
        self.plane.hold = None
        self._holding, self._held_since = "", None

    def _part(self, number: str, index: int, part: dict[str, Any]) -> None:
        parts = self._parts.setdefault(number, {})
        parts[index] = part
        while len(self._parts) > MAX_OPEN:
            self._parts.pop(next(iter(self._parts)))
        if len(parts) < self.membership.servers:
            return
        del self._parts[number]
        ordered = [parts[i] for i in range(self.membership.servers)]
        cut = Cut(
            number,
            min(int(p["step"]) for p in ordered),
            self.membership.servers,
            tuple(str(p["manifest"]) for p in ordered),
            sum(int(p["size"]) for p in ordered),
            tuple(
                min(int(b) for b in column)
                for column in zip(*(p["batches"] for p in ordered), strict=True)
            ),
        )
        name = cut_name(self.membership.prefix, number)
        rollbacks = self._rollbacks

        def done(_result: object, error: Exception | None) -> None:
            if rollbacks != self._rollbacks:
                return
            if error is not None:
                LOG.warning("the cut %s was not written: %s", number, error)
                self.saver.error = str(error)
                if number == self._final_number:
                    # The operator asks for the result until it is there: only ours is missing then.
                    self._taken.discard(number)
                    self._parts[number] = {i: p for i, p in parts.items() if i != self.index}
                return
            self.newest = SavedState(name, cut.step, cut.size, 0.0)
            self.newest_at = time.monotonic()
            if number == self._final_number:
                self.final = name
            else:
                self._retire(number)

        self.background.submit(lambda: self.store.create(name, cut.encode()), done)

    def _retire(self, number: str) -> None:
        """Keep the newest `keep` cuts (the coordinator; shards follow by what it reports)."""
        keep, store, void = self.membership.settings.keep, self.store, self._void
        folder, last = f"{self.membership.prefix}/cuts", f"{number}.json"

        def clean() -> None:
            # Listed, not remembered: an earlier coordinator's cuts count as well.
            names = [n for n in store.list(folder) if n <= last]
            # What a rollback left behind may be damaged: it must not displace one that is whole.
            live = [n for n in names if void is None or not void[0] < n[:-5] < void[1]]
            for name in sorted(set(names) - set(live[-keep:])):
                store.delete(f"{folder}/{name}")
            store.sweep(folder, lambda name: name < last)

        self.background.submit(clean, lambda _r, _e: None)
        self.saver.files.forget_cuts(number)

    def follow(self, newest: str) -> None:
        """Drop this shard's files of cuts that were given up or retired, once for each newest."""
        number = newest.rpartition("/")[2].removesuffix(".json")
        if number > self._followed:
            self._followed = number
            self.saver.files.forget_cuts(number)
