"""What of a member's report the operator gets at once."""

from dataclasses import replace

import pytest

from daruma_trainer.contract import SLOTS, Copies, Report, slots_to_hex
from daruma_trainer.server.reporting import Reports

TRAINING = Report("worker-0-1", 1, "Training", step=3, metrics={"loss": 0.5})


@pytest.mark.parametrize(
    ("change", "important"),
    [
        ({"step": 4}, False),
        ({"metrics": {"loss": 0.4}}, False),
        ({"state": "Left"}, True),
        ({"error": "no space"}, True),
    ],
)
def test_mere_progress_can_wait(change: dict[str, object], important: bool) -> None:
    reports = Reports()
    assert reports.take(TRAINING), "it was not known before"
    assert not reports.take(TRAINING)
    assert reports.take(replace(TRAINING, **change)) is important  # type: ignore[arg-type]


def test_the_results_metrics_cannot_for_the_worker_ends_once_they_are_heard() -> None:
    reports = Reports()
    left = replace(TRAINING, state="Left")
    reports.take(left)
    assert reports.take(replace(left, metrics={"loss": 0.5, "test_accuracy": 0.96}))
    assert not reports.take(replace(left, metrics={"loss": 0.5, "test_accuracy": 0.96}))


def test_reports_are_handed_on_without_the_copies_that_they_offer() -> None:
    """Of many workers, to be handed on by many servers, they would be megabytes."""
    reports = Reports()
    reports.take(TRAINING)
    offer = replace(TRAINING, copies=(Copies(1, 3, slots_to_hex(range(SLOTS))),))
    assert not reports.take(offer), "the operator hears it from the worker itself"
    assert reports.others("server-0-1")["worker-0-1"][1] == TRAINING


def test_what_was_said_before_what_is_known_is_dropped() -> None:
    """It was on its way over a connection that was replaced meanwhile."""
    reports = Reports()
    left = replace(TRAINING, state="Left", at=5.0)
    reports.take(left)
    assert not reports.take(replace(TRAINING, at=4.9))
    assert reports.others("server-0-1")["worker-0-1"][1] == left
