"""The operator, with somebody at its elbow: run in its pod instead of its own entry point.

* With a point's name in /tmp/die-at it gets SIGKILL there, in a pass of the recovery of a job named
  `at-…`, once.
* A job named `conflict`: just before its first status write somebody else writes the status.

What happens to `conflict` is noted in /tmp/passes, a word a line.
"""

import contextvars
import json
import os
import pathlib
import signal
import ssl
import sys
import urllib.request
from importlib import import_module
from typing import Any

entry: Any = import_module("daruma_operator.__main__")
loop: Any = import_module("daruma_operator.controller.loop")

ACCOUNT = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")
DIE_AT = pathlib.Path("/tmp/die-at")
PASSES = pathlib.Path("/tmp/passes")
decide, apply, controller = loop.decide, loop.apply, entry.Controller
job: contextvars.ContextVar[Any] = contextvars.ContextVar("job", default=None)
recovers = contextvars.ContextVar("recovers", default=False)


def watched(seen: Any, policy: Any, now: Any) -> Any:
    """Decide, and remember in this pass's context for whom."""
    decision = decide(seen, policy, now)
    changed = decision.status != seen.job.status
    job.set(seen.job)
    recovers.set(str(decision.phase) == "Recovering" and (changed or bool(decision.acts)))
    return decision


async def noted(acts: Any, *rest: Any) -> bool:
    """Act, and note it."""
    if job.get().name == "conflict" and acts:
        note("acted")
    return bool(await apply(acts, *rest))


def point(name: str) -> None:
    """Do what is due here."""
    due = DIE_AT.exists() and DIE_AT.read_text().strip() == name
    if due and job.get().name.startswith("at-") and recovers.get():
        DIE_AT.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if job.get().name == "conflict" and job.get().status.phase is None and name == "decided":
        note("decided")
        if PASSES.read_text().split() == ["decided"]:
            write_status()


def note(word: str) -> None:
    """Add a word."""
    with PASSES.open("a") as file:
        file.write(f"{word}\n")


def write_status() -> None:
    """Be somebody else who writes a status: the resourceVersion moves on."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    path = f"apis/daruma.dev/v1alpha1/namespaces/{job.get().namespace}/trainingjobs/conflict/status"
    request = urllib.request.Request(
        f"https://{host}:{port}/{path}",
        data=json.dumps({"status": {"message": "somebody else was here"}}).encode(),
        method="PATCH",
        headers={
            "Content-Type": "application/merge-patch+json",
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
        },
    )
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=10, context=context):
        pass


loop.decide, loop.apply = watched, noted
entry.Controller = lambda *given: controller(*given, hooks=loop.Hooks(point=point))
sys.exit(entry.main())
