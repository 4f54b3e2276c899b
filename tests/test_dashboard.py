"""The dashboard's queries can be parsed, and ask for metrics that the operator has."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from daruma_operator.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD: dict[str, Any] = json.loads((ROOT / "charts/daruma/dashboards/daruma.json").read_text())
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]


def plain(query: str) -> str:
    """Put values where Grafana does."""
    return query.replace("$__rate_interval", "5m").replace("$namespace", ".*")


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_can_be_parsed(query: str) -> None:
    promql_parser.parse(plain(query))


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_and_labels_that_there_are(query: str) -> None:
    families = {family.name: family for family in Metrics().registry.collect()}
    for name in set(re.findall(r"daruma_[a-z_]+", query)):
        base = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert base in families or name in families, f"no metric {name}"
    labels = set(re.findall(r"by \(([^)]*)\)|\{(\w+)=~", query))
    asked = {label.strip() for pair in labels for part in pair for label in part.split(",")}
    known = {label for name in re.findall(r"daruma_[a-z_]+", query) for label in labels_of(name)}
    assert asked - {"", "le"} <= known


def labels_of(name: str) -> tuple[str, ...]:
    """Return the labels of a metric, as an attribute of Metrics declares them."""
    base = re.sub(r"_(total|bucket|sum|count)$", "", name)
    (found,) = [m for m in vars(Metrics()).values() if getattr(m, "_name", None) in (base, name)]
    return tuple(found._labelnames)


def test_every_panel_has_a_title_a_unit_and_a_query() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
