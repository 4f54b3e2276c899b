"""How a worker comes to a position and to values that its next batch may be made of.

For the program's thread. `Position` has the bookkeeping.
"""

import logging
import time

from daruma_trainer.errors import GaveUpError
from daruma_trainer.worker.client import Client

LOG = logging.getLogger("daruma")
RELAY_SECONDS = 30.0
"""How long a worker's replacement looks for values that servers have overwritten."""
RELAY_AGAIN_SECONDS = 1.0
"""Before it asks again, and so another worker."""


def pull_all(client: Client, seconds: float) -> None:
    """Pull every slot, whatever step it is at."""
    wanted = client.pull(0)
    client.wait(lambda: not wanted.missing.any(), seconds, "a complete pull")


def take_position(client: Client, seconds: float) -> int:
    """Go on at the first batch that the servers lack; returns the generation that it is of."""
    while True:
        generation = client.generation
        pull_all(client, seconds)
        if not client.resume(generation):
            continue
        membership = client.membership
        if membership is not None and membership.elastic and client.batch:
            # It entered after a step that some servers may be about to make.
            wanted = client.pull(pace(client))
            client.wait(
                lambda w=wanted, g=generation: (  # type: ignore[misc]
                    not w.missing.any() or client.generation != g or client.stopped is not None
                ),
                seconds,
                "the step to enter after",
            )
        align(client, generation)
        if client.generation == generation:
            return generation


def pace(client: Client) -> int:
    """Return the batch of all workers that this one needs before it makes its next."""
    membership = client.membership
    if membership is None or membership.settings.consistency == "Async":
        return 0
    return max(0, client.batch - membership.settings.max_staleness)


def align(client: Client, generation: int) -> None:
    """Under `Sync`, see that all slots are as of this worker's last batch.

    Its predecessor may have died between its push to one server and to the next: one has made the
    step, the other has not. The batch is made again, of what all slots were before it; live
    workers still have that. Where nobody has it any more, it is made of what there is, and counted.
    """
    following, end = client.batch + 1, time.monotonic() + RELAY_SECONDS
    while client.generation == generation and following not in client.position.mixed:
        wanted = client.pull_before()
        if wanted is None:
            return
        try:
            client.wait(
                lambda w=wanted: (  # type: ignore[misc]
                    w.unkept or not w.missing.any() or client.generation != generation
                ),
                RELAY_AGAIN_SECONDS,
                "an answer of a live worker",
            )
        except GaveUpError:
            if client.failure is not None:
                raise  # it was replaced, or nothing is asked any more
        if wanted.unkept or time.monotonic() > end:
            LOG.warning("batch %s is made of values of two steps", following)
            client.position.mixed.add(following)
