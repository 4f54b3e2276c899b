"""The cluster's substrate against an API server that knows Secrets and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from controller_world import spec_of
from daruma_operator.api.job import TrainingJob
from daruma_operator.errors import ClusterError
from daruma_operator.substrate.kubernetes import KubernetesSubstrate
from daruma_operator.substrate.pods import token_secret

JOB = TrainingJob(name="j", namespace="n", uid="a-job-uid", spec=spec_of())
Make = Callable[[Callable[[], None]], KubernetesSubstrate]


class Secrets:
    """By namespace and name. Only the operator's own may be read, as the chart's rights have it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], dict[str, Any]] = {}
        self.refused = False
        self.charged = 0
        """What a quota counts: it is asked before it is looked whether the Secret is there."""

    async def answer(self, request: web.Request) -> web.Response:
        _, _, _, _, namespace, kind, *name = request.path.split("/")
        assert kind == "secrets"
        if self.refused:
            return web.json_response({"reason": "Forbidden"}, status=403)
        if request.method == "GET":
            assert (namespace, *name) == ("system", "daruma-operator-key")
            return web.json_response(self.held["system", name[0]])
        assert request.method == "POST"
        body = await request.json()
        key = namespace, body["metadata"]["name"]
        dry = request.query.get("dryRun") == "All"
        self.charged += not dry
        if key in self.held:
            return web.json_response({"reason": "AlreadyExists"}, status=409)
        if dry:
            return web.json_response(body, status=201)
        self.held[key] = body | {"data": body["stringData"]}
        return web.json_response(body, status=201)


def tell(story: Callable[[Secrets, Make], Awaitable[None]]) -> None:
    async def play() -> None:
        secrets = Secrets()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", secrets.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with client.ApiClient(client.Configuration(host=host)) as api:
                await story(secrets, lambda heard: KubernetesSubstrate(api, "system", [], heard))
        finally:
            await runner.cleanup()

    asyncio.run(play())


def test_a_jobs_secret_that_was_removed_is_made_again() -> None:
    async def story(secrets: Secrets, make: Make) -> None:
        substrate = make(lambda: None)
        token = await substrate.token(JOB)
        where = "n", token_secret(JOB)
        await substrate.equip(JOB)
        assert secrets.held.pop(where)["data"]["token"] == token
        for _ in range(2):
            await substrate.equip(JOB)
            assert secrets.held[where]["data"]["token"] == token
        assert await make(lambda: None).token(JOB) == token, "the next operator has the same key"

    tell(story)


def test_a_secret_that_is_there_is_not_charged_to_a_quota_again() -> None:
    async def story(secrets: Secrets, make: Make) -> None:
        substrate = make(lambda: None)
        await substrate.equip(JOB)
        charged = secrets.charged
        for _ in range(3):
            await substrate.equip(JOB)
        assert secrets.charged == charged

    tell(story)


def test_what_was_done_is_a_sign_of_life_and_a_refusal_is_none() -> None:
    async def story(secrets: Secrets, make: Make) -> None:
        heard: list[int] = []
        substrate = make(lambda: heard.append(1))
        await substrate.equip(JOB)
        assert heard
        heard.clear()
        secrets.refused = True
        with pytest.raises(ClusterError):
            await substrate.equip(JOB)
        assert not heard
        assert await substrate.token(JOB), "it follows from the key: the job is looked after"

    tell(story)
