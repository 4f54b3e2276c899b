"""What the commands of the benchmarks share: options, where results go, errors as a sentence."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.contract import ExitCode
from daruma_trainer.errors import ConfigurationError, MissingError

Result = dict[str, Any]
"""Plain JSON values."""


def parser_of(name: str, doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has. `quick`: what is less then."""
    parser = argparse.ArgumentParser(
        prog=f"daruma bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page of them there")
    return parser


def conclude(
    options: argparse.Namespace,
    measure: Callable[[], Result],
    text: Callable[[Result], str],
    page: Callable[[Path, Result], str] | None = None,
) -> int:
    """Measure, print the text, and write what was asked for; returns the exit code.

    `page(path, result)` makes what `--write` writes, where that is not the text.
    """
    try:
        result = measure()
        print(text(result))
        if options.json:
            options.json.write_text(json.dumps(result) + "\n")
        if options.write:
            options.write.parent.mkdir(parents=True, exist_ok=True)
            options.write.write_text(page(options.write, result) if page else text(result))
    except (BenchError, ConfigurationError, MissingError) as error:
        print(f"daruma bench: {error}", file=sys.stderr)
        if isinstance(error, BenchError):
            return ExitCode.FAILED
        return ExitCode.USAGE if isinstance(error, ConfigurationError) else ExitCode.MISSING
    return ExitCode.OK


def machine() -> str:
    """Say what this was measured on."""
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def today() -> str:
    """Return the date."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def method(doc: str | None) -> str:
    """Return a benchmark's docstring without its title and its usage: how it is measured."""
    return (doc or "").partition("\n\n")[2].partition("\n\n")[2].strip()
