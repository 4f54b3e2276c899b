"""What the numbers say: the bars that were set beforehand for training through an outage."""

from collections.abc import Mapping, Sequence
from typing import Any

from daruma_trainer.bench.availability.arms import AROUND, SCENARIOS, THROUGH
from daruma_trainer.bench.availability.stats import Run, interval, paired, select
from daruma_trainer.contract import Settings

BUSY = 0.95
"""Least utilisation of the workers during an outage of 20 s."""
ADDED = 1.1 + Settings().max_uncovered
"""Most that an outage adds to a worker's memory, in models, however long it is."""
OUTAGE = "outage-20"


def bars(result: Mapping[str, Any]) -> list[str]:
    """The bars, and whether they were met."""
    runs, model = result["runs"], 4 * result["parameters"]
    rows = [*_busy(runs), *_added(runs, model), *_accuracy(runs)]
    if not rows:
        return []
    few = ["Too short a run to judge a bar by.", ""] if result["quick"] else []
    head = ["| what | bar, set beforehand | measured | |", "|---|---|---|---|"]
    return ["## Bars", "", *few, *head, *rows, ""]


def _busy(runs: Sequence[Run]) -> list[str]:
    rows = []
    for arm in THROUGH:
        found = interval(r["utilisation_outage"] for r in select(runs, OUTAGE, arm))
        if found is not None:
            what = f"{arm}: utilisation of the workers while a server is away for 20 s"
            rows.append(_row(what, f"≥ {BUSY:.0%}", f"{found.mean:.1%}", found.mean >= BUSY))
    return rows


def _added(runs: Sequence[Run], model: int) -> list[str]:
    rows = []
    outages = [s.name for s in SCENARIOS if s.name.startswith("outage-")]
    for arm in THROUGH:
        found = {
            name.removeprefix("outage-"): made.mean / model
            for name in outages
            if (made := interval(r["memory"]["added"] for r in select(runs, name, arm)))
        }
        if found:
            after, said = "/".join(found), "/".join(f"{v:.1f}" for v in found.values())
            what = f"{arm}: what an outage of {after} s adds to a worker's memory, in models"
            rows.append(_row(what, f"≤ {ADDED:.1f}", said, max(found.values()) <= ADDED))
    return rows


def _accuracy(runs: Sequence[Run]) -> list[str]:
    rows = []
    names = dict.fromkeys(r["arm"] for r in select(runs, OUTAGE))
    for arm in THROUGH:
        ours = select(runs, OUTAGE, arm)
        against = {
            other: made
            for other in names
            if other != arm and (made := paired(ours, select(runs, OUTAGE, other), "end"))
        }
        if against:
            worst = min(against, key=lambda other: against[other].mean)
            least, half = against[worst].mean, against[worst].half
            what = f"{arm}: accuracy {AROUND[1]:g} s after an outage of 20 s, less another system's"
            said = f"{least:+.3f}{'' if half is None else f' ± {half:.3f}'} ({worst})"
            rows.append(_row(what, "≥ 0", said, least >= 0))
    return rows


def _row(what: str, bar: str, measured: str, met: bool) -> str:
    return f"| {what} | {bar} | {measured} | {'met' if met else '**not met**'} |"
