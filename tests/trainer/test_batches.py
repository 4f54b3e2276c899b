"""A worker's position in its data is its batch number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daruma_trainer.worker.batches import batch_indices, batches_in, shard_of

small = st.integers(1, 40)


@given(samples=st.integers(1, 200), size=small, workers=st.integers(1, 5), seed=st.integers(0, 9))
def test_an_epoch_of_all_workers_has_every_sample(
    samples: int, size: int, workers: int, seed: int
) -> None:
    seen: list[int] = []
    for worker in range(workers):
        who = (worker, workers)
        mine = [
            batch_indices(samples, size, b, seed, who)
            for b in range(1, batches_in(samples, size, 1, who) + 1)
        ]
        flat = np.concatenate(mine).tolist()
        assert len(set(flat)) == len(flat), "nothing twice in an epoch of a worker"
        assert all(0 < len(batch) <= size for batch in mine)
        seen += flat
    assert set(seen) == set(range(samples))
    if samples >= workers:
        assert len(seen) == samples


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    first = batch_indices(100, 8, 17, 3, (1, 4))
    assert first.tolist() == batch_indices(100, 8, 17, 3, (1, 4)).tolist()
    others = [(100, 8, 17, 4, (1, 4)), (100, 8, 17, 3, (2, 4)), (100, 8, 18, 3, (1, 4))]
    assert all(first.tolist() != batch_indices(*other).tolist() for other in others)


def test_each_epoch_has_an_order_of_its_own() -> None:
    who = (0, 2)
    epoch = batches_in(64, 8, 1, who)
    first = np.concatenate([batch_indices(64, 8, b, 0, who) for b in range(1, epoch + 1)])
    second = np.concatenate(
        [batch_indices(64, 8, b, 0, who) for b in range(epoch + 1, 2 * epoch + 1)]
    )
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("worker", [0, 1, 2, 3])
def test_a_worker_without_samples_of_its_own_borrows_one(worker: int) -> None:
    mine = shard_of(2, worker, 4)
    assert len(mine) == 1
    assert 0 <= mine[0] < 2
