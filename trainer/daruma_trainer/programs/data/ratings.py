"""Ratings: who gave which item how much. MovieLens, Jester, or made of known factors."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.programs.data.reading import opened, read_table, sizes

NO_RATING = 99.0
"""What Jester writes where a user gave none."""


@dataclass(frozen=True, slots=True)
class Ratings:
    """Three arrays of one length; users and items are counted from 0 without gaps."""

    users: Ints
    items: Ints
    values: Floats
    shape: tuple[int, int]
    """(users, items), also where a part of the data does not name them all."""

    def __len__(self) -> int:
        return len(self.values)

    def part(self, chosen: Ints) -> "Ratings":
        """Return some of them."""
        return Ratings(self.users[chosen], self.items[chosen], self.values[chosen], self.shape)


def ratings(source: str, seed: int = 0) -> tuple[Ratings, Ratings]:
    """Return training and test ratings, nine to one, by a fixed shuffle.

    `synthetic:USERS,ITEMS,RANK,RATINGS`: of factors of that rank, with noise of 0.1. Otherwise a
    path: MovieLens (a folder or file: `ratings.csv`, `u.data`, `ratings.dat`) or Jester (a folder
    or file: `jester*.csv`, a row a user, 99 for none); files also as .gz.
    """
    if source.startswith("synthetic:"):
        found = _synthetic(source, seed)
    else:
        found = _from_path(Path(source), source)
    order = np.random.default_rng(seed).permutation(len(found))
    test = len(found) // 10
    return found.part(np.sort(order[test:])), found.part(np.sort(order[:test]))


def _synthetic(source: str, seed: int) -> Ratings:
    users, items, rank, count = sizes(source, "USERS,ITEMS,RANK,RATINGS")
    if max(users, items) * rank > 1 << 31 or count > 1 << 31:
        raise ConfigurationError(f"{source!r}: at most 2^31 factors, and ratings")
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(users, rank)), rng.normal(size=(items, rank))
    # Drawn with repetition, each pair counted once: exact where the matrix is large.
    pairs = np.unique(rng.integers(0, users * items, count))
    u, i = pairs // items, pairs % items
    clean = np.einsum("nk,nk->n", left[u], right[i]) / np.sqrt(rank)
    values = (clean + 0.1 * rng.normal(size=len(pairs))).astype(np.float32)
    return Ratings(u, i, values, (users, items))


def _from_path(path: Path, source: str) -> Ratings:
    if path.is_dir():
        names = ("ratings.csv", "u.data", "ratings.dat", "jester*.csv")
        found = [
            p for name in names for tail in ("", ".gz") for p in sorted(path.glob(name + tail))
        ]
        if not found:
            raise ConfigurationError(f"{source!r} has none of {', '.join(names)}, nor packed ones")
        # Jester comes in several files of the same items: one after the other.
        files = [p for p in found if p.name.startswith("jester")] or found[:1]
    elif path.is_file():
        files = [path]
    else:
        raise ConfigurationError(
            f"no ratings at {source!r}: synthetic:USERS,ITEMS,RANK,RATINGS, or a folder or file of "
            "MovieLens (ratings.csv, u.data, ratings.dat) or Jester (jester*.csv)"
        )
    name = files[0].name.removesuffix(".gz")
    if name.endswith(".csv") and "rating" not in name:
        return _jester(files)
    if name.endswith(".csv"):
        return _triples(files[0], ",", skip=1)
    return _triples(files[0], "," if name.endswith(".dat") else None)


def _triples(path: Path, delimiter: str | None, skip: int = 0) -> Ratings:
    """Read MovieLens: user, item, rating and more."""
    table = read_table(path, delimiter, 3, skip)
    ids = table[:, :2]
    if (ids < 0).any() or (ids != np.floor(ids)).any():
        raise ConfigurationError(f"{path}: the first two columns are no numbers of users and items")
    users, u = np.unique(ids[:, 0], return_inverse=True)
    items, i = np.unique(ids[:, 1], return_inverse=True)
    return Ratings(
        u.astype(np.int64), i.astype(np.int64), table[:, 2].astype(np.float32),
        (len(users), len(items)),
    )  # fmt: skip


def _jester(paths: list[Path]) -> Ratings:
    """Read a row a user: how many ratings, then one for each joke, 99 where there is none."""
    rows: list[list[float]] = []
    for path in paths:
        with opened(path) as file:
            for number, row in enumerate(csv.reader(file), 1):
                try:
                    rows.append([float(cell) for cell in row])
                except ValueError as error:
                    raise ConfigurationError(f"{path}:{number}: {error}") from error
                if len(row) != len(rows[0]) or len(row) < 2:
                    raise ConfigurationError(
                        f"{path}:{number}: {len(row)} columns, and {len(rows[0])} in the first row"
                    )
    table = np.array(rows)[:, 1:] if rows else np.empty((0, 0))
    u, i = np.nonzero(table != NO_RATING)
    values = table[u, i].astype(np.float32)
    if not len(values) or np.abs(values).max() > 10:
        raise ConfigurationError(
            f"{paths[0]} is no Jester file: a row is the number of ratings, then ratings from "
            "−10 to 10 or 99 for none"
        )
    return Ratings(u, i, values, (table.shape[0], table.shape[1]))
