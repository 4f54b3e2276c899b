"""How many iterations a failure costs, for each way to save and to recover.

    daruma bench rework [--quick] [--json FILE] [--write FILE] [--jobs N] [--programs A,B]
                        [--study perturbation] [--resume]

Without processes, clusters or clocks: the servers' own tables, saves and recoveries, thousands of
failures of small programs. `--write` makes the page and its plots; nothing in it is typed by hand.
`--json` has each program as soon as it is measured; with `--resume` those that it has of as large a
run on the same machine are not measured again.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daruma_trainer.bench.cli import Result, conclude, machine, parser_of, today
from daruma_trainer.bench.rework.arms import Grid
from daruma_trainer.bench.rework.catalogue import PROGRAMS
from daruma_trainer.bench.rework.experiment import Size, measure
from daruma_trainer.bench.rework.page import page, text
from daruma_trainer.bench.rework.perturbation import study
from daruma_trainer.errors import ConfigurationError

WHOLE = Grid()
QUICK = Grid(every=(8,), fractions=(1.0, 0.125))
STUDIES = ("all", "rework", "perturbation")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    options = _parse(arguments)
    return conclude(options, lambda: run(options), text, written)


def run(options: argparse.Namespace) -> Result:
    """Run what was asked for. ConfigurationError: there is no such program."""
    if unknown := sorted(set(options.programs) - set(PROGRAMS)):
        raise ConfigurationError(f"no program {unknown[0]}; there are {', '.join(PROGRAMS)}")
    quick = options.quick
    size = Size(
        options.seeds or (2 if quick else 10),
        options.failures or (4 if quick else 30),
        QUICK if quick else WHOLE,
        options.jobs,
    )
    result: Result = {
        "benchmark": "rework",
        "quick": quick,
        "machine": f"{machine()}, {options.jobs} processes",
        "date": today(),
        "arms": [arm.key for arm in size.grid.arms()],
        "programs": [],
        "perturbation": [],
        "seconds": 0.0,
    }
    before = _before(options, result, size) if options.resume else {}
    for name in options.programs if options.study in ("all", "rework") else []:
        result["programs"].append(before.get(name) or measure(name, size))
        result["seconds"] += result["programs"][-1]["seconds"]
        if options.json:
            options.json.write_text(json.dumps(result) + "\n")
    if options.study in ("all", "perturbation"):
        began = time.monotonic()
        result["perturbation"] = [s.to_json() for s in study(200 if quick else 5000)]
        result["seconds"] += time.monotonic() - began
    return result


def _before(options: argparse.Namespace, now: Result, size: Size) -> dict[str, dict[str, Any]]:
    """Return the programs that an earlier run has measured as this one would."""
    if not options.json:
        raise ConfigurationError("--resume goes on with what --json has: say which file")
    if not options.json.exists():
        return {}
    result = json.loads(options.json.read_text())
    if any(result.get(key) != now[key] for key in ("benchmark", "quick", "machine", "arms")):
        raise ConfigurationError(f"{options.json} is of another machine, or another kind of run")
    wanted = (size.seeds, size.failures)
    return {p["program"]: p for p in result["programs"] if (p["seeds"], p["failures"]) == wanted}


def written(path: Path, result: Result) -> str:
    """Return the page that is to lie at `path`; its plots are put into a folder beside it."""
    from daruma_trainer.bench.rework.plots import draw

    plots = {p["program"]: draw(path.parent / path.stem, p) for p in result["programs"]}
    return page(result, {n: f.relative_to(path.parent).as_posix() for n, f in plots.items()})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("rework", __doc__, "a small part: under two minutes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seeds", type=int, metavar="N", help="training seeds (10)")
    parser.add_argument("--failures", type=int, metavar="N", help="failures a seed (30)")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has")
    parser.add_argument("--study", choices=STUDIES, default="all")
    parser.add_argument(
        "--programs",
        type=lambda given: given.split(","),
        default=list(PROGRAMS),
        metavar="A,B",
        help=", ".join(PROGRAMS),
    )
    return parser.parse_args(arguments)
