"""A worker's metrics in Prometheus' text format; names as in docs (api: metrics of workers)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

    from daruma_trainer.worker.client import Client


def exposition(client: "Client") -> bytes:
    """Return what `GET /metrics` answers. The library is imported at the first scrape."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["job", "role", "index"]
    values = [client.me.job, client.me.role.value, str(client.me.index)]
    text = "Seconds from a batch's first sending until all slots have applied it."
    histograms = []
    with client.lock:
        pushes, loss, blocked = client.pushes, client.loss, client.blocked_seconds
        acked = 0 if pushes is None else pushes.acked
        pending = 0 if pushes is None else pushes.pending
        gap = 0.0 if pushes is None else pushes.view_gap
        batches = {
            "lost": 0 if pushes is None else len(pushes.lost),
            "replayed": 0 if pushes is None else pushes.replayed,
            "skipped": len(client.position.skipped),
            "mixed": len(client.position.mixed),
        }
        if pushes is not None:
            whose = dict(zip(labels, values, strict=True))
            seen = pushes.latency.seen
            histograms.append(seen.family("daruma_push_latency_seconds", text, whose))

    class Collector:
        def collect(self) -> "Iterator[Metric]":
            gauges = [
                ("daruma_step", "Last batch that all slots have.", float(acked)),
                ("daruma_pending_pushes", "Batches accumulated and not yet sent.", float(pending)),
                (
                    "daruma_parameter_gap",
                    "Bound on the L2 distance between the parameters this worker computes with and "
                    "the true ones, because of pushes that wait for a server.",
                    gap,
                ),
            ]
            if loss is not None:
                gauges.append(("daruma_loss", "What the program reported last.", loss))
            for name, text, value in gauges:
                gauge = GaugeMetricFamily(name, text, labels=labels)
                gauge.add_metric(values, value)
                yield gauge
            counter = CounterMetricFamily(
                "daruma_blocked_seconds",
                "Seconds that the program waited.",
                labels=[*labels, "cause"],
            )
            counter.add_metric([*values, "step"], blocked)
            yield counter
            counter = CounterMetricFamily(
                "daruma_batches",
                "Batches that a failure touched: lost or skipped (not applied), replayed, or made "
                "of values of two steps (mixed).",
                labels=[*labels, "outcome"],
            )
            for outcome, count in batches.items():
                counter.add_metric([*values, outcome], count)
            yield counter
            yield from histograms

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)
