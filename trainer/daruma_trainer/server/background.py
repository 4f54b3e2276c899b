"""The thread that reads and writes the store, so that the serve loop never waits for a disk."""

import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from daruma_trainer.errors import ConfigurationError, MissingError, StoreError

LOG = logging.getLogger("daruma.server")
Job = Callable[[], Any]
Done = Callable[[Any, StoreError | None], None]
MAX_BY_HAND = 100_000
"""Jobs in one go."""


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
            result, failure = attempt(job)
            self._post(partial(done, result, failure))
            # Or the last job's arrays would live as long as this waits for the next.
            del item, job, done, result, failure


class ByHand(Background):
    """Without a thread: what was submitted waits for `run`. For benchmarks and tests."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Job, Done]] = deque()
        self._lock = threading.Lock()

    def submit(self, job: Job, done: Done) -> None:
        """See Background.submit."""
        self.jobs.append((job, done))

    def post(self, call: Callable[[], None]) -> None:
        """See Background.post. A job may read with several threads, which all post."""
        with self._lock:
            call()

    def run(self) -> None:
        """Run what was submitted, and what that submits."""
        for _ in range(MAX_BY_HAND):
            if not self.jobs:
                return
            job, done = self.jobs.popleft()
            done(*attempt(job))
        raise RuntimeError(f"{MAX_BY_HAND} jobs, and there are more: does one submit itself?")

    def close(self, seconds: float) -> None:
        """See Background.close."""
        del seconds
        self.run()


def attempt(job: Job) -> tuple[Any, StoreError | None]:
    """Run a job: its result, or what went wrong. Nothing is raised."""
    try:
        return job(), None
    except StoreError as error:
        return None, error
    except (ConfigurationError, MissingError) as error:
        return None, StoreError(str(error))
    except BaseException as error:  # noqa: BLE001 - the thread's edge; a Rust panic is no Exception
        # Who waits for this must hear of it, and the jobs after it must be done. What a library
        # says may hold addresses and signatures: neither log nor status gets it.
        where = "".join(traceback.format_tb(error.__traceback__))
        LOG.error("a job of the store's thread broke: %s\n%s", type(error).__name__, where)
        return None, StoreError(f"an unexpected {type(error).__name__}, see the server's log")
