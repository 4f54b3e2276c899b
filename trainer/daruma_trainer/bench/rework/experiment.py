"""The whole experiment of one program: ε, intervals, seeds in processes of their own, and a result.

Processes are spawned, with one thread of linear algebra each: what is measured on two cores must
not be computed by four threads.
"""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from daruma_trainer.bench.cli import today
from daruma_trainer.bench.rework.arena import Saves, Servers, even, seconds_of
from daruma_trainer.bench.rework.arms import Grid, Saving, Strategy
from daruma_trainer.bench.rework.catalogue import PROGRAMS
from daruma_trainer.bench.rework.problems import Problem
from daruma_trainer.bench.rework.stats import cells, standing
from daruma_trainer.bench.rework.trial import (
    CAP,
    Plan,
    Run,
    concentration,
    run_seed,
    stream,
    target_of,
)
from daruma_trainer.checkpoint.selection import Selection

SEED_SECONDS = 4 * 3600.0
"""A seed that takes longer than this is stuck."""
PROBE_STEPS = 40
WAY = 8
"""Steps over which a row's way is measured: the smallest C."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    seeds: int
    failures: int
    grid: Grid
    jobs: int


@dataclass(frozen=True, slots=True)
class Interval:
    """FullCheckpoint's interval after Young and Daly: √(2 · save · MTBF), all in steps."""

    steps: int
    save_steps: float
    mtbf: float


def young_daly(problem: Problem, mtbf: float) -> Interval:
    """Measure what a save holds up, in steps of this program, and return the interval."""
    values = problem.initial(stream(problem, 0, 1))
    servers = Servers(f"{problem.name}-probe", problem, values)
    saves = Saves(servers, Saving(Strategy.FULL, 1))
    saves.begin()
    rng = stream(problem, 0, 6)
    steps, held = [], []
    for step in range(1, PROBE_STEPS + 1):
        batch = problem.batch(rng, step)

        def train(number: int = step, drawn: Any = batch) -> None:
            servers.push(number, problem.pushes(servers.state().values, drawn))

        steps.append(seconds_of(train))
        before = saves.held_up
        saves.tick()
        held.append(saves.held_up - before)
    cost = sorted(held)[PROBE_STEPS // 2] / sorted(steps)[PROBE_STEPS // 2]
    return Interval(max(1, round(math.sqrt(2 * cost * mtbf))), cost, mtbf)


def measure(name: str, size: Size) -> dict[str, Any]:
    """Measure one program; plain JSON values."""
    began = time.monotonic()
    problem = PROGRAMS[name]()
    target, at = target_of(problem)
    mtbf = at / 2
    interval = young_daly(problem, mtbf)
    grid = replace(size.grid, young_daly=interval.steps)
    if even(problem):
        others = tuple(s for s in grid.selections if s is not Selection.DISTANCE)
        grid = replace(grid, selections=others)
    plans = [Plan(seed, size.failures, target, mtbf, grid) for seed in range(size.seeds)]
    runs = run_all(name, plans, size.jobs)
    return {
        "program": name,
        "title": problem.title,
        "date": today(),
        "tables": [[t.name, t.rows, t.cols, t.rule.name] for t in problem.tables],
        "parameters": sum(t.rows * t.cols for t in problem.tables),
        "seeds": size.seeds,
        "failures": size.failures,
        "target": target,
        "target_step": at,
        "budget": problem.budget,
        "cap": CAP * problem.budget,
        "mtbf": mtbf,
        "young_daly": {"steps": interval.steps, "save_steps": interval.save_steps},
        "concentration": concentration(problem, WAY),
        "undisturbed": [run.undisturbed for run in runs],
        "failure_steps": [run.failures for run in runs],
        "cells": [c.to_json() for c in cells(runs, grid)],
        "standing": [s.to_json() for s in standing(runs)],
        "kappa": {arm: [run.kappa[arm] for run in runs] for arm in runs[0].kappa},
        "seconds": time.monotonic() - began,
    }


def run_all(name: str, plans: Sequence[Plan], jobs: int) -> list[Run]:
    """Run all seeds, in order of the plans; says on stderr how far it is."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    context = multiprocessing.get_context("spawn")
    runs: dict[int, Run] = {}
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        waits = [pool.submit(run_one, name, plan) for plan in plans]
        for done in as_completed(waits, timeout=SEED_SECONDS):
            run = done.result()
            runs[run.seed] = run
            print(f"{name}: {len(runs)} of {len(plans)} seeds", file=sys.stderr)
    return [runs[plan.seed] for plan in plans]


def run_one(name: str, plan: Plan) -> Run:
    """What a process runs."""
    return run_seed(PROGRAMS[name](), plan)
