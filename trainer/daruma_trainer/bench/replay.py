"""What a replay does to the loss: one of two servers away, for 10, 100 and 1,000 steps.

    daruma bench replay [--quick] [--json FILE] [--write FILE]

The real code of servers, and of what a worker keeps for one that is away, in one process. Two
workers train under Async, in turn; after 100 steps server 1 is lost, and they go on without it. It
comes back from the fresher worker's copy, by the servers' own restore; moments begin again at zero,
as they do without a store. Then both workers replay, as `recovery.replay.combine` says, and train
for 100 steps more. All ways to combine see the same outage, and the same batches after it; `Drop`
throws the replay away, so it is what the loss does without one. The loss is that of the servers'
parameters on all samples, and is looked at after every push, from the return to the last of these
steps. With Auto a replay rides on the batches that follow: *rode* is the step with the last of it,
of the worker and the seed whose replay lasted longest; one that outlasts the steps is an error.

Losses are in parts of the loss at the kill: just before the server is back; then, of each way, the
largest of all after the return (the worst of the seeds) and that after the last step (their mean).
Auto is promised never to exceed 1.1. Bold: it did.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from daruma_trainer.bench import cli
from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.convolution import Convolution
from daruma_trainer.bench.rework.problems import Problem, mlr
from daruma_trainer.contract import (
    Membership,
    Replay,
    Restore,
    Role,
    Settings,
    Source,
    SourceKind,
    slots_to_hex,
)
from daruma_trainer.identity import Identity
from daruma_trainer.layout import Floats, Ints, TableSpec, choose_block_rows
from daruma_trainer.rules import SGD, Adam, Rule, rule_to_json
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.data import DataPlane
from daruma_trainer.server.restoring import Restorer
from daruma_trainer.server.slots import SlotState
from daruma_trainer.wire import Header, Kind, Push, TablePush, encode_push, mask_of
from daruma_trainer.worker.copies import Group, HostCopy
from daruma_trainer.worker.pushes import Held, Pushes, Update
from daruma_trainer.worker.sending import parts_of

SERVERS, WORKERS, LOST = 2, 2, 1
KILL = 100
"""Steps before the loss of the server."""
AFTER = 100
"""Steps after its return. With momentum 0.9 a thousand mean gradients have ridden after 93."""
OUTAGES = (10, 100, 1000)
WAYS = ("Auto", "Sum", "Mean", "Drop")
BOUND = 1.1


@dataclass(frozen=True, slots=True)
class Cell:
    """What is trained, and with which rule."""

    problem: str
    rule: str
    steps: Rule
    lr: float


CELLS = (
    Cell("mlr", "SGD", SGD(), 0.1),
    Cell("mlr", "SGD, momentum 0.9", SGD(momentum=0.9), 0.02),
    Cell("mlr", "Adam", Adam(), 1e-3),
    Cell("cnn", "SGD", SGD(), 0.05),
    Cell("cnn", "SGD, momentum 0.9", SGD(momentum=0.9), 0.005),
    Cell("cnn", "Adam", Adam(), 1e-3),
)


class World:
    """A training run: servers and workers without sockets."""

    def __init__(self, problem: Problem, cell: Cell, seed: int) -> None:
        self._problem, self._cell = problem, cell
        self._member = Membership(
            f"{cell.problem}-{seed}", "bench", "replay", 1, SERVERS, WORKERS, (), Settings()
        )
        self._specs = [
            TableSpec(
                i, t.name, (t.rows, t.cols), choose_block_rows(t.rows, t.cols, SERVERS),
                rule_to_json(cell.steps),
            )
            for i, t in enumerate(problem.tables)
        ]  # fmt: skip
        self._rng = np.random.default_rng([seed, 0])
        self._batch = 0
        self._planes = [self._plane(i, 1) for i in range(SERVERS)]
        values = problem.initial(np.random.default_rng([seed, 1]))
        for plane in self._planes:
            every = np.arange(len(plane.slots.ids))
            layout = plane.shard.layout.tables
            plane.shard.set_values(
                every, {i: v[0][layout[i].rows].reshape(-1) for i, v in enumerate(values)}
            )
            plane.note_given(every)
            plane.slots.state[:] = SlotState.READY
            plane.slots.lineage[:] = 1
        self._copies = [HostCopy(self._member.job_uid, SERVERS, WORKERS) for _ in range(WORKERS)]
        self.pushes = [Pushes(Replay()) for _ in range(WORKERS)]
        self.away = False
        for worker, held in enumerate(self._copies):
            for spec in self._specs:
                held.add(spec)
            held.arrange()
            self._pull(worker)

    def fork(self, combine: str) -> "World":
        """Return what would be, with another way to combine."""
        other = copy.deepcopy(self, {id(self._problem): self._problem})
        for pushes in other.pushes:
            pushes.limits = replace(pushes.limits, combine=combine)
        return other

    def step(self, *, look: bool = False) -> list[float]:
        """Let every worker make a batch; `look`: returns the loss after each."""
        self._batch += 1
        found = []
        for worker in range(WORKERS):
            self._step(worker)
            found += [self.loss()] if look else []
        return found

    @property
    def rides(self) -> bool:
        """Whether some of a replay is yet to ride on a batch."""
        return any(pushes.rest for pushes in self.pushes)

    def loss(self) -> float:
        """Of the servers' parameters, on all samples."""
        values = [np.zeros((1, t.rows, t.cols), np.float32) for t in self._problem.tables]
        for plane in self._planes:
            for value, table in zip(values, plane.shard.tables, strict=True):
                value[0][table.layout.rows] = table.data
        return float(self._problem.losses(values)[0])

    def come_back(self) -> list[float]:
        """Restore the lost server from the fresher worker, and replay; losses after each replay."""
        self._planes[LOST] = self._restored()
        self.away = False
        found = []
        for worker, (held, pushes) in enumerate(zip(self._copies, self.pushes, strict=True)):
            pushes.seal(LOST, held.moved(LOST), self._rules)
            groups = held.groups_of(LOST)
            for done in pushes.sealed.pop(LOST, []):
                for group, parts in zip(groups, done.cut(groups), strict=True):
                    self._send(worker, (done.first, done.last, done.count), group, parts)
            found.append(self.loss())
        for worker in range(WORKERS):
            self._pull(worker)
        return found

    def updates(self, gradients: Sequence[Floats]) -> tuple[Update, ...]:
        """Return what a worker pushes of the tables' gradients, each (rows, cols)."""
        return tuple(Update(i, self._cell.lr, g) for i, g in enumerate(gradients))

    @property
    def _rules(self) -> list[Rule]:
        return [self._cell.steps] * len(self._specs)

    def _step(self, worker: int) -> None:
        held, pushes = self._copies[worker], self.pushes[worker]
        batch = self._problem.batch(self._rng, self._batch)
        gradients = self._problem.pushes([table[None] for table in held.data], batch)
        made = Held(self._batch, 1, self.updates([gradient[0] for gradient in gradients]))
        pushes.begin(self._batch)
        pushes.hold(made)
        for server in range(SERVERS):
            if self.away and server == LOST:
                pushes.accumulate(made, server, held, 0.0, self._rules)
                continue
            pushes.ride(made, server, held)
            groups = held.groups_of(server)
            for number, group in enumerate(groups):
                parts = parts_of(made, groups, number)
                self._send(worker, (self._batch, self._batch, 1), group, parts)
                pushes.note_applied(self._batch, group.mask)
        self._pull(worker)

    def _pull(self, worker: int) -> None:
        for group in self._copies[worker].groups:
            if not (self.away and group.server == LOST):
                plane = self._planes[group.server]
                k = plane.slots.index_of(np.flatnonzero(group.mask))
                self._copies[worker].take(plane.state(k, len(self._specs)))

    def _send(
        self, worker: int, batches: tuple[int, int, int], group: Group, parts: Sequence[TablePush]
    ) -> None:
        push = Push(worker, *batches, 0, group.mask, tuple(parts))
        body = [bytes(frame) for frame in encode_push(push)]
        header = Header(Kind.PUSH, 1, 1, 1)
        reply = self._planes[group.server].push(f"worker-{worker}-1".encode(), header, [b"", *body])
        if reply is None or reply.kind is not Kind.ACK:
            raise BenchError(f"a push was refused: {reply}")

    def _plane(self, index: int, incarnation: int) -> DataPlane:
        member = replace(self._member, initialised=incarnation > 1)
        plane = DataPlane(member, index, incarnation)
        for spec in self._specs:
            plane.add_table(spec)
        return plane

    def _restored(self) -> DataPlane:
        plane = self._plane(LOST, 2)
        asked: list[tuple[Ints, int]] = []

        def fetch(_member: str, ids: Ints, number: int) -> bool:
            asked.append((ids, number))
            return True

        def complete() -> None:
            plane.restored(np.arange(len(plane.slots.ids)))

        me = Identity("bench", "replay", Role.SERVER, LOST, 2, "")
        restorer = Restorer(plane, None, ByHand(), "", me, fetch, complete)
        freshest = max(range(WORKERS), key=lambda w: self._copies[w].position[plane.slots.ids[0]])
        name = f"worker-{freshest}-1"
        source = Source(SourceKind.PEER, slots_to_hex(plane.slots.ids.tolist()), name)
        restorer.begin(Restore(1, 2, me.id, (source,)))
        for ids, number in asked:
            for state in self._copies[freshest].give(mask_of(ids)):
                restorer.on_copy(name, number, state)
        if restorer.report is None or not restorer.report.done:
            raise BenchError(f"the server did not come back: {restorer.report}")
        return plane


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one cell and outage; losses in parts of the one at the kill."""

    problem: str
    rule: str
    outage: int
    kill: float
    """The loss then; mean of the seeds."""
    before: float
    largest: dict[str, float]
    """By way: of all after the return."""
    later: dict[str, float]
    """By way: after AFTER steps."""
    rode: dict[str, int]
    """By way: the step after the return with the last of the replay; 0: none rode."""


def measure(
    cell: Cell, outages: Sequence[int], seeds: int, ways: Sequence[str] = WAYS
) -> list[Outcome]:
    """Measure one cell, for outages of ascending length: each goes on where the last stood."""
    problem: Problem = mlr() if cell.problem == "mlr" else Convolution()
    runs: dict[int, list[Outcome]] = {outage: [] for outage in outages}
    for seed in range(seeds):
        world = World(problem, cell, seed)
        for _ in range(KILL):
            world.step()
        kill = world.loss()
        world.away = True
        made = 0
        for outage in outages:
            for _ in range(outage - made):
                world.step()
            made, before = outage, world.loss()
            found = Outcome(cell.problem, cell.rule, outage, kill, before / kill, {}, {}, {})
            for way in ways:
                losses, found.rode[way] = follow(world.fork(way))
                found.largest[way], found.later[way] = max(losses) / kill, losses[-1] / kill
            runs[outage].append(found)
    return [_joined(runs[outage], ways) for outage in outages]


def follow(world: World) -> tuple[list[float], int]:
    """Bring the server back; return the loss after each push, and the step with the last ride.

    BenchError: some of the replay still rides after AFTER steps.
    """
    losses, rode = world.come_back(), 0
    for step in range(1, AFTER + 1):
        rode = step if world.rides else rode
        losses += world.step(look=True)
    if world.rides:
        raise BenchError(f"a replay still rides {AFTER} steps after the server's return")
    return losses, rode


def _joined(runs: Sequence[Outcome], ways: Sequence[str]) -> Outcome:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    return replace(
        runs[0],
        kill=mean([r.kill for r in runs]),
        before=mean([r.before for r in runs]),
        largest={way: max(r.largest[way] for r in runs) for way in ways},
        later={way: mean([r.later[way] for r in runs]) for way in ways},
        rode={way: max(r.rode[way] for r in runs) for way in ways},
    )


def page(result: cli.Result) -> str:
    """Write the table, and how it came about."""
    lines = [
        "# Replays",
        "",
        f"`daruma bench replay{' --quick' if result['quick'] else ''}`, {result['date']}, "
        f"{result['seeds']} seeds. The same seeds give the same numbers.",
        "",
        cli.method(__doc__),
        "",
        f"| | rule | outage | loss at the kill | before | {' | '.join(WAYS)} | rode |",
        "|---|---|---|---|---|" + "---|" * len(WAYS) + "---|",
    ]
    for raw in result["cells"]:
        ways = [_cell(way, raw["largest"][way], raw["later"][way]) for way in WAYS]
        lines.append(
            f"| {raw['problem']} | {raw['rule']} | {raw['outage']} | {raw['kill']:.3f} | "
            f"{raw['before']:.2f} | {' | '.join(ways)} | {raw['rode']['Auto']} |"
        )
    return "\n".join([*lines, ""])


def _cell(way: str, largest: float, later: float) -> str:
    mark = "**" if way == "Auto" and largest > BOUND else ""
    return f"{mark}{largest:.2f}{mark}, {later:.2f}"


def main(arguments: Sequence[str]) -> int:
    """`daruma bench replay`."""
    options = cli.parser_of("replay", __doc__, "1 seed, outages to 100").parse_args(arguments)
    seeds = 1 if options.quick else 5
    outages = OUTAGES[:2] if options.quick else OUTAGES

    def measured() -> cli.Result:
        cells = [asdict(o) for cell in CELLS for o in measure(cell, outages, seeds)]
        return {"quick": options.quick, "date": cli.today(), "seeds": seeds, "cells": cells}

    return cli.conclude(options, measured, page)
