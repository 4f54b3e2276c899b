"""What the operator's pod runs: `daruma-operator`."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Sequence

import kopf
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from prometheus_client import start_http_server

from daruma_operator.clock import utc_now
from daruma_operator.controller.handlers import registry
from daruma_operator.controller.loop import Controller
from daruma_operator.election import Election
from daruma_operator.health import Signs, serve_health
from daruma_operator.metrics import Metrics
from daruma_operator.settings import Settings
from daruma_operator.substrate.kubernetes import KubernetesSubstrate

LOG = logging.getLogger("daruma.operator")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; each option has an environment variable beside it."""
    parser = argparse.ArgumentParser("daruma-operator", description=__doc__)

    def option(name: str, default: str, help_: str) -> None:
        variable = f"DARUMA_{name.upper().replace('-', '_')}"
        parser.add_argument(
            f"--{name}", default=os.environ.get(variable, default), help=f"{help_} [{variable}]"
        )

    option("namespace", "daruma-system", "where the operator itself lives")
    option("watch-namespaces", "", "comma-separated; empty: all")
    option("metrics-port", "9090", "port of /metrics")
    option("health-port", "8080", "port of /healthz")
    option("log-level", "INFO", "DEBUG, INFO, WARNING or ERROR")
    return parser.parse_args(arguments)


def main() -> int:
    """Run until told to stop; returns the exit code."""
    options = parse(sys.argv[1:])
    logging.basicConfig(
        level=options.log_level,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    return asyncio.run(operate(options))


async def operate(options: argparse.Namespace) -> int:
    """Wait to lead, then watch and reconcile. Ends with 1 when it no longer leads."""
    try:
        load_incluster_config()
    except ConfigException:
        await load_kube_config()
    namespaces = [n for n in options.watch_namespaces.split(",") if n]
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics()
    start_http_server(int(options.metrics_port), registry=metrics.registry)
    async with client.ApiClient() as api:
        signs = Signs()
        substrate = KubernetesSubstrate(api, options.namespace, namespaces, signs.answered)
        metrics.watch_age.set_function(signs.watch_age_seconds)
        health = await serve_health(int(options.health_port), signs)
        identity = os.environ.get("POD_ID") or socket.gethostname()
        # A candidate that waits for its turn asks for nothing else.
        election = Election(api, options.namespace, identity, utc_now, signs.answered)
        try:
            return await _lead(election, substrate, metrics, namespaces, signs, stop)
        finally:
            await health.cleanup()


async def _lead(
    election: Election,
    substrate: KubernetesSubstrate,
    metrics: Metrics,
    namespaces: Sequence[str],
    signs: Signs,
    stop: asyncio.Event,
) -> int:
    if not await _first(stop, election.won()):
        return 0
    metrics.leader.set(1)
    controller = Controller(substrate, Settings(), metrics)
    signs.watched()
    watching = kopf.operator(
        registry=registry(controller.enqueue, signs.watched),
        clusterwide=not namespaces,
        namespaces=list(namespaces),
        standalone=True,
        stop_flag=stop,
    )
    tasks = {
        asyncio.create_task(watching, name="watch"),
        asyncio.create_task(controller.run(stop), name="controller"),
        asyncio.create_task(election.lost(), name="lease"),
    }
    stopped = asyncio.create_task(stop.wait(), name="stop")
    done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
    asked = stopped in done
    for task in done - {stopped}:
        LOG.error("%s ended by itself", task.get_name(), exc_info=task.exception())
    stop.set()
    await asyncio.wait(tasks, timeout=10)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if asked:
        await election.resign()
    return 0 if asked else 1


async def _first(stop: asyncio.Event, other: Awaitable[None]) -> bool:
    """Wait for `other`; False if told to stop before."""
    task, stopped = asyncio.ensure_future(other), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    won = task.done()
    for future in (task, stopped):
        future.cancel()
    await asyncio.gather(task, stopped, return_exceptions=True)
    return won


if __name__ == "__main__":
    sys.exit(main())
