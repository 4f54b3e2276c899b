"""Tests of `daruma bench availability`: what it makes of what was noted; nothing is started."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.bench.availability import command
from daruma_trainer.bench.availability.arms import (
    SCENARIOS,
    STORE,
    WORKERS,
    Arm,
    Fault,
    arms,
    manifest,
    refusal,
)
from daruma_trainer.bench.availability.page import page, text
from daruma_trainer.bench.availability.plots import draw
from daruma_trainer.bench.availability.sampling import Sampler, byte_counters, resident
from daruma_trainer.bench.availability.stats import (
    ACCURACY,
    GRADIENTS,
    TIME,
    average,
    equal_gradients,
    interval,
    paired,
    value_at,
)
from daruma_trainer.bench.availability.trace import (
    SNAPSHOT,
    STEP,
    TRACE,
    Steps,
    Trace,
    read_traces,
    snapshots,
    utilisation,
)
from daruma_trainer.bench.availability.trial import Outage, Seen, summary
from daruma_trainer.bench.cli import today
from daruma_trainer.contract import ExitCode, Role

NAN = float("nan")


def steps(*rows: tuple[float, float, float, int]) -> Steps:
    """A life of (begin, end, blocked so far, acked); each step is noted twice, as a worker does."""
    out = []
    for begin, end, blocked, acked in rows:
        out.append((begin, NAN, 0.0, 0.0, 0, 0))
        if not np.isnan(end):
            out.append((begin, end, blocked, 0.0, acked, acked))
    return np.array(out, STEP)


# Arms and faults


def test_every_arm_is_run_or_refused_in_words() -> None:
    found = arms(100)
    assert {a.name for a in found} == {
        "sync checkpoint", "async checkpoint", "sync chain", "async chain", "stateless",
        "freshest", "freshest 2 copies",
    }  # fmt: skip
    known = {a.name for a in found if refusal(a, 100) is None}
    assert known >= {"sync checkpoint", "async checkpoint", "stateless", "freshest"}
    strange = Arm("strange", "Async", {"strategy": "Freshest", "wings": 2})
    why = refusal(strange, 100)
    assert why is not None
    assert why.startswith("spec.recovery.wings: there is no such field")


@pytest.mark.parametrize("updates", [1, 30, 100])
def test_what_happens_by_updates_does_so_in_every_mode(updates: int) -> None:
    for arm in arms(updates):
        spec = manifest(arm, ["python"], "file:///x", updates)["spec"]
        every = spec["checkpoint"]["every"]
        if arm.saves:
            assert every * (1 if arm.mode == "Sync" else WORKERS) == max(updates, WORKERS) or (
                updates == 1
            )
            assert every * spec["checkpoint"]["fraction"] >= 1


def test_faults_are_within_the_run_and_the_scored_worker_is_left_alone() -> None:
    assert SCENARIOS[0].faults == ()
    for fault in (f for s in SCENARIOS for f in s.faults):
        assert 0 < fault.begin < (fault.end or 1) <= 1
        assert (fault.what, fault.index) != (Role.WORKER, 0)


# Traces


def test_a_worker_is_busy_but_for_what_it_waited() -> None:
    # Computes 1 s, is in step for 1 s of which it waits 0.75; twice. The third step never ends.
    trace = Trace([steps((1, 2, 0.75, 1), (3, 4, 1.5, 2), (5, NAN, 0, 0))])
    assert trace.busy(1, 6) == pytest.approx(0.25 + 1.25 + 1)
    assert trace.busy(5, 9) == 0, "it waits in a step that does not end"
    assert trace.busy(2, 3) == pytest.approx(1)
    assert utilisation([trace, Trace([])], 2, 4) == pytest.approx(1.25 / 4), "one is away"


def test_what_a_replacement_waited_for_its_place_is_no_part_of_its_first_step() -> None:
    trace = Trace([steps((10, 11, 500.0, 7), (12, 13, 500.5, 8))])
    assert trace.busy(10, 13) == pytest.approx(0 + 1.5)


def test_gradients_count_when_all_slots_have_them_and_again_when_made_again() -> None:
    first = steps((0, 1, 0, 1), (1, 2, 0, 2), (2, 3, 0, 5), (3, 4, 0, 3), (4, 5, 0, 4))
    trace = Trace([first, steps((8, 9, 0, 4), (9, 10, 0, 5), (10, NAN, 0, 0))])
    at = np.array([0.5, 1.0, 3.5, 4.5, 5.0, 10.0])
    # 5 → 3 is a rollback: nothing is added by it, and what follows counts again.
    assert trace.applied(at).tolist() == [0, 1, 5, 5, 6, 7]
    assert trace.computed(np.array([0.0, 4.0, 10.0])).tolist() == [1, 5, 8]
    assert trace.began() == 1
    nobody = Trace([])
    assert nobody.applied(at).tolist() == [0] * 6
    assert nobody.computed(at).tolist() == [0] * 6
    assert nobody.began() is None


def test_traces_are_read_in_the_order_of_lives_without_what_was_cut_short(tmp_path: Path) -> None:
    late, early = steps((5, 6, 0, 9)), steps((0, 1, 0, 1), (1, 2, 0, 2))
    (tmp_path / TRACE.format(0, 10)).write_bytes(late.tobytes())
    (tmp_path / TRACE.format(0, 9)).write_bytes(early.tobytes()[:-1])
    (tmp_path / TRACE.format(1, 3)).write_bytes(b"")
    one, two = read_traces(tmp_path, 2)
    assert [len(life) for life in one.lives] == [3, 2]
    assert one.busy(1.9, 9.0) == pytest.approx(1.0)
    assert list(two.lives) == []


def test_the_last_copy_is_among_those_that_are_scored(tmp_path: Path) -> None:
    for at in range(20):
        (tmp_path / SNAPSHOT.format(at)).touch()
    found = [at for at, _ in snapshots(tmp_path, 2, 12, 4)]
    assert len(found) == 4
    assert (found[0], found[-1]) == (2, 12)
    assert len(snapshots(tmp_path, 2, 12, 40)) == 11


# What is looked at


def test_counters_of_bytes_are_taken_whatever_they_are_called() -> None:
    found = byte_counters(
        "# HELP daruma_push_bytes_total Bytes.\n"
        'daruma_push_bytes_total{index="0",job="j"} 12.0\n'
        'daruma_replica_bytes_total{index="0",to="1"} 1e+03\n'
        'daruma_replica_bytes_total{index="0",to="2"} 5.0\n'
        'daruma_push_bytes_created{index="0"} 7.0\n'
        'daruma_step{index="0"} 3.0\n'
    )
    assert found == {"push": 12.0, "replica": 1005.0}


def test_counters_that_begin_again_lose_nothing(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path)
    for id_, value in (("a", 5.0), ("b", 1.0), ("a", 8.0), ("a", 2.0), ("a", 2.0)):
        sampler.count(id_, {"push": value})
    assert sampler.bytes == {"push": 8.0 + 1.0 + 2.0}


def test_memory_is_that_of_a_process_and_of_those_it_started() -> None:
    script = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
        "print(p.pid, flush=True); sys.stdin.read(); p.kill(); p.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        both, small = resident(parent.pid), resident(child)
        parent.communicate(b"")
    assert both > small > 0
    assert resident(parent.pid) == 0


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    seen = Seen(100.0, 110.0, Sampler(tmp_path))
    (tmp_path / TRACE.format(0, 1)).write_bytes(
        steps((101, 102, 1, 1), (103, 108, 6, 4), (109, 110, 7, 6)).tobytes()
    )
    (tmp_path / TRACE.format(1, 1)).write_bytes(steps((100, 101, 0, 3)).tobytes())
    for at in (99.0, 102.0, 110.0):
        (tmp_path / SNAPSHOT.format(at)).touch()
    held = Fault(Role.SERVER, 0.3, 0.5, 1)
    seen.outages = [
        Outage(held, 103.0, 105.0),
        Outage(Fault(Role.SERVER, 0.7, None, 0), 107.0, None),
        Outage(Fault(STORE, 0.4, 0.6), 104.0, 106.0),
    ]
    seen.sampler.memory = [
        (102.5, "worker-0-1", 100), (104.0, "worker-0-1", 140), (107.5, "worker-0-1", 120),
        (104.5, "worker-1-2", 900), (101.0, "server-0-1", 30),
    ]  # fmt: skip
    record = {"phases": {}, "cause": "ServerLost", "outcome": "Succeeded"}
    seen.report = {
        "pushes": {"applied": 9, "lost": 1, "replayed": 2, "duplicate": 0},
        "recoveries": [
            record | {"seconds": 2.5},
            record | {"seconds": 9.0, "cause": "HandBack"},
            record | {"seconds": 0.5},
        ],
    }
    found = summary(seen, tmp_path, 40, lambda files: [(0.5, float(len(files)))] * len(files))
    assert found["outages"] == [[3.0, 6.0], [7.0, 7.5]], "held: until released; else: recovered"
    assert found["curve"] == [[2.0, 4, 0.5, 2.0], [10.0, 9, 0.5, 2.0]]
    assert (found["applied"], found["computed"]) == (9, 4)
    assert found["memory"] == {
        "server": 30, "worker": 900, "added": 40, "added_highest": 40,
    }  # fmt: skip
    assert found["utilisation_outage"] == 0
    assert (found["kills"], found["recoveries"][0]["seconds"]) == (2, 2.5)
    json.dumps(found)
    seen.report["recoveries"].pop()
    found = summary(seen, tmp_path, 40, lambda files: [(0.5, 1.0)] * len(files))
    assert found["outages"][-1] == [7.0, 10.0], "it was not back when the run was over"


# Statistics


def test_intervals_are_students() -> None:
    assert interval([None, None]) is None
    one = interval([2.0, None])
    assert one is not None
    assert (one.mean, one.half) == (2.0, None)
    three = interval([1.0, 2.0, 3.0])
    assert three is not None
    assert (three.mean, three.count) == (2.0, 3)
    assert three.half == pytest.approx(4.303 / 3**0.5)
    many = interval([float(i % 2) for i in range(100)])
    assert many is not None
    assert many.half == pytest.approx(2.262 * 0.50252 / 10, rel=1e-3)


CURVE = [[1.0, 10, 0.1, 2.0], [2.0, 20, 0.4, 1.0], [4.0, 20, 0.3, 0.5]]


def test_a_value_holds_until_the_next() -> None:
    assert value_at(CURVE, TIME, 3.9, ACCURACY) == 0.4
    assert value_at(CURVE, TIME, 4.0, ACCURACY) == 0.3
    assert value_at(CURVE, TIME, 0.0, ACCURACY) == 0.1
    assert value_at(CURVE, GRADIENTS, 19, ACCURACY) == 0.1
    assert value_at(CURVE, GRADIENTS, 20, ACCURACY) == 0.3
    assert value_at([], TIME, 1.0, ACCURACY) is None
    assert average(CURVE, 5.0, ACCURACY) == pytest.approx((0.1 * 2 + 0.4 * 2 + 0.3) / 5)


def a_run(arm: str, scenario: str, seed: int, accuracy: float) -> dict[str, Any]:
    broken = scenario != "none"
    phases = {"detect": 0.25, "replace": 1.5, "restore": 0.125, "resume": None}
    record = {"phases": phases, "seconds": 2.0, "reason": "PeerCopiesFound", "outcome": "Succeeded"}
    return {
        "arm": arm, "scenario": scenario, "seed": seed, "seconds": 10.0, "took": 12.0, "load": 2.0,
        "curve": [[0.0, 2, 0.125, 2.5], [5.0, 40 + seed, accuracy, 1.5]],
        "applied": 80, "computed": 82, "aside": 0.01,
        "pushes": {"applied": 80, "lost": 3, "replayed": 17, "duplicate": 0},
        "utilisation": 0.75, "utilisation_outage": 0.5 if broken else None,
        "utilisation_before": 0.8 if broken else None,
        "outages": [[2.5, 4.2]] if broken else [], "bytes": {"push": 8.2e8, "replica": 1.64e8},
        "memory": {"server": 60e6, "worker": 900e6, "added": 9e6 if broken else None,
                   "added_highest": 11e6 if broken else None},
        "kills": int(broken), "recoveries": [record] if broken and seed == 0 else [],
    }  # fmt: skip


def a_result() -> dict[str, Any]:
    runs = [
        a_run(arm, scenario, seed, accuracy + 0.01 * seed)
        for seed in range(2)
        for scenario in ("none", "server")
        for arm, accuracy in (("async checkpoint", 0.5), ("stateless", 0.75))
    ]
    return {
        "benchmark": "availability", "quick": True, "machine": "2 cores", "date": "2026-01-01",
        "size": {"seconds": 10.0, "updates": 30, "evaluate": 6, "data": "digits"},
        "parameters": 813258, "took": 120.0, "runs": runs,
        "skipped": [{"arm": "sync chain", "why": "spec.recovery.chain: there is no such field"}],
        "failed": [{"arm": "freshest", "scenario": "store", "seed": 1, "why": "StateLost"}],
    }  # fmt: skip


def test_arms_are_compared_seed_by_seed() -> None:
    runs = a_result()["runs"]
    ours = [r for r in runs if r["arm"] == "stateless"]
    theirs = [r for r in runs if r["arm"] == "async checkpoint"]
    found = paired(ours, theirs, "end")
    assert found is not None
    assert found.mean == pytest.approx(0.25)
    assert found.half == pytest.approx(0)
    assert equal_gradients(runs) == 40
    assert equal_gradients([]) == 0
    assert paired(ours, [], "end") is None


def test_the_page_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    result = a_result()
    made = page(result, {"server": "availability/server.svg"})
    assert "**Not measured: sync chain.**" in made
    assert "spec.recovery.chain: there is no such field" in made
    assert "**Failed: freshest, store, seed 1.** StateLost" in made
    assert "![Accuracy, one server is killed, and held away](availability/server.svg)" in made
    assert "| stateless − async checkpoint | +0.250 ± 0.000 | +0.125 ± 0.000 |" in made
    assert "| stateless | 75.0 ± 0.0 % | 80.0 ± 0.0 % | 50.0 ± 0.0 % | 3.0 ± 0.0 | 17.0" in made
    assert "| stateless | 1 of 2 | PeerCopiesFound | 2.00 | 0.25 | 1.50 | 0.12 | 0.00 |" in made
    assert "| 10.00 ± 0.00 | 2.00 ± 0.00 | 1.0 ± 0.0 % |" in made, "push, replica, aside"
    assert "813,258 parameters" in made
    assert "## How it is measured" in made
    assert "How it is measured" not in text(result)
    files = [draw(tmp_path, name, [r for r in result["runs"] if r["scenario"] == name])
             for name in ("none", "server")]  # fmt: skip
    assert all("<svg" in f.read_text() for f in files)
    before = files[1].read_bytes()
    draw(tmp_path, "server", [r for r in result["runs"] if r["scenario"] == "server"])
    assert files[1].read_bytes() == before, "the same numbers make the same file"


def test_bars_are_judged_where_their_outages_were_measured() -> None:
    result = a_result() | {"quick": False}
    assert "## Bars" not in page(result, {})
    result["runs"] += [
        a_run(arm, "outage-20", seed, accuracy)
        for seed in range(2)
        for arm, accuracy in (("async chain", 0.625), ("stateless", 0.75), ("freshest", 0.5))
    ]
    result["runs"].append(a_run("freshest", "outage-60", 0, 0.5))
    result["runs"][-1]["memory"]["added"] = 13e6
    made = page(result, {})
    assert "while a server is away for 20 s | ≥ 95% | 50.0 ± 0.0 % | **not met** |" in made
    assert "| stateless: what an outage of 20 s adds to a worker's memory" in made
    assert "| ≤ 3.1 | 2.8 ± 0.0 | met |" in made
    one = "an outage of 20/60 s adds to a worker's memory, in models | ≤ 3.1 | 2.8 ± 0.0 / 4.0"
    assert f"{one} | not resolved |" in made, "of one run there is no interval"
    assert "| ≥ 0 | +0.125 ± 0.000 (async chain) | met |" in made
    assert "| ≥ 0 | -0.250 ± 0.000 (stateless) | **not met** |" in made
    result["runs"].append(a_run("freshest", "outage-60", 1, 0.5))
    made = page(result, {})
    assert "| ≤ 3.1 | 2.8 ± 0.0 / 3.4 ± 7.8 | not resolved |" in made, "it spans the bar"
    assert "those of 5 and 60 s are for the two whose workers train through one" in made


def test_the_worst_comparison_is_the_one_that_is_resolved() -> None:
    result = a_result() | {"quick": False}
    ours, near, far = [(0.5, 0.5), (0.51, 0.51), (0.4, 0.8)]
    result["runs"] += [
        a_run(arm, "outage-20", seed, accuracy)
        for arm, both in (("stateless", ours), ("async chain", near), ("sync chain", far))
        for seed, accuracy in enumerate(both)
    ]
    made = page(result, {})
    assert "| ≥ 0 | -0.010 ± 0.000 (async chain) | **not met** |" in made
    result["runs"] = [r for r in result["runs"] if r["arm"] != "async chain"]
    assert "(sync chain) | not resolved |" in page(result, {})


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "freshest,fresher"], "no arm 'fresher'; there are sync checkpoint"),
        (["--scenarios", "flood"], "no scenario 'flood'; there are none, server"),
        (["--resume"], "--resume goes on with what --json has"),
    ],
)
def test_what_cannot_be_asked_for_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_a_run_that_was_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str, int, float]] = []

    def run_job(arm: Any, scenario: Any, seed: int, size: Any, _score: Any) -> dict[str, Any]:
        done.append((arm.name, scenario.name, seed, size.seconds))
        return a_run(arm.name, scenario.name, seed, 0.5)

    monkeypatch.setattr(command, "run_job", run_job)
    file = tmp_path / "found.json"
    asked = ["--quick", "--json", str(file), "--arms", "stateless,freshest"]
    assert command.main([*asked, "--scenarios", "none"]) == ExitCode.OK
    assert done == [("stateless", "none", 0, 4.5), ("freshest", "none", 0, 4.5)]
    assert command.main([*asked, "--resume"]) == ExitCode.OK
    assert [d[:2] for d in done[2:]] == [("stateless", "server"), ("freshest", "server")]
    assert len(json.loads(file.read_text())["runs"]) == 4
    file.write_text(file.read_text().replace(today(), "2026-01-02"))
    page, write = tmp_path / "page.md", [*asked, "--write", str(tmp_path / "page.md"), "--resume"]
    assert command.main([*write, "--scenarios", "none"]) == ExitCode.OK
    assert "\n2026-01-02, " in page.read_text(), "it is of that day"
    assert command.main([*write, "--scenarios", "worker"]) == ExitCode.OK
    assert f"\n2026-01-02 to {today()}, " in page.read_text()
    del done[4:]
    assert command.main([*asked, "--resume", "--scenarios", "outage-5,outage-20"]) == ExitCode.OK
    assert [(what, seconds) for _, what, _, seconds in done[4:]] == [
        ("outage-5", 20.0), ("outage-5", 20.0), ("outage-20", 35.0), ("outage-20", 35.0),
    ]  # fmt: skip
    asked[-1] = "async chain"
    assert command.main([*asked, "--resume", "--scenarios", "outage-5,outage-20"]) == ExitCode.OK
    assert [what for _, what, _, _ in done[8:]] == ["outage-20"], "the other is not for chains"
    assert command.main([*asked, "--resume", "--seconds", "3"]) == ExitCode.USAGE
