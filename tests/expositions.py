"""What a member's /metrics answers, without its process, read as Prometheus reads it."""

import threading
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from daruma_trainer.contract import Replay, Role
from daruma_trainer.identity import Identity
from daruma_trainer.server.metrics import exposition as of_server
from daruma_trainer.worker.metrics import exposition as of_worker
from daruma_trainer.worker.position import Position
from daruma_trainer.worker.pushes import Pushes


def server_text(**life: Any) -> str:
    """`life`: what the server has of plane, saver and cuts."""
    me = Identity("n", "j", Role.SERVER, 0, 1, "")
    found = {"plane": None, "saver": None, "cuts": None} | life
    replicator = SimpleNamespace(bytes_total=11)
    server = SimpleNamespace(me=me, stale=2, life=SimpleNamespace(**found), replicator=replicator)
    return of_server(cast("Any", server)).decode()


def worker_text(**has: Any) -> str:
    """`has`: what of the worker is not as at its beginning."""
    client: dict[str, Any] = {
        "me": Identity("n", "j", Role.WORKER, 1, 1, ""), "pushes": Pushes(Replay()),
        "position": Position(), "loss": None, "blocked_seconds": 1.5, "lock": threading.Lock(),
    }  # fmt: skip
    return of_worker(cast("Any", SimpleNamespace(**client | has))).decode()


def families(text: str) -> dict[str, Metric]:
    """Return the metrics of an exposition by name (counters without `_total`)."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(text: str, name: str, **labels: str) -> float:
    """Return the only sample of this name that has these labels."""
    (found,) = [
        one.value
        for family in families(text).values()
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    ]
    return float(found)
