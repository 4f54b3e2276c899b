"""A saver that is killed at any moment leaves its newest durable save whole."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.server.background import Background
from saving_world import World, must_not_fail

SEEDS = 200 if os.environ.get("DARUMA_SOAK") else 20


def save_for_ever(folder: Path) -> None:
    """Train, save and compact, and say the number of each manifest once it is durable."""
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    world = World(folder, thread=Background(calls.put))
    world.saver.save_all("running", "", must_not_fail)
    told = 0
    rng = np.random.default_rng(0)
    while True:
        while told == world.saver.saves:
            calls.get(timeout=60)()
        told = world.saver.saves
        assert world.saver.newest is not None
        moved = "moved" if world.saver.moved_total else "not"
        sys.stdout.write(f"{world.saver.newest.path[-15:-5]} {moved}\n")
        sys.stdout.flush()
        world.train(1, 0.0)
        world.change(rng.integers(0, 40, 5), 1.0)
        world.saver.tick()
        while world.saver.pending:
            world.saver.work(idle=True)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_kill_9_while_saving_and_compacting(tmp_path: Path, seed: int) -> None:
    paths = [*sys.path, str(Path(__file__).parent)]
    code = f"""
import sys
sys.path[:] = {paths!r}
from pathlib import Path
from test_saving_killed import save_for_ever
save_for_ever(Path({str(tmp_path)!r}))
"""
    rng = np.random.default_rng(seed)
    count, extra = int(rng.integers(1, 40)), int(rng.integers(0, 30))
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            lines.append(line)
            if len(lines) >= count:
                break
        # A little later, at no particular moment of a save.
        sum(range(extra * 10_000))
        writer.send_signal(signal.SIGKILL)
        lines += [line for line in writer.stdout if line.endswith("\n")]
    assert len(lines) >= count, "it ended by itself"
    durable = max(int(line.split()[0]) for line in lines)
    world = World(tmp_path)
    manifest = world.newest()  # every block of it read and whole
    assert manifest.number >= durable
    if len(lines) > 30:
        assert lines[-1].endswith("moved\n"), "compaction was to be hit as well"
