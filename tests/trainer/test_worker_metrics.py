"""What a worker's /metrics answers."""

import threading
from types import SimpleNamespace
from typing import Any, cast

from daruma_trainer.contract import Replay, Role
from daruma_trainer.identity import Identity
from daruma_trainer.worker.metrics import exposition
from daruma_trainer.worker.position import Position
from daruma_trainer.worker.pushes import Pushes


def test_batches_that_a_failure_touched_are_counted() -> None:
    pushes, position = Pushes(Replay()), Position()
    pushes.lose(3, 4)
    pushes.replayed = 7
    position.mixed.add(9)
    me = Identity("n", "j", Role.WORKER, 1, 1, "")
    client = SimpleNamespace(
        me=me, pushes=pushes, position=position, loss=None, blocked_seconds=1.5,
        lock=threading.Lock(),
    )  # fmt: skip
    lines = exposition(cast("Any", client)).decode().splitlines()
    counted = {
        line.split('outcome="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("daruma_batches_total{")
    }
    assert counted == {"lost": 2, "replayed": 7, "skipped": 0, "mixed": 1}
