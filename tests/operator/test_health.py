"""What the operator takes for a sign of life, as a candidate that waits and as a leader."""

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import Callable

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio import client

import daruma_operator.__main__ as entry
from daruma_operator import election
from daruma_operator.health import DEAF_SECONDS, Signs, serve_health

DEADLINE = 60.0
HELD = {
    "metadata": {"name": "daruma-operator", "resourceVersion": "1"},
    "spec": {"holderIdentity": "another", "leaseDurationSeconds": 10**6, "renewTime": "now"},
}


async def ask(port: int) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/healthz") as response,
    ):
        return response.status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_candidate_that_waits_for_its_turn_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour passes with each look at the lease, and nobody asks for anything else."""
    now, asked = [0.0], [0]
    monkeypatch.setattr(election, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(entry, "Signs", lambda: Signs(lambda: now[0]))
    monkeypatch.setattr(entry, "start_http_server", lambda *_a, **_k: None)

    async def lease(_request: web.Request) -> web.Response:
        now[0] += 4 * DEAF_SECONDS
        asked[0] += 1
        return web.json_response(HELD)

    async def story() -> int:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", lease)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"

        async def kube_config() -> None:
            client.Configuration.set_default(client.Configuration(host=host))

        monkeypatch.setattr(entry, "load_kube_config", kube_config)
        port = free_port()
        options = argparse.Namespace(
            watch_namespaces="", namespace="here", metrics_port="0", health_port=str(port)
        )
        operator = asyncio.create_task(entry.operate(options))
        async with asyncio.timeout(DEADLINE):
            while asked[0] < 3 or await ask(port) != 200:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            code = await operator
        await runner.cleanup()
        return code

    try:
        assert asyncio.run(story()) == 0
    finally:
        client.Configuration.set_default(None)


def test_silence_of_the_api_server_is_unhealthy() -> None:
    async def story() -> list[int]:
        now = [0.0]
        signs = Signs(lambda: now[0])
        port = free_port()
        runner = await serve_health(port, signs)
        found = []
        changes: list[Callable[[], None]] = [lambda: None, signs.answered, signs.watched]
        for change in changes:
            now[0] += DEAF_SECONDS + 1
            found.append(await ask(port))
            change()
            found.append(await ask(port))
        await runner.cleanup()
        return found

    assert asyncio.run(story()) == [503, 503, 503, 200, 503, 200]


def test_answers_say_nothing_of_the_watch() -> None:
    now = [0.0]
    signs = Signs(lambda: now[0])
    now[0] = 50.0
    assert signs.watch_age_seconds() == 0.0, "who does not lead watches nothing"
    signs.watched()
    now[0] = 80.0
    signs.answered()
    assert signs.watch_age_seconds() == 30.0
    assert signs.silent_seconds() == 0.0
