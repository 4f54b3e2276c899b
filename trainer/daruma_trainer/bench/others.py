"""What others would save a shard with, for comparison: everything, into a directory."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from daruma_trainer.layout import Floats


class Other(Protocol):
    """One way to save."""

    name: str

    def save(self) -> float:
        """Save what the array holds now; returns the seconds that training waited."""

    def settle(self) -> None:
        """Wait for what still runs."""


class TorchSave:
    """torch.save, made durable as one has to: fsync, then rename."""

    name = "torch.save, all"

    def __init__(self, data: Floats, folder: Path) -> None:
        import torch

        self._torch, self._folder = torch, folder
        self._tensor = torch.from_numpy(data)

    def save(self) -> float:
        """See Other."""
        started = time.monotonic()
        partial = self._folder / "torch.partial"
        with partial.open("wb") as file:
            self._torch.save({"t": self._tensor}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._folder / "torch")
        return time.monotonic() - started

    def settle(self) -> None:
        """See Other."""


class AsyncSave:
    """torch.distributed.checkpoint.async_save; it waits for the save before."""

    name = "async_save, all"

    def __init__(self, data: Floats, folder: Path) -> None:
        import torch
        from torch.distributed import checkpoint

        self._save: Any = getattr(checkpoint, "async_save", None)
        self._folder = folder
        self._tensor = torch.from_numpy(data)
        self._number = 0
        self._last: Any = None

    def save(self) -> float:
        """See Other."""
        started = time.monotonic()
        self.settle()
        shutil.rmtree(self._folder / f"async-{self._number - 1}", ignore_errors=True)
        path = str(self._folder / f"async-{self._number}")
        self._last = self._save({"t": self._tensor}, checkpoint_id=path)
        self._number += 1
        return time.monotonic() - started

    def settle(self) -> None:
        """See Other."""
        if self._last is not None:
            self._last.result(120.0)
            self._last = None


@contextlib.contextmanager
def others(data: Floats, folder: Path) -> Iterator[tuple[list[Other], list[str]]]:
    """Return the ways that the installed torch has, and a sentence for each it has not."""
    try:
        import torch
        import torch.distributed as dist
        from torch.distributed import checkpoint as dist_checkpoint
    except ImportError:
        yield [], ["torch is not installed: nothing to compare with"]
        return
    torch.set_num_threads(1)
    found: list[Other] = [TorchSave(data, folder)]
    if not hasattr(dist_checkpoint, "async_save"):
        yield found, [f"torch {torch.__version__} has no torch.distributed.checkpoint.async_save"]
        return
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        found.append(AsyncSave(data, folder))
        yield found, []
        for other in found:
            other.settle()
    finally:
        dist.destroy_process_group()
