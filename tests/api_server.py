"""An API server in this process, whose every answer can be spoiled.

It keeps objects with their versions, lists and streams them as Kubernetes does, and remembers what
was asked. Real ones are in `cluster`; this one fails on demand.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

POOLS = "/apis/trimtab.dev/v1alpha1", "inferencepools"
PODS = "/api/v1", "pods"
LEASES = "/apis/coordination.k8s.io/v1", "leases"
EVENTS = "/apis/events.k8s.io/v1", "events"
# Kopf does not begin before it has seen that these exist.
NAMESPACES = "/api/v1", "namespaces"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"
_ALL = (POOLS, PODS, LEASES, EVENTS, NAMESPACES, DEFINITIONS)
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


@dataclass(frozen=True)
class Asked:
    """A request, as RBAC sees it and as it was."""

    verb: str
    resource: str
    namespace: str
    name: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any


class _Event(NamedTuple):
    version: int
    resource: str
    type: str
    item: dict[str, Any]


class ApiServer:
    """Objects by group and version, resource, namespace and name."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.spoil: Callable[[Asked], web.Response | None] = lambda _: None
        """Answers instead of us where it answers."""
        self.delay: Callable[[Asked], float] = lambda _: 0.0
        """Seconds before a request is looked at."""
        self.loses: Callable[[str, dict[str, Any]], bool] = lambda _type, _item: False
        """Whether an event never reaches those who watch."""
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._version = 0
        self._history: list[_Event] = []
        self._compacted = 0
        self._changed = asyncio.Event()
        self._cut = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator[ApiServer]:
        server = cls()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield server
        finally:
            server.cut_streams()
            await runner.cleanup()

    def kubeconfig(self, path: Path) -> Path:
        config = {
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(config))
        return path

    # What happens in the cluster

    def put(self, resource: str, item: Mapping[str, Any]) -> dict[str, Any]:
        """Create or replace an object."""
        meta = item["metadata"]
        key = resource, meta.get("namespace", "team"), meta["name"]
        before = self.objects.get(key, {}).get("metadata", {})
        self._version += 1
        metadata = {
            "uid": before.get("uid", f"uid-{self._version}"),
            "creationTimestamp": "2026-11-25T00:00:00Z",
            **meta,
            "namespace": key[1],
            "resourceVersion": str(self._version),
            "generation": before.get("generation", 0)
            + (item.get("spec") != self.objects.get(key, {}).get("spec")),
        }
        stored = {**item, "metadata": metadata}
        self.objects[key] = stored
        self._tell(resource, "MODIFIED" if before else "ADDED", stored)
        return stored

    def remove(self, resource: str, name: str, namespace: str = "team") -> None:
        item = self.objects.pop((resource, namespace, name))
        self._version += 1
        metadata = {**item["metadata"], "resourceVersion": str(self._version)}
        self._tell(resource, "DELETED", {**item, "metadata": metadata})

    def cut_streams(self, *, forget: bool = False) -> None:
        """End every watch; `forget` what happened so far, so that it must be listed anew."""
        if forget:
            self._compacted = self._version
        self._cut.set()
        self._cut = asyncio.Event()

    def writes(self, resource: str = "") -> list[Asked]:
        reads = {"get", "list", "watch"}
        return [a for a in self.asked if a.verb not in reads and a.resource.startswith(resource)]

    def _tell(self, resource: str, type_: str, item: dict[str, Any]) -> None:
        self._history.append(_Event(self._version, resource, type_, item))
        self._changed.set()
        self._changed = asyncio.Event()

    # What is asked

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        depth = 2 if parts[0] == "api" else 3
        if len(parts) <= depth:
            return web.json_response(_discovery(request.path))
        rest = parts[depth:]
        namespace = ""
        if rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        resource, name, sub = (*rest, "", "")[:3]
        body = json.loads(await request.read() or "null")
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(
            request.method, "get" if name else "watch" if "watch" in request.query else "list"
        )
        full = f"{resource}/{sub}" if sub else resource
        asked = Asked(verb, full, namespace, name, dict(request.query), dict(request.headers), body)
        self.asked.append(asked)
        await asyncio.sleep(self.delay(asked))
        if (answer := self.spoil(asked)) is not None:
            return answer
        if verb == "watch":
            return await self._stream(request, asked)
        return self._serve(asked)

    def _serve(self, asked: Asked) -> web.Response:
        resource = asked.resource.partition("/")[0]
        if asked.verb == "list":
            items = [i for k, i in self.objects.items() if k[0] == resource]
            metadata = {"resourceVersion": str(self._version)}
            return web.json_response({"metadata": metadata, "items": items})
        metadata = (asked.body or {}).get("metadata", {})
        name = asked.name or metadata.get("name") or f"{metadata['generateName']}{self._version}"
        there = self.objects.get((resource, asked.namespace, name))
        if (there is None) != (asked.verb == "create"):
            return refuse(409 if there else 404)
        version = metadata.get("resourceVersion")
        if asked.verb == "update" and there and version != there["metadata"]["resourceVersion"]:
            return refuse(409)
        if asked.verb == "patch":
            there = self.put(resource, {**(there or {}), "status": asked.body["status"]})
        elif asked.verb in {"create", "update"}:
            there = self.put(resource, {**asked.body, "metadata": {**metadata, "name": name}})
        return web.json_response(there, status=201 if asked.verb == "create" else 200)

    async def _stream(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        version, cut = int(asked.query.get("resourceVersion", 0)), self._cut
        if version < self._compacted:
            gone = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
            await response.write(json.dumps(gone).encode() + b"\n")
            return response
        while not cut.is_set():
            changed = self._changed
            for event in [e for e in self._history if e.version > version]:
                version = event.version
                if event.resource == asked.resource and not self.loses(event.type, event.item):
                    line = json.dumps({"type": event.type, "object": event.item})
                    await response.write(line.encode() + b"\n")
            await asyncio.wait(
                [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(cut.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
        return response


def refuse(status: int, message: str = "because", **headers: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": status, "message": message}
    return web.json_response(body, status=status, headers=headers)


def _discovery(path: str) -> dict[str, Any]:
    resources = [(group, name) for group, name in _ALL if group == path]
    if path == "/apis":
        named = {group for group, _ in _ALL if group.startswith("/apis/")}
        return {"groups": [_group(*each.split("/")[2:]) for each in sorted(named)]}
    return {
        "versions": ["v1"],
        "resources": [
            {"name": name, "kind": name, "namespaced": True, "verbs": _VERBS, "singularName": name}
            for _, name in resources
        ],
    }


def _group(name: str, version: str) -> dict[str, Any]:
    versions = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [versions], "preferredVersion": versions}
