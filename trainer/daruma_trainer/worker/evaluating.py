"""What worker 0's program finds the parameters worth, after some of its batches and at the end."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

from daruma_trainer.errors import ConfigurationError, GaveUpError
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.footing import pull_all

LOG = logging.getLogger("daruma")
RESULT_SECONDS = 30.0
"""How long worker 0 waits for the parameters that were saved, to evaluate them."""
ANSWER_SECONDS = 5.0
"""How long it waits until all servers know what it found; one that is gone is not replaced now."""
Score = Callable[[], float | Mapping[str, float]]
"""The program's function; a number is reported as `score`."""


class Evaluation:
    """For the program's thread. Other workers than 0 never evaluate."""

    def __init__(self, client: Client, report: Callable[..., None]) -> None:
        """`report`: say what was found (Job.report)."""
        self._client, self._report = client, report
        self._fn: Score | None = None
        self._every = 0

    def choose(self, fn: Score, every: int) -> None:
        """See Job.evaluate."""
        if self._client.me.index == 0:
            self._fn, self._every = fn, every

    def after_batch(self) -> None:
        """Evaluate, if this was one of the batches to do so after."""
        if self._fn is not None and self._every and self._client.batch % self._every == 0:
            self._report(**_found(self._fn))

    def of_result(self, writers: Iterable[Callable[[], None]]) -> None:
        """Evaluate what was saved: nobody pushes any more, and the servers stay until we end.

        `writers` give the program what was pulled.
        """
        if self._fn is None:
            return
        try:
            pull_all(self._client, RESULT_SECONDS)
        except GaveUpError:
            LOG.warning("a server is gone: the evaluation has the parameters of the last pull")
        for write in writers:
            write()
        found = _found(self._fn)
        try:
            self._report(**found)
        except ConfigurationError as error:
            # What was trained is there, and saved.
            LOG.error("the result's evaluation is not reported: %s", error)
        self._client.say()
        with contextlib.suppress(GaveUpError):
            self._client.wait(lambda: self._client.said, ANSWER_SECONDS, "the servers' answers")


def _found(fn: Score) -> dict[str, float]:
    found = fn()
    return dict(found) if isinstance(found, Mapping) else {"score": found}
