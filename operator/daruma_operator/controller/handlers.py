"""What kopf is used for: watching jobs and pods. A handler puts a key into the queue, no more.

Exceptions in these handlers would be swallowed, and patches or finalizers are not wanted: every
decision is made in the controller's pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from daruma_operator.api.job import GROUP, PLURAL, VERSION
from daruma_operator.substrate.pods import LABEL
from daruma_operator.substrate.protocol import JobKey


def registry(enqueue: Callable[[JobKey], None], heard: Callable[[], None]) -> kopf.OperatorRegistry:
    """Return the handlers. `heard` is called at each event: a watch that lives."""
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(
            **arguments
        )

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=made)
    def job_changed(namespace: str | None, name: str | None, **_: Any) -> None:
        heard()
        enqueue(JobKey(namespace or "default", name or ""))

    @kopf.on.event("", "v1", "pods", labels={f"{LABEL}/job": kopf.PRESENT}, registry=made)
    def pod_changed(namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        heard()
        enqueue(JobKey(namespace or "default", labels[f"{LABEL}/job"]))

    @kopf.on.startup(registry=made)
    def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        # Defaults leave it deaf for up to 10 s after an API outage.
        settings.networking.error_backoffs = [0.2] * 25 + [1] * 300
        settings.networking.request_timeout = 15
        settings.networking.connect_timeout = 2
        settings.scanning.disabled = True
        settings.watching.server_timeout = 300
        settings.watching.client_timeout = 330
        settings.posting.enabled = False
        settings.process.ultimate_exiting_timeout = 25
        settings.queueing.worker_limit = None

    return made
