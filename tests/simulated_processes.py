"""What the servers and workers of a simulated job are in: its network and its clock, no threads."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from daruma_trainer.contract import Member
from daruma_trainer.server import lifecycle, restoring, serve, siblings
from daruma_trainer.server import reporting as server_reporting
from daruma_trainer.server.background import ByHand
from daruma_trainer.server.fencing import Fence
from daruma_trainer.server.replication import replicator, stream
from daruma_trainer.server.replication.replicator import Replicator
from daruma_trainer.worker import client as worker_client
from daruma_trainer.worker import loop as worker_loop
from daruma_trainer.worker import meanwhile as worker_meanwhile
from daruma_trainer.worker import reading as worker_reading
from daruma_trainer.worker import reporting as worker_reporting
from daruma_trainer.worker import sessions as worker_sessions
from simulated_network import Door, Network, Wire


@contextmanager
def simulated(network: Network, now: Callable[[], float], *, narrow: bool) -> Iterator[None]:
    """Until its end, whoever is made has this network and this clock (seconds).

    `narrow`: little may be under way to a replica, whole slots one by one and in turns.
    """
    clock = SimpleNamespace(monotonic=now)

    def wire(_: Any, own: str, _token: str, peer: Member, _poller: Any, first: int = 0) -> Wire:
        return Wire(network, own, peer, first)

    def idle(*_args: Any) -> SimpleNamespace:
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        return SimpleNamespace(close=nothing, follow=nothing, tick=nothing, report=())

    threads = SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None))
    patches: list[tuple[Any, str, Any]] = [
        (worker_sessions, "Link", wire),
        (serve, "Link", wire),
        (siblings, "Link", wire),
        (serve, "Door", lambda me, _context, _poller: Door(network, me.id)),
        (serve, "Guests", idle),
        (serve, "Agent", idle),
        (worker_client, "Agent", idle),
        (worker_loop, "threading", threads),
        (serve, "Fence", partial(Fence, clock=clock.monotonic)),
        (serve, "Replicator", partial(Replicator, clock=clock.monotonic)),
        (lifecycle, "Background", lambda _post: ByHand()),
    ]
    timed = (
        worker_sessions, worker_client, worker_meanwhile, worker_reading, worker_reporting,
        serve, lifecycle, restoring, server_reporting,
    )  # fmt: skip
    patches += [(module, "time", clock) for module in timed]
    if narrow:
        narrower = [(stream, "ROOM", 300), (stream, "AT_ONCE", 1), (stream, "MIN_WINDOW", 0)]
        patches += [*narrower, (replicator, "ROOM", 300)]
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
