"""Leader election, against a server of one Lease that may be slow or away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from daruma_operator import election
from daruma_operator.clock import utc_now
from daruma_operator.election import Election

DEADLINE = 60.0


class Leases:
    """An API server that knows one Lease; `hold`: no request is answered meanwhile."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.hold = asyncio.Event()
        self.asked = self.renewals = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        while self.hold.is_set():
            await asyncio.sleep(0.01)
        if request.method == "GET":
            found = self.lease is not None
            return web.json_response(self.lease or {}, status=200 if found else 404)
        body = await request.json()
        version = (self.lease or {}).get("metadata", {}).get("resourceVersion")
        if body["metadata"].get("resourceVersion") != version:
            return web.json_response({"reason": "Conflict"}, status=409)
        self.renewals += 1
        self.lease = body | {"metadata": body["metadata"] | {"resourceVersion": f"{self.renewals}"}}
        return web.json_response(self.lease)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not true():
            await asyncio.sleep(0.005)


def tell(
    monkeypatch: pytest.MonkeyPatch,
    story: Callable[[Leases, Callable[[str], Election]], Awaitable[None]],
) -> None:
    """Play a story twice as fast as it is in a cluster."""
    for name in ("RETRY_SECONDS", "RENEW_SECONDS", "LEASE_SECONDS"):
        monkeypatch.setattr(election, name, getattr(election, name) / 2)

    async def play() -> None:
        leases = Leases()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", leases.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        configuration = client.Configuration(host=f"http://127.0.0.1:{port}")
        try:
            async with client.ApiClient(configuration) as api:
                await story(leases, lambda who: Election(api, "here", who, utc_now))
        finally:
            leases.hold.clear()
            await runner.cleanup()

    asyncio.run(play())


def test_one_leads_and_the_next_when_it_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(leases: Leases, candidate: Callable[[str], Election]) -> None:
        first, second = candidate("first"), candidate("second")
        async with asyncio.timeout(DEADLINE):
            await first.won()
            leads, follows = asyncio.create_task(first.lost()), asyncio.create_task(second.won())
            asked = leases.asked
            await until(lambda: leases.asked > asked + 10)
            assert not follows.done(), "the first renews"
            leads.cancel()
            await first.resign()
            await follows
            assert leases.lease is not None
            assert leases.lease["spec"]["holderIdentity"] == "second"

    tell(monkeypatch, story)


def test_one_who_is_silent_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(leases: Leases, candidate: Callable[[str], Election]) -> None:
        async with asyncio.timeout(DEADLINE):
            await candidate("first").won()
            await candidate("second").won()

    tell(monkeypatch, story)


def test_a_late_answer_deposes_nobody_and_silence_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(leases: Leases, candidate: Callable[[str], Election]) -> None:
        first = candidate("first")
        await first.won()
        leads = asyncio.create_task(first.lost())
        asked = leases.asked
        leases.hold.set()
        await until(lambda: leases.asked > asked + 1)  # the first attempt was given up
        leases.hold.clear()
        renewed = leases.renewals
        await until(lambda: leases.renewals > renewed + 1)
        assert not leads.done()
        leases.hold.set()
        async with asyncio.timeout(DEADLINE):
            await leads

    tell(monkeypatch, story)
