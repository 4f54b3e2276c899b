"""Samples with a label each: digits, MNIST, CoverType, or Gaussian classes."""

import gzip
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.errors import ConfigurationError, MissingError
from daruma_trainer.programs.data.reading import read_table, sizes

Samples = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Features (n, d) and labels (n,)."""


def classification(source: str, seed: int = 0) -> tuple[Samples, Samples]:
    """Return training and test samples.

    `digits`: scikit-learn's 1,797 images of 8 × 8. `synthetic:N,D,K`: N samples of K Gaussian
    classes in D dimensions. Otherwise a path: a folder with MNIST's four idx files (also .gz), or
    CoverType's `covtype.data` (also .gz).
    """
    if source == "digits":
        return split(*_digits(), seed)
    if source.startswith("synthetic:"):
        return split(*_synthetic(source, seed), seed)
    path = Path(source)
    if path.is_dir():
        return _mnist(path)
    if path.is_file():
        return split(*_covertype(path), seed)
    raise ConfigurationError(
        f"no data at {source!r}: digits, synthetic:N,D,K, a folder with MNIST's idx files, "
        "or CoverType's covtype.data"
    )


def images(source: str, side: int = 16, seed: int = 0) -> tuple[Samples, Samples]:
    """Return training and test samples whose features are square images; x has (n, side, side).

    `digits`: enlarged to `side`, a multiple of 8. `synthetic:N,SIDE,K`: K Gaussian classes.
    Otherwise a folder with MNIST's idx files, 28 × 28.
    """
    if source.startswith("synthetic:"):
        n, side, k = sizes(source, "N,SIDE,K")
        source = f"synthetic:{n},{side * side},{k}"
    if source == "digits" and side % 8:
        raise ConfigurationError(f"digits are 8 × 8: a side of {side} is no multiple of that")
    parts = []
    for x, y in classification(source, seed):
        edge = round(x.shape[1] ** 0.5)
        if edge * edge != x.shape[1]:
            raise ConfigurationError(f"{source!r}: {x.shape[1]} features make no square image")
        square = x.reshape(-1, edge, edge)
        if source == "digits":
            square = square.repeat(side // edge, axis=1).repeat(side // edge, axis=2)
        parts.append((square, y))
    return parts[0], parts[1]


def split(x: NDArray[np.float32], y: NDArray[np.int64], seed: int) -> tuple[Samples, Samples]:
    """Keep a fifth for the test, by a fixed shuffle."""
    order = np.random.default_rng(seed).permutation(len(x))
    test = len(x) // 5
    return (x[order[test:]], y[order[test:]]), (x[order[:test]], y[order[:test]])


def _digits() -> Samples:
    # scikit-learn takes a second to import, its data file does not.
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise MissingError("the digits come with scikit-learn: pip install scikit-learn")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1] / np.float32(16), table[:, -1].astype(np.int64)


def _synthetic(source: str, seed: int) -> Samples:
    n, d, k = sizes(source, "N,D,K")
    if n * d > 1 << 32:
        raise ConfigurationError(f"{source!r}: at most 2^32 values")
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, d)).astype(np.float32) * np.float32(2 / np.sqrt(d))
    y = rng.integers(0, k, n)
    return centres[y] + rng.normal(size=(n, d)).astype(np.float32), y


def _mnist(folder: Path) -> tuple[Samples, Samples]:
    parts = []
    for name in ("train", "t10k"):
        images = _idx(folder, f"{name}-images-idx3-ubyte")
        labels = _idx(folder, f"{name}-labels-idx1-ubyte")
        x = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
        parts.append((x, labels.astype(np.int64)))
    return parts[0], parts[1]


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.exists():
        data = plain.read_bytes()
    elif packed.exists():
        data = gzip.decompress(packed.read_bytes())
    else:
        raise ConfigurationError(f"{folder} has no {name}, nor {name}.gz")
    try:
        zero, kind, dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dims}I", data, 4)
    except struct.error as error:
        raise ConfigurationError(f"{folder / name} is no idx file: {error}") from error
    if zero or kind != 8 or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ConfigurationError(f"{folder / name} is no idx file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _covertype(path: Path) -> Samples:
    table = read_table(path, ",").astype(np.float32)
    if table.shape[1] != 55:
        raise ConfigurationError(f"{path} has {table.shape[1]} columns; CoverType has 55")
    x = table[:, :-1]
    scale = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(scale > 0, scale, 1), table[:, -1].astype(np.int64) - 1
