"""The operator's metrics (names are API, see docs), on a registry of their own.

They are fed from what status is, as it was read or written: what changed in it since this operator
saw it before is counted once, however often a pass is repeated and whenever a write comes true.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from daruma_operator.api.status import RecoveryRecord, TrainingJobStatus
from daruma_operator.controller.verdicts import PROCESS_ENDED

CONDITIONS = ("Stalled", "Unreachable", "CheckpointStale", "StateLost", "Degraded")
SECONDS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PASS_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STEPS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0)
NORMS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


class Metrics:
    """All metrics of one operator. `version` is shown by daruma_build_info."""

    def __init__(self, version: str = "0.1.0") -> None:
        self.registry = r = CollectorRegistry()
        self._jobs: dict[tuple[str, str], tuple[str | None, frozenset[str]]] = {}
        self.jobs = Gauge("daruma_jobs", "Jobs by phase.", ["namespace", "phase"], registry=r)
        self.jobs_condition = Gauge(
            "daruma_jobs_condition",
            "Jobs for which a condition is true.",
            ["namespace", "condition"],
            registry=r,
        )
        self.pod_failures = Counter(
            "daruma_pod_failures",
            "Members that were lost.",
            ["namespace", "role", "cause"],
            registry=r,
        )
        self.recoveries = Counter(
            "daruma_recoveries",
            "Recoveries that ended.",
            ["namespace", "strategy", "cause", "outcome"],
            registry=r,
        )
        self.recovery_seconds = Histogram(
            "daruma_recovery_seconds",
            "From the failure to the first new step.",
            ["strategy", "cause"],
            buckets=SECONDS,
            registry=r,
        )
        self.phase_seconds = Histogram(
            "daruma_recovery_phase_seconds",
            "Parts of a recovery: detect, replace, restore, resume.",
            ["strategy", "phase"],
            buckets=SECONDS,
            registry=r,
        )
        self.rework_steps = Histogram(
            "daruma_recovery_rework_steps",
            "Steps that a recovery costs: done again (redone), at most by estimate (estimated), or "
            "what a full checkpoint would have redone (counterfactual).",
            ["strategy", "kind"],
            buckets=STEPS,
            registry=r,
        )
        self.delta_norm = Histogram(
            "daruma_recovery_delta_norm",
            "L2 distance between the lost state and the restored one, where known or bounded.",
            ["strategy"],
            buckets=NORMS,
            registry=r,
        )
        self.pushes_lost = Counter("daruma_pushes_lost", "Pushes that were lost.", registry=r)
        self.pushes_replayed = Counter(
            "daruma_pushes_replayed", "Pushes that recovered slots got late.", registry=r
        )
        self.pushes_skipped = Counter(
            "daruma_pushes_skipped", "Batches that nobody made: a worker was missing.", registry=r
        )
        self.escalations = Counter(
            "daruma_recovery_escalations",
            "Steps from one rung of the ladder to the next.",
            ["from", "to"],
            registry=r,
        )
        self.limit_used = Histogram(
            "daruma_limit_used_ratio",
            "Counted recreations ÷ runPolicy.backoffLimit, when a job ends.",
            buckets=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
            registry=r,
        )
        self.goodput = Histogram(
            "daruma_goodput_ratio",
            "Seconds that a job trained ÷ seconds since it began to, when it ends.",
            buckets=(0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
            registry=r,
        )
        self.reconcile_seconds = Histogram(
            "daruma_reconcile_seconds", "Length of a pass.", buckets=PASS_SECONDS, registry=r
        )
        self.reconcile_errors = Counter(
            "daruma_reconcile_errors", "Passes that failed.", ["error"], registry=r
        )
        self.queue_depth = Gauge("daruma_queue_depth", "Jobs that wait for a pass.", registry=r)
        self.queue_wait = Histogram(
            "daruma_queue_wait_seconds",
            "From the first event to the pass.",
            buckets=PASS_SECONDS,
            registry=r,
        )
        self.watch_age = Gauge(
            "daruma_watch_age_seconds",
            "Since the watch last showed a change of a job or a pod; 0 where this operator does "
            "not lead. Where no job runs, nothing changes.",
            registry=r,
        )
        self.leader = Gauge("daruma_leader", "1 if this operator leads.", registry=r)
        self.build_info = Gauge("daruma_build_info", "Always 1.", ["version"], registry=r)
        self.build_info.labels(version).set(1)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def note_job(self, namespace: str, name: str, status: TrainingJobStatus | None) -> None:
        """Keep `daruma_jobs` and `daruma_jobs_condition` true; None: the job is gone."""
        before_phase, before = self._jobs.pop((namespace, name), (None, frozenset[str]()))
        phase, after = None, frozenset[str]()
        if status is not None and status.phase is not None:
            phase = str(status.phase)
            after = frozenset(
                c.type for c in status.conditions if c.status == "True" and c.type in CONDITIONS
            )
            self._jobs[namespace, name] = phase, after
        if phase != before_phase:
            if before_phase is not None:
                self.jobs.labels(namespace, before_phase).dec()
            if phase is not None:
                self.jobs.labels(namespace, phase).inc()
        for condition in before - after:
            self.jobs_condition.labels(namespace, condition).dec()
        for condition in after - before:
            self.jobs_condition.labels(namespace, condition).inc()

    def note_write(
        self, namespace: str, old: TrainingJobStatus, new: TrainingJobStatus, limit: int
    ) -> None:
        """Count what status announced since. `limit` is runPolicy.backoffLimit."""
        known = {r.id for r in old.recoveries}
        for record in new.recoveries:
            if record.id not in known:
                self._recovered(namespace, record)
        self.pushes_lost.inc(max(0, new.pushes.lost - old.pushes.lost))
        self.pushes_replayed.inc(max(0, new.pushes.replayed - old.pushes.replayed))
        self.pushes_skipped.inc(max(0, new.pushes.skipped - old.pushes.skipped))
        before = _losses(old)
        for key, (role, cause) in _losses(new).items():
            if key not in before:
                self.pod_failures.labels(namespace, role, cause).inc()
        was, now = old.recovery, new.recovery
        if was and now and was.id == now.id and now.rung > was.rung:
            self.escalations.labels(was.strategy, now.strategy).inc()
        if new.completion_time is not None and old.completion_time is None:
            used = len(new.restarts.counted)
            self.limit_used.observe(min(1.0, used / limit) if limit else float(used > 0))
            if new.progress is not None and new.progress.goodput is not None:
                self.goodput.observe(new.progress.goodput)

    def _recovered(self, namespace: str, record: RecoveryRecord) -> None:
        strategy, cause = record.strategy, record.cause
        self.recoveries.labels(namespace, strategy, cause, record.outcome or "Unknown").inc()
        if record.seconds is not None:
            self.recovery_seconds.labels(strategy, cause).observe(record.seconds)
        for phase in ("detect", "replace", "restore", "resume"):
            seconds = getattr(record.phases, phase)
            if seconds is not None:
                self.phase_seconds.labels(strategy, phase).observe(seconds)
        self.rework_steps.labels(strategy, "redone").observe(record.rework.redone_steps)
        rework = record.rework
        if rework.estimated is not None:
            self.rework_steps.labels(strategy, "estimated").observe(rework.estimated[1])
        if rework.counterfactual_steps is not None:
            counterfactual = self.rework_steps.labels(strategy, "counterfactual")
            counterfactual.observe(rework.counterfactual_steps)
        if record.delta_norm.value is not None:
            self.delta_norm.labels(strategy).observe(record.delta_norm.value)


def _losses(status: TrainingJobStatus) -> dict[tuple[str, int, int], tuple[str, str]]:
    """Causes by member; while a recovery goes on, only those that are known for good."""
    found = [x for record in status.recoveries for x in record.losses]
    if status.recovery is not None:
        found += [x for x in status.recovery.losses if x.reason != PROCESS_ENDED]
    return {(str(x.role), x.index, x.incarnation): (str(x.role), x.reason) for x in found}
