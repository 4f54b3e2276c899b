"""The work queue: every key at most once in it, and never in two passes at the same time."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from daruma_operator.substrate.protocol import JobKey


@dataclass(slots=True)
class WorkQueue:
    """Keys that wait for a pass. Used from one event loop.

    A key that is added during its own pass is given out again after it, so no event is lost.
    """

    _ready: deque[JobKey] = field(default_factory=deque)
    _since: dict[JobKey, float] = field(default_factory=dict)
    """When each waiting key was first added, in the loop's time."""
    _busy: set[JobKey] = field(default_factory=set)
    _timers: dict[JobKey, asyncio.TimerHandle] = field(default_factory=dict)
    _wakeup: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._since)

    def add(self, key: JobKey) -> None:
        """Ask for a pass now."""
        if key in self._since:
            return
        self._since[key] = asyncio.get_running_loop().time()
        if key not in self._busy:
            self._ready.append(key)
            self._wakeup.set()

    def add_after(self, key: JobKey, seconds: float) -> None:
        """Ask for a pass later; of several such requests the earliest counts."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._due, key)

    async def get(self) -> tuple[JobKey, float]:
        """Wait for a key; returns it and the seconds it waited. `done` must follow."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key = self._ready.popleft()
        self._busy.add(key)
        return key, asyncio.get_running_loop().time() - self._since.pop(key)

    def done(self, key: JobKey) -> None:
        """End a key's pass."""
        self._busy.discard(key)
        if key in self._since:
            self._ready.append(key)
            self._wakeup.set()

    def forget(self, key: JobKey) -> None:
        """Drop what was planned for later: the job is gone, or final."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _due(self, key: JobKey) -> None:
        self._timers.pop(key, None)
        self.add(key)
