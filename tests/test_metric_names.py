"""The operator, servers and workers have the metrics that users' alerts and dashboards rest on."""

from pathlib import Path

from prometheus_client import Metric

from daruma_operator.metrics import Metrics
from expositions import families, server_text, worker_text
from metric_names import OPERATOR, SERVER, WORKER, Names
from saving_world import World


def shapes(found: dict[str, Metric]) -> Names:
    """Type and labels of each, but for the bound of a bucket."""
    return {
        name: (family.type, tuple(sorted({k for s in family.samples for k in s.labels} - {"le"})))
        for name, family in found.items()
    }


def in_order(names: Names) -> Names:
    return {name: (kind, tuple(sorted(labels))) for name, (kind, labels) in names.items()}


def test_the_operator_has_these() -> None:
    kept = {getattr(m, "_name", ""): m for m in vars(Metrics()).values()}
    assert {name: (m._type, m._labelnames) for name, m in kept.items() if name} == OPERATOR


def test_a_server_has_these(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    text = server_text(plane=world.plane, saver=world.saver, cuts=world.cuts)
    assert shapes(families(text)) == in_order(SERVER)


def test_a_worker_has_these() -> None:
    assert shapes(families(worker_text(loss=0.5))) == in_order(WORKER)
