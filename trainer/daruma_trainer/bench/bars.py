"""Bars that were set beforehand, and whether what was measured meets them: a table for a page."""

from collections.abc import Sequence
from enum import StrEnum

from daruma_trainer.contract import Settings

LEAN = 1.1
ADDED = LEAN + Settings().max_uncovered
"""Models that an outage may add to a worker's memory; LEAN: without what waits to be covered."""


class Verdict(StrEnum):
    """What is said of a bar; the worst first."""

    NOT_MET = "**not met**"
    NOT_RESOLVED = "not resolved"
    MET = "met"


def judge(slack: float, half: float | None) -> Verdict:
    """Say whether a bar is met.

    `slack`: how far what was measured is on the good side of it; `half`: half of the interval of
    what was measured. None: there is none, and nothing can be concluded.
    """
    if half is None:
        return Verdict.NOT_RESOLVED
    if slack - half >= 0:
        return Verdict.MET
    return Verdict.NOT_MET if slack + half < 0 else Verdict.NOT_RESOLVED


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a bar that all of several have to meet."""
    return min(verdicts, key=list(Verdict).index)


def row(what: str, bar: str, measured: str, verdict: str) -> str:
    """Return one row of the table."""
    return f"| {what} | {bar} | {measured} | {verdict} |"


def table(rows: Sequence[str], *notes: str) -> list[str]:
    """Return the section with these rows, what is to be said of it before them; [] without any."""
    if not rows:
        return []
    head = ["| what | bar, set beforehand | measured | |", "|---|---|---|---|"]
    return ["## Bars", "", *(line for note in notes for line in (note, "")), *head, *rows, ""]
