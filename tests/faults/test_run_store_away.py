"""`daruma run` whose store cannot be reached for a while, or lost what a rollback needs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import softmax
from daruma_trainer.bench.members import processes
from daruma_trainer.checkpoint.manifest import newest_cut, newest_manifest
from daruma_trainer.checkpoint.objects import ENV_SECONDS
from daruma_trainer.checkpoint.store import Store, open_store
from faulty_proxy import Fault, FaultyProxy, faulty_proxy
from left_behind import left_by
from s3_server import environment

pytestmark = pytest.mark.faults
DEADLINE = 120.0
STEPS = 130
PATIENCE = "0.5"
"""Seconds that an operation on the store may take."""
LOST = "shard-0001/00000001/"
"""What the first server-1 saved."""


@contextmanager
def running(
    folder: Path, store: str, recovery: dict[str, Any], *arguments: str, think_ms: int = 10
) -> Iterator[subprocess.Popen[str]]:
    command = ["python", softmax.__file__, str(STEPS), "digits", "0.5", str(think_ms)]
    manifest = {
        "apiVersion": "daruma.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": "toy"},
        "spec": {
            "program": {"image": "none", "command": command},
            "servers": {"replicas": 2},
            "workers": {"replicas": 2},
            "checkpoint": {"store": store, "every": 32, "fraction": 0.25},
            "recovery": recovery,
        },
    }
    (folder / "toy.yaml").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", "toy.yaml", "--out", "out"]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def direct(s3: str) -> Store:
    """The store as it is without the proxy."""
    return open_store(s3)


@pytest.fixture
def proxy(direct: Store, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    assert direct.list("default/toy") == [], "it is opened before the way to it changes"
    with faulty_proxy(s3_port) as found:
        for key, value in environment(found.port).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv(ENV_SECONDS, PATIENCE)
        yield found


def until(folder: Path, what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, f"{what}\n{(folder / 'output').read_text()}"
        time.sleep(0.1)


def told(folder: Path, words: str) -> bool:
    """Whether a person was told so."""
    return words in (folder / "output").read_text()


def logged(folder: Path, words: str) -> bool:
    """Whether status said so: what it says is logged whenever it changes."""
    return words in (folder / "out" / "logs" / "daruma.log").read_text()


def ended(folder: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end, with nothing left and no step lost; returns the report."""
    assert process.wait(DEADLINE) == 0, (folder / "output").read_text()
    assert left_by(folder) == []
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)
    assert found["metrics"]["test_accuracy"] >= 0.9
    return found


def saved(store: Store, strategy: str) -> bool:
    """Whether there is more than what the job began with."""
    if strategy == "Partial":
        return min(saved_steps(store)) > 0
    found = [newest_cut(store, f"default/toy/{uid}") for uid in store.list("default/toy")]
    return any(one is not None and one[1].step > 0 for one in found)


def saved_steps(store: Store) -> list[int]:
    """The step of each shard's newest save."""
    prefixes = [f"default/toy/{uid}" for uid in store.list("default/toy")]
    found = [
        newest_manifest(store, prefix, shard, 10**6) for prefix in prefixes for shard in (0, 1)
    ]
    return [0 if one is None else one[1].step for one in found] or [0]


def test_training_outlives_its_store_and_saves_catch_up(
    tmp_path: Path, s3: str, direct: Store, proxy: FaultyProxy
) -> None:
    with running(tmp_path, s3, {"strategy": "Partial"}, think_ms=80) as process:
        until(tmp_path, "a save", lambda: told(tmp_path, "step ") and min(saved_steps(direct)) > 0)
        proxy.fail(Fault.REFUSED)
        until(tmp_path, "a failed save is told", lambda: told(tmp_path, "CheckpointFailed: "))
        proxy.heal()
        before = saved_steps(direct)
        until(
            tmp_path, "newer saves",
            lambda: all(new > old for new, old in zip(saved_steps(direct), before, strict=True)),
        )  # fmt: skip
        assert process.poll() is None, "these are no saves of the end"
        found = ended(tmp_path, process)
    assert found["recoveries"] == []
    assert found["pushes"]["applied"] == 2 * STEPS
    assert found["pushes"]["lost"] == 0


@pytest.mark.parametrize("strategy", ["Partial", "FullCheckpoint"])
def test_a_recovery_waits_for_its_store_and_says_so(
    tmp_path: Path, s3: str, proxy: FaultyProxy, strategy: str
) -> None:
    # What is written is written; what a recovery reads it does not get.
    proxy.fail(Fault.REFUSED, method="GET", path="shard-0001")
    with running(tmp_path, s3, {"strategy": strategy}, "--kill", "server-1@step=80") as process:
        until(tmp_path, "it is told", lambda: told(tmp_path, f"StoreUnreachable: {strategy}: the"))
        proxy.heal()
        found = ended(tmp_path, process)
    assert logged(tmp_path, "Recovering, StoreUnreachable: server-1 lost")
    assert not told(tmp_path, "SourceDamaged")
    (recovery,) = found["recoveries"]
    assert (recovery["outcome"], recovery["rung"]) == ("Succeeded", 0)
    source = {"Partial": "runningCheckpoint", "FullCheckpoint": "fullCheckpoint"}[strategy]
    assert list(recovery["sources"]) == [source]
    assert recovery["reason"] in ("RunningCheckpointFound", "RolledBackToCut")


@pytest.mark.parametrize("strategy", ["Partial", "FullCheckpoint"])
def test_a_recovery_waits_for_a_volume_that_is_not_mounted(tmp_path: Path, strategy: str) -> None:
    """The new server finds an empty folder: nothing is written there, nothing taken for lost."""
    volume, aside = tmp_path / "out" / "store", tmp_path / "out" / "aside"
    recovery = {"strategy": strategy}
    with running(tmp_path, "file:///saves", recovery, think_ms=40) as process:
        store = open_store(f"file://{volume}/saves")
        until(tmp_path, "saves", lambda: told(tmp_path, "step ") and saved(store, strategy))
        volume.rename(aside)
        volume.mkdir()
        next(p for p in processes(tmp_path / "out") if p.id.startswith("server-1-")).kill()
        until(tmp_path, "it is told", lambda: told(tmp_path, f"StoreUnreachable: {strategy}: the"))
        until(tmp_path, "why", lambda: logged(tmp_path, "mount its volume again"))
        aside.rename(volume)  # which fails unless it is empty still
        found = ended(tmp_path, process)
    assert not told(tmp_path, "SourceDamaged")
    (record,) = found["recoveries"]
    assert (record["outcome"], record["rung"]) == ("Succeeded", 0)
    assert record["reason"] in ("RunningCheckpointFound", "RolledBackToCut")


def test_a_recovery_waits_no_longer_than_its_deadline_and_takes_the_next_rung(
    tmp_path: Path, s3: str, proxy: FaultyProxy
) -> None:
    recovery = {
        "strategy": "Partial", "fallback": ["Stateless"], "timeouts": {"restoreSeconds": 4},
    }  # fmt: skip
    proxy.fail(Fault.REFUSED, method="GET", path="shard-0001")
    with running(tmp_path, s3, recovery, "--kill", "server-1@step=60") as process:
        found = ended(tmp_path, process)
    assert told(tmp_path, "StoreUnreachable: Partial: the store is asked again, for up to 4 s")
    text = "RecoveryEscalated: Partial → Stateless: the lost slots were not Ready within 4 s"
    assert told(tmp_path, f"{text}; server-1-")
    (record,) = found["recoveries"]
    assert (record["strategy"], record["rung"]) == ("Stateless", 1)
    assert list(record["sources"]) == ["peer"]


@pytest.fixture
def patient(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """A proxy whose every answer is waited for: an operation that gives up is no lost file."""
    monkeypatch.setenv(ENV_SECONDS, "10")
    return proxy


def test_where_the_newest_cut_lost_a_file_all_go_back_to_the_one_before(
    tmp_path: Path, s3: str, patient: FaultyProxy
) -> None:
    patient.fail(Fault.GONE, 1, method="GET", path=f"{LOST}cut-")
    recovery = {"strategy": "FullCheckpoint"}
    with running(tmp_path, s3, recovery, "--kill", "server-1@step=80") as process:
        found = ended(tmp_path, process)
    assert patient.done[Fault.GONE] == 1
    (record,) = found["recoveries"]
    assert (record["outcome"], record["reason"]) == ("Succeeded", "RolledBackToOlderCut")
    rework = record["rework"]
    assert rework["redoneSteps"] > rework["counterfactualSteps"], "more than the newest would cost"
    output = (tmp_path / "output").read_text()
    (event,) = [line for line in output.splitlines() if "SourceDamaged server" in line]
    assert "SourceDamaged server-1: cannot load default/toy/" in event
    assert "there is no such object; going back to step" in event


def test_where_no_cut_is_whole_the_next_rung_restores_all_servers(
    tmp_path: Path, s3: str, patient: FaultyProxy
) -> None:
    patient.fail(Fault.GONE, method="GET", path=f"{LOST}cut-")
    recovery = {"strategy": "FullCheckpoint", "fallback": ["Partial"]}
    with running(tmp_path, s3, recovery, "--kill", "server-1@step=80") as process:
        found = ended(tmp_path, process)
    assert told(tmp_path, "there is no cut before it")
    assert told(tmp_path, "RecoveryEscalated: FullCheckpoint → Partial: server-1-")
    (record,) = found["recoveries"]
    assert (record["outcome"], record["strategy"], record["rung"]) == ("Succeeded", "Partial", 1)
    assert record["sources"] == {"runningCheckpoint": 1024}, "some had gone back, others not"
