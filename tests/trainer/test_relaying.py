"""Who is asked for values that this server has overwritten."""

import numpy as np

from daruma_trainer.contract import Member, Membership, Role, Settings
from daruma_trainer.server.relaying import Relay
from daruma_trainer.server.replies import Reply
from daruma_trainer.wire import PULL, Header, Kind, Refusal, State, bitmap, encode_state

ASKER = b"worker-2-1"
NOTHING = np.zeros(0, np.int64)


class Asked:
    """A relay of a job of three workers, of which the third asks."""

    def __init__(self) -> None:
        self.relay = Relay(self._send)
        self.sent: list[tuple[str, int]] = []
        workers = tuple(Member(Role.WORKER, i, 1, f"w{i}", f"a:{i}") for i in range(3))
        self.membership = Membership("uid", "ns", "job", 1, 1, 3, workers, Settings())

    def _send(self, member: str, number: int, body: bytes) -> bool:
        self.sent.append((member, number))
        return True

    def ask(self, batch: int, generation: int = 0) -> Reply | None:
        header = Header(Kind.BEFORE, 1, 1, 1, generation)
        meta = PULL.pack(batch, 0, 0) + bitmap(np.ones(1024, np.bool_))
        return self.relay.ask(ASKER, header, [b"", meta], self.membership)

    def has_nothing(self) -> None:
        """Whoever was asked last does not have it."""
        none = State(
            np.zeros(1024, np.bool_), NOTHING, NOTHING, NOTHING,
            np.zeros((0, 3), np.int64), np.zeros((0, 3), np.uint64), (),
        )  # fmt: skip
        assert self.relay.answer(*self.sent[-1], [b"", *encode_state(none)]) is not None


def test_all_live_workers_are_asked_before_it_is_given_up() -> None:
    asked = Asked()
    for _ in range(2):
        assert asked.ask(5) is None
        asked.has_nothing()
    assert {member for member, _ in asked.sent} == {"worker-0-1", "worker-1-1"}
    refused = asked.ask(5)
    assert refused is not None
    assert refused.flags == Refusal.NOT_KEPT


def test_who_lacks_one_batch_is_asked_for_the_next() -> None:
    asked = Asked()
    asked.ask(5)
    asked.has_nothing()
    for _ in range(2):
        assert asked.ask(6) is None
        asked.has_nothing()
    assert {member for member, _ in asked.sent[1:]} == {"worker-0-1", "worker-1-1"}


def test_who_lacks_a_batch_is_asked_for_it_after_a_rollback() -> None:
    asked = Asked()
    asked.ask(5)
    asked.has_nothing()
    for _ in range(2):
        assert asked.ask(5, generation=1) is None
        asked.has_nothing()
    assert {member for member, _ in asked.sent[1:]} == {"worker-0-1", "worker-1-1"}
