"""What the pages of benchmarks say of the bars that were set beforehand."""

from dataclasses import asdict
from typing import Any

import pytest

from daruma_trainer.bench import memory, recovery, replication
from daruma_trainer.bench.replication import ALL, COPIES, NEXT, NONE, TAIL, Job, Plan


def row(job: Job, way: str, rate: float, replica_bytes: float = 0.0) -> dict[str, Any]:
    cpu = {"server": 0.1, "replicas": 0.1, "worker": 0.1, "cores": 1.5}
    return {**asdict(job), "way": way, "rate": rate, "bytes": replica_bytes, **cpu}


def costs(*rows: dict[str, Any]) -> str:
    head = {"machine": "m", "date": "d", "load": 0.5, "seconds": 10.0}
    return replication.page({**head, "rows": list(rows)})


def test_bytes_of_copies_are_judged_by_the_chain_of_the_same_job() -> None:
    sgd, momentum = Job(100, 0.05), Job(100, 0.05, "momentum")
    sync = Job(100, 0.05, consistency=ALL)
    made = costs(
        row(sgd, TAIL, 2.0, 1.0), row(sgd, COPIES, 2.0, 0.04),
        row(momentum, TAIL, 2.0, 0.99), row(momentum, COPIES, 2.0, 0.96),
        row(sync, TAIL, 2.0, 1.0), row(sync, COPIES, 2.0, 1.0),
    )  # fmt: skip
    what = "50 ms of think: bytes of `copies: 2`, of the chain's with `Tail`"
    assert f"| Async, sgd, 2 workers, {what} | ≤ 10% | 4.0% ± 0.4% | met, by 6.0 points |" in made
    assert f"| Async, momentum, 2 workers, {what} | ≤ 100% | 97.0% ± 9.7% | not resolved" in made
    said = "≤ 10% | 100.0% ± 10.0% | **not met**, by 90.0 points"
    assert f"| Sync, all needed, sgd, 2 workers, {what} | {said} |" in made
    assert "Too small" not in made


def test_rates_of_chains_are_judged_by_the_job_without_one() -> None:
    think, none = Job(100, 0.05, workers=1), Job(100, 0.0)
    made = costs(
        row(think, NONE, 2.0), row(think, NEXT, 1.6, 1.0),
        row(none, NEXT, 1.0, 1.0), row(none, NONE, 2.0),
    )  # fmt: skip
    assert "50 ms of think: rate of a chain of 2 with `Next`, of that without" in made
    assert "| ≥ 70% | 80.0% | met, by 10.0 points |" in made
    assert "| ≥ 55% | 50.0% | **not met**, by 5.0 points |" in made


def test_small_shards_are_no_judge() -> None:
    small = Job(10, 0.05)
    assert "Too small to judge by" in costs(row(small, NONE, 2.0), row(small, NEXT, 1.0))
    assert "## Bars" not in costs(row(small, NONE, 2.0))


def test_every_bar_of_bytes_is_measured() -> None:
    cells = {(job.consistency, job.rule, job.think): set(ways)
             for job, ways in Plan.of(quick=False).ways if {TAIL, COPIES} <= set(ways)}  # fmt: skip
    modes = {("Sync", "sgd", 0.05), ("Sync", "momentum", 0.05), (ALL, "sgd", 0.05)}
    rules = {("Async", rule, think) for rule in replication.BYTES for think in replication.RATES}
    assert cells.keys() == modes | rules
    assert all(NONE in ways for ways in cells.values())


@pytest.mark.parametrize(
    ("placement", "cluster", "said"),
    [
        ("Chain", False, "| ≤ 0.3 s | 0.200 s | met, by 0.100 s |"),
        ("Chain", False, "| ≤ 0.3 s | 0.400 s | **not met**, by 0.100 s; 1 of 3 kills took"),
        ("Chain", True, "on a cluster, max | ≤ 1.5 s | 0.400 s | met, by 1.100 s; 0 of 3"),
        ("Replace", False, None),
    ],
)
def test_bars_of_chains_are_on_the_page(placement: str, cluster: bool, said: str | None) -> None:
    spread = {"median": 0.2, "min": 0.1, "max": 0.4}
    made = recovery.page(
        {
            "where": "w", "placement": placement, "cluster": cluster, "machine": "m", "store": "s",
            "load": 0.5, "date": "d", "kills": 3, "seconds": spread, "detected": spread,
            "phases": dict.fromkeys(recovery.PHASES, spread), "unseen": spread,
            "samples": [{"seconds": seconds} for seconds in (0.1, 0.2, 0.4)],
        }
    )  # fmt: skip
    assert ("## Bars" in made) == (said is not None)
    assert said is None or said in made


def test_memory_is_judged_with_slack_and_without() -> None:
    one = {"strategy": "Freshest", "rule": "sgd", "gradients": "dense", "before": 7e8}
    rows = [one | {"copies": copies, "added": [1.25], "batches": [9]} for copies in (1, 2)]
    made = memory.page(
        {"mb": 100, "date": "d", "machine": "m", "load": 0.5, "outages": (5.0,), "rows": rows}
    )
    assert "| Freshest | 1 | sgd | dense | 700 | 1.25 | 9 | met, by 1.85 | **not met**, by" in made
    assert "| Freshest | 2 | sgd | dense | 700 | 1.25 | 9 | met, by 1.85 | – |" in made
