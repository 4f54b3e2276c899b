"""Members that are anybody's programs: what one of them sends harms no other job's operator."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import web

from controller_live import DEADLINE, KEY, SETTINGS, TOKEN
from controller_world import EVERYTHING
from daruma_operator.controller.acts import PutMembership
from daruma_operator.controller.agents import LEAST_VIEW_BYTES, MEMBER_BYTES, Agents, Talk
from daruma_operator.controller.observe import merge
from daruma_trainer.contract import Copies, Membership, Report, Settings, View

ME = "worker-0-1"
PATIENT = replace(SETTINGS, view_seconds=DEADLINE, command_seconds=DEADLINE)
Story = Callable[[Agents, Talk, str], Awaitable[None]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def view() -> bytes:
    own = Report(ME, 1, "Training")
    return json.dumps(View(1, 1, own).to_json()).encode()


def play(handler: Handler, story: Story) -> Talk:
    """Speak to a member that answers as `handler` does."""

    async def run() -> Talk:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        agents = Agents(PATIENT, lambda _key: None)
        talk = agents.begin(KEY, "u", TOKEN)
        try:
            async with asyncio.timeout(DEADLINE):
                await story(agents, talk, f"127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await agents.close()
            await runner.cleanup()
        return talk

    return asyncio.run(run())


async def look(agents: Agents, talk: Talk, agent: str) -> None:
    await agents.look(talk, {ME: agent})


def test_a_view_without_end_is_not_read_to_its_end() -> None:
    sent, most = [0], 64 << 20

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while sent[0] < most:
            sent[0] += 1 << 16
            await response.write(b" " * (1 << 16))
        return response

    talk = play(endless, look)
    assert talk.failing.keys() == {ME}
    # What lies in the buffers between the two, the member has sent as well.
    assert sent[0] < most / 2


def test_a_view_is_not_unpacked() -> None:
    async def packed(_request: web.Request) -> web.StreamResponse:
        body = gzip.compress(view() + b" " * (LEAST_VIEW_BYTES // 2))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    talk = play(packed, look)
    assert (list(talk.failing), list(talk.views)) == ([ME], [])


@pytest.mark.parametrize(("members", "taken"), [(1, False), (200, True)])
def test_a_view_may_be_as_long_as_the_job_has_members(members: int, taken: bool) -> None:
    async def long(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=view() + b" " * (LEAST_VIEW_BYTES + (1 << 20)))

    async def story(agents: Agents, talk: Talk, agent: str) -> None:
        talk.members = members
        await look(agents, talk, agent)

    assert (ME in play(long, story).views) is taken
    assert LEAST_VIEW_BYTES + (1 << 20) + len(view()) < 200 * MEMBER_BYTES


@pytest.mark.parametrize("status", [302, 307, 308])
def test_nobody_sends_the_operator_elsewhere(status: int) -> None:
    paths: list[str] = []

    async def away(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        if request.path == "/elsewhere":
            return web.Response(body=view(), status=200 if request.method == "GET" else 204)
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    took: list[bool] = []

    async def story(agents: Agents, talk: Talk, agent: str) -> None:
        await look(agents, talk, agent)
        empty = Membership("u", "n", "j", 1, 1, 1, (), Settings())
        took.append(await agents.put_membership(talk, PutMembership(ME, agent, empty)))

    talk = play(away, story)
    assert paths == ["/v1/view", "/v1/membership"]
    assert (list(talk.failing), list(talk.views), took) == ([ME], [], [False])


def test_a_refusal_of_any_length_is_short_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=409, text="no" * (1 << 20), charset="utf-8")

    async def story(agents: Agents, talk: Talk, agent: str) -> None:
        empty = Membership("u", "n", "j", 1, 1, 1, (), Settings())
        assert not await agents.put_membership(talk, PutMembership(ME, agent, empty))

    with caplog.at_level("WARNING", "daruma.operator"):
        play(refuse, story)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "409 nono" in said
    assert len(said) < 400


def test_nested_without_end_is_no_view() -> None:
    async def nested(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"[" * (LEAST_VIEW_BYTES // 2))

    assert play(nested, look).failing.keys() == {ME}


@pytest.mark.parametrize("status", [401, 403])
def test_who_refuses_the_token_is_told_from_who_is_silent(status: int) -> None:
    async def deny(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    assert play(deny, look).failing[ME].denied


def test_copies_are_taken_from_a_members_own_view_with_its_epoch() -> None:
    copies = (Copies(1, 7, EVERYTHING),)
    mine = Report(ME, 3, "Training", step=7, copies=copies)

    newer = Report(ME, 4, "Training", step=8)
    server = View(9, 4, Report("server-0-1", 4, "Ready"), {ME: (0.0, newer)})
    found = merge([(0.5, View(5, 3, mine)), (0.1, server)])[ME]
    assert found.report == replace(newer, copies=copies)
    assert found.copies_epoch == 3, "it may have pulled anew before it heard of the next loss"
    assert merge([(0.5, View(5, 3, mine))])[ME].copies_epoch == 3
    bare = replace(mine, copies=())
    assert merge([(0.5, View(5, 3, bare)), (0.1, server)])[ME].copies_epoch == 3
    assert merge([(0.1, server)])[ME].copies_epoch == 0, "it has not said it itself"


def test_what_a_member_said_last_counts_whatever_came_last() -> None:
    """A replica that was promoted serves; a busy sibling has just read what it said before."""
    before = Report("server-1-5", 6, "Replica", follows="server-1-1", at=40.0)
    now = Report("server-1-5", 7, "Ready", follows="server-1-1", at=40.3)
    own = (0.2, View(9, 7, now))
    busy = (0.01, View(3, 6, Report("server-0-1", 6, "Ready"), {now.id: (0.0, before)}))
    for views in ([own, busy], [busy, own]):
        found = merge(views)[now.id]
        assert (found.report, found.age, found.copies_epoch) == (now, 0.2, 7)
    later = (0.01, View(4, 7, Report("server-0-1", 7, "Ready"), {now.id: (0.0, now)}))
    assert merge([own, later])[now.id].age == 0.01, "the same words, heard of later"
