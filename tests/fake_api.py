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
