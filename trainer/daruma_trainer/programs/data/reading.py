"""What the loaders share: opening files, packed or not, and reading numbers that users gave."""

import gzip
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.errors import ConfigurationError


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, also a packed one (.gz); what cannot be read is said in a sentence."""
    try:
        # Old data sets are Latin-1; their ASCII part, which the loaders read, is the same.
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="latin-1") as file:
                yield file
        else:
            with path.open(encoding="latin-1") as file:
                yield file
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def read_table(
    path: Path, delimiter: str | None, columns: int | None = None, skip: int = 0
) -> NDArray[np.float64]:
    """Read a text file of numbers, or the first columns of one; shape (rows, columns)."""
    with opened(path) as file:
        lines = (line.replace("::", ",") for line in file)
        used = None if columns is None else range(columns)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that there is nothing: said below
                found = np.loadtxt(lines, delimiter=delimiter, skiprows=skip, usecols=used, ndmin=2)
        except (ValueError, IndexError) as error:
            raise ConfigurationError(f"{path}: {error}") from error
    if not len(found) or not np.isfinite(found).all():
        raise ConfigurationError(f"{path} has no rows, or some that are not numbers")
    return np.asarray(found, np.float64)


def sizes(source: str, names: str) -> list[int]:
    """Read `synthetic:A,B,C`: as many whole numbers as `names` has, at least 1 each."""
    text = source.removeprefix("synthetic:")
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != len(names.split(",")) or min(found) < 1:
        raise ConfigurationError(f"{source!r}: write synthetic:{names}, whole numbers from 1 on")
    if max(found) > 1 << 31:
        raise ConfigurationError(f"{source!r}: at most 2^31 each")
    return found
