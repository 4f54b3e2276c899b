"""Bring lost slots back: each from the first of its sources that can give it.

All sources are asked at once, each for the slots it stands first for; what one cannot give goes
to the next. A slot's parameters and `applied` come whole from one source; the optimizer's state of
slots that a peer gave comes from the running checkpoint, or starts at zero with a counter at zero.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from daruma_trainer.checkpoint.manifest import (
    Cut,
    Manifest,
    newest_manifest,
    read_blocks,
    read_manifest,
)
from daruma_trainer.checkpoint.segment import BlockState
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import (
    ContractError,
    Restore,
    RestoreReport,
    Source,
    SourceKind,
    slots_from_hex,
)
from daruma_trainer.errors import DamagedError, StoreError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.handover import fetch as fetch_shard
from daruma_trainer.wire import State

LOG = logging.getLogger("daruma.server")
PEER_SECONDS = 5.0
"""How long a peer may take to connect and answer, before the next source is asked."""
MAX_DAMAGED = 20
"""Sentences about damage in one report."""


@dataclass(slots=True)
class _Ask:
    """One source that was asked, and for which slots (indices)."""

    source: int
    k: Ints
    since: float
    sent: bool = False


@dataclass(slots=True)
class Restorer:
    """The restore of one incarnation's slots."""

    plane: DataPlane
    store: Store | None
    background: Background
    prefix: str
    me: Identity
    fetch: Callable[[str, Ints, int], bool]
    """Ask a worker for slots; False if it is not connected (yet)."""
    complete: Callable[[], None]
    """Called when every slot that has a source is back in memory; opens them."""
    plan: Restore | None = None
    report: RestoreReport | None = None
    _asks: list[_Ask] = field(default_factory=list)
    _tried: dict[int, int] = field(default_factory=dict)
    _back: set[int] = field(default_factory=set)
    _started: float = 0.0
    _reading: int = 0
    """Reads of moments on their way, for slots whose parameters have come."""

    def begin(self, plan: Restore) -> None:
        """Start a plan, or go on with a new one for what is still missing."""
        if self.plan == plan:
            return
        now = time.monotonic()
        if self.report is None or self.report.recovery != plan.recovery:
            self.report = RestoreReport(plan.recovery)
            self._started = now
        self.report = replace(self.report, missing=0)
        self.plan = plan
        self._asks.clear()
        self._tried.clear()
        self._next(self._lost(), now)

    def tick(self) -> None:
        """Ask peers that have connected since, and give up on those that do not answer."""
        now = time.monotonic()
        for ask in list(self._asks):
            source = self._source(ask)
            if source.kind is not SourceKind.PEER:
                continue
            if not ask.sent and self.plane.shard.tables:
                ask.sent = self.fetch(source.member or "", self.plane.slots.ids[ask.k], ask.source)
            if now - ask.since > PEER_SECONDS:
                LOG.warning("%s did not give its copy within %s s", source.member, PEER_SECONDS)
                self._asks.remove(ask)
                self._next(ask.k, now)

    def on_copy(self, member: str, number: int, state: State) -> None:
        """Take a worker's copy."""
        for ask in list(self._asks):
            source = self._source(ask)
            if source.member != member or ask.source != number:
                continue
            tables = len(self.plane.shard.tables)
            if tables < len(state.values):
                # Its answer overtook the Create of some table: it is asked again.
                ask.sent = False
                continue
            self._asks.remove(ask)
            ids = np.flatnonzero(state.slots)
            k = self.plane.slots.index_of(ids)
            good = np.isin(k, ask.k)
            if not good.all() or len(state.values) != tables:
                LOG.warning("%s gave slots that nobody asked it for", member)
                self._next(ask.k, time.monotonic())
                continue
            try:
                self.plane.shard.set_values(k, dict(enumerate(state.values)))
            except ValueError as error:
                LOG.warning("the copy of %s does not fit: %s", member, error)
                self._next(ask.k, time.monotonic())
                continue
            slots = self.plane.slots
            slots.position[k] = state.position
            workers = min(slots.last.shape[1], state.last.shape[1])
            slots.last[k, :workers] = state.last[state.vector][:, :workers]
            slots.window[k, :workers] = state.window[state.vector][:, :workers]
            self._bring_moments(k, ask, sum(v.nbytes for v in state.values))
            self._next(np.setdiff1d(ask.k, k), time.monotonic())

    def load_cut(self, name: str, done: Callable[[Cut | None, str | None], None]) -> None:
        """Load every slot from a cut (a rollback); `done` runs on the loop's thread."""
        store, index = self.store, self.me.index
        if store is None:
            done(None, "there is no store to roll back to")
            return

        def read() -> tuple[Cut, Manifest, list[BlockState]]:
            cut = Cut.decode(store.read(name))
            if index >= len(cut.shards):
                raise DamagedError(f"{name} is a cut of {len(cut.shards)} servers")
            manifest = read_manifest(store, cut.shards[index])
            blocks, damaged = read_blocks(store, manifest, manifest.blocks)
            if damaged:
                raise DamagedError(f"{name}: {damaged[0]}")
            return cut, manifest, blocks

        def loaded(
            result: tuple[Cut, Manifest, list[BlockState]] | None, error: StoreError | None
        ) -> None:
            if result is None:
                done(None, str(error))
                return
            cut, manifest, blocks = result
            everything = np.arange(len(self.plane.slots.ids))
            if problem := self._make_tables(manifest):
                done(None, problem)
                return
            self.plane.shard.reset_optimizer(everything)
            self._set_blocks(blocks, moments_only=False)
            self._set_slots(manifest, everything)
            self.plane.restored(everything)
            done(cut, None)

        self.background.submit(read, loaded)

    def _lost(self) -> Ints:
        missing = np.flatnonzero(~self.plane.slots.ready)
        return missing[~np.isin(missing, list(self._back))] if self._back else missing

    def _source(self, ask: _Ask) -> Source:
        if self.plan is None:
            raise RuntimeError("a source without a plan")
        return self.plan.sources[ask.source]

    def _next(self, k: Ints, now: float) -> None:
        """Give each slot to the next source in the plan's order that lists it."""
        if self.plan is None or self.report is None:
            return
        groups: dict[int, list[int]] = {}
        listed = [set(slots_from_hex(s.slots)) for s in self.plan.sources]
        for s in k.tolist():
            slot = int(self.plane.slots.ids[s])
            start = self._tried.get(s, -1) + 1
            found = next((i for i in range(start, len(listed)) if slot in listed[i]), None)
            if found is None:
                self.report = replace(self.report, missing=self.report.missing + 1)
            else:
                self._tried[s] = found
                groups.setdefault(found, []).append(s)
        for i, mine in groups.items():
            ask = _Ask(i, np.array(mine), now)
            self._asks.append(ask)
            kind = self.plan.sources[i].kind
            if kind is SourceKind.INITIAL:
                self._asks.remove(ask)
                self.plane.shard.reset_optimizer(ask.k)
                self._taken(kind, ask.k, 0)
            elif kind is not SourceKind.PEER:
                self._read(ask)
        self.tick()
        self._check_end()

    def _read(self, ask: _Ask) -> None:
        source, store = self._source(ask), self.store
        predecessor = source.agent if source.kind is SourceKind.PREDECESSOR else None
        if store is None and predecessor is None:
            self._asks.remove(ask)
            self._next(ask.k, time.monotonic())
            return
        prefix, index, below = self.prefix, self.me.index, self.plane.incarnation

        def read() -> tuple[Manifest, list[BlockState], list[str]]:
            if predecessor is not None:
                return fetch_shard(predecessor, self.me.token)
            if store is None:
                raise StoreError("the job has no store")
            if source.manifest:
                manifest = read_manifest(store, source.manifest)
            else:
                found = newest_manifest(store, prefix, index, below)
                if found is None:
                    raise StoreError(f"shard {index} has no readable manifest in the store")
                manifest = found[1]
            blocks, damaged = read_blocks(store, manifest, manifest.blocks)
            return manifest, blocks, damaged

        def done(
            result: tuple[Manifest, list[BlockState], list[str]] | None, error: StoreError | None
        ) -> None:
            if ask in self._asks:
                self._asks.remove(ask)
                self._take_read(ask, result, error)

        self.background.submit(read, done)

    def _take_read(
        self,
        ask: _Ask,
        result: tuple[Manifest, list[BlockState], list[str]] | None,
        error: StoreError | None,
    ) -> None:
        now = time.monotonic()
        problem = str(error) if result is None else self._make_tables(result[0])
        if result is None or problem or self.report is None:
            LOG.warning("%s gave nothing: %s", self._source(ask).kind, problem)
            self._next(ask.k, now)
            return
        manifest, blocks, damaged = result
        bad = self._set_blocks(
            [b for b in blocks if self._slot_of(b) in set(ask.k.tolist())], moments_only=False
        )
        got = {(b.table, b.block) for b in blocks} - bad
        whole = np.array([s for s in ask.k.tolist() if self._keys(s) <= got], np.int64)
        self._set_slots(manifest, whole)
        self.report = replace(self.report, damaged=(*self.report.damaged, *damaged)[:MAX_DAMAGED])
        size = sum(b.data.nbytes for b in blocks)
        self._taken(self._source(ask).kind, whole, size)
        self._next(np.setdiff1d(ask.k, whole), now)

    def _bring_moments(self, k: Ints, ask: _Ask, size: int) -> None:
        """Zero the moments of slots that a peer gave, then take what the running save has.

        The slots count as back only then; that the save has none, or cannot be read, is no reason
        to take an older copy of their parameters.
        """
        self.plane.shard.reset_optimizer(k)
        plan, store = self.plan, self.store
        kind = self._source(ask).kind
        stored = plan is not None and any(
            s.kind is SourceKind.RUNNING_CHECKPOINT for s in plan.sources[ask.source :]
        )
        has_state = any(table.state for table in self.plane.shard.tables)
        if store is None or not (stored and has_state):
            self._taken(kind, k, size)
            return
        keys = [key for s in k.tolist() for key in self._keys(s)]
        prefix, index, below = self.prefix, self.me.index, self.plane.incarnation

        def read() -> list[BlockState]:
            found = newest_manifest(store, prefix, index, below)
            return [] if found is None else read_blocks(store, found[1], keys)[0]

        def done(blocks: list[BlockState] | None, error: StoreError | None) -> None:
            self._reading -= 1
            if self.plan is not plan:
                return
            if blocks is None:
                LOG.warning("the moments start at zero: %s", error)
            self._set_blocks(blocks or [], moments_only=True)
            self._taken(kind, k, size)

        self._reading += 1
        self.background.submit(read, done)

    def _make_tables(self, manifest: Manifest) -> str | None:
        """Make the tables of a save; says what is wrong where they are not the job's."""
        for spec in manifest.tables:
            try:
                refused = self.plane.add_table(spec) is not None
            except ContractError as error:
                return f"table {spec.name!r} of the checkpoint: {error}"
            if refused:
                return f"table {spec.name!r} of the checkpoint is not the job's"
        return None

    def _set_blocks(self, blocks: list[BlockState], *, moments_only: bool) -> set[tuple[int, int]]:
        """Write blocks into the arrays; returns those whose size does not fit."""
        bad: set[tuple[int, int]] = set()
        at = [{int(g): i for i, g in enumerate(t.layout.blocks)} for t in self.plane.shard.tables]
        for b in blocks:
            table = self.plane.shard.tables[b.table]
            i = at[b.table].get(b.block)
            if i is None:
                bad.add((b.table, b.block))
                continue
            rows = slice(int(table.layout.block_starts[i]), int(table.layout.block_starts[i + 1]))
            shape = table.data[rows].shape
            if b.data.size != shape[0] * shape[1] or len(b.state) != len(table.state):
                bad.add((b.table, b.block))
                continue
            if not moments_only:
                table.data[rows] = b.data.reshape(shape)
            for array, saved in zip(table.state, b.state, strict=True):
                array[rows] = saved.reshape(shape)
            table.steps[i] = b.steps
        return bad

    def _set_slots(self, manifest: Manifest, k: Ints) -> None:
        slots, saved = self.plane.slots, manifest.slots
        where = np.searchsorted(saved.ids, slots.ids[k])
        slots.position[k] = saved.position[where]
        workers = min(slots.last.shape[1], saved.last.shape[1])
        slots.last[k, :workers] = saved.last[where, :workers]
        slots.window[k, :workers] = saved.window[where, :workers]

    def _keys(self, k: int) -> set[tuple[int, int]]:
        """All blocks of a slot."""
        return {
            (t.layout.table.id, int(b))
            for t in self.plane.shard.tables
            for b in t.layout.blocks[t.layout.slot_blocks[k] : t.layout.slot_blocks[k + 1]]
        }

    def _slot_of(self, block: BlockState) -> int:
        layout = self.plane.shard.tables[block.table].layout
        found = np.flatnonzero(layout.blocks == block.block)
        if not len(found):
            return -1
        return int(np.searchsorted(layout.slot_blocks, found[0], side="right")) - 1

    def _taken(self, kind: SourceKind, k: Ints, size: int) -> None:
        if self.report is None or not len(k):
            return
        sources = dict(self.report.sources)
        sources[kind.value] = sources.get(kind.value, 0) + len(k)
        self.report = replace(self.report, sources=sources, bytes=self.report.bytes + size)
        self._back.update(k.tolist())
        self._check_end()

    def _check_end(self) -> None:
        if self.report is None or self.report.done or self.report.missing:
            return
        if self._asks or self._reading:
            return
        if len(self._lost()) == 0:
            seconds = time.monotonic() - self._started
            self.report = replace(self.report, seconds=seconds, done=True)
            self.complete()
