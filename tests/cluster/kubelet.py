"""A kubelet whose containers are simulated engines: a Deployment in, answering pods out.

It serves all nodes, and the pods whose image is IMAGE; their arguments are those of
`python -m trimtab.engine_sim`, so the same manifest would run in a real container. For each pod it
starts the engines on the pod's own address and tells by annotation whether they are healthy; kwok
makes status of that (kwok.yaml). A deleted pod lives as a real one does: it serves on during
`preStop.sleep`, then takes no new connection (SIGTERM), lets streams finish, and is gone when they
have; when the grace period is over kwok deletes it and what still runs is cut (SIGKILL).

Everything is level-triggered: after an outage of the API server it lists again, and goes on.
Run as `python -m cluster.kubelet KUBECONFIG`. The annotation SWITCHES changes a running engine as
`PUT /sim/switches` on its address does; only the annotation can revive a crashed one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import uvloop

from trimtab.engine_sim.__main__ import main as engine_command
from trimtab.engine_sim.server import EngineOptions, EngineServer, serve
from trimtab.ports import StartError

IMAGE = "trimtab.test/engine-sim:1"
READY = "trimtab.test/ready"
SWITCHES = "trimtab.test/switches"
PROBE_S = 0.1
RETRY_S = 0.2
ANSWER_S = 5.0  # a hanging API server must not block the probes for longer
WATCH_LINE_BYTES = 1 << 20  # an object is at most that large

log = logging.getLogger("kubelet")


@dataclass(eq=False)
class Pod:
    """One pod that runs here."""

    namespace: str
    name: str
    uid: str
    address: str
    options: list[EngineOptions]
    reported: bool | None
    """What the annotation says as far as we know; None before it was ever set."""
    switches: str = "{}"
    engines: tuple[EngineServer, ...] = ()
    told_to_end: asyncio.Event = field(default_factory=asyncio.Event)
    pre_stop_s: float = 0.0
    life: asyncio.Task[None] | None = None

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    @property
    def healthy(self) -> bool:
        """What a probe of `/health` would find, on every port."""
        return bool(self.engines) and all(
            engine.switches.ready and not engine.switches.crashed for engine in self.engines
        )


class Kubelet:
    """Makes what runs here equal to what the API server says should."""

    def __init__(self, session: aiohttp.ClientSession, parent: asyncio.TaskGroup) -> None:
        self._session = session
        self._parent = parent
        self._pods: dict[str, Pod] = {}

    async def watch(self) -> None:
        """Follow the pods for ever, from a fresh list after each interruption."""
        while True:
            try:
                await self._follow(await self._list())
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("watch ended: %r", error)
            await asyncio.sleep(RETRY_S)

    async def probe(self) -> None:
        """Report readiness for ever, where what was reported is not what is."""
        while True:
            stale = [
                pod for pod in self._pods.values() if pod.engines and pod.reported != pod.healthy
            ]
            await asyncio.gather(*map(self._report, stale))
            await asyncio.sleep(PROBE_S)

    async def _list(self) -> str:
        answer = await self._call("GET", "/api/v1/pods")
        found = {pod["metadata"]["uid"] for pod in answer["items"]}
        for uid in self._pods.keys() - found:
            self._forget(uid)
        for pod in answer["items"]:
            self._see(pod)
        return str(answer["metadata"]["resourceVersion"])

    async def _follow(self, version: str) -> None:
        query = {"watch": "true", "resourceVersion": version}
        forever = aiohttp.ClientTimeout(total=None)
        async with self._session.get("/api/v1/pods", params=query, timeout=forever) as answer:
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":  # most likely the version is too old: list again
                    log.warning("watch refused: %s", event["object"].get("message"))
                    return
                if event["type"] == "DELETED":
                    self._forget(event["object"]["metadata"]["uid"])
                else:
                    self._see(event["object"])

    def _see(self, what: dict[str, Any]) -> None:
        metadata, address = what["metadata"], what["status"].get("podIP")
        container = next((c for c in what["spec"]["containers"] if c["image"] == IMAGE), None)
        if container is None or not address:
            return
        annotations = metadata.get("annotations", {})
        pod = self._pods.get(metadata["uid"])
        if pod is None:
            if "deletionTimestamp" in metadata:
                return
            pod = Pod(
                namespace=metadata["namespace"],
                name=metadata["name"],
                uid=metadata["uid"],
                address=address,
                options=_options(container.get("args", ())),
                reported=True if READY in annotations else None,
                pre_stop_s=_pre_stop_s(container),
            )
            self._pods[pod.uid] = pod
            pod.life = self._parent.create_task(self._live(pod), name=pod.path)
        if pod.switches != (switches := annotations.get(SWITCHES, "{}")):
            pod.switches = switches
            self._parent.create_task(_switch(pod))
        if "deletionTimestamp" in metadata:
            pod.told_to_end.set()

    def _forget(self, uid: str) -> None:
        """End what still runs of a pod that is gone, as SIGKILL would."""
        if (pod := self._pods.pop(uid, None)) and pod.life:
            pod.life.cancel()

    async def _live(self, pod: Pod) -> None:
        async with AsyncExitStack() as stack:
            while not pod.engines:
                try:
                    fleet = await stack.enter_async_context(serve(pod.options, host=pod.address))
                    pod.engines = fleet.engines
                except StartError as error:  # the address may be an ended pod's, a moment ago
                    log.warning("%s: %s", pod.path, error)
                    await asyncio.sleep(RETRY_S)
            await _switch(pod)
            await pod.told_to_end.wait()
            await asyncio.sleep(pod.pre_stop_s)
            await asyncio.gather(*map(_drain, pod.engines))
        await self._remove(pod)

    async def _report(self, pod: Pod) -> None:
        healthy = pod.healthy
        change = {"uid": pod.uid, "annotations": {READY: "true" if healthy else "false"}}
        try:
            await self._call("PATCH", pod.path, {"metadata": change})
        except (aiohttp.ClientError, TimeoutError) as error:  # gone, or the next probe tells it
            log.warning("%s: readiness not told: %r", pod.path, error)
        else:
            pod.reported = healthy

    async def _remove(self, pod: Pod) -> None:
        """Tell the API server that a deleted pod has ended, until it says that it is gone."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}}
        while pod.uid in self._pods:
            try:
                await self._call("DELETE", pod.path, body)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("%s: not removed: %r", pod.path, error)
            await asyncio.sleep(RETRY_S)

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {
            "Content-Type": "application/merge-patch+json"
            if method == "PATCH"
            else "application/json"
        }
        async with self._session.request(method, path, json=body, headers=headers) as answer:
            return await answer.json()


async def _drain(engine: EngineServer) -> None:
    """Do on behalf of an engine what a web server does on SIGTERM: finish, and take nothing new."""
    if engine._listener is not None:
        engine._listener.close()
        engine._server.pre_shutdown()  # connections end after their request
        for connection in engine._server.connections:
            if not connection._request_in_progress:
                connection.force_close()  # aiohttp would leave it open, and deaf
    while engine._server.connections:  # noqa: ASYNC110  # aiohttp has no event for the last one
        await asyncio.sleep(PROBE_S)


async def _switch(pod: Pod) -> None:
    try:
        for engine in pod.engines:
            await engine.switch(**json.loads(pod.switches))
    except (ValueError, TypeError, StartError) as error:
        log.warning("%s: %s %s: %s", pod.path, SWITCHES, pod.switches, error)


def _options(arguments: list[str]) -> list[EngineOptions]:
    """Read a container's arguments as the engine's own command does."""
    try:
        given = engine_command.make_context(IMAGE, list(arguments)).params
    except click.ClickException as error:
        log.warning("not started: %s %s: %s", IMAGE, arguments, error.format_message())
        return []
    ports: list[int] = given["ports"]
    common = {name: given[name] for name in ("model", "speed", "stream_interval")}
    return [EngineOptions(port=port, **common) for port in ports]


def _pre_stop_s(container: dict[str, Any]) -> float:
    hook = container.get("lifecycle", {}).get("preStop", {})
    return float(hook.get("sleep", {}).get("seconds", 0))


async def run(config: dict[str, Any]) -> None:
    """Serve the cluster of a kubeconfig until killed."""
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    async with (
        aiohttp.ClientSession(
            cluster["server"],
            headers={"Authorization": f"Bearer {user['token']}"},
            connector=aiohttp.TCPConnector(
                ssl=ssl.create_default_context(cafile=cluster["certificate-authority"])
            ),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            raise_for_status=True,
            read_bufsize=WATCH_LINE_BYTES,
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        kubelet = Kubelet(session, group)
        group.create_task(kubelet.watch())
        group.create_task(kubelet.probe())


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s")
    uvloop.run(run(json.loads(Path(sys.argv[1]).read_text())))
