"""Members as pods of a cluster: the substrate of the operator.

Reads are live, so a pass never decides on a cache's past. LISTs are read as raw JSON: the typed
client takes ten times the CPU for them.
"""

import asyncio
import base64
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio import client

from daruma_operator.api.job import GROUP, PLURAL, VERSION, TrainingJob
from daruma_operator.api.status import TrainingJobStatus
from daruma_operator.errors import ClusterError, UnreadableJobError
from daruma_operator.names import KEY_SECRET
from daruma_operator.substrate.pods import LABEL, owner, pod_facts, pod_manifest, token_secret
from daruma_operator.substrate.protocol import Event, JobKey, PodFacts, PodPlan, StatusConflict
from daruma_operator.substrate.reading import Reader
from daruma_trainer.contract import STORE_MOUNT, token_for

LOG = logging.getLogger("daruma.operator")
MERGE = "application/merge-patch+json"
PAGE = 500
REQUEST_SECONDS = 15.0
COMPONENT = "daruma-operator"


class KubernetesSubstrate:
    """Implements `substrate.protocol.Substrate` on an API server.

    `answered` is called whenever that did what was asked.
    """

    def __init__(
        self,
        api: client.ApiClient,
        own_namespace: str,
        namespaces: Sequence[str],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self._core = client.CoreV1Api(api)
        self._jobs = client.CustomObjectsApi(api)
        self._own = own_namespace
        self._namespaces = tuple(namespaces)
        self._key: bytes | None = None
        self._answered = answered
        self._reader = Reader()
        self._told: dict[JobKey, str] = {}
        """What of a job cannot be read, as people were told."""

    async def list_jobs(self) -> Sequence[JobKey]:
        """See the Protocol."""
        keys = []
        for namespace in self._namespaces or (None,):
            token = ""
            while True:
                raw = await self._call(self._list_jobs(namespace, token))
                keys += [
                    JobKey(i["metadata"]["namespace"], i["metadata"]["name"]) for i in raw["items"]
                ]
                token = raw["metadata"].get("continue") or ""
                if not token:
                    break
        return keys

    async def read_job(self, key: JobKey) -> TrainingJob | None:
        """See the Protocol."""
        try:
            raw = await self._call(
                self._jobs.get_namespaced_custom_object(
                    GROUP, VERSION, key.namespace, PLURAL, key.name
                )
            )
        except NotFoundError:
            raw = None
        if raw is None or raw["metadata"].get("deletionTimestamp") is not None:
            self._reader.forget(key)
            self._told.pop(key, None)
            return None
        return await self._read(key, raw)

    async def _read(self, key: JobKey, raw: Mapping[str, Any]) -> TrainingJob:
        """Parse a job; tell people once what of it cannot be read."""
        reading = self._reader.read(raw)
        if reading.problem is None:
            self._told.pop(key, None)
        elif self._told.get(key) != reading.problem:
            LOG.error("%s: cannot be read: %s", key, reading.problem)
            # The generation for the epoch: the status may be what cannot be read.
            meta, lost = raw["metadata"], reading.job is None
            generation = meta.get("generation", 1)
            event = Event(
                "JobNotRead" if lost else "EditNotRead", reading.problem, generation, True
            )
            await self._tell(key, meta["uid"], event)
            self._told[key] = reading.problem
        if reading.job is None:
            raise UnreadableJobError(f"{key}: {reading.problem}")
        return reading.job

    async def list_pods(self, job: TrainingJob) -> Sequence[PodFacts]:
        """See the Protocol."""
        facts: list[PodFacts] = []
        token = ""
        while True:
            raw = await self._raw(
                self._core.list_namespaced_pod(
                    job.namespace, label_selector=f"{LABEL}/job={job.name}", limit=PAGE,
                    _continue=token or None, _preload_content=False,
                )
            )  # fmt: skip
            for item in raw["items"]:
                owners = item["metadata"].get("ownerReferences", [])
                found = pod_facts(item)
                # Pods of an earlier job of this name are the garbage collector's.
                if found is not None and any(o.get("uid") == job.uid for o in owners):
                    facts.append(found)
            token = raw["metadata"].get("continue") or ""
            if not token:
                return facts

    async def write_status(self, job: TrainingJob, status: TrainingJobStatus) -> TrainingJob:
        """See the Protocol."""
        new = status.model_dump(mode="json", by_alias=True)
        # The first status is written whole: what is zero shall be seen, not missing.
        patch = merge_patch(job.status_to_wire() if job.status.phase else {}, new)
        body = {
            "metadata": {"resourceVersion": job.resource_version, "uid": job.uid},
            "status": patch,
        }
        try:
            raw = await self._call(
                self._jobs.patch_namespaced_custom_object_status(
                    GROUP, VERSION, job.namespace, PLURAL, job.name, body, _content_type=MERGE
                )
            )
        except NotFoundError as error:
            raise StatusConflict from error
        return await self._read(JobKey(job.namespace, job.name), raw)

    async def token(self, job: TrainingJob) -> str:
        """See the Protocol."""
        return token_for(await self._operator_key(), job.uid)

    async def equip(self, job: TrainingJob) -> None:
        """See the Protocol."""
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": token_secret(job),
                "labels": {f"{LABEL}/job": job.name},
                "ownerReferences": [owner(job)],
            },
            "stringData": {"token": await self.token(job)},
        }
        # What is there already is left as it is, and not read: it follows from the key. The dry
        # run, since a quota is charged, for minutes, for a Secret that turns out to be there.
        try:
            await self._call(
                self._core.create_namespaced_secret(job.namespace, body, dry_run="All")
            )
        except AlreadyExistsError:
            return
        await self._create(self._core.create_namespaced_secret(job.namespace, body))

    async def create_pod(self, job: TrainingJob, plan: PodPlan) -> None:
        """See the Protocol."""
        await self._create(
            self._core.create_namespaced_pod(
                job.namespace, pod_manifest(job, plan), _preload_content=False
            )
        )

    async def delete_pod(self, job: TrainingJob, name: str, uid: str, grace_seconds: float) -> None:
        """See the Protocol."""
        body = {"gracePeriodSeconds": int(grace_seconds), "preconditions": {"uid": uid}}
        try:
            await self._call(
                self._core.delete_namespaced_pod(
                    name, job.namespace, body=body, _preload_content=False
                )
            )
        except (NotFoundError, StatusConflict):
            return  # gone, or another pod has the name now

    async def emit(self, job: TrainingJob, event: Event) -> None:
        """See the Protocol."""
        await self._tell(JobKey(job.namespace, job.name), job.uid, event)

    async def _tell(self, key: JobKey, uid: str, event: Event) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # The uid: events of an earlier job of this name outlive it.
        parts = [key.name, event.reason.lower(), str(event.epoch), event.member, uid[:8]]
        name = ".".join(part for part in parts if part)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainingJob", "name": key.name,
                "namespace": key.namespace, "uid": uid,
            },
            "reason": event.reason,
            "message": event.message[:1024],
            "type": "Warning" if event.warning else "Normal",
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }  # fmt: skip
        try:
            await self._create(
                self._core.create_namespaced_event(key.namespace, body, _preload_content=False)
            )
        except (ClusterError, StatusConflict) as error:
            LOG.warning("%s: event %s not told: %s", key, name, error)

    def store_uri(self, job: TrainingJob) -> str | None:
        """See the Protocol: file:///p is p within the claim."""
        store = job.spec.checkpoint.store
        if store is None or not store.startswith("file://"):
            return store
        return f"file://{STORE_MOUNT}{store.removeprefix('file://')}"

    async def _operator_key(self) -> bytes:
        """Read the operator's key, or make it: the first of several replicas wins."""
        if self._key is None:
            fresh = base64.b64encode(secrets.token_bytes(32)).decode()
            body = {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": KEY_SECRET},
                "stringData": {"key": fresh},
            }
            await self._create(self._core.create_namespaced_secret(self._own, body))
            raw = await self._raw(
                self._core.read_namespaced_secret(KEY_SECRET, self._own, _preload_content=False)
            )
            self._key = base64.b64decode(raw["data"]["key"])
        return self._key

    def _list_jobs(self, namespace: str | None, token: str) -> Any:
        options = {"limit": PAGE, "_continue": token}
        if namespace is None:
            return self._jobs.list_cluster_custom_object(GROUP, VERSION, PLURAL, **options)
        return self._jobs.list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, **options
        )

    async def _create(self, request: Awaitable[Any]) -> None:
        """Create something; that it is there already is no error."""
        try:
            await self._call(request)
        except AlreadyExistsError:
            return

    async def _raw(self, request: Awaitable[Any]) -> Any:
        response = await self._call(request)
        return json.loads(await response.read())

    async def _call(self, request: Awaitable[Any]) -> Any:
        """Await a request with a deadline; errors become the operator's own."""
        try:
            answer = await asyncio.wait_for(request, REQUEST_SECONDS)
            await _raise_for_status(answer)
        except client.ApiException as error:
            raise _translated(error) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ClusterError(f"the API server did not answer: {error!r}") from error
        self._answered()
        return answer


async def _raise_for_status(answer: Any) -> None:
    """Without _preload_content the client hands on failures as they are."""
    status = getattr(answer, "status", 200)
    if isinstance(status, int) and status >= 400:
        raise client.ApiException(status=status, reason=await answer.text())


class NotFoundError(ClusterError):
    """404."""


class AlreadyExistsError(ClusterError):
    """409 of a creation."""


def _translated(error: client.ApiException) -> Exception:
    text = f"{error.body or error.reason or ''}"
    if error.status == 404:
        return NotFoundError(text[:500])
    if error.status == 403 and "NamespaceTerminating" in text:
        return NotFoundError("the namespace is being deleted")
    if error.status == 409:
        return AlreadyExistsError(text[:500]) if "AlreadyExists" in text else StatusConflict()
    return ClusterError(f"the API server answered {error.status}: {text[:500]}")


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the merge patch that turns `old` into `new`; what is gone is null."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = merge_patch(before, value)
            if inner:
                patch[key] = inner
        elif key not in old or before != value:
            patch[key] = value
    return patch
