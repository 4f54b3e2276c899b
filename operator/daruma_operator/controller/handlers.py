"""What kopf is used for: watching jobs and pods. A handler puts a key into the queue, no more.

Exceptions in these handlers would be swallowed, and patches or finalizers are not wanted: every
decision is made in the controller's pass. They are coroutines: kopf calls plain functions in a
thread, and the queue belongs to the event loop.
"""

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kopf

from daruma_operator.api.job import GROUP, PLURAL, VERSION
from daruma_operator.substrate.pods import LABEL
from daruma_operator.substrate.protocol import JobKey

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
RELOGIN = timedelta(minutes=30)
"""Tokens of service accounts are renewed by the kubelet; after this long the file is read again."""


def service_account(environment: Mapping[str, str]) -> kopf.ConnectionInfo | None:
    """Return how a pod reaches the API server, or None outside of one.

    By address, not by name as kopf's own does: a cluster need not have DNS.
    """
    host = environment.get("KUBERNETES_SERVICE_HOST")
    if host is None or not (ACCOUNT / "token").exists():
        return None
    host = f"[{host}]" if ":" in host else host
    return kopf.ConnectionInfo(
        server=f"https://{host}:{environment.get('KUBERNETES_SERVICE_PORT', '443')}",
        ca_path=str(ACCOUNT / "ca.crt"),
        token=(ACCOUNT / "token").read_text().strip(),
        expiration=datetime.now(UTC) + RELOGIN,
    )


def registry(enqueue: Callable[[JobKey], None], heard: Callable[[], None]) -> kopf.OperatorRegistry:
    """Return the handlers. `heard` is called at each event: a watch that lives."""
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return service_account(os.environ) or kopf.login_with_kubeconfig(**arguments)

    # Coroutines, though nothing is awaited: kopf runs plain functions in threads of its own, and
    # the queue belongs to the loop's.
    @kopf.on.event(GROUP, VERSION, PLURAL, registry=made)
    async def job_changed(namespace: str | None, name: str | None, **_: Any) -> None:
        heard()
        enqueue(JobKey(namespace or "default", name or ""))

    @kopf.on.event("", "v1", "pods", labels={f"{LABEL}/job": kopf.PRESENT}, registry=made)
    async def pod_changed(namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        heard()
        enqueue(JobKey(namespace or "default", labels[f"{LABEL}/job"]))

    @kopf.on.startup(registry=made)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        # Defaults leave it deaf for up to 10 s after an API outage.
        settings.networking.error_backoffs = [0.2] * 25 + [1] * 300
        settings.networking.request_timeout = 15
        settings.networking.connect_timeout = 2
        settings.scanning.disabled = True
        settings.watching.server_timeout = 300
        settings.watching.client_timeout = 330
        # `labels` above picks what is handled; the API server would send every pod of the cluster.
        settings.watching.label_selectors["", "v1", "pods"] = f"{LABEL}/job"
        settings.watching.chunk_size = 500
        settings.posting.enabled = False
        settings.process.ultimate_exiting_timeout = 25
        settings.queueing.worker_limit = None

    return made
