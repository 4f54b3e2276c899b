"""What a run's report says, from what views said."""

import json
from collections.abc import Mapping

import pytest
from rich.console import Console

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.load import parse_manifest
from daruma_operator.api.status import (
    DeltaNorm,
    Phase,
    Phases,
    Progress,
    Pushes,
    RecoveryRecord,
    Result,
    TrainingJobStatus,
)
from daruma_operator.cli import record
from daruma_operator.cli.record import Recorder, mean_loss
from daruma_operator.cli.show import View, metrics_table, recoveries_tables
from daruma_operator.substrate.protocol import Event
from daruma_trainer.contract import Report, Role

TEXT = """
apiVersion: daruma.dev/v1alpha1
kind: TrainingJob
metadata: {name: toy}
spec: {program: {image: none, command: [python]}}
"""
RECOVERY = RecoveryRecord(
    id=1,
    cause="ServerLost",
    role=Role.SERVER,
    indexes=(1,),
    strategy="Freshest",
    seconds=0.4,
    phases=Phases(detect=0.1, replace=0.2, restore=0.05, resume=0.05),
    sources={"peer": 250, "runningCheckpoint": 6},
    delta_norm=DeltaNorm(value=0.03, kind="UpperBound"),
    pushes=Pushes(lost=2, replayed=5, skipped=9),
    outcome="Succeeded",
)


def job_at(step: int, recoveries: tuple[RecoveryRecord, ...] = ()) -> TrainingJob:
    status = TrainingJobStatus(
        phase=Phase.RUNNING,
        progress=Progress(step=step, total_steps=400, steps_per_second=50.0),
        recoveries=recoveries,
        pushes=Pushes(lost=2, replayed=5, skipped=3, mixed=1),
        result=Result(uri="file:///x", step=step),
    )
    job = parse_manifest(TEXT, "toy.yaml", local=True)
    return job.model_copy(update={"status": status})


def reports(*found: Report) -> Mapping[str, Report]:
    return {r.id: r for r in found}


def worker(index: int, incarnation: int, step: int, loss: float | None = None) -> Report:
    metrics = {"test_accuracy": 0.9 + index / 100}
    return Report(
        f"worker-{index}-{incarnation}", 3, "Training", step=step, loss=loss, metrics=metrics
    )


def test_the_report_counts_each_thing_once() -> None:
    recorder = Recorder()
    first = reports(worker(0, 1, 10, 2.0), worker(1, 1, 8, 4.0), Report("server-0-1", 3, "Ready"))
    recorder.note(job_at(9), first, 1.0)
    later = reports(
        worker(0, 1, 20, 1.0),
        worker(1, 7, 15, 1.0),
        Report("server-0-1", 3, "Ready", duplicate=2),
        Report("server-0-6", 3, "Ready", duplicate=3),
    )
    recorder.note(job_at(17, (RECOVERY,)), later, 2.0)
    recorder.note(job_at(17, (RECOVERY,)), later, 3.0)
    report = recorder.report(job_at(17, (RECOVERY,)), 3.5, interrupted=False)
    assert report["loss"] == [[9, 1.0, 3.0], [17, 2.0, 1.0]]
    assert report["pushes"] == {
        "applied": 30, "lost": 2, "replayed": 5, "skipped": 3, "mixed": 1, "duplicate": 5,
    }  # fmt: skip
    assert report["metrics"] == {"test_accuracy": 0.9}, "worker 0 evaluates"
    assert (report["job"], report["phase"], report["steps"]) == ("default/toy", "Running", 17)
    assert report["recoveries"][0]["deltaNorm"] == {"value": 0.03, "kind": "UpperBound"}
    assert report["result"]["uri"] == "file:///x"
    json.dumps(report)


def test_recoveries_beyond_those_that_status_keeps_stay_in_the_report() -> None:
    recorder = Recorder()
    for number in range(1, 13):
        record = RECOVERY.model_copy(update={"id": number})
        recorder.note(job_at(1, (record,)), {}, 1.0)
    report = recorder.report(job_at(1), 2.0, interrupted=False)
    assert [r["id"] for r in report["recoveries"]] == list(range(1, 13))


def test_samples_are_bounded_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 200
    monkeypatch.setattr(record, "MOST_SAMPLES", most)
    recorder = Recorder()
    for step in range(1, 3 * most):
        recorder.note(job_at(step), reports(worker(0, 1, step, 1.0)), float(step))
    steps = [step for step, _, _ in recorder.loss]
    assert most // 2 <= len(steps) <= most
    assert steps == sorted(steps)
    assert steps[-1] > 3 * most - 10


def test_no_loss_is_no_sample() -> None:
    assert mean_loss({}) is None
    recorder = Recorder()
    recorder.note(job_at(5), reports(worker(0, 1, 5)), 1.0)
    assert recorder.loss == []


def test_what_is_no_number_is_null_in_the_report() -> None:
    recorder = Recorder()
    report = worker(0, 1, 5, float("nan"))
    report.metrics["perplexity"] = float("inf")  # type: ignore[index]
    recorder.note(job_at(5), reports(report), 1.0)
    made = recorder.report(job_at(5), 2.0, interrupted=False)
    assert made["loss"] == [[5, 1.0, None]]
    assert made["metrics"]["perplexity"] is None
    json.dumps(made, allow_nan=False)
    console = Console(width=200, record=True)
    console.print(metrics_table(made))
    assert console.export_text().count("not a number") == 2


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.RECOVERING])
def test_an_interrupted_job_did_not_succeed(phase: Phase) -> None:
    recorder = Recorder(step=17)
    job = job_at(17)
    job = job.model_copy(update={"status": job.status.model_copy(update={"phase": phase})})
    made = recorder.report(job, 2.0, interrupted=True)
    assert (made["phase"], made["reason"], made["interrupted"]) == ("Failed", "Interrupted", True)
    assert made["message"].startswith("interrupted at step 17 of 400; spec.checkpoint.restoreFrom:")
    assert made["result"]["uri"] in made["message"]
    unsaved = job.status.model_copy(update={"result": None, "initialised": True})
    made = recorder.report(job.model_copy(update={"status": unsaved}), 2.0, interrupted=True)
    assert made["message"] == "interrupted at step 17 of 400; no result was saved"


def test_a_job_that_failed_while_it_was_interrupted_failed_for_its_own_reason() -> None:
    job = job_at(17)
    failed = job.status.model_copy(update={"phase": Phase.FAILED, "reason": "ResultNotSaved"})
    job = job.model_copy(update={"status": failed})
    made = Recorder(step=17).report(job, 2.0, interrupted=True)
    assert (made["phase"], made["reason"], made["interrupted"]) == (
        "Failed",
        "ResultNotSaved",
        True,
    )


def test_a_wait_says_what_for() -> None:
    console = Console(width=200, force_terminal=False, record=True)
    job = job_at(0)
    update = {"phase": Phase.STARTING, "message": "waiting for worker-1"}
    job = job.model_copy(update={"status": job.status.model_copy(update=update)})
    with View(console) as view:
        view.show(job, None, 1.0)
    assert "Starting, servers -, workers -" in console.export_text(clear=False)
    assert ": waiting for worker-1" in console.export_text()


def test_what_people_see_names_the_numbers() -> None:
    console = Console(width=200, force_terminal=False, record=True)
    with View(console) as view:
        view.show(job_at(10), 0.5, 1.0)
        view.show(job_at(11), 0.4, 1.1)
        view.event(1.2, Event("RecoveryStarted", "server 1 was lost", 3, True, "server-1"))
    recorder = Recorder()
    recorder.note(job_at(10, (RECOVERY,)), {}, 1.0)
    report = recorder.report(job_at(10, (RECOVERY,)), 1.0, interrupted=False)
    for table in recoveries_tables(report["recoveries"] * 7, width=100):
        console.print(table)
    console.print(metrics_table(report))
    text = console.export_text()
    assert "step 10 of 400, loss 0.5000, 50 steps/s" in text
    assert "step 11" not in text, "lines come at a readable pace"
    for word in (
        "RecoveryStarted server-1: server 1 was lost",
        "≤ 0.03",
        "peer 250",
        "2 lost, 5 replayed, 9 skipped",
    ):
        assert word in text


def test_a_terminal_gets_a_live_view() -> None:
    console = Console(width=120, force_terminal=True, record=True)
    with View(console) as view:
        view.show(job_at(10, (RECOVERY,)), 0.5, 1.0)
    assert "server-1" in console.export_text()
