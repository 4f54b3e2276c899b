"""Whether a worker goes on while a server is away."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import SLOTS, Member, Membership, Role, Settings, WorkersMeanwhile
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.meanwhile import Meanwhile

SERVERS, WORKERS = 2, 2


class Worker:
    """Worker 0, whose server 1 is away; what it may accumulate is said."""

    def __init__(self, **settings: Any) -> None:
        members = tuple(Member(Role.WORKER, w, 1, f"w{w}", f"a:{w}") for w in range(WORKERS))
        membership = Membership("uid", "n", "j", 1, SERVERS, WORKERS, members, Settings(**settings))
        self.copy = HostCopy("uid", SERVERS, WORKERS)
        self.gone, self.may, self.uncovered = {1}, True, {0: 0, 1: 0}
        client: Any = SimpleNamespace(
            me=SimpleNamespace(index=0), resumed=True, lock=threading.Condition()
        )
        self.client = client
        sessions: Any = SimpleNamespace(
            membership=membership,
            copy=self.copy,
            pushes=SimpleNamespace(
                may_accumulate=lambda _server, _now: self.may,
                uncovered=lambda server: self.uncovered[server],
            ),
            away=lambda: sorted(self.gone),
            synced=lambda server: None if server in self.gone else object(),
        )
        self.meanwhile = Meanwhile(sessions, client)


@pytest.mark.parametrize(
    ("settings", "replays"),
    [
        ({"consistency": "Async"}, True),
        ({"consistency": "Bounded", "max_staleness": 2}, True),
        ({"consistency": "Bounded"}, False),
        ({"consistency": "Sync"}, False),
        ({"consistency": "Async", "meanwhile": WorkersMeanwhile.WAIT}, False),
    ],
)
def test_who_goes_on(settings: dict[str, Any], replays: bool) -> None:
    worker = Worker(**settings)
    worker.copy.last[:] = 9
    assert worker.meanwhile.replays == replays
    away = worker.copy.slots_of(1) if replays else np.zeros(SLOTS, np.bool_)
    np.testing.assert_array_equal(worker.meanwhile.away(9), away)
    worker.client.resumed = False
    assert not worker.meanwhile.away(9).any(), "it has no position yet"


def test_nobody_goes_on_past_the_limits() -> None:
    worker = Worker()
    assert worker.meanwhile.runs_ahead()
    worker.may = False
    assert not worker.meanwhile.away(0).any()
    assert not worker.meanwhile.runs_ahead()
    assert not worker.meanwhile.may_merge(1, 1, 0.0)


def test_bounded_goes_on_while_its_copy_has_enough_of_the_others() -> None:
    worker = Worker(consistency="Bounded", max_staleness=2)
    mine = worker.copy.slots_of(1)
    worker.copy.last[:, 1] = 4
    assert worker.meanwhile.away(4)[mine].all()
    assert not worker.meanwhile.away(5).any()
    assert not worker.meanwhile.runs_ahead()


def test_with_all_servers_there_nobody_runs_ahead() -> None:
    worker = Worker()
    worker.gone.clear()
    assert not worker.meanwhile.runs_ahead()
    assert not worker.meanwhile.away(0).any()


def test_a_batch_that_some_slot_has_goes_out_by_itself() -> None:
    worker = Worker()
    assert worker.meanwhile.may_merge(1, 5, 0.0)
    worker.copy.last[np.flatnonzero(worker.copy.slots_of(1))[3], 0] = 5
    assert not worker.meanwhile.may_merge(1, 5, 0.0)
    assert worker.meanwhile.may_merge(0, 5, 0.0)


def test_uncovered_pushes_crowd_it_but_not_those_of_a_server_that_is_away() -> None:
    worker = Worker(max_uncovered=2)
    worker.uncovered = {0: 2, 1: 5}
    assert not worker.meanwhile.crowded
    worker.uncovered[0] = 3
    assert worker.meanwhile.crowded


def test_where_steps_are_repeated_it_keeps_one_push_of_any_server_there_or_not() -> None:
    worker = Worker(max_uncovered=2, consistency="Sync")
    worker.uncovered = {0: 1, 1: 1}
    assert not worker.meanwhile.crowded
    worker.uncovered[1] = 2
    assert worker.meanwhile.crowded
    elastic = Worker(max_uncovered=2, consistency="Sync", min_replicas=1)
    elastic.uncovered = {0: 2, 1: 5}
    assert not elastic.meanwhile.crowded, "replacements do not go back"
