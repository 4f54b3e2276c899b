"""How often what is random is tried: some times in CI, very often in `make soak`, which tells.

    pytest -p soak --soak-page FILE tests

As a plugin it runs the tests with a count alone, and writes a page of what became of them. Rows of
tests that it did not run stay as they were: the whole takes hours, and may be done in parts.
"""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import pytest

SOAK = bool(os.environ.get("DARUMA_SOAK"))
_PAGE = """\
# Soak: what is random, tried very often

Made by `make soak`; edit the tests, not this page.

| test | what | how often | failed | seconds | when, where |
|---|---|---|---|---|---|
{rows}

Each of these tests runs in CI too, with fewer tries.
"""


def counted(what: str, ci: int, soak: int) -> tuple[int, pytest.MarkDecorator]:
    """Return how often a test tries, and the mark that tells of it: `what` it tries."""
    number = soak if SOAK else ci
    return number, pytest.mark.counted(what, number)


class Soak:
    """Collects what became of the tests with a count."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._tests: dict[str, list[Any]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep those with a count; each carries it to the process that tells."""
        mine: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            mark = item.get_closest_marker("counted")
            (others if mark is None else mine).append(item)
            if mark is not None:
                item.user_properties.append(("counted", mark.args))
        config.hook.pytest_deselected(items=others)
        items[:] = mine

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test's part up; one test may be made of many."""
        mark: Any = dict(report.user_properties).get("counted")
        if mark is None:
            return
        name = report.nodeid.partition("[")[0]
        entry = self._tests.setdefault(name, [*mark, 0, 0.0])
        entry[2] += report.failed
        entry[3] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the page, in the process that has all reports."""
        if hasattr(session.config, "workerinput") or not self._tests:
            return
        where = (
            f"{datetime.datetime.now(datetime.UTC).date()}, {os.cpu_count()} cores, "
            f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
        )
        rows = _rows(self._page) | {
            name: f"| {name} | {what} | {number:,} | {failed} | {seconds:.0f} | {where} |"
            for name, (what, number, failed, seconds) in self._tests.items()
        }
        self._page.write_text(_PAGE.format(rows="\n".join(rows[name] for name in sorted(rows))))


def _rows(page: Path) -> dict[str, str]:
    """Return the rows that a page has, by test."""
    lines = page.read_text().splitlines() if page.exists() else []
    return {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| tests/")}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --soak-page."""
    parser.addoption("--soak-page", type=Path, help="write what became of the counted tests there")


def pytest_configure(config: pytest.Config) -> None:
    """Collect where a page is wanted."""
    page = config.getoption("--soak-page")
    if page is not None:
        config.pluginmanager.register(Soak(page))
