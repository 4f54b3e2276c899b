"""Whose requests a server answers: no sockets, a shard that is only said to be there."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from daruma_trainer.contract import ContractError, Member, Membership, Role, Settings
from daruma_trainer.identity import Identity
from daruma_trainer.server.guard import Guard
from daruma_trainer.wire import Header, Kind, Refusal

ME = Identity("n", "j", Role.SERVER, 0, 3, "token")
WORKER = Member(Role.WORKER, 1, 2, "w", "a:1")
MEMBERSHIP = Membership("uid", "n", "j", 5, 1, 2, (WORKER,), Settings())
READS = replace(MEMBERSHIP, settings=Settings(pulls_from_replicas=True))
PUSH = Header(Kind.PUSH, 1, 5, 3, 4)
PULL = replace(PUSH, kind=Kind.PULL)


class Guarded:
    """A guard, what it looks at, and whom it asked."""

    def __init__(self) -> None:
        life: Any = SimpleNamespace(
            plane=object(), generation=4, rolling=False, frozen=False, replica=False
        )
        replicator: Any = SimpleNamespace(counted_on=False)
        self.life, self.replicator = life, replicator
        self.sure = True
        self.asked: list[bytes] = []
        fence: Any = SimpleNamespace(sure=lambda: self.sure)
        self.guard = Guard(ME, life, replicator, fence, self.asked.append)

    def says(
        self,
        header: Header = PUSH,
        sender: str = WORKER.id,
        membership: Membership | None = MEMBERSHIP,
    ) -> Refusal | None:
        found = self.guard.refusal(membership, sender.encode(), header)
        assert found is None or found.kind is Kind.REFUSED
        return None if found is None else Refusal(found.flags)


@pytest.fixture
def guarded() -> Guarded:
    return Guarded()


def test_a_worker_that_counts_is_answered(guarded: Guarded) -> None:
    assert guarded.says() is None
    assert guarded.says(replace(PUSH, epoch=4)) is None, "it may be late: it is told"
    assert (guarded.guard.stale, guarded.asked) == (0, [])


@pytest.mark.parametrize(
    ("header", "sender", "refusal", "stale"),
    [
        (replace(PUSH, incarnation=2), WORKER.id, Refusal.STALE_INCARNATION, 1),
        (replace(PUSH, incarnation=2, epoch=6), WORKER.id, Refusal.STALE_INCARNATION, 1),
        (PUSH, "worker-1-1", Refusal.STALE_INCARNATION, 1),
        (PUSH, "worker-0-2", Refusal.STALE_INCARNATION, 1),
        (replace(PUSH, generation=3), WORKER.id, Refusal.WRONG_GENERATION, 0),
        (replace(PUSH, generation=5), WORKER.id, Refusal.WRONG_GENERATION, 0),
    ],
)
def test_what_is_stale_is_refused_by_name_and_counted(
    guarded: Guarded, header: Header, sender: str, refusal: Refusal, stale: int
) -> None:
    assert guarded.says(header, sender) == refusal
    assert (guarded.guard.stale, guarded.asked) == (stale, [])


def test_who_knows_of_a_newer_membership_is_asked_for_it(guarded: Guarded) -> None:
    assert guarded.says(replace(PUSH, epoch=6)) == Refusal.UNSURE
    assert guarded.asked == [WORKER.id.encode()]


def test_only_a_worker_asks_for_data(guarded: Guarded) -> None:
    with pytest.raises(ContractError):
        guarded.says(sender="server-0-1")


def test_before_there_is_a_shard_nobody_is_answered(guarded: Guarded) -> None:
    assert guarded.says(membership=None) == Refusal.UNSURE
    guarded.life.plane = None
    assert guarded.says() == Refusal.UNSURE


@pytest.mark.parametrize(
    ("state", "refusal"),
    [
        ("rolling", Refusal.WRONG_GENERATION),
        ("frozen", Refusal.STALE_INCARNATION),
        ("replica", Refusal.STALE_INCARNATION),
    ],
)
def test_a_shard_that_is_not_served_now_answers_nobody(
    guarded: Guarded, state: str, refusal: Refusal
) -> None:
    setattr(guarded.life, state, True)
    assert guarded.says() == guarded.says(PULL) == refusal
    assert guarded.guard.stale == 0


def test_a_replica_answers_pulls_once_it_is_counted_on(guarded: Guarded) -> None:
    guarded.life.replica = True
    assert guarded.says(PULL, membership=READS) == Refusal.STALE_INCARNATION
    guarded.replicator.counted_on = True
    assert guarded.says(PULL, membership=READS) is None
    assert guarded.says(PUSH, membership=READS) == Refusal.STALE_INCARNATION
    assert guarded.says(PULL) == Refusal.STALE_INCARNATION, "the job does not want it"
    guarded.life.frozen = True
    assert guarded.says(PULL, membership=READS) == Refusal.STALE_INCARNATION


def test_a_server_in_doubt_answers_nobody(guarded: Guarded) -> None:
    guarded.sure = False
    assert guarded.says() == Refusal.UNSURE
