"""A saver that is killed at any moment leaves its newest durable save whole."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saving_world import World
from soak import counted

SEEDS, COUNTED = counted("kills while saving and compacting", 20, 200)


@COUNTED
@pytest.mark.parametrize("seed", range(SEEDS))
def test_kill_9_while_saving_and_compacting(tmp_path: Path, seed: int) -> None:
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from pathlib import Path
from saving_world import save_for_ever
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
