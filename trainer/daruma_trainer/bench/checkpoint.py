"""What saving costs a server, and how long a restore takes.

    daruma bench checkpoint [--quick] [--json FILE] [--write FILE] [--store URI]...

One shard in one process, with a server's own classes: the loop on the main thread, the store's
thread beside it. A push is a full SGD update of the shard. `OMP_NUM_THREADS=1`, as servers have it.
*Directory* is one below TMPDIR. The S3 of `make bench` is moto's, a server in Python on the same
cores, so its times are more than those of the servers' own work.

*Blocked* is what a request may wait for: the copy of the chosen blocks (the distance pass and the
choice are short turns before it, with requests in between). Beside it stands a memcpy
of as many bytes of the same array, after a push as the save was, in turn with it; the bar is two
of those and one millisecond. *Durable* is the background's time from the copy to the manifest.
*CPU* is the process's CPU time from the push to the manifest: the distance pass, copy, checksums
and write.

The *step rate* is that of a worker that sends a push `think` after the one before was applied and
the loop was free; pauses of the loop, for a copy or because the store's thread holds the
interpreter, take from it. Each is compared with the rate without saves of the same round; what is
shown is the median of the rounds, with the lowest and highest. *Made* is saves made of saves due:
one that is due while the last is written is left out. Others save everything: `torch.save`, then
fsync and rename, on the loop; `torch.distributed.checkpoint.async_save` on its own thread, where
the save before is waited for. They save to a directory, whatever the store is.

*Restore* is from the first order to the last slot in memory, from a running checkpoint after
partial saves; beside it a plain read of the same bytes, with neighbouring blocks read at once, into
one piece of fresh memory. *Cold*: the kernel was
asked to forget the files before (posix_fadvise), *warm*: they had just been read. Of another store
than a directory the plain read asks for the same ranges, one segment's after another's, and nothing
is cold.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.cli import Result, conclude, machine, method, parser_of, today
from daruma_trainer.bench.others import Other, others
from daruma_trainer.bench.shard import Shard
from daruma_trainer.checkpoint.reading import Chunk, chunks_of
from daruma_trainer.checkpoint.store import open_store
from daruma_trainer.contract import Settings

KIB = 1024
DIRECTORY = "directory"
Spread = tuple[float, float, float]
"""Median, lowest, highest."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    saves: int
    rounds: int
    seconds: float
    """Of each step rate."""

    @classmethod
    def of(cls, *, quick: bool) -> "Plan":
        """Return the quick one or the whole."""
        return cls((10, 100), 5, 2, 1.5) if quick else cls((10, 100, 400), 9, 5, 4.0)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write what was asked for; returns the exit code."""
    parser = parser_of("checkpoint", __doc__, "smaller, and fewer of each")
    parser.add_argument(
        "--store", metavar="URI", action="append",
        help=f"where to save, several if given again; {DIRECTORY}, as by default: below TMPDIR",
    )  # fmt: skip
    options = parser.parse_args(arguments)

    def measured() -> Result:
        with tempfile.TemporaryDirectory(prefix="daruma-bench-") as folder:
            own = f"file://{folder}/store"
            uris = [own if uri == DIRECTORY else uri for uri in options.store or [DIRECTORY]]
            return measure(uris, Path(folder), Plan.of(quick=options.quick))

    return conclude(options, measured, page)


def measure(uris: Sequence[str], folder: Path, plan: Plan) -> Result:
    """Take all measurements on each store. BenchError: one does not work."""
    result: Result = {
        "benchmark": "checkpoint",
        "machine": f"{machine()}, numpy {np.__version__}",
        "date": today(),
        "saves": [],
        "rates": [],
        "restores": [],
        "notes": [],
    }
    for uri in uris:
        result["saves"] += [
            measure_saves(uri, megabytes, block * KIB, fraction, plan.saves)
            for megabytes in plan.sizes
            for block, fraction in ((64, 1 / 8), (4, 1 / 8), (64, 1.0))
        ]
        rates, notes = measure_rates(uri, folder, plan)
        result["rates"] += rates
        # Each once, though it is true of every store.
        result["notes"] = list(dict.fromkeys([*result["notes"], *notes]))
        result["restores"] += [
            measure_restore(uri, megabytes, plan.rounds)
            for megabytes in plan.sizes
            if megabytes > 10
        ]
    return {**result, "load": round(os.getloadavg()[0], 1)}


def _name(uri: str) -> str:
    """Say what kind of store it is."""
    scheme = uri.partition(":")[0]
    return DIRECTORY if scheme == "file" else scheme


# What a save costs ------------------------------------------------------------------------------


def measure_saves(
    uri: str, megabytes: int, block_bytes: int, fraction: float, count: int
) -> dict[str, Any]:
    """Save some times, each after a push, and copy as many bytes plainly in between."""
    settings = Settings(every=max(1, round(1 / fraction)), fraction=fraction)
    shard = Shard(uri, megabytes, block_bytes, settings)
    try:
        shard.begin()
        size = round(shard.data.nbytes * fraction)
        flat = shard.data.reshape(-1).view(np.uint8)
        into = np.zeros(size, np.uint8)
        blocked, plain, durable, cpu = [], [], [], []
        for n in range(count + 1):
            shard.push()
            begin = (n % round(1 / fraction)) * size
            started = time.perf_counter()
            np.copyto(into[: len(flat) - begin], flat[begin : begin + size])
            plain.append(time.perf_counter() - started)
            shard.push()
            before, used = shard.saver.seconds.total, time.process_time()
            shard.saver.tick()
            shard.settle()
            cpu.append(time.process_time() - used)
            blocked.append(shard.saver.copied_seconds)
            durable.append(shard.saver.seconds.total - before)
        # The first finds memory that nobody touched before.
        memcpy = statistics.median(plain[1:])
        return {
            "store": _name(uri),
            "megabytes": megabytes,
            "block": block_bytes,
            "fraction": fraction,
            "saved": size,
            "memcpy": memcpy,
            "bar": 2 * memcpy + 0.001,
            "blocked": spread(blocked[1:]),
            "durable": spread(durable[1:]),
            "cpu": spread(cpu[1:]),
        }
    finally:
        shard.close()


# What saves cost the steps ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """One way to save, at one pace, as parts of the step rate without saves."""

    store: str
    way: str
    think: float
    every: int
    rate: Spread
    made: Spread


def measure_rates(uri: str, folder: Path, plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare step rates, round by round; also what could not be compared."""
    megabytes = plan.sizes[1]
    found: dict[tuple[str, float, int], list[tuple[float, float]]] = {}
    none = Shard(uri, megabytes, 64 * KIB, Settings())
    # What others do has nothing to do with the store: once is enough.
    beside: AbstractContextManager[tuple[list[Other], list[str]]] = nullcontext(([], []))
    if _name(uri) == DIRECTORY:
        beside = others(none.data, folder)
    with beside as (ways, notes):
        for _ in range(plan.rounds):
            for think in (0.05, 0.0):
                base = _steps(none, think, plan.seconds)
                for every in (8, 1):
                    for name, rate, made in _ways(uri, none, ways, (think, every), plan.seconds):
                        found.setdefault((name, think, every), []).append((rate / base, made))
    none.close()
    rates = [
        Rate(_name(uri), *key, spread([r for r, _ in values]), spread([m for _, m in values]))
        for key, values in found.items()
    ]
    return [asdict(r) for r in sorted(rates, key=lambda r: (-r.think, -r.every))], notes


def _ways(
    uri: str, none: Shard, ways: Sequence[Other], pace: tuple[float, int], seconds: float
) -> list[tuple[str, float, float]]:
    """Return name, steps a second, and saves made of those due, of each way."""
    think, every = pace
    found = []
    for name, fraction in (("daruma, r = 1/8", 1 / 8), ("daruma, r = 1", 1.0)):
        settings = Settings(every=round(every / fraction), fraction=fraction)
        shard = Shard(uri, none.data.nbytes // 1_000_000, 64 * KIB, settings)
        try:
            shard.begin()
            before = shard.saver.saves
            rate = _steps(shard, think, seconds)
            due = max(1, shard.plane.step // every)
            found.append((name, rate, (shard.saver.saves - before) / due))
            shard.settle()
        finally:
            shard.close()
    for way in ways:
        found.append((way.name, _steps(none, think, seconds, (every, way.save)), 1.0))
        way.settle()
    return found


def _steps(
    shard: Shard,
    think: float,
    seconds: float,
    save: tuple[int, Callable[[], object]] | None = None,
) -> float:
    """Return the steps a second."""
    for _ in range(2):
        shard.push()
        shard.turn(0.0)
    started, steps = time.monotonic(), 0
    while (spent := time.monotonic() - started) < seconds or steps < 8:
        shard.push()
        steps += 1
        if save is not None and steps % save[0] == 0:
            save[1]()
        shard.turn(think)
    return steps / spent


# Restores ---------------------------------------------------------------------------------------


def measure_restore(uri: str, megabytes: int, rounds: int) -> dict[str, Any]:
    """Restore a shard, warm and cold, in turn with plain reads of its segments."""
    shard = Shard(uri, megabytes, 64 * KIB, Settings(every=8, fraction=1 / 8))
    try:
        shard.begin()
        for _ in range(5):
            shard.push()
            shard.saver.tick()
            shard.settle()
        chunks = list(chunks_of(shard.places(), shard.places().rows))
        shard.restored()
        ways: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, seconds in _ways_to_read(uri, shard, chunks):
                ways.setdefault(name, []).append(seconds)
        return {
            "store": _name(uri),
            "megabytes": megabytes,
            "read": sum(chunk.size for chunk in chunks),
            **{name: spread(values) for name, values in ways.items()},
        }
    finally:
        shard.close()


def _ways_to_read(uri: str, shard: Shard, chunks: Sequence[Chunk]) -> Iterator[tuple[str, float]]:
    """Restore and read plainly, each once."""
    if _name(uri) != DIRECTORY:
        yield "warm read", _fetch(uri, chunks)
        yield "warm", shard.restored()
        return
    root = Path(uri.removeprefix("file://"))
    files = sorted({root / chunk.segment for chunk in chunks})
    _forget(files)
    yield "cold read", _read(root, chunks)
    yield "warm read", _read(root, chunks)
    yield "warm", shard.restored()
    _forget(files)
    yield "cold", shard.restored()


def _forget(files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(root: Path, chunks: Sequence[Chunk]) -> float:
    """Read files as plainly as can be."""
    started = time.perf_counter()
    into = np.empty(sum(chunk.size for chunk in chunks), np.uint8).data
    at = 0
    for chunk in chunks:
        with (root / chunk.segment).open("rb", buffering=0) as file:
            for offset, size in chunk.ranges():
                at += os.preadv(file.fileno(), [into[at : at + size]], offset)
    if at != len(into):
        raise BenchError(f"{at} bytes of {len(into)} could be read")
    return time.perf_counter() - started


def _fetch(uri: str, chunks: Sequence[Chunk]) -> float:
    """Read out of another store."""
    store = open_store(uri)
    started = time.perf_counter()
    into = np.empty(sum(chunk.size for chunk in chunks), np.uint8).data
    at = 0
    for chunk in chunks:
        store.read_ranges(chunk.segment, chunk.ranges(), into[at : at + chunk.size])
        at += chunk.size
    return time.perf_counter() - started


# The page ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Spread:
    """Return median, lowest, highest."""
    return statistics.median(values), min(values), max(values)


def page(result: Result) -> str:
    """Return the result as a page in Markdown."""
    return "\n".join(
        [
            "# What checkpoints cost",
            "",
            "Made by `daruma bench checkpoint --write`; edit the benchmark, not this page.",
            "",
            f"{result['date']}, {result['machine']}; load average at the end {result['load']} "
            "(what is more than 1 was other work on the machine, such as an S3's). "
            "Median (lowest to highest).",
            "",
            "## One save",
            "",
            "| store | shard MB | block KiB | r | memcpy ms | bar ms | blocked ms | durable ms "
            "| CPU ms |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_save_row(row) for row in result["saves"]),
            "",
            "## Step rate, as a part of that without saves",
            "",
            "| store | way | think ms | save every | rate | saves made of due |",
            "|---|---|---|---|---|---|",
            *(_rate_row(row) for row in result["rates"]),
            "",
            *(f"{note}.\n" for note in result["notes"]),
            "## Restore of one shard",
            "",
            "| store | shard MB | read MB | cold read ms | cold ms | × | warm read ms | warm ms "
            "| × |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_restore_row(row) for row in result["restores"]),
            "",
            "## How it is measured",
            "",
            method(__doc__),
            "",
        ]
    )


def _ms(found: Spread) -> str:
    median, low, high = (f"{1000 * value:.1f}" for value in found)
    return f"{median} ({low}–{high})"


def _save_row(row: dict[str, Any]) -> str:
    within = "" if row["blocked"][0] <= row["bar"] else " **over**"
    return (
        f"| {row['store']} | {row['megabytes']} | {row['block'] // KIB} | {row['fraction']:g} "
        f"| {1000 * row['memcpy']:.1f} | {1000 * row['bar']:.1f} | {_ms(row['blocked'])}{within} "
        f"| {_ms(row['durable'])} | {_ms(row['cpu'])} |"
    )


def _rate_row(row: dict[str, Any]) -> str:
    median, low, high = row["rate"]
    return (
        f"| {row['store']} | {row['way']} | {1000 * row['think']:g} | {row['every']} "
        f"| {median:.3f} ({low:.3f}–{high:.3f}) | {row['made'][0]:.2f} |"
    )


def _restore_row(row: dict[str, Any]) -> str:
    def ways(name: str) -> str:
        if name not in row:
            return "– | – | –"
        read, restore = row[f"{name} read"], row[name]
        return f"{_ms(read)} | {_ms(restore)} | {restore[0] / read[0]:.2f}"

    return (
        f"| {row['store']} | {row['megabytes']} | {row['read'] / 1e6:.0f} "
        f"| {ways('cold')} | {ways('warm')} |"
    )
