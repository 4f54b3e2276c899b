"""Leader election by a Lease. A deposed leader ends: its status writes would lose anyway."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from time import monotonic
from typing import Any

import aiohttp
from kubernetes.aio import client

LOG = logging.getLogger("daruma.operator")
LEASE = "daruma-operator"
LEASE_SECONDS = 4
"""Another takes over when the holder was silent for so long."""
RENEW_SECONDS = 3
"""A holder that did not renew for so long gives up by itself, after one more attempt."""
RETRY_SECONDS = 1
"""Between attempts; and what one may take, so that an answer or two may be late or lost."""
_FAULTS = (client.ApiException, aiohttp.ClientError, OSError, TimeoutError)


class Election:
    """One candidate. `answered` is called whenever the API server did what was asked."""

    def __init__(
        self,
        api: client.ApiClient,
        namespace: str,
        identity: str,
        clock: Callable[[], datetime],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self._leases = client.CoordinationV1Api(api)
        self._namespace = namespace
        self._identity = identity
        self._clock = clock
        self._answered = answered
        self._seen: tuple[str, float] | None = None
        """The holder's last renewal, and when this process first saw it: no clock of another
        machine is trusted, and none that can be set."""

    async def won(self) -> None:
        """Return once this candidate leads."""
        while not await self._attempt():
            await asyncio.sleep(RETRY_SECONDS)
        LOG.info("%s leads", self._identity)

    async def lost(self) -> None:
        """Return once it no longer does."""
        renewed = monotonic()
        while monotonic() - renewed < RENEW_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            # Others count from when the API server has it: at the earliest from now.
            began = monotonic()
            if await self._attempt():
                renewed = began
        LOG.error("%s could not renew its lease for %s s", self._identity, RENEW_SECONDS)

    async def resign(self) -> None:
        """Let go of the lease, so that another need not wait for its end."""
        try:
            lease = await self._read()
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._replace(lease)
        except _FAULTS as error:
            LOG.warning("the lease was not given back: %r", error)

    async def _attempt(self) -> bool:
        try:
            taken = await asyncio.wait_for(self._take(), RETRY_SECONDS)
        except _FAULTS as error:
            LOG.warning("the lease could not be renewed: %r", error)
            return False
        self._answered()
        return taken

    async def _take(self) -> bool:
        stamp = self._clock().isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": stamp,
        }
        lease = await self._read()
        if lease is None:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": LEASE},
                "spec": {**spec, "acquireTime": stamp},
            }
            await self._leases.create_namespaced_lease(self._namespace, body)
            return True
        holder = lease["spec"].get("holderIdentity")
        if holder not in (self._identity, "", None) and not self._expired(lease["spec"]):
            return False
        lease["spec"] = {**lease["spec"], **spec}
        await self._replace(lease)
        return True

    def _expired(self, spec: dict[str, Any]) -> bool:
        renewal = str(spec.get("renewTime"))
        if self._seen is None or self._seen[0] != renewal:
            self._seen = (renewal, monotonic())
        return monotonic() - self._seen[1] > (spec.get("leaseDurationSeconds") or 0)

    async def _read(self) -> dict[str, Any] | None:
        try:
            response = await self._leases.read_namespaced_lease(
                LEASE, self._namespace, _preload_content=False
            )
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise
        if response.status == 404:
            return None
        if response.status >= 400:
            raise client.ApiException(status=response.status, reason=await response.text())
        lease: dict[str, Any] = await response.json()
        return lease

    async def _replace(self, lease: dict[str, Any]) -> None:
        """Replace by resourceVersion: of two candidates one gets a conflict."""
        await self._leases.replace_namespaced_lease(LEASE, self._namespace, lease)
