"""Sessions with servers, and what is pulled in them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import SGD, rule_to_json
from daruma_trainer.wire import PULL, Frame, Kind
from daruma_trainer.worker.copies import HostCopy
from daruma_trainer.worker.pulling import Puller, Wanted
from daruma_trainer.worker.reading import Readers
from daruma_trainer.worker.sessions import Sessions

SERVER, WORKER = Member(Role.SERVER, 0, 1, "s", "127.0.0.1:9"), Member(Role.WORKER, 0, 1, "w")
MEMBERSHIP = Membership("uid", "n", "j", 1, 1, 1, (SERVER, WORKER), Settings())


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    me = SimpleNamespace(index=0, id="worker-0-1", token="token")
    worker = SimpleNamespace(me=me, lost_server=lambda _server: None)
    made = Sessions(cast("Any", worker), MEMBERSHIP, context, zmq.Poller())
    yield made
    made.close()
    context.destroy(linger=0)


def test_nothing_is_asked_in_a_session_that_is_over(sessions: Sessions) -> None:
    """A replica may refuse a pull after its server was replaced: its link is closed by then."""
    sessions.follow()
    over = sessions.by_server[0]
    before = over.token
    promoted = replace(SERVER, incarnation=2, address="127.0.0.1:8")
    sessions.membership = replace(MEMBERSHIP, epoch=2, members=(promoted, WORKER))
    sessions.follow()
    assert sessions.by_server[0] is not over
    assert over.token != before


def test_a_pull_names_the_tables_that_servers_were_told_of() -> None:
    """Another worker may have made the next one already; this one's copy has no place for it."""
    copy = HostCopy("uid", 1, 1)
    copy.add(TableSpec(0, "t", (8, 2), 1, rule_to_json(SGD())))
    copy.arrange()
    copy.add(TableSpec(1, "declared", (8, 2), 1, rule_to_json(SGD())))
    asked: list[int] = []

    def ask(_session: object, kind: Kind, body: Sequence[Frame], _then: object, **_: bool) -> None:
        assert kind is Kind.PULL
        asked.append(PULL.unpack_from(body[0])[1])

    session = SimpleNamespace(token=1)
    fakes = SimpleNamespace(copy=copy, synced=lambda _server: session, ask=ask)
    worker = SimpleNamespace(wanted=Wanted(0), resumed=False, announced=1, rebuilds=set())
    readers = Readers(0, lambda *_: pytest.fail("no replicas"))
    Puller(cast("Any", fakes), cast("Any", worker), readers).ask(0)
    assert asked == [1]
