"""Whether the operator hears the API server: /healthz, and the age of the watch."""

import time
from collections.abc import Callable

from aiohttp import web

DEAF_SECONDS = 900.0
"""Without an answer of the API server for so long, leading or not, it is unhealthy."""


class Signs:
    """What shows that the operator hears the API server. Times are monotonic.

    Each of its answers proves that it can be asked, and none that the watch is alive: that, only
    what the watch itself shows does.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answered_at = clock()
        self._watched_at: float | None = None

    def answered(self) -> None:
        """Note that the API server did what was asked."""
        self._answered_at = self._clock()

    def watched(self) -> None:
        """Note that the watch begins, or showed something."""
        self._watched_at = self._clock()

    def silent_seconds(self) -> float:
        """Return how long ago the API server last answered, or showed, anything."""
        return self._clock() - max(self._answered_at, self._watched_at or 0.0)

    def watch_age_seconds(self) -> float:
        """Return how long ago the watch last showed anything; 0: there is none yet."""
        return 0.0 if self._watched_at is None else self._clock() - self._watched_at


async def serve_health(port: int, signs: Signs) -> web.AppRunner:
    """Answer /healthz until the runner is cleaned up."""

    async def healthz(_request: web.Request) -> web.Response:
        silent = signs.silent_seconds()
        if silent > DEAF_SECONDS:
            return web.Response(
                status=503, text=f"no word from the API server for {silent:.0f} s\n"
            )
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104 - the pod's own address
    return runner
