"""One training run, its failures, and what each arm made of them.

The run goes on undisturbed to the last failure; all ways to save look on. At a failure every arm
recovers from what it had saved until then, and goes on alone: all arms, and the undisturbed state,
draw the same batches, of a stream that belongs to this failure and that nobody saw before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.arena import Peer, Saves, Servers, put, state_of
from daruma_trainer.bench.rework.arms import (
    LOST,
    SERVERS,
    UNDISTURBED,
    Arm,
    Copy,
    Grid,
    Saving,
    Strategy,
    servers_of,
)
from daruma_trainer.bench.rework.problems import Problem, Values
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
class Cost:
    """What a way to save costs while nothing fails."""

    steps: int = 0
    data: int = 0
    manifests: int = 0
    held_up: float = 0.0
    background: float = 0.0
    memory: int = 0


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
    saves = {s: Saves(servers, s) for s in plan.grid.savings()}
    for s in saves.values():
        s.begin()
    begun = {s: (kept.store.data, kept.store.manifests) for s, kept in saves.items()}
    rng = stream(problem, plan.seed, 0)
    peer, older = Peer(servers), Peer(servers)
    older.pull()
    for step in range(1, run.failures[-1] + 1):
        batch = problem.batch(rng, step)
        servers.push(step, problem.pushes(servers.state().values, batch))
        for s in saves.values():
            s.tick()
        hits = [n for n, at in enumerate(run.failures) if at == step]
        if hits:
            peer.pull()
        for n in hits:
            _fail(problem, plan, run, n, Parts(servers, saves, peer, older))
        if step + 1 in run.failures:
            older.pull()
    for saving, kept in saves.items():
        data, manifests = begun[saving]
        run.costs[saving.name] = Cost(
            run.failures[-1], kept.store.data - data, kept.store.manifests - manifests,
            kept.held_up, kept.background, kept.memory,
        )  # fmt: skip
    run.costs["Freshest"] = Cost(run.failures[-1], memory=2 * peer.nbytes)
    return run


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a failure finds."""

    servers: Servers
    saves: Mapping[Saving, Saves]
    peer: Peer
    older: Peer


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
    back: dict[tuple[Saving, Copy | None, int], DataPlane] = {}
    lost = order[: max(LOST)]
    found: list[tuple[Arm, Arms]] = []
    for arm in grid.arms():
        saves = parts.saves[arm.saving]
        if arm.saving.strategy is Strategy.FULL:
            found.append((arm, state_of(problem, saves.roll_back())))
            continue
        state = before.take(np.zeros(1, np.int64))
        for server in servers_of(lost, arm.lost):
            key = (arm.saving, arm.copy, server)
            if key not in back:
                old = arm.copy is Copy.OLDEST or (arm.copy is Copy.ASYNC and ages[server])
                source = parts.older if old else parts.peer
                back[key] = saves.restore(server, source if arm.copy else None)
            put(state, back[key])
        found.append((arm, state))
    return found


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
