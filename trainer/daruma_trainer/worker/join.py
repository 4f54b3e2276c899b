"""How a program becomes a worker, and how it leaves."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from daruma_trainer.contract import ExitCode
from daruma_trainer.errors import ConfigurationError, GaveUpError, MissingError, ReplacedError
from daruma_trainer.identity import Identity
from daruma_trainer.worker.client import Client
from daruma_trainer.worker.job import Job

LOG = logging.getLogger("daruma")
JOIN_SECONDS = 600.0
"""How long a worker waits for its first membership."""


@contextmanager
def join() -> Iterator[Job]:
    """Join the job that this process was started for, and leave it when the program is done.

    Ends the process with the exit code that the operator understands where the program cannot go
    on: 2 for a program that asks for what cannot be, 4 where a newer incarnation has its place,
    143 when it gets SIGTERM.
    An exception of the program itself is handed on; Python then exits with 1.
    """
    try:
        client = Client(Identity.from_environment(os.environ))
    except ConfigurationError as error:
        _end(ExitCode.USAGE, error)
    # Not with 0, which says that the program came to its end.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    job = Job(client)
    try:
        client.wait(lambda: client.membership is not None, JOIN_SECONDS, "a membership")
        yield job
        job.flush()
        _leave(client, job)
        job.evaluate_result()
    except ReplacedError as error:
        _end(ExitCode.STALE, error)
    except ConfigurationError as error:
        _end(ExitCode.USAGE, error)
    except MissingError as error:
        _end(ExitCode.MISSING, error)
    except GaveUpError as error:
        _end(ExitCode.FAILED, error)
    finally:
        client.close()


def _leave(client: Client, job: Job) -> None:
    """Stay as a peer until the result is durable: a server may still need this worker's copy."""
    client.enter("Left")
    seconds = 600.0
    if client.membership is not None:
        seconds = client.membership.settings.progress_seconds
    started = time.monotonic()
    try:
        job.wait(lambda: client.released, seconds, "the job's end")
    except ReplacedError:
        raise
    except GaveUpError:
        LOG.warning("nobody released this worker in %.0f s: leaving", time.monotonic() - started)


def _end(code: ExitCode, error: Exception) -> None:
    sys.stderr.write(f"daruma: {error}\n")
    sys.stderr.flush()
    raise SystemExit(int(code))
