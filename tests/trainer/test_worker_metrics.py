"""What a worker's /metrics answers."""

from daruma_trainer.contract import Replay
from daruma_trainer.worker.position import Position
from daruma_trainer.worker.pushes import Pushes
from expositions import families, worker_text


def test_batches_that_a_failure_touched_are_counted() -> None:
    pushes, position = Pushes(Replay()), Position()
    pushes.lose(3, 4)
    pushes.replayed = 7
    position.mixed.add(9)
    found = families(worker_text(pushes=pushes, position=position))["daruma_batches"]
    counted = {one.labels["outcome"]: one.value for one in found.samples}
    assert counted == {"lost": 2, "replayed": 7, "skipped": 0, "mixed": 1}


def test_before_the_first_membership_no_push_took_any_time() -> None:
    assert "daruma_push_latency_seconds" not in families(worker_text(pushes=None))
