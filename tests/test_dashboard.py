"""The dashboard's queries can be parsed, and ask for metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from metric_names import OPERATOR, SERVER, WORKER

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD: dict[str, Any] = json.loads((ROOT / "charts/daruma/dashboards/daruma.json").read_text())
NAMES = OPERATOR | {
    # Prometheus knows the namespace and the name of a pod that it asks.
    name: (kind, (*labels, "namespace", "pod"))
    for name, (kind, labels) in (SERVER | WORKER).items()
}
PARTS = {"gauge": {""}, "counter": {"_total"}, "histogram": {"_bucket", "_sum", "_count"}}
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]


def plain(query: str) -> str:
    """Put values where Grafana does."""
    return query.replace("$__rate_interval", "5m").replace("$namespace", ".*")


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_can_be_parsed(query: str) -> None:
    promql_parser.parse(plain(query))


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_and_labels_that_there_are(query: str) -> None:
    asked = re.findall(r"daruma_[a-z_]+", query)
    known = {label for name in asked for label in labels_of(name)}
    labels = set(re.findall(r"by \(([^)]*)\)|\{(\w+)=~", query))
    wanted = {label.strip() for pair in labels for part in pair for label in part.split(",")}
    assert wanted - {"", "le"} <= known


def labels_of(name: str) -> tuple[str, ...]:
    """Return the labels of a metric, which has what the query takes of it."""
    base = re.sub(r"_(total|bucket|sum|count)$", "", name)
    assert base in NAMES, f"no metric {name}"
    kind, labels = NAMES[base]
    assert name.removeprefix(base) in PARTS[kind], f"{name} of a {kind}"
    return labels


def test_every_panel_has_a_title_a_unit_and_a_query() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
