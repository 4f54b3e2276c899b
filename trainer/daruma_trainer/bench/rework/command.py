"""How many iterations a failure costs, for each way to save and to recover.

    daruma bench rework [--quick] [--json FILE] [--write FILE] [--jobs N] [--programs A,B]
                        [--study perturbation]

Without processes, clusters or clocks: the servers' own tables, saves and recoveries, thousands of
failures of small programs. `--write` makes the page and its plots; nothing in it is typed by hand.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework.arms import Grid
from daruma_trainer.bench.rework.catalogue import PROGRAMS
from daruma_trainer.bench.rework.experiment import Size, measure
from daruma_trainer.bench.rework.page import page, text
from daruma_trainer.bench.rework.perturbation import study
from daruma_trainer.contract import ExitCode
from daruma_trainer.errors import MissingError

WHOLE = Grid()
QUICK = Grid(every=(8,), fractions=(1.0, 0.125))
STUDIES = ("all", "rework", "perturbation")


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    options = _parse(arguments)
    unknown = sorted(set(options.programs) - set(PROGRAMS))
    if unknown:
        known = ", ".join(PROGRAMS)
        print(f"daruma bench: no program {unknown[0]}; there are {known}", file=sys.stderr)
        return ExitCode.USAGE
    try:
        result = run(options)
        print(text(result))
        if options.json:
            options.json.write_text(json.dumps(result) + "\n")
        if options.write:
            write(options.write, result)
    except BenchError as error:
        print(f"daruma bench: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except MissingError as error:
        print(f"daruma bench: {error}", file=sys.stderr)
        return ExitCode.MISSING
    return ExitCode.OK


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for; plain JSON values."""
    began = time.monotonic()
    quick = options.quick
    size = Size(
        options.seeds or (2 if quick else 10),
        options.failures or (4 if quick else 30),
        QUICK if quick else WHOLE,
        options.jobs,
    )
    rework = options.study in ("all", "rework")
    bounds = options.study in ("all", "perturbation")
    return {
        "benchmark": "rework",
        "quick": quick,
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {options.jobs} processes",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "programs": [measure(name, size) for name in options.programs] if rework else [],
        "perturbation": [s.to_json() for s in study(200 if quick else 5000)] if bounds else [],
        "seconds": time.monotonic() - began,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the page, and its plots into a folder beside it."""
    from daruma_trainer.bench.rework.plots import draw

    path.parent.mkdir(parents=True, exist_ok=True)
    plots = {p["program"]: draw(path.parent / path.stem, p) for p in result["programs"]}
    path.write_text(
        page(result, {n: f.relative_to(path.parent).as_posix() for n, f in plots.items()})
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="daruma bench rework",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small part: under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every κ there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page of it there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seeds", type=int, metavar="N", help="training seeds (10)")
    parser.add_argument("--failures", type=int, metavar="N", help="failures a seed (30)")
    parser.add_argument("--study", choices=STUDIES, default="all")
    parser.add_argument(
        "--programs",
        type=lambda given: given.split(","),
        default=list(PROGRAMS),
        metavar="A,B",
        help=", ".join(PROGRAMS),
    )
    return parser.parse_args(arguments)
