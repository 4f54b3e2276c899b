"""Speaking with the agents of a job's members: long polls for views, and commands.

A job that is calm has one long poll, to one member, whose view holds what the others told it. As
long as something happens, every member that can be reached is polled.
"""

import asyncio
import contextlib
import errno
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus

import aiohttp

from daruma_operator.controller.acts import PostCheckpoint, PostRestore, PutMembership
from daruma_operator.controller.observe import Heard, merge
from daruma_operator.settings import Settings
from daruma_operator.substrate.protocol import JobKey
from daruma_trainer.contract import ContractError, Restore, View

LOG = logging.getLogger("daruma.operator")
Targets = Mapping[str, str]
"""Agents' `host:port` by member id."""
FAILURES = (
    aiohttp.ClientError, OSError, TimeoutError, ContractError, ValueError, RecursionError,
)  # fmt: skip
MAX_ERROR_BYTES = 300
"""Of the text with which a command is refused."""
_PIECE = 1 << 16
_DENIED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
MEMBER_BYTES = 16 << 10
"""A view may be this long for each member of the job: no report has more than about 5 KB but for
the metrics that the program reports, of which the trainer takes 8 KiB."""
LEAST_VIEW_BYTES = 1 << 20
PATIENCE = 100
SLOWER = 10
"""A member that does not answer is asked this many times less often after PATIENCE failures."""
FORGET_SECONDS = 120.0
"""The last words of members of the past are kept so long: they price a recovery."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A member that does not answer."""

    since: float
    """The loop's time of the first question in vain."""
    refused: bool
    """Whether its host answered the last one: nobody listens there."""
    denied: bool
    """Whether itself did: the token is another job's, or of another operator's key."""


@dataclass(frozen=True, slots=True)
class Refusals:
    """A pod that was refused so often is not asked for again before then (the loop's time)."""

    count: int
    until: float


@dataclass(slots=True)
class Talk:
    """What the operator remembers of a job's members. It may be lost with the operator."""

    key: JobKey
    uid: str
    token: str
    members: int = 0
    """Servers, replicas and workers that the job asks for."""
    views: dict[str, tuple[float, View]] = field(default_factory=dict)
    """When (the loop's time) each view came."""
    failing: dict[str, Silence] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    planned: dict[str, Restore] = field(default_factory=dict)
    saving: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, "Refusals"] = field(default_factory=dict)
    """Of pods that the API server would not make, by name."""
    equipped: bool = False
    """Whether the token's Secret was there after the last pod was asked for, or no pod waits."""
    began: datetime | None = None
    """When this operator began to look after the job."""
    polls: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    calm: bool = False
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def prune(self, targets: Targets) -> None:
        """Forget what was told to members of the past."""
        for told in (self.failing, self.delivered, self.planned, self.saving):
            for gone in [i for i in told if i not in targets and i not in self.views]:
                del told[gone]

    def fails(self, member: str, error: Exception) -> bool:
        """Note that a member did not answer; True if that, or how it is refused, is new."""
        refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
        denied = isinstance(error, aiohttp.ClientResponseError) and error.status in _DENIED
        known = self.failing.get(member)
        since = _now() if known is None else known.since
        self.failing[member] = Silence(since, refused, denied)
        return known is None or refused > known.refused or denied > known.denied

    def heard(self, now: float) -> dict[str, Heard]:
        """Merge what all said."""
        for gone in [i for i, (at, _) in self.views.items() if now - at > FORGET_SECONDS]:
            del self.views[gone]
        return merge((now - at, view) for at, view in self.views.values())


class Agents:
    """One HTTP session for all jobs. `notify` is called with the key of a job that has news."""

    def __init__(self, settings: Settings, notify: Callable[[JobKey], None]) -> None:
        self._settings = settings
        self._notify = notify
        self._talks: dict[JobKey, Talk] = {}
        self._session: aiohttp.ClientSession | None = None

    def talk(self, key: JobKey, uid: str) -> Talk | None:
        """Return what is remembered of a job; None if nothing, or if it was of another uid."""
        talk = self._talks.get(key)
        return talk if talk is not None and talk.uid == uid else None

    def begin(self, key: JobKey, uid: str, token: str) -> Talk:
        """Begin to remember a job."""
        self.forget(key)
        talk = self._talks[key] = Talk(key, uid, token)
        return talk

    def forget(self, key: JobKey) -> None:
        """Stop polling a job and drop what is remembered."""
        talk = self._talks.pop(key, None)
        if talk is not None:
            polls = list(talk.polls.values())
            talk.polls.clear()
            for task in polls:
                task.cancel()

    async def close(self) -> None:
        """Stop all polls and close the session."""
        tasks = [task for talk in self._talks.values() for task in talk.polls.values()]
        for key in list(self._talks):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def follow(self, talk: Talk, targets: Targets, *, calm: bool) -> None:
        """Poll exactly these members; slower while the job is calm."""
        talk.calm = calm
        if not calm:
            talk.hurry.set()
        talk.prune(targets)
        for gone in [i for i in talk.polls if i not in targets]:
            talk.polls.pop(gone).cancel()
        for member, agent in targets.items():
            task = talk.polls.get(member)
            if task is None or task.done():
                talk.polls[member] = asyncio.create_task(
                    self._poll(talk, member, agent), name=f"poll {talk.key} {member}"
                )

    async def look(self, talk: Talk, targets: Targets) -> None:
        """Ask members for their views at once, and wait for those that answer in time."""
        await asyncio.gather(*(self._look(talk, m, agent) for m, agent in targets.items()))

    async def put_membership(self, talk: Talk, act: PutMembership) -> bool:
        """Hand out a membership; True if the member has it."""
        body = act.membership.to_json()
        if not await self._command(talk, "PUT", act.agent, "membership", body, act.member):
            return False
        talk.delivered[act.member] = act.membership.epoch
        return True

    async def post_restore(self, talk: Talk, act: PostRestore) -> bool:
        """Hand out a restore plan."""
        body = act.restore.to_json()
        if not await self._command(talk, "POST", act.agent, "restore", body, act.member):
            return False
        talk.planned[act.member] = act.restore
        return True

    async def post_checkpoint(self, talk: Talk, act: PostCheckpoint) -> bool:
        """Order the final cut."""
        body = {"kind": "final", "number": act.number}
        if not await self._command(talk, "POST", act.agent, "checkpoint", body, act.member):
            return False
        talk.saving[act.member] = act.number
        return True

    async def _poll(self, talk: Talk, member: str, agent: str) -> None:
        after, settings, failures = 0, self._settings, 0
        # A cancellation that comes together with a timeout may be taken for that.
        while talk.polls.get(member) is asyncio.current_task():
            try:
                view = await self._view(talk, agent, after, settings.poll_seconds)
            except FAILURES as error:
                if talk.fails(member, error):
                    LOG.debug("%s: %s does not answer: %r", talk.key, member, error)
                    self._notify(talk.key)
                failures += 1
                slow = failures > PATIENCE
                await asyncio.sleep(settings.retry_seconds * (SLOWER if slow else 1))
                continue
            failures = 0
            before = talk.views.get(member)
            changed = member in talk.failing or before is None or news(before[1], view)
            self._keep(talk, member, view)
            after = view.version
            if changed:
                self._notify(talk.key)
            if talk.calm:
                talk.hurry.clear()
                await _wait(talk.hurry, settings.calm_seconds)
            elif not changed:
                # A server that works has a new view all the time, of which few say anything new.
                await asyncio.sleep(settings.hurry_seconds)

    async def _look(self, talk: Talk, member: str, agent: str) -> None:
        try:
            self._keep(talk, member, await self._view(talk, agent, 0, 0.0))
        except FAILURES as error:
            talk.fails(member, error)

    def _keep(self, talk: Talk, member: str, view: View) -> None:
        talk.failing.pop(member, None)
        known = talk.views.get(member)
        was = None if known is None else known[1]
        # Of two answers on their way the older may come last. A new life counts from the start.
        if was is None or view.version >= was.version or view.own.at > was.own.at:
            talk.views[member] = _now(), view

    async def _view(self, talk: Talk, agent: str, after: int, wait: float) -> View:
        timeout = aiohttp.ClientTimeout(total=wait + self._settings.view_seconds)
        async with self._http().get(
            f"http://{agent}/v1/view",
            params={"after": str(after), "wait": str(wait)},
            headers={"Authorization": f"Bearer {talk.token}"},
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            response.raise_for_status()
            limit = max(LEAST_VIEW_BYTES, talk.members * MEMBER_BYTES)
            body = await _read(response, limit)
            if len(body) > limit:
                raise ContractError(f"a view of more than {limit} bytes")
            return View.from_json(json.loads(body))

    async def _command(
        self, talk: Talk, method: str, agent: str, what: str, body: object, member: str
    ) -> bool:
        timeout = aiohttp.ClientTimeout(total=self._settings.command_seconds)
        try:
            async with self._http().request(
                method,
                f"http://{agent}/v1/{what}",
                json=body,
                headers={"Authorization": f"Bearer {talk.token}"},
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if response.status == HTTPStatus.NO_CONTENT:
                    return True
                text = (await _read(response, MAX_ERROR_BYTES)).decode(errors="replace")
                LOG.warning("%s refused a %s: %s %s", member, what, response.status, text)
        except FAILURES as error:
            LOG.debug("%s did not take a %s: %r", member, what, error)
        return False

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Pods run anybody's programs. What one of them sends is not unpacked, no cookie of its
            # is kept, and where it would send a request on to, the job's token is not taken.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
            )
        return self._session


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return a body, of one that is longer than `limit` bytes one more, whatever its head says.

    A connection with more to read is closed, not used again.
    """
    found = bytearray()
    while len(found) <= limit and (piece := await response.content.read(_PIECE)):
        found += piece
    return bytes(found[: limit + 1])


def news(old: View, new: View) -> bool:
    """Whether a view says something that a decision may turn on, not just progress."""
    return _gist(old) != _gist(new)


def _gist(view: View) -> dict[str, tuple[object, ...]]:
    reports = [view.own, *(report for _, report in view.others.values())]
    return {
        r.id: (
            r.epoch, r.state, r.generation, r.initialised, bool(r.copies), r.final, r.restore,
            r.acked_epoch, r.error, r.stop, r.save_error, r.guests, {s.id for s in r.suspects},
            r.follows, r.waiting, r.older is None,
        )
        for r in reports
    }  # fmt: skip


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _now() -> float:
    return asyncio.get_running_loop().time()
