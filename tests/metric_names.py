"""The metrics that there are: names (of counters without `_total`), types, labels. They are API."""

Names = dict[str, tuple[str, tuple[str, ...]]]

MEMBER = ("index", "job", "role")
OPERATOR: Names = {
    "daruma_jobs": ("gauge", ("namespace", "phase")),
    "daruma_jobs_condition": ("gauge", ("namespace", "condition")),
    "daruma_pod_failures": ("counter", ("namespace", "role", "cause")),
    "daruma_recoveries": ("counter", ("namespace", "strategy", "cause", "outcome")),
    "daruma_recovery_seconds": ("histogram", ("strategy", "cause")),
    "daruma_recovery_phase_seconds": ("histogram", ("strategy", "phase")),
    "daruma_recovery_rework_steps": ("histogram", ("strategy", "kind")),
    "daruma_recovery_delta_norm": ("histogram", ("strategy",)),
    "daruma_pushes_lost": ("counter", ()),
    "daruma_pushes_replayed": ("counter", ()),
    "daruma_pushes_skipped": ("counter", ()),
    "daruma_recovery_escalations": ("counter", ("from", "to")),
    "daruma_limit_used_ratio": ("histogram", ()),
    "daruma_goodput_ratio": ("histogram", ()),
    "daruma_reconcile_seconds": ("histogram", ()),
    "daruma_reconcile_errors": ("counter", ("error",)),
    "daruma_queue_depth": ("gauge", ()),
    "daruma_queue_wait_seconds": ("histogram", ()),
    "daruma_watch_age_seconds": ("gauge", ()),
    "daruma_leader": ("gauge", ()),
    "daruma_build_info": ("gauge", ("version",)),
}
SERVER: Names = {
    "daruma_step": ("gauge", MEMBER),
    "daruma_push_bytes": ("counter", MEMBER),
    "daruma_pull_bytes": ("counter", MEMBER),
    "daruma_replica_bytes": ("counter", MEMBER),
    "daruma_update_seconds": ("histogram", MEMBER),
    "daruma_staleness_steps": ("histogram", MEMBER),
    "daruma_duplicate_pushes": ("counter", MEMBER),
    "daruma_stale_requests": ("counter", MEMBER),
    "daruma_checkpoint_seconds": ("histogram", MEMBER),
    "daruma_checkpoint_bytes": ("counter", MEMBER),
    "daruma_checkpoint_age_steps": ("gauge", MEMBER),
    "daruma_checkpoint_distance": ("gauge", MEMBER),
    "daruma_cuts_abandoned": ("counter", MEMBER),
}
WORKER: Names = {
    "daruma_step": ("gauge", MEMBER),
    "daruma_loss": ("gauge", MEMBER),
    "daruma_push_latency_seconds": ("histogram", MEMBER),
    "daruma_pending_pushes": ("gauge", MEMBER),
    "daruma_parameter_gap": ("gauge", MEMBER),
    "daruma_blocked_seconds": ("counter", (*MEMBER, "cause")),
    "daruma_batches": ("counter", (*MEMBER, "outcome")),
}
