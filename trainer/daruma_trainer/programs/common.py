"""What all programs' command lines have in common."""

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from daruma_trainer.errors import DarumaError

T = TypeVar("T")


def parser_of(description: str | None, data: str, help_of_data: str) -> argparse.ArgumentParser:
    """Return a parser with what every program takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default=data, help=help_of_data)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--think-ms", type=float, default=0.0, help="extra time a step, to try failures"
    )
    return parser


def read_or_exit(program: str, read: Callable[[], T]) -> T:
    """Read the data; what is wrong with it is said in a sentence, and ends the program with 2."""
    try:
        return read()
    except DarumaError as error:
        sys.stderr.write(f"{program}: {error}\n")
        raise SystemExit(2) from error
