"""A server's metrics in Prometheus' text format; names as in docs (api: metrics of servers)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from daruma_trainer.histogram import Histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

    from daruma_trainer.server.serve import Server


def exposition(server: "Server") -> bytes:
    """Return what `GET /metrics` answers. The library is imported at the first scrape."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["job", "role", "index"]
    values = [server.me.job, server.me.role.value, str(server.me.index)]
    whose = dict(zip(labels, values, strict=True))

    class Collector:
        def collect(self) -> "Iterator[Metric]":
            for name, text, value in _gauges(server):
                gauge = GaugeMetricFamily(name, text, labels=labels)
                gauge.add_metric(values, value)
                yield gauge
            for name, text, value in _counters(server):
                counter = CounterMetricFamily(name, text, labels=labels)
                counter.add_metric(values, value)
                yield counter
            for name, text, histogram in _histograms(server):
                yield histogram.family(name, text, whose)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


def _gauges(server: "Server") -> list[tuple[str, str, float]]:
    plane, saver = server.life.plane, server.life.saver
    found: list[tuple[str, str, float]] = []
    if plane is not None:
        found.append(("daruma_step", "Step this shard is at.", plane.step))
    if saver is not None and saver.newest is not None and plane is not None:
        age = plane.step - saver.newest.step
        found.append(("daruma_checkpoint_age_steps", "Steps since the newest save.", age))
        if saver.newest.distance is not None:
            text = "L2 distance between the shard and its save, when it was saved."
            found.append(("daruma_checkpoint_distance", text, saver.newest.distance))
    return found


def _counters(server: "Server") -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = [
        ("daruma_stale_requests", "Requests meant for, or of, a replaced member.", server.stale)
    ]
    if server.life.plane is not None:
        counts = server.life.plane.counts
        found += [
            ("daruma_push_bytes", "Bytes of pushes taken.", counts.pushed_bytes),
            ("daruma_pull_bytes", "Bytes of pulls answered.", counts.pulled_bytes),
            (
                "daruma_replica_bytes",
                "Bytes sent to the next replica.",
                server.replicator.bytes_total,
            ),
            ("daruma_duplicate_pushes", "Pushes that were applied already.", counts.duplicate),
        ]
    if server.life.saver is not None:
        found.append(("daruma_checkpoint_bytes", "Bytes saved.", server.life.saver.bytes_total))
    if server.life.cuts is not None:
        text = "Cuts that were given up, since a worker did not get that far in time."
        found.append(("daruma_cuts_abandoned", text, server.life.cuts.abandoned))
    return found


def _histograms(server: "Server") -> list[tuple[str, str, Histogram]]:
    plane, saver = server.life.plane, server.life.saver
    found: list[tuple[str, str, Histogram]] = []
    if plane is not None:
        text = "Seconds to apply a push to the tables; under Sync a step, with what all gave to it."
        found.append(("daruma_update_seconds", text, plane.shard.update_seconds))
        if not plane.sync:
            text = "Updates of others between a worker's pull and its push, where that is applied."
            found.append(("daruma_staleness_steps", text, plane.staleness.seen))
    if saver is not None:
        text = "Seconds until a save was durable, cuts and first saves among them."
        found.append(("daruma_checkpoint_seconds", text, saver.seconds))
    return found
