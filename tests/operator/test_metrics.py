"""Metrics: fed from status writes, each thing once."""

from datetime import UTC, datetime

from daruma_operator.api.status import (
    Condition,
    DeltaNorm,
    Loss,
    Phase,
    Phases,
    Pushes,
    RecoveryRecord,
    TrainingJobStatus,
)
from daruma_operator.metrics import Metrics
from daruma_trainer.contract import Role

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def record(**more: object) -> RecoveryRecord:
    loss = Loss(role=Role.SERVER, index=1, incarnation=1, pod="p", reason="OOMKilled")
    base = {"id": 1, "cause": "ServerLost", "strategy": "Freshest", "losses": (loss,)}
    return RecoveryRecord.model_validate(base | more)


def test_jobs_are_counted_by_their_present_phase() -> None:
    metrics = Metrics()
    running = TrainingJobStatus(
        phase=Phase.RUNNING, conditions=(Condition(type="Stalled", status="True"),)
    )
    for name in ("a", "b", "a"):
        metrics.note_job("n", name, running)
    assert value(metrics, "daruma_jobs", namespace="n", phase="Running") == 2
    assert value(metrics, "daruma_jobs_condition", namespace="n", condition="Stalled") == 2
    metrics.note_job("n", "a", TrainingJobStatus(phase=Phase.FAILED))
    metrics.note_job("n", "b", None)
    assert value(metrics, "daruma_jobs", namespace="n", phase="Running") == 0
    assert value(metrics, "daruma_jobs", namespace="n", phase="Failed") == 1
    assert value(metrics, "daruma_jobs_condition", namespace="n", condition="Stalled") == 0


def test_a_recovery_is_counted_once_when_it_ends() -> None:
    metrics = Metrics()
    begun = TrainingJobStatus(recovery=record())
    ended = record(
        outcome="Succeeded",
        seconds=1.5,
        phases=Phases(detect=0.5, replace=0.5, restore=0.25, resume=0.25),
        delta_norm=DeltaNorm(value=0.1, kind="UpperBound"),
        pushes=Pushes(lost=2, replayed=3),
    )
    done = TrainingJobStatus(recoveries=(ended,), pushes=Pushes(lost=2, replayed=3))
    later = done.model_copy(update={"pushes": Pushes(lost=2, replayed=5, skipped=4)})
    metrics.note_write("n", TrainingJobStatus(), begun, 6)
    metrics.note_write("n", begun, done, 6)
    metrics.note_write("n", done, done.model_copy(update={"message": "x"}), 6)
    metrics.note_write("n", done, later, 6)
    labels = {"strategy": "Freshest", "cause": "ServerLost"}
    assert value(metrics, "daruma_recoveries_total", namespace="n", outcome="Succeeded", **labels)
    assert value(metrics, "daruma_recovery_seconds_count", **labels) == 1
    assert value(metrics, "daruma_recovery_seconds_sum", **labels) == 1.5
    phase = {"strategy": "Freshest", "phase": "restore"}
    assert value(metrics, "daruma_recovery_phase_seconds_sum", **phase) == 0.25
    assert value(metrics, "daruma_pushes_lost_total") == 2
    assert value(metrics, "daruma_pushes_replayed_total") == 5
    assert value(metrics, "daruma_pushes_skipped_total") == 4
    failures = {"namespace": "n", "role": "Server", "cause": "OOMKilled"}
    assert value(metrics, "daruma_pod_failures_total", **failures) == 1


def test_how_a_process_ended_is_counted_once_it_is_known() -> None:
    metrics = Metrics()
    loss = Loss(role=Role.SERVER, index=1, incarnation=1, pod="p", reason="ProcessEnded")
    gone = TrainingJobStatus(recovery=record(losses=(loss,)))
    known = loss.model_copy(update={"reason": "Error"})
    told = TrainingJobStatus(recovery=record(losses=(known,)))
    metrics.note_write("n", TrainingJobStatus(), gone, 6)
    failures = {"namespace": "n", "role": "Server"}
    assert value(metrics, "daruma_pod_failures_total", cause="Error", **failures) is None
    metrics.note_write("n", gone, told, 6)
    assert value(metrics, "daruma_pod_failures_total", cause="Error", **failures) == 1
    metrics.note_write("n", gone, TrainingJobStatus(recoveries=(record(losses=(loss,)),)), 6)
    assert value(metrics, "daruma_pod_failures_total", cause="ProcessEnded", **failures) == 1


def test_a_higher_rung_is_an_escalation() -> None:
    metrics = Metrics()
    first = TrainingJobStatus(recovery=record())
    second = TrainingJobStatus(recovery=record(rung=1, strategy="Partial"))
    metrics.note_write("n", first, second, 6)
    metrics.note_write("n", second, second, 6)
    labels = {"from": "Freshest", "to": "Partial"}
    assert value(metrics, "daruma_recovery_escalations_total", **labels) == 1


def test_what_is_scraped_names_the_build() -> None:
    metrics = Metrics("9.9")
    assert b'daruma_build_info{version="9.9"} 1.0' in metrics.exposition()
    done = TrainingJobStatus(completion_time=NOW)
    metrics.note_write("n", TrainingJobStatus(), done, 6)
    metrics.note_write("n", done, done, 6)
    assert value(metrics, "daruma_limit_used_ratio_count") == 1
