"""Tests of what kopf is asked to watch, with kopf itself."""

import asyncio
import json
from pathlib import Path
from typing import Any

import kopf
import pytest

from daruma_operator.controller.handlers import registry
from daruma_operator.substrate.protocol import JobKey
from fake_api import WatchedApi, served

MANY = 501


def thing(name: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    meta = {"name": name, "namespace": "n", "uid": name, "labels": labels or {}}
    return {"metadata": {**meta, "resourceVersion": "1"}}


def test_all_jobs_and_their_pods_alone_are_watched_in_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = [thing(f"pod-{i}", {"daruma.dev/job": f"of-pod-{i}"}) for i in range(MANY)]
    api = WatchedApi([thing("j")], pods)
    wanted = {JobKey("n", "j"), *(JobKey("n", f"of-pod-{i}") for i in range(MANY))}
    found: set[JobKey] = set()

    async def story(url: str) -> None:
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        (tmp_path / "config").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("POD_ID", "test")
        operator = asyncio.create_task(
            kopf.operator(
                registry=registry(found.add, lambda: None),
                clusterwide=True,
                standalone=True,
            )
        )
        while not (found >= wanted and api.watched == {"pods", "trainingjobs"}):
            assert not operator.done()
            await asyncio.sleep(0.01)
        # Told to stop, it would wait 5 s for the tasks of the API server, which are not its own.
        operator.cancel()
        await asyncio.gather(operator, return_exceptions=True)

    asyncio.run(served(api.routes(), story))
    assert found == wanted
    selector, version = {"labelSelector": "daruma.dev/job"}, {"resourceVersion": "1"}
    first, second, watch = api.queries["pods"]
    assert first == selector | {"limit": "500"}
    assert second == selector | {"limit": "500", "continue": "500"}
    assert selector.items() | version.items() | {("watch", "true")} <= watch.items()
    # Jobs have no such label, and are watched all.
    for query in api.queries["trainingjobs"]:
        assert "labelSelector" not in query
