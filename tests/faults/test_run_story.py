"""`daruma run` from start to end: failures on order, Ctrl-C, its own death; nothing is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import softmax
from daruma_trainer.bench.members import processes
from daruma_trainer.programs.data import classification
from left_behind import left_by

pytestmark = pytest.mark.faults
DEADLINE = 180.0
STEPS = 70
PROCESSES = 5
"""What `daruma run` starts at least, for 3 servers and 2 workers."""
MANIFEST = """\
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec:
  program:
    image: none
    command: [python, PROGRAM, "STEPS", digits, "RATE", "THINK", RULE]
  servers: {replicas: 3}
  workers: {replicas: 2, minReplicas: LEAST}
  checkpoint: {store: "file:///saves", every: 32, fraction: 0.25}
  consistency: {mode: MODE}
  recovery: {placement: PLACEMENT, strategy: STRATEGY}
"""
RATES = {"sgd": "0.5", "rows": "0.2", "momentum": "0.1", "adam": "0.02"}
SOFTMAX = softmax.__file__
"""A regression without torch: the tests of failures start many workers."""
KEYS = {"job", "phase", "steps", "loss", "metrics", "recoveries", "seconds", "pushes", "result"}


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    steps: int = STEPS,
    think_ms: int = 10,
    mode: str = "Async",
    program: str = SOFTMAX,
    placement: str = "Replace",
    strategy: str = "Freshest",
    rule: str = "sgd",
    least: int = 2,
) -> Iterator[subprocess.Popen[str]]:
    manifest = folder / "toy.yaml"
    text = MANIFEST.replace("PROGRAM", program).replace("STEPS", str(steps))
    text = text.replace("THINK", str(think_ms)).replace("MODE", mode)
    text = text.replace("STRATEGY", strategy).replace("RULE", rule).replace("RATE", RATES[rule])
    text = text.replace("LEAST", str(least))
    manifest.write_text(text.replace("PLACEMENT", placement))
    command = [sys.executable, "-m", "daruma_operator.cli.main", "run", str(manifest)]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--out", str(folder / "out"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def output(folder: Path) -> str:
    return (folder / "output").read_text()


def ended(folder: Path, process: subprocess.Popen[str]) -> int:
    code = process.wait(DEADLINE)
    assert left_by(folder) == []
    assert not (folder / "out" / "token").exists()
    assert "Traceback" not in output(folder)
    assert "Warning:" not in output(folder)
    return code


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "out" / "report.json").read_text())
    assert isinstance(found, dict)
    return found


def until(what: str, found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def trains(folder: Path, steps: int = 1) -> bool:
    said = re.findall(r"Running.* step (\d+)", output(folder))
    return bool(said) and int(said[-1]) >= steps


def exported(uri: str, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Export a result, and read it."""
    command = [sys.executable, "-m", "daruma_operator.cli.main", "export", uri, "-o", str(out)]
    subprocess.run(command, check=True, timeout=DEADLINE, capture_output=True)
    return load_file(out)


def accuracy(uri: str, out: Path) -> float:
    """Export a result, and score it as the program does."""
    state = exported(uri, out)
    _, (x, y) = classification("digits", 0)
    bias = state.get("bias", np.zeros(10))
    return float(np.mean((x @ state["weight"].T + bias).argmax(1) == y))


def check_recovery(record: dict[str, Any]) -> None:
    phases = [record["phases"][name] for name in ("detect", "replace", "restore", "resume")]
    assert sum(phases) == pytest.approx(record["seconds"], abs=0.01)
    assert record["outcome"] == "Succeeded"


def check_counts(found: dict[str, Any]) -> None:
    """What the records say became of pushes adds up to what the report says."""
    for kind in ("lost", "replayed", "skipped", "mixed"):
        told = [record["pushes"][kind] for record in found["recoveries"]]
        assert sum(told) == found["pushes"][kind], kind


def test_a_server_is_killed_and_the_job_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, "--kill", "server-1@step=20") as process:
        assert ended(tmp_path, process) == 0, output(tmp_path)
    found = report(tmp_path)
    assert set(found) >= KEYS
    (recovery,) = found["recoveries"]
    check_recovery(recovery)
    assert (recovery["cause"], recovery["indexes"]) == ("ServerLost", [1])
    assert sum(recovery["sources"].values()) > 300, "a third of 1,024 slots"
    assert recovery["rework"]["redoneSteps"] == 0
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)
    assert found["pushes"]["applied"] + found["pushes"]["lost"] == 2 * STEPS
    check_counts(found)
    steps = [step for step, _, _ in found["loss"]]
    assert steps == sorted(steps), "the step count never goes back"
    assert found["metrics"]["test_accuracy"] >= 0.9
    exported = accuracy(found["result"]["uri"], tmp_path / "model")
    assert exported == pytest.approx(found["metrics"]["test_accuracy"], abs=1e-6)
    for word in ("Recoveries", "server-1 lost", "detect", "peer", "test_accuracy"):
        assert word in output(tmp_path)


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(["worker-1@step=20"], id="worker"),
        pytest.param(["server-0@step=20", "server-2@step=20"], id="two-servers"),
        pytest.param(["server-0@step=20", "worker-0@step=20"], id="server-and-worker"),
    ],
)
def test_others_are_killed(tmp_path: Path, kills: list[str]) -> None:
    arguments = [word for kill in kills for word in ("--kill", kill)]
    with running(tmp_path, *arguments) as process:
        assert ended(tmp_path, process) == 0, output(tmp_path)
    found = report(tmp_path)
    lost = [(x["role"], x["index"]) for r in found["recoveries"] for x in r["losses"]]
    wanted = [kill.partition("@")[0].split("-") for kill in kills]
    assert sorted(lost) == sorted((role.capitalize(), int(index)) for role, index in wanted)
    for record in found["recoveries"]:
        check_recovery(record)
    check_counts(found)
    assert found["steps"] == STEPS
    assert found["metrics"]["test_accuracy"] >= 0.9


def killed(folder: Path, members: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run a job of which these members are killed at once; returns its report."""
    folder.mkdir()
    arguments = [word for member in members for word in ("--kill", f"{member}@step=20")]
    with running(folder, *arguments, **options) as process:
        assert ended(folder, process) == 0, output(folder)
    return report(folder)


SERVERS = ("server-0", "server-1", "server-2")


@pytest.mark.parametrize("mode", ["Async", "Sync"])
@pytest.mark.parametrize("others", [("worker-1",), ()], ids=["one-worker-left", "both-left"])
def test_all_servers_come_back_from_the_workers(
    tmp_path: Path, mode: str, others: tuple[str, ...]
) -> None:
    found = killed(tmp_path / "killed", (*SERVERS, *others), mode=mode)
    (recovery,) = found["recoveries"]
    check_recovery(recovery)
    assert len(recovery["losses"]) == len(SERVERS) + len(others)
    assert recovery["sources"] == {"peer": 1024}
    assert recovery["moments"] == {}, "plain SGD has none"
    assert 0.0 <= recovery["utilisation"] <= 1.0
    assert found["steps"] == STEPS
    assert found["metrics"]["test_accuracy"] >= 0.9
    if mode == "Sync":
        assert recovery["pushes"]["lost"] == 0
        plain = killed(tmp_path / "plain", (), mode=mode)
        assert not plain["recoveries"]
        uris = [(plain, "a"), (found, "b")]
        a, b = (exported(r["result"]["uri"], tmp_path / name) for r, name in uris)
        for name, values in a.items():
            assert values.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    ("rule", "mode", "least"),
    [
        ("rows", "Sync", 2),
        ("rows", "Async", 1),
        ("sgd", "Sync", 1),
        ("adam", "Sync", 2),
        ("momentum", "Async", 1),
    ],
)
def test_one_worker_has_all_parameters_but_moments(
    tmp_path: Path, rule: str, mode: str, least: int
) -> None:
    """All servers and a worker are lost at once, and with the servers the moments.

    These are the running checkpoint's then, which the record counts (without a store they begin
    anew: tests/trainer/test_restoring.py). Under `Sync` no batch is lost where all workers are
    needed, and without moments the run is the undisturbed one bit for bit. Where the others go on
    without a lost worker, nobody makes its batches again: one is lost if its step was made and the
    worker that is left had not pulled that yet; those after it are skipped, and counted.
    """
    moments = rule in ("momentum", "adam")
    options: dict[str, Any] = {"mode": mode, "rule": rule, "least": least}
    found = killed(tmp_path / "killed", (*SERVERS, "worker-1"), **options)
    records, pushes = found["recoveries"], found["pushes"]
    for record in records:
        check_recovery(record)
    check_counts(found)
    assert sum(len(r["losses"]) for r in records) == len(SERVERS) + 1
    (of_servers,) = (r for r in records if r["sources"])
    assert of_servers["sources"] == {"peer": 1024}
    assert of_servers["moments"] == ({"runningCheckpoint": 1024} if moments else {})
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)
    assert pushes["applied"] + pushes["lost"] + pushes["skipped"] == 2 * STEPS
    assert found["metrics"]["test_accuracy"] >= 0.85
    if mode == "Sync":
        assert pushes["lost"] <= (0 if least == 2 else 1)
        assert least == 1 or pushes["skipped"] == 0
    if (mode, least, moments) == ("Sync", 2, False):
        plain = killed(tmp_path / "plain", (), **options)
        uris = [(plain, "a"), (found, "b")]
        a, b = (exported(r["result"]["uri"], tmp_path / name) for r, name in uris)
        for name, values in a.items():
            assert values.tobytes() == b[name].tobytes(), name


def test_a_store_is_the_peer_of_last_resort(tmp_path: Path) -> None:
    members = (*SERVERS, "worker-0", "worker-1")
    found = killed(tmp_path / "killed", members, strategy="Stateless")
    (recovery,) = found["recoveries"]
    assert (recovery["strategy"], recovery["reason"]) == ("Stateless", "RunningCheckpointFound")
    assert recovery["sources"] == {"runningCheckpoint": 1024}
    assert recovery["utilisation"] is None, "nobody was left to compute"
    assert found["steps"] == STEPS


@pytest.mark.parametrize("mode", ["Async", "Sync"])
@pytest.mark.parametrize("strategy", ["FullCheckpoint", "Partial", "Stateless"])
def test_each_strategy_recovers(tmp_path: Path, strategy: str, mode: str) -> None:
    # Between two cuts: what is seen of a step is late by some, and a cut is of some steps later.
    kill = ("--kill", "server-2@step=40")
    with running(tmp_path, "--strategy", strategy, *kill, "--json", mode=mode, steps=90) as it:
        assert ended(tmp_path, it) == 0, output(tmp_path)
    found = report(tmp_path)
    (recovery,) = found["recoveries"]
    assert recovery["strategy"] == strategy
    assert (recovery["rework"]["redoneSteps"] > 0) is (strategy == "FullCheckpoint")
    assert found["metrics"]["test_accuracy"] >= 0.9


@pytest.mark.parametrize("mode", ["Async", "Sync"])
def test_adopted_slots_return_and_nothing_is_lost(tmp_path: Path, mode: str) -> None:
    # Where workers go on without the server, they must not be done before its slots return.
    think_ms = 120 if mode == "Async" else 40
    kill = ("--kill", "server-2@step=5")
    with running(tmp_path, *kill, mode=mode, placement="Adopt", think_ms=think_ms) as it:
        assert ended(tmp_path, it) == 0, output(tmp_path)
    found = report(tmp_path)
    causes = [(r["cause"], r["placement"], r["indexes"]) for r in found["recoveries"]]
    assert causes == [("ServerLost", "Adopt", [2]), ("HandBack", "Replace", [2])]
    handed = found["recoveries"][1:]
    assert [list(r["sources"]) for r in handed] == [["predecessor"]]
    for record in found["recoveries"]:
        check_recovery(record)
    # A kill may take what was acknowledged and not pulled by anybody (Async); a hand-back nothing.
    assert all(
        r["pushes"]["lost"] == 0 for r in (handed if mode == "Async" else found["recoveries"])
    )
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)
    assert found["metrics"]["test_accuracy"] >= 0.9


def test_ctrl_c_saves_what_there_is(tmp_path: Path) -> None:
    with running(tmp_path, steps=100_000) as process:
        until("it trains", lambda: trains(tmp_path, 20))
        process.send_signal(signal.SIGINT)
        assert ended(tmp_path, process) == 1
    said = output(tmp_path)
    found = report(tmp_path)
    assert f"daruma: interrupted at step {found['steps']} of 100000; spec.checkpoint" in said
    assert "Succeeded" not in said
    assert found["interrupted"] is True
    assert (found["phase"], found["reason"]) == ("Failed", "Interrupted")
    assert 0 < found["steps"] < 100_000
    assert accuracy(found["result"]["uri"], tmp_path / "model") > 0.2


def test_a_worker_that_others_end_is_not_done(tmp_path: Path) -> None:
    """Whoever sends it SIGTERM: it is replaced as one that crashed."""
    with running(tmp_path, think_ms=50) as process:
        until("it trains", lambda: trains(tmp_path, 5))
        (worker,) = [p for p in processes(tmp_path / "out") if p.id == "worker-1-1"]
        os.kill(worker.pid, signal.SIGTERM)
        assert ended(tmp_path, process) == 0
    found = report(tmp_path)
    assert (found["phase"], found["steps"]) == ("Succeeded", STEPS)
    (record,) = found["recoveries"]
    assert (record["cause"], record["losses"][0]["reason"]) == ("WorkerLost", "Error")


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with running(tmp_path, steps=100_000) as process:
        until("it trains", lambda: trains(tmp_path))
        process.send_signal(signal.SIGINT)
        until("the first was heard", lambda: "once more to kill" in output(tmp_path))
        process.send_signal(signal.SIGINT)
        assert ended(tmp_path, process) == 1
    found = report(tmp_path)
    assert (found["phase"], found["reason"]) == ("Failed", "Interrupted"), "whenever it was killed"


def test_no_member_survives_a_killed_daruma(tmp_path: Path) -> None:
    with running(tmp_path, steps=100_000) as process:
        until("members run", lambda: len(left_by(tmp_path)) >= PROCESSES)
        os.kill(process.pid, signal.SIGKILL)
        until("none is left", lambda: left_by(tmp_path) == [])


def test_ctrl_c_before_training_begins_ends_at_once(tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(600)")
    with running(tmp_path, program=str(sleeper)) as process:
        until("members run", lambda: len(left_by(tmp_path)) >= PROCESSES)
        process.send_signal(signal.SIGINT)
        assert ended(tmp_path, process) == 1
    assert "there is nothing to save" in output(tmp_path)
    assert "saving what there is" not in output(tmp_path)
    found = report(tmp_path)
    assert (found["interrupted"], found["steps"], found["result"]) == (True, 0, None)


def test_a_folder_is_used_by_one_run(tmp_path: Path) -> None:
    with running(tmp_path, steps=100_000) as process:
        until("members run", lambda: len(left_by(tmp_path)) >= PROCESSES)
        command = [sys.executable, "-m", "daruma_operator.cli.main", "run", "toy.yaml"]
        second = subprocess.run(
            [*command, "--out", "out"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert second.returncode == 3
        assert "another `daruma run` uses this folder" in second.stderr
        process.kill()
        until("none is left", lambda: left_by(tmp_path) == [])
