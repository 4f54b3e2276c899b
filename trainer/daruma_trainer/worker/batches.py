"""Which samples a batch has: a pure function of seed, worker and batch number.

So a worker's position in its data is its batch number, which outlives the worker.
"""

from collections.abc import Sequence

import numpy as np

from daruma_trainer.layout import Ints


def shard_of(samples: int, worker: int, workers: int) -> Ints:
    """Return the samples that are this worker's: every `workers`-th one; at least one."""
    mine = np.arange(worker, samples, workers)
    return mine if len(mine) else np.array([worker % samples])


def batch_indices(samples: int, batch_size: int, batch: int, seed: int, who: Sequence[int]) -> Ints:
    """Return the sample indices of a batch; shape (≤ batch_size,).

    `batch` counts from 1; `who` is (worker, workers). Each epoch is a fresh permutation of the
    worker's shard; the last batch of an epoch may be shorter.
    """
    mine = shard_of(samples, who[0], who[1])
    a_epoch = -(-len(mine) // batch_size)
    epoch, at = divmod(batch - 1, a_epoch)
    order = np.random.default_rng((seed, who[0], epoch)).permutation(len(mine))
    return mine[order[at * batch_size : (at + 1) * batch_size]]


def batches_in(samples: int, batch_size: int, epochs: int, who: Sequence[int]) -> int:
    """Return how many batches a worker has in so many epochs of its shard."""
    return epochs * -(-len(shard_of(samples, who[0], who[1])) // batch_size)
