"""The Kubernetes API as far as it is written: status, events, the Lease. Plain dicts, no models.

Every call has a deadline, and whatever goes wrong is a ClusterError that says what a caller can do:
try later, read again, or forget it. Nothing is tried again here, because the loops that ask come
round anyway. Watching is Kopf's (watch.py).
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api.custom_objects_api import CustomObjectsApi
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException, OpenApiException

from trimtab.ports import AbsentError, ClusterError, ConflictError, LeaseRecord, StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Mapping
    from typing import Self

POOLS: dict[str, Any] = {"group": "trimtab.dev", "version": "v1alpha1", "plural": "inferencepools"}
EVENTS: dict[str, Any] = {"group": "events.k8s.io", "version": "v1", "plural": "events"}
LEASES: dict[str, Any] = {"group": "coordination.k8s.io", "version": "v1", "plural": "leases"}

MANAGER = "trimtab"
"""Under which name the API server keeps which fields are ours."""
CONTROLLER = "trimtab.dev/operator"
ANSWER_S = 3.0  # the lease is lost after 10 s, and a write that waits must have ended by then
NOTE_CHARS = 1024  # the API refuses more
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeApi:
    """What is written, as one identity."""

    def __init__(self, client: ApiClient, *, identity: str, lease: tuple[str, str]) -> None:
        """Say for whom to write, and which Lease (namespace and name) says who may."""
        self._api = CustomObjectsApi(client)
        self._identity = identity
        self._lease_namespace, self._lease_name = lease

    @classmethod
    @asynccontextmanager
    async def connect(cls, *, identity: str, lease: tuple[str, str]) -> AsyncIterator[Self]:
        """Log in as kubectl does, else as the pod's ServiceAccount. Raises StartError.

        Whether the API server answers is not asked here.
        """
        settings = Configuration()
        try:
            if files := kubeconfig():
                await config.load_kube_config(files, client_configuration=settings)  # type: ignore[no-untyped-call]  # untyped
            else:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # untyped
        except (config.ConfigException, OSError) as error:
            raise StartError(
                f"no cluster is known: {error} Set KUBECONFIG, or run in a pod with a ServiceAccount"
            ) from error
        async with ApiClient(settings) as client:
            client.user_agent = MANAGER
            yield cls(client, identity=identity, lease=lease)

    async def apply_status(
        self, namespace: str, name: str, status: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        body = {
            "apiVersion": f"{POOLS['group']}/{POOLS['version']}",
            "kind": "InferencePool",
            "metadata": {"name": name, "namespace": namespace},
            "status": dict(status),
        }
        return await _answer(
            self._api.patch_namespaced_custom_object_status(
                **POOLS,
                namespace=namespace,
                name=name,
                body=body,
                field_manager=MANAGER,
                force=True,
                _content_type="application/apply-patch+yaml",
            )
        )

    async def post_event(
        self, regarding: Mapping[str, str], *, reason: str, note: str, warning: bool
    ) -> None:
        namespace = regarding["namespace"]
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{regarding['name'][:200]}-", "namespace": namespace},
            "eventTime": _now(),
            "reportingController": CONTROLLER,
            "reportingInstance": self._identity,
            "regarding": dict(regarding),
            "action": "Reconcile",
            "reason": reason,
            "note": note[:NOTE_CHARS],
            "type": "Warning" if warning else "Normal",
        }
        await _answer(
            self._api.create_namespaced_custom_object(**EVENTS, namespace=namespace, body=body)
        )

    async def read_lease(self) -> LeaseRecord:
        return _record(
            await _answer(
                self._api.get_namespaced_custom_object(
                    **LEASES, namespace=self._lease_namespace, name=self._lease_name
                )
            )
        )

    async def write_lease(self, record: LeaseRecord) -> LeaseRecord:
        now = _now()
        metadata = {"name": self._lease_name, "namespace": self._lease_namespace}
        if record.version:
            metadata["resourceVersion"] = record.version
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": record.holder,
                "leaseDurationSeconds": record.duration_s,
                "leaseTransitions": record.transitions,
                "acquireTime": record.acquired or now,
                "renewTime": now,
            },
        }
        where = {**LEASES, "namespace": self._lease_namespace}
        if record.version:
            call = self._api.replace_namespaced_custom_object(
                **where, name=self._lease_name, body=body
            )
        else:
            call = self._api.create_namespaced_custom_object(**where, body=body)
        return _record(await _answer(call))


def kubeconfig() -> str:
    """Return where kubectl would look; empty where there is nothing, as in a pod."""
    home = Path("~/.kube/config").expanduser()
    return os.environ.get("KUBECONFIG") or (str(home) if home.exists() else "")


def own_namespace() -> str:
    """Return the namespace of the pod that this runs in; `default` where it is none."""
    try:
        return NAMESPACE_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return "default"


async def _answer(call: Awaitable[Any]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await call
    except TimeoutError as error:
        raise ClusterError(f"no answer from the API server within {ANSWER_S:g} s") from error
    except ApiException as error:
        raise _refusal(error) from error
    except (aiohttp.ClientError, OpenApiException, OSError, ValueError) as error:
        raise ClusterError(f"the API server cannot be reached: {error!r}") from error
    if not isinstance(answer, dict):
        raise ClusterError("the API server answered with something that is no object")
    return answer


def _refusal(error: ApiException) -> ClusterError:
    detail = f"the API server refused: {error.status} {_message(error.body) or error.reason}"
    if error.status == HTTPStatus.NOT_FOUND:
        return AbsentError(detail)
    if error.status == HTTPStatus.CONFLICT:
        return ConflictError(detail)
    asked = str((error.headers or {}).get("Retry-After", ""))
    return ClusterError(detail, retry_after_s=float(asked) if asked.isdecimal() else 0.0)


def _message(body: str | None) -> str:
    try:
        return str(json.loads(body or "")["message"])[:NOTE_CHARS]
    except (ValueError, TypeError, KeyError):
        return ""


def _record(lease: Mapping[str, Any]) -> LeaseRecord:
    spec = lease.get("spec") or {}
    version = (lease.get("metadata") or {}).get("resourceVersion")
    if not version:
        raise ClusterError("the API server answered with something that is no Lease")
    return LeaseRecord(
        holder=spec.get("holderIdentity") or "",
        duration_s=spec.get("leaseDurationSeconds") or 0,
        transitions=spec.get("leaseTransitions") or 0,
        acquired=spec.get("acquireTime") or "",
        version=version,
    )


def _now() -> str:
    """The time of day as the API writes it: for people only, nothing is decided by it."""
    now = datetime.now(UTC)  # noqa: TID251  # the border
    return now.isoformat(timespec="microseconds").replace("+00:00", "Z")
