"""Bring lost slots back: each from the first of its sources that can give it.

All sources are asked at once, each for the slots it stands first for; what one cannot give goes
to the next. A slot's parameters and `applied` come whole from one source; the optimizer's state of
slots that a peer gave comes from the running checkpoint, or starts at zero with a counter at zero.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from daruma_trainer.checkpoint.manifest import Cut
from daruma_trainer.checkpoint.reading import CutPart, Found, Unread, try_cut
from daruma_trainer.checkpoint.store import Store
from daruma_trainer.contract import (
    RESET,
    Copies,
    Restore,
    RestoreReport,
    Source,
    SourceKind,
    group_versions,
    slots_from_hex,
)
from daruma_trainer.errors import StoreAwayError, StoreError
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Ints, ShardLayout
from daruma_trainer.server.background import Background
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.intake import Intake, make_tables, set_blocks, set_slots
from daruma_trainer.wire import State, split_slots

LOG = logging.getLogger("daruma.server")
PEER_SECONDS = 5.0
"""How long a peer may take to connect and answer, before the next source is asked."""
MAX_DAMAGED = 20
"""Sentences about damage in one report."""
AGAIN_SECONDS = 1.0
"""Before a store that could not be asked is asked again. The operator's deadline ends it."""


@dataclass(slots=True, eq=False)
class _Ask:
    """One source that was asked, and for which slots (indices). Each is itself alone."""

    source: int
    k: Ints
    since: float
    sent: bool = False
    again: float | None = None
    """When a store that could not be asked is to be asked again."""


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
    waiting: str | None = None
    """Why the store could not be asked for what is to be restored."""
    kept: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Slots that a promoted replica has."""
    _rollbacks: int = 0

    def begin(self, plan: Restore) -> None:
        """Start a plan, or go on with a new one for what is still missing."""
        if self.plan == plan:
            return
        now = time.monotonic()
        if self.report is None or self.report.recovery != plan.recovery:
            self.report = RestoreReport(plan.recovery)
            self._started = now
        self.report = replace(self.report, missing=0, epoch=plan.epoch)
        self.plan, self.waiting = plan, None
        self._asks.clear()
        self._tried.clear()
        self._next(self._lost(), now)

    def promoted(self, k: Ints, recovery: int | None, *, served: bool) -> None:
        """This was a replica, and has the slots `k`; `served`: they are Ready already.

        Else they are offered to the plan, as peers' copies are.
        """
        self.kept = np.zeros(0, np.int64) if served else k
        if recovery is None or not served or not len(k):
            return
        size = sum(v.nbytes for v in self.plane.shard.values(k))
        done = bool(self.plane.slots.ready.all())
        found = {SourceKind.REPLICA.value: len(k)}
        moments = found if self._has_moments else {}
        self.report = RestoreReport(recovery, sources=found, bytes=size, moments=moments, done=done)
        self._started = time.monotonic()

    @property
    def offered(self) -> tuple[Copies, ...]:
        """The versions of the slots that a promoted replica has and does not serve yet."""
        slots = self.plane.slots
        k = self.kept[~slots.ready[self.kept]]
        return group_versions(
            slots.ids[k].tolist(), slots.lineage[k].tolist(), slots.position[k].tolist()
        )

    def drop(self) -> None:
        """Give the plan up: what is still on its way is not taken (a rollback)."""
        self._asks.clear()
        self._tried.clear()
        self._back.clear()
        self.plan = self.report = self.waiting = None
        self._rollbacks += 1

    def tick(self) -> None:
        """Ask peers that have connected since, and give up on those that do not answer."""
        now = time.monotonic()
        for ask in list(self._asks):
            source = self._source(ask)
            if source.kind is not SourceKind.PEER:
                if ask.again is not None and now >= ask.again:
                    ask.again = None
                    self._read(ask)
                continue
            if not ask.sent and self.plane.shard.tables:
                ask.sent = self._ask_peer(source.member or "", ask)
            if now - ask.since > PEER_SECONDS:
                LOG.warning("%s did not give its copy within %s s", source.member, PEER_SECONDS)
                self._asks.remove(ask)
                self._next(ask.k, now)

    def _ask_peer(self, member: str, ask: _Ask) -> bool:
        """Ask for as many slots at once as one message holds; False: it is not connected yet."""
        shard = self.plane.shard
        layout = ShardLayout(shard.uid, shard.specs, self.plane.slots.ids[ask.k])
        return all(self.fetch(member, part, ask.source) for part in split_slots(layout))

    def on_copy(self, member: str, number: int, state: State) -> None:
        """Take a part of a worker's copy."""
        now = time.monotonic()
        for ask in list(self._asks):
            source = self._source(ask)
            if source.member != member or ask.source != number:
                continue
            tables = len(self.plane.shard.tables)
            if tables < len(state.values):
                # Its answer overtook the Create of some table: it is asked again.
                ask.sent = False
                continue
            k = self.plane.slots.index_of(np.flatnonzero(state.slots))
            if not np.isin(k, ask.k).all():
                continue  # it was asked twice
            if problem := self._set_values(k, state):
                LOG.warning("the copy of %s does not fit: %s", member, problem)
                self._asks.remove(ask)
                self._next(ask.k, now)
                continue
            slots = self.plane.slots
            # The whole version: a promoted replica offers these slots to the next plan.
            slots.lineage[k], slots.position[k] = state.lineage, state.position
            workers = min(slots.last.shape[1], state.last.shape[1])
            slots.last[k, :workers] = state.last[state.vector][:, :workers]
            slots.window[k, :workers] = state.window[state.vector][:, :workers]
            self.plane.note_given(k, len(state.values))
            ask.k, ask.since = np.setdiff1d(ask.k, k), now
            if not len(ask.k):
                self._asks.remove(ask)
            self._bring_moments(k, ask, sum(v.nbytes for v in state.values))

    def _set_values(self, k: Ints, state: State) -> str | None:
        """Write a copy's parameters; says what is wrong with it.

        A table that it lacks was new, or yet to be declared by that worker: its first values come
        again. Copies that have it are newer, so asked before.
        """
        try:
            self.plane.shard.set_values(k, dict(enumerate(state.values)))
        except ValueError as error:
            return str(error)
        return None

    def load_cut(self, name: str, done: Callable[[Cut | Unread], None]) -> None:
        """Load every slot from a cut (a rollback); `done` runs on the loop's thread.

        Nothing comes of it once another rollback has begun (`drop`).
        """
        store, index, number = self.store, self.me.index, self._rollbacks
        if store is None or self.background is None:
            done(Unread("there is no store to roll back to"))
            return

        def loaded(result: CutPart | Unread | None, error: StoreError | None) -> None:
            if number != self._rollbacks:
                return
            away = isinstance(error, StoreAwayError)
            self.waiting = str(error) if away else None
            if not isinstance(result, CutPart):
                done(result or Unread(str(error), away))
                return
            everything = np.arange(len(self.plane.slots.ids))
            if problem := make_tables(self.plane, result.manifest):
                done(Unread(problem))
                return
            self.plane.shard.reset_optimizer(everything)
            set_blocks(self.plane, result.blocks, moments_only=False)
            set_slots(self.plane, result.manifest, everything)
            self.plane.note_given(everything, len(result.manifest.tables))
            self.plane.restored(everything)
            done(result.cut)

        self.background.submit(lambda: try_cut(store, self.prefix, name, index), loaded)

    @property
    def handed_over(self) -> bool:
        """Whether all came from a predecessor that was frozen: exact."""
        return self.report is not None and set(self.report.sources) == {SourceKind.PREDECESSOR}

    @property
    def _where(self) -> tuple[str, int, int]:
        """Where saves lie, and which incarnations' are older than this one."""
        return self.prefix, self.me.index, self.plane.incarnation

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
                self.plane.note_given(ask.k, 0)
                self._taken(kind, ask.k, 0, reset=ask.k)
            elif kind is SourceKind.REPLICA:
                self._asks.remove(ask)
                whole = np.intersect1d(ask.k, self.kept)
                self._taken(kind, whole, sum(v.nbytes for v in self.plane.shard.values(whole)))
                self._next(np.setdiff1d(ask.k, whole), now)
            elif kind is not SourceKind.PEER:
                self._read(ask)
        self.tick()
        self._check_end()

    def _read(self, ask: _Ask) -> None:
        source, store = self._source(ask), self.store
        intake = Intake(self.plane, self.background, lambda: ask in self._asks)
        if source.kind is SourceKind.PREDECESSOR and (agent := source.agent) is not None:
            read = partial(intake.take_over, agent, self.me.token)
        elif store is not None:
            read = partial(intake.read, store, self._where, ask.k)
        else:
            self._asks.remove(ask)
            self._next(ask.k, time.monotonic())
            return

        def done(found: Found | None, error: StoreError | None) -> None:
            if ask not in self._asks:
                return
            if isinstance(error, StoreAwayError):
                # Nothing says that the save is not there; of the next source that may be said.
                LOG.warning("the store is asked again: %s", error)
                self.waiting, ask.again = str(error), time.monotonic() + AGAIN_SECONDS
                return
            self.waiting = None
            self._asks.remove(ask)
            self._take_read(ask, intake, found, error)

        self.background.submit(read, done)

    def _take_read(
        self, ask: _Ask, intake: Intake, found: Found | None, error: StoreError | None
    ) -> None:
        now = time.monotonic()
        problem = str(error) if found is None else intake.problem
        if self.report is None:
            return
        if found is None or problem:
            LOG.warning("%s gave nothing: %s", self._source(ask).kind, problem)
            self._damaged((problem or "",))
            self._next(ask.k, now)
            return
        self._damaged(found.damaged)
        whole = ask.k[intake.whole(ask.k)]
        set_slots(self.plane, found.manifest, whole)
        self.plane.note_given(whole, len(found.manifest.tables))
        self._taken(self._source(ask).kind, whole, intake.size)
        self._next(np.setdiff1d(ask.k, whole), now)

    def _bring_moments(self, k: Ints, ask: _Ask, size: int) -> None:
        """Zero the moments of slots that a peer gave, then take what the running save has.

        The slots count as back only then; that the save has none, or cannot be read, is no reason
        to take an older copy of their parameters.
        """
        self.plane.shard.reset_optimizer(k)
        plan, store, background = self.plan, self.store, self.background
        kind = self._source(ask).kind
        stored = plan is not None and any(
            s.kind is SourceKind.RUNNING_CHECKPOINT for s in plan.sources[ask.source :]
        )
        if store is None or not (stored and self._has_moments):
            self._taken(kind, k, size, reset=k)
            return
        intake = Intake(self.plane, background, lambda: self.plan is plan, moments_only=True)

        def done(found: Found | None, error: StoreError | None) -> None:
            self._reading -= 1
            if self.plan is not plan:
                self._check_end()
                return
            reset = k
            if found is None:
                LOG.warning("the moments start at zero: %s", error)
            else:
                self._damaged(found.damaged)
                reset = k[~intake.whole(k)]
            self._taken(kind, k, size, reset=reset)

        self._reading += 1
        background.submit(lambda: intake.read(store, self._where, k), done)

    def _damaged(self, sentences: Sequence[str]) -> None:
        if self.report is not None:
            # A newer plan of the same recovery reads the same damage again.
            known = dict.fromkeys((*self.report.damaged, *sentences))
            self.report = replace(self.report, damaged=tuple(known)[:MAX_DAMAGED])

    @property
    def _has_moments(self) -> bool:
        return any(table.state for table in self.plane.shard.tables)

    def _taken(self, kind: SourceKind, k: Ints, size: int, reset: Ints | None = None) -> None:
        """These slots are back. `reset`: of them, those whose moments begin again at zero.

        None: the moments came with the parameters.
        """
        if self.report is None or not len(k):
            return
        sources, moments = Counter(self.report.sources), Counter(self.report.moments)
        sources[kind.value] += len(k)
        if self._has_moments:
            # A peer has none; what is not zero then is the running save's.
            other = SourceKind.RUNNING_CHECKPOINT if kind is SourceKind.PEER else kind
            fresh = 0 if reset is None else len(reset)
            moments += Counter({other.value: len(k) - fresh, RESET: fresh})
        self.report = replace(
            self.report, sources=dict(sources), moments=dict(moments),
            bytes=self.report.bytes + size,
        )  # fmt: skip
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
