"""What the numbers say: the bars that were set beforehand for training through an outage."""

from collections.abc import Mapping, Sequence
from typing import Any

from daruma_trainer.bench.availability.arms import AROUND, SCENARIOS, THROUGH
from daruma_trainer.bench.availability.stats import Interval, Run, interval, paired, select
from daruma_trainer.bench.bars import ADDED, judge, row, table, worst

BUSY = 0.95
"""Least utilisation of the workers during an outage of 20 s."""
OUTAGE = "outage-20"
NOTE = (
    "*Met* and *not met*: the whole interval is on that side of the bar; *not resolved*: it spans "
    "it, or there is none. Of several outages or systems it is the worst that counts."
)


def bars(result: Mapping[str, Any]) -> list[str]:
    """The bars, and whether they were met."""
    runs, model = result["runs"], 4 * result["parameters"]
    rows = [*_busy(runs), *_added(runs, model), *_accuracy(runs)]
    return table(rows, *(["Too short a run to judge a bar by."] if result["quick"] else []), NOTE)


def _busy(runs: Sequence[Run]) -> list[str]:
    rows = []
    for arm in THROUGH:
        found = interval(r["utilisation_outage"] for r in select(runs, OUTAGE, arm))
        if found is not None:
            what = f"{arm}: utilisation of the workers while a server is away for 20 s"
            verdict = judge(found.mean - BUSY, found.half)
            rows.append(row(what, f"≥ {BUSY:.0%}", f"{_said(found, '.1f', 100)} %", verdict))
    return rows


def _added(runs: Sequence[Run], model: int) -> list[str]:
    rows = []
    outages = [s.name for s in SCENARIOS if s.name.startswith("outage-")]
    for arm in THROUGH:
        found = {
            name.removeprefix("outage-"): made
            for name in outages
            if (made := interval(_models(select(runs, name, arm), model)))
        }
        if found:
            after, said = "/".join(found), " / ".join(_said(v, ".1f") for v in found.values())
            what = f"{arm}: what an outage of {after} s adds to a worker's memory, in models"
            verdict = worst([judge(ADDED - v.mean, v.half) for v in found.values()])
            rows.append(row(what, f"≤ {ADDED:.1f}", said, verdict))
    return rows


def _models(runs: Sequence[Run], model: int) -> list[float | None]:
    added = [r["memory"]["added"] for r in runs]
    return [None if a is None else a / model for a in added]


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
            verdicts = {other: judge(made.mean, made.half) for other, made in against.items()}
            verdict = worst(list(verdicts.values()))
            held = [other for other in against if verdicts[other] is verdict]
            least = min(held, key=lambda other: against[other].mean)
            what = f"{arm}: accuracy {AROUND[1]:g} s after an outage of 20 s, less another system's"
            said = f"{_said(against[least], '+.3f')} ({least})"
            rows.append(row(what, "≥ 0", said, verdict))
    return rows


def _said(found: Interval, form: str, times: float = 1) -> str:
    half = "" if found.half is None else f" ± {times * found.half:{form.removeprefix('+')}}"
    return f"{times * found.mean:{form}}{half}"
