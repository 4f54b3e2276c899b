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


def test_every_panel_has_a_title_a_unit_and_a_query() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
