"""The thread that reads and writes the store, so that the serve loop never waits for a disk."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from daruma_trainer.errors import ConfigurationError, MissingError, StoreError

LOG = logging.getLogger("daruma.server")
Job = Callable[[], Any]
Done = Callable[[Any, StoreError | None], None]


class Background:
    """Runs jobs one after another; their results are handed to the loop through `post`."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def submit(self, job: Job, done: Done) -> None:
        """Run `job` soon; then `done(result, error)` on the loop's thread."""
        self._jobs.put((job, done))

    def post(self, call: Callable[[], None]) -> None:
        """Run something on the loop's thread: how a job hands over a part of its result."""
        self._post(call)

    def close(self, seconds: float) -> None:
        """Let what was submitted end, but wait no longer than this."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            result: Any = None
            failure: StoreError | None = None
            try:
                result = job()
            except StoreError as error:
                failure = error
            except (ConfigurationError, MissingError) as error:
                failure = StoreError(str(error))
            except Exception as error:
                # Who waits for this must hear of it, and the jobs after it must be done.
                LOG.exception("a job of the store's thread broke")
                failure = StoreError(f"an unexpected error, see the log: {error!r}")
            self._post(lambda r=result, e=failure, d=done: d(r, e))  # type: ignore[misc]
