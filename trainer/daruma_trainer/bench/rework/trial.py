"""One training run, its failures, and what each arm made of them.

The run goes on undisturbed to the last failure; all ways to save look on. At a failure every arm
recovers from what it had saved until then, and goes on alone: all arms, and the undisturbed state,
draw the same batches, of a stream that belongs to this failure and that nobody saw before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.arena import Peer, Saves, Servers, put, state_of
from daruma_trainer.bench.rework.arms import (
    LOST,
    SERVERS,
    UNDISTURBED,
    Ack,
    Arm,
    Copy,
    Cost,
    Grid,
    Replication,
    Saving,
    Strategy,
    servers_of,
)
from daruma_trainer.bench.rework.problems import Problem, Values
from daruma_trainer.bench.rework.replicas import Replicas
from daruma_trainer.bench.rework.updates import Arms, apply, join
from daruma_trainer.server.data import DataPlane

PILOTS = 3
TARGET = 0.6
"""Part of the budget at which ε is read off the pilots' mean."""
CAP = 3
"""κ counts as this many budgets at most."""
PILOT_SEED = 1_000_000
"""Seeds of pilots begin here; those of the experiment lie below."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one process needs to run one seed."""

    seed: int
    failures: int
    target: float
    """ε"""
    mean_failure: float
    """Mean of the geometric distribution of failure steps."""
    grid: Grid


@dataclass(slots=True)
class Run:
    """What became of one seed."""

    seed: int
    undisturbed: int
    """κ of the run itself, on its own batches: failures are drawn before it."""
    failures: list[int] = field(default_factory=list)
    kappa: dict[str, list[int]] = field(default_factory=dict)
    """By arm (and UNDISTURBED), an entry a failure."""
    deltas: dict[str, list[float]] = field(default_factory=dict)
    """By arm, ‖δ‖ of the parameters."""
    cap: int = 0
    costs: dict[str, Cost] = field(default_factory=dict)


def stream(problem: Problem, seed: int, *purpose: int) -> np.random.Generator:
    """A stream of random numbers that nothing else draws from."""
    name = int.from_bytes(problem.name.encode()[:8], "little")
    return np.random.default_rng([name, seed, *purpose])


def losses_of_run(problem: Problem, seed: int, steps: int) -> list[float]:
    """Train without servers; the loss after each step, the initial one first."""
    rng = stream(problem, seed, 0)
    arms = fresh(problem, problem.initial(stream(problem, seed, 1)))
    arms.values += problem.derive(arms.values)
    found = [float(problem.losses(arms.values)[0])]
    for step in range(1, steps + 1):
        apply(
            arms, problem.pushes(arms.values, problem.batch(rng, step)), problem.tables, problem.lr
        )
        found.append(float(problem.losses(arms.values)[0]))
    return found


def fresh(problem: Problem, values: Values) -> Arms:
    """State at the beginning, with the moments that the rules have."""
    moments = []
    for table, value in zip(problem.tables, values, strict=True):
        names = table.rule.state_names if table.rule.name != "sgd" else ()
        moments.append(tuple(np.zeros_like(value) for _ in names))
    steps = [np.zeros(v.shape[:2], np.int64) for v in values]
    return Arms([v.copy() for v in values], moments, steps)


def target_of(problem: Problem) -> tuple[float, int]:
    """ε, and the step where the pilots' mean reaches it: before any run of the experiment."""
    runs = [losses_of_run(problem, PILOT_SEED + p, problem.budget) for p in range(PILOTS)]
    mean = np.mean(runs, axis=0)
    at = round(TARGET * problem.budget)
    return float(mean[at]), at


def concentration(problem: Problem, every: int) -> float:
    """How much there is to choose: the part of the way (squared, in `every` steps) that the eighth
    of the rows that moved farthest made; mean over a pilot until ε. 1/8: all rows move alike."""
    rng = stream(problem, PILOT_SEED, 0)
    arms = fresh(problem, problem.initial(stream(problem, PILOT_SEED, 1)))
    shares: list[float] = []
    before = [v.copy() for v in arms.values]
    for step in range(1, round(TARGET * problem.budget) + 1):
        pushes = problem.pushes(arms.values, problem.batch(rng, step))
        apply(arms, pushes, problem.tables, problem.lr)
        if step % every == 0:
            pairs = zip(arms.values, before, strict=True)
            moved = np.sort(np.concatenate([np.square(a - b).sum(axis=2)[0] for a, b in pairs]))
            shares.append(float(moved[-(len(moved) // 8) :].sum() / moved.sum()))
            before = [v.copy() for v in arms.values]
    return float(np.mean(shares))


def draw_failures(plan: Plan, problem: Problem, before: int) -> list[int]:
    """Steps after which servers are lost: geometric, and before the run is done; ascending."""
    rng = stream(problem, plan.seed, 2)
    steps: list[int] = []
    for _ in range(1000 * plan.failures):
        if len(steps) == plan.failures:
            return sorted(steps)
        step = int(rng.geometric(1 / plan.mean_failure))
        if step < before:
            steps.append(step)
    raise BenchError(f"{problem.name}: no failures can be drawn before step {before}")


def run_seed(problem: Problem, plan: Plan) -> Run:
    """Run one seed."""
    cap = CAP * problem.budget
    alone = losses_of_run(problem, plan.seed, cap)
    done = next((i for i, loss in enumerate(alone) if loss <= plan.target), cap)
    run = Run(plan.seed, done, draw_failures(plan, problem, done), cap=cap)
    servers = Servers(
        f"{problem.name}-{plan.seed}", problem, problem.initial(stream(problem, plan.seed, 1))
    )
    parts = Parts(
        servers,
        {s: Saves(servers, s) for s in plan.grid.savings()},
        {r: Replicas(servers, r) for r in plan.grid.replications()},
        Peer(servers),
        Peer(servers),
    )
    parts.begin()
    rng = stream(problem, plan.seed, 0)
    for step in range(1, run.failures[-1] + 1):
        batch = problem.batch(rng, step)
        servers.push(step, problem.pushes(servers.state().values, batch))
        parts.pushed()
        hits = [n for n, at in enumerate(run.failures) if at == step]
        if hits:
            parts.peer.pull()
        for n in hits:
            _fail(problem, plan, run, n, parts)
        if step + 1 in run.failures:
            parts.older.pull()
    run.costs = parts.costs(run.failures[-1])
    return run


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a failure finds."""

    servers: Servers
    saves: Mapping[Saving, Saves]
    replicas: Mapping[Replication, Replicas]
    peer: Peer
    older: Peer
    """A step behind `peer`."""

    def begin(self) -> None:
        """Save, send and pull the initial values."""
        for saves in self.saves.values():
            saves.begin()
        for replicas in self.replicas.values():
            replicas.begin()
        self.older.pull()

    def pushed(self) -> None:
        """The servers have applied a push."""
        for saves in self.saves.values():
            saves.tick()
        for replicas in self.replicas.values():
            replicas.pushed()

    def costs(self, steps: int) -> dict[str, Cost]:
        """What all of it has cost since it began."""
        found = {s.name: replace(kept.cost, steps=steps) for s, kept in self.saves.items()}
        found["Freshest"] = Cost(steps, memory=2 * self.peer.nbytes)
        return found | {
            r.name: replace(kept.cost, steps=steps) for r, kept in self.replicas.items()
        }


def _fail(problem: Problem, plan: Plan, run: Run, n: int, parts: Parts) -> None:
    """Let every arm recover from failure number n, and go on until it is as far as ε."""
    order = stream(problem, plan.seed, 3, n).permutation(SERVERS).tolist()
    ages = stream(problem, plan.seed, 4, n).integers(0, 2, SERVERS).tolist()
    before = parts.servers.state()
    names, states = [UNDISTURBED], [before]
    for arm, state in recovered(plan.grid, parts, before, order, ages):
        names.append(arm.key)
        states.append(state)
        run.deltas.setdefault(arm.key, []).append(distance(before, state))
    index, unique = _distinct(states)
    kappa = go_on(problem, unique, run.failures[n], plan.target, stream(problem, plan.seed, 5, n))
    for name, i in zip(names, index, strict=True):
        run.kappa.setdefault(name, []).append(min(int(kappa[i]), run.cap))


def recovered(
    grid: Grid, parts: Parts, before: Arms, order: list[int], ages: list[int]
) -> list[tuple[Arm, Arms]]:
    """Return each arm's state after its recovery."""
    problem = parts.servers.problem
    back: dict[tuple[Saving, Copy | Ack | None, int], DataPlane] = {}
    lost = order[: max(LOST)]
    found: list[tuple[Arm, Arms]] = []
    for arm in grid.arms():
        if arm.saving.strategy is Strategy.FULL:
            found.append((arm, state_of(problem, parts.saves[arm.saving].roll_back())))
            continue
        state = before.take(np.zeros(1, np.int64))
        for server in servers_of(lost, arm.lost):
            key = (arm.saving, arm.source, server)
            if key not in back:
                back[key] = _bring_back(parts, arm, server, old=bool(ages[server]))
            put(state, back[key])
        found.append((arm, state))
    return found


def _bring_back(parts: Parts, arm: Arm, server: int, *, old: bool) -> DataPlane:
    """Return a lost server as the arm has it; `old`: whether Async's copy of it is."""
    saves, source = parts.saves[arm.saving], arm.source
    if source is None:
        return saves.restore(server)
    if isinstance(source, Ack):
        every = arm.saving.every if source is Ack.NONE else 1
        return parts.replicas[Replication(source, every)].promote(server)
    if source is not Copy.COVERED:
        older = source is Copy.OLDEST or (source is Copy.ASYNC and old)
        return saves.restore(server, parts.older if older else parts.peer)
    copies = parts.replicas[Replication()]
    if copies.by_itself:
        return copies.promote(server)
    plane = saves.restore(server, parts.older)
    parts.servers.push_again(plane, server)
    return plane


def distance(a: Arms, b: Arms) -> float:
    """L2 distance of the parameters."""
    return float(
        np.sqrt(sum(float(np.square(y - x).sum()) for x, y in zip(a.values, b.values, strict=True)))
    )


def _distinct(states: list[Arms]) -> tuple[list[int], Arms]:
    """Equal states go on equally: compute each once. Returns the index of each, and the states."""
    seen: dict[bytes, int] = {}
    index: list[int] = []
    unique: list[Arms] = []
    for state in states:
        floats = [*state.values, *(m for ms in state.moments for m in ms)]
        # Step counters matter to rules with moments alone.
        counters = [s for s, ms in zip(state.steps, state.moments, strict=True) if ms]
        key = b"".join([a.tobytes() for a in floats] + [a.tobytes() for a in counters])
        if key not in seen:
            seen[key] = len(unique)
            unique.append(state)
        index.append(seen[key])
    return index, join(unique)


def go_on(
    problem: Problem, arms: Arms, step: int, target: float, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Train all arms on the same batches; the first step of each with a loss of at most ε."""
    cap = CAP * problem.budget
    arms = Arms(arms.values + problem.derive(arms.values), arms.moments, arms.steps)
    kappa = np.full(len(arms.values[0]), cap, np.int64)
    alive = np.arange(len(kappa))
    for now in range(step, cap + 1):
        done = problem.losses(arms.values) <= target
        if done.any():
            kappa[alive[done]] = now
            keep = np.flatnonzero(~done)
            if not len(keep):
                break
            alive, arms = alive[keep], arms.take(keep)
        batch = problem.batch(rng, now + 1)
        apply(arms, problem.pushes(arms.values, batch), problem.tables, problem.lr)
    return kappa
