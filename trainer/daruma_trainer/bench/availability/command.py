"""Training while servers, workers or the store are away: five systems of a paper, and ours.

    daruma bench availability [--quick] [--json FILE] [--write FILE] [--resume]
                              [--scenarios A,B] [--arms A,B] [--seeds N] [--seconds S] [--data D]

Real processes under `daruma run`; each arm also without faults. `--write` makes the page and its
plots; nothing in it is typed by hand. `--json` has each run as soon as it is over; with `--resume`
those that it has of the same size and machine are not done again. Arms that the TrainingJob does
not know are named and left out; a run that fails is named, and the others go on.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.availability.arms import SCENARIOS, Arm, Scenario, arms, refusal
from daruma_trainer.bench.availability.page import page, text
from daruma_trainer.bench.availability.plots import draw
from daruma_trainer.bench.availability.stats import select
from daruma_trainer.bench.availability.trial import Score, Size
from daruma_trainer.bench.availability.trial import run as run_job
from daruma_trainer.bench.cli import Result, conclude, machine, parser_of, today
from daruma_trainer.errors import ConfigurationError, MissingError

# With --quick the parameters change less often, so everything that happens by updates does, too.
WHOLE = Size(seconds=18.0, updates=100, evaluate=10, points=40)
QUICK = Size(seconds=4.5, updates=30, evaluate=6, points=15)
QUICK_SCENARIOS = ("none", "server")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    options = _parse(arguments)
    return conclude(options, lambda: run(options), text, written)


def run(options: argparse.Namespace) -> Result:
    """Run what was asked for. ConfigurationError: there is no such arm or scenario."""
    size = _size(options)
    chosen = _named(options.arms, {a.name: a for a in arms(size.updates)}, "arm")
    scenarios = _named(options.scenarios, {s.name: s for s in SCENARIOS}, "scenario")
    if options.write and importlib.util.find_spec("matplotlib") is None:
        # Before the hour, not after it.
        raise MissingError("plots need matplotlib: pip install 'daruma-operator[bench]'")
    judge = _judge()
    refused = {a.name: why for a in chosen if (why := refusal(a, size.updates))}
    result: Result = {
        "benchmark": "availability",
        "quick": options.quick,
        "machine": machine(),
        "date": today(),
        "size": asdict(size),
        "parameters": judge(size.data, 0).parameters,
        "skipped": [{"arm": name, "why": why} for name, why in refused.items()],
        "failed": [],
        "runs": _before(options, size),
        "took": 0.0,
    }
    for name, why in refused.items():
        print(f"daruma bench: {name} is left out: {why}", file=sys.stderr)
    # Whatever the machine does meanwhile: seed by seed, all arms come close to each other.
    for seed in range(options.seeds):
        for scenario in scenarios:
            for arm in chosen:
                if arm.name in refused or arm.name not in (scenario.arms or (arm.name,)):
                    continue
                if not _done(result, arm, scenario, seed):
                    score = judge(size.data, seed).scores
                    _measure(result, (arm, scenario, seed), size, score)
                    if options.json:
                        options.json.write_text(json.dumps(result) + "\n")
    if not result["runs"]:
        raise BenchError("no run came to its end")
    result["took"] = sum(r["took"] for r in result["runs"])
    return result


def _measure(result: Result, what: tuple[Arm, Scenario, int], size: Size, score: Score) -> None:
    """Add one run to the result, or that it failed."""
    arm, scenario, seed = what
    name = f"{arm.name}, {scenario.name}, seed {seed}"
    began = time.monotonic()
    try:
        length = replace(size, seconds=scenario.seconds or size.seconds)
        found = run_job(arm, scenario, seed, length, score)
    except BenchError as error:
        failed = {"arm": arm.name, "scenario": scenario.name, "seed": seed, "why": str(error)}
        result["failed"].append(failed)
        print(f"daruma bench: {name}: {error}", file=sys.stderr)
        return
    found |= {"took": time.monotonic() - began, "load": round(os.getloadavg()[0], 1)}
    found["date"] = today()
    result["runs"].append(found)
    accuracy = f"accuracy {found['curve'][-1][2]:.3f}, " if found["curve"] else ""
    print(f"{name}: {accuracy}{found['applied']} gradients, {found['took']:.0f} s", file=sys.stderr)


def _done(result: Result, arm: Arm, scenario: Scenario, seed: int) -> bool:
    return any(r["seed"] == seed for r in select(result["runs"], scenario.name, arm.name))


def _before(options: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """Return the runs that an earlier command has done as this one would."""
    if not options.resume:
        return []
    if not options.json:
        raise ConfigurationError("--resume goes on with what --json has: say which file")
    if not options.json.exists():
        return []
    found = json.loads(options.json.read_text())
    now = json.loads(json.dumps({"benchmark": "availability", "machine": machine(),
                                 "size": asdict(size)}))  # fmt: skip
    if any(found[key] != value for key, value in now.items()):
        raise ConfigurationError(f"{options.json} is of another machine, or of another size")
    return [{"date": found["date"]} | run for run in found["runs"]]


def _judge() -> Any:
    """Return what scores a split of the data; torch is imported here, where it is needed."""
    from daruma_trainer.bench.availability.scoring import Judge

    return cache(Judge)


def written(path: Path, result: Result) -> str:
    """Return the page that is to lie at `path`; its plots are put into a folder beside it."""
    plots = {}
    for name in dict.fromkeys(r["scenario"] for r in result["runs"]):
        file = draw(path.parent / path.stem, name, select(result["runs"], name))
        plots[name] = file.relative_to(path.parent).as_posix()
    return page(result, plots)


def _named(names: Sequence[str] | None, there: dict[str, Any], kind: str) -> list[Any]:
    if unknown := sorted(set(names or ()) - set(there)):
        known = ", ".join(there)
        raise ConfigurationError(f"no {kind} {unknown[0]!r}; there are {known}")
    return [found for name, found in there.items() if names is None or name in names]


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else WHOLE
    return replace(size, seconds=options.seconds or size.seconds, data=options.data)


def _list(given: str) -> list[str]:
    return given.split(",")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("availability", __doc__, "a small part: under three minutes")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has")
    parser.add_argument("--seeds", type=int, metavar="N", help="3; with --quick 1")
    parser.add_argument("--seconds", type=float, metavar="S", help="of training in each run (18)")
    parser.add_argument("--data", default="digits", help="digits, or a folder of FashionMNIST")
    parser.add_argument("--arms", type=_list, metavar="A,B", help="those with these names")
    parser.add_argument(
        "--scenarios", type=_list, metavar="A,B", help=", ".join(s.name for s in SCENARIOS)
    )
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.scenarios is None and options.quick:
        options.scenarios = list(QUICK_SCENARIOS)
    return options
