"""An API server's answers in memory, over real HTTP: what the operator asks for, and how."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from kubernetes.aio import client

from daruma_operator.substrate.kubernetes import KubernetesSubstrate

JOBS = "/apis/daruma.dev/v1alpha1/namespaces/{namespace}/trainingjobs/{name}"


class FakeApi:
    """Holds jobs, and notes events and queries."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.writes: list[dict[str, Any]] = []

    def routes(self) -> list[web.RouteDef]:
        """Return what is served."""
        return [
            web.get(JOBS, self._get),
            web.patch(JOBS + "/status", self._patch),
            web.post("/api/v1/namespaces/{namespace}/events", self._event),
        ]

    async def _get(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["name"])
        return web.json_response(job or {"reason": "NotFound"}, status=200 if job else 404)

    async def _patch(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.writes.append(body)
        job = self.jobs[request.match_info["name"]]
        job["status"] = job.get("status", {}) | body["status"]
        return web.json_response(job)

    async def _event(self, request: web.Request) -> web.Response:
        self.events.append(await request.json())
        return web.json_response({}, status=201)


class WatchedApi:
    """What kopf asks of an API server: discovery, lists in pages, watches. Notes each query."""

    def __init__(self, jobs: list[dict[str, Any]], pods: list[dict[str, Any]]) -> None:
        self.queries: dict[str, list[dict[str, str]]] = {}
        self.watched: set[str] = set()
        self._items = {"trainingjobs": jobs, "pods": pods}

    def routes(self) -> list[web.RouteDef]:
        """Return what is served."""

        def answer(body: dict[str, Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
            async def handler(_: web.Request) -> web.Response:
                return web.json_response(body)

            return handler

        def resource(name: str, kind: str) -> dict[str, Any]:
            verbs = ["get", "list", "watch", "patch"]
            both = {"singularName": "", "namespaced": True, "verbs": verbs}
            return both | {"name": name, "kind": kind}

        def group(name: str, version: str) -> dict[str, Any]:
            known = {"version": version, "groupVersion": f"{name}/{version}"}
            return {"name": name, "preferredVersion": known, "versions": [known]}

        # Namespaces and definitions are not read, but kopf waits until it knows of them.
        core = [resource("pods", "Pod"), resource("namespaces", "Namespace")]
        ours = [resource("trainingjobs", "TrainingJob")]
        theirs = [resource("customresourcedefinitions", "CustomResourceDefinition")]
        groups = [group("daruma.dev", "v1alpha1"), group("apiextensions.k8s.io", "v1")]
        return [
            web.get("/version", answer({})),
            web.get("/api", answer({"versions": ["v1"]})),
            web.get("/api/v1", answer({"resources": core})),
            web.get("/apis", answer({"groups": groups})),
            web.get("/apis/daruma.dev/v1alpha1", answer({"resources": ours})),
            web.get("/apis/apiextensions.k8s.io/v1", answer({"resources": theirs})),
            web.get("/api/v1/{plural}", self._list_or_watch),
            web.get("/apis/daruma.dev/v1alpha1/{plural}", self._list_or_watch),
        ]

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        plural, query = request.match_info["plural"], dict(request.query)
        self.queries.setdefault(plural, []).append(query)
        if query.get("watch"):
            self.watched.add(plural)
            stream = web.StreamResponse()
            await stream.prepare(request)
            await asyncio.Event().wait()
        items, at = self._items[plural], int(query.get("continue", "0"))
        after = at + int(query.get("limit", len(items)))
        more = str(after) if after < len(items) else ""
        meta = {"resourceVersion": "1", "continue": more}
        return web.json_response({"items": items[at:after], "metadata": meta})


async def served(routes: list[web.RouteDef], story: Callable[[str], Awaitable[None]]) -> None:
    """Serve while the story runs; it gets the server's URL."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        await asyncio.wait_for(story(f"http://127.0.0.1:{runner.addresses[0][1]}"), 60.0)
    finally:
        await runner.cleanup()


def with_substrate(api: FakeApi, story: Callable[[KubernetesSubstrate], Awaitable[None]]) -> None:
    """Run a story of a substrate that speaks to the fake."""

    async def told(url: str) -> None:
        async with client.ApiClient(client.Configuration(host=url)) as connection:
            await story(KubernetesSubstrate(connection, "daruma-system", []))

    asyncio.run(served(api.routes(), told))
