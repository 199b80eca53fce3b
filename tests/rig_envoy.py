"""A real gateway on free ports: simulated engines, an xDS server and a stock Envoy before them.

Run as a program it is an xDS server alone, to be killed: `python rig_envoy.py PORT WEIGHTS`.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Snapshot
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.envoy_config import Listener, PoolRoute, bootstrap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from trimtab.engine_sim.server import Fleet

LISTENER = "gateway"
MODEL = "llama"
DEADLINE_S = 20.0  # far above what anything here takes; only a hang meets it
FAST = 50.0  # speed at which an engine's iteration takes a quarter of a millisecond
ONE_POOL = PoolRoute("llama")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Poll a foreign process, which offers no event, until `holds`."""
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():  # noqa: ASYNC110  # no event of ours is set over there
            await asyncio.sleep(0.02)


@dataclass
class Gateway:
    """One Envoy, seen from outside: its clients' door and its admin interface."""

    process: EnvoyProcess
    session: aiohttp.ClientSession
    url: str

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **options) as answer:
            return answer.status, await answer.json()

    async def post(
        self, body: Any, path: str = "/v1/completions", **options: Any
    ) -> tuple[int, Any]:
        what: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            what = {"data": io.BytesIO(body)}  # aiohttp warns of large bytes
        elif not isinstance(body, dict):
            what = {"data": body}
        async with self.session.post(self.url + path, **what, **options) as answer:
            return answer.status, await answer.json()

    def open_stream(self, tokens: int) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        body = {"model": MODEL, "prompt": "tell", "max_tokens": tokens, "ignore_eos": True}
        return self.session.post(f"{self.url}/v1/completions", json=body | {"stream": True})

    async def hosts(self, pool: str = ONE_POOL.name) -> list[dict[str, Any]]:
        """What Envoy's admin interface says of a pool's endpoints."""
        url = f"{self.process.admin_url}/clusters?format=json"
        async with self.session.get(url) as answer:
            clusters = {c["name"]: c for c in (await answer.json())["cluster_statuses"]}
        return list(clusters.get(pool, {}).get("host_statuses", []))

    async def weights(self, pool: str = ONE_POOL.name) -> dict[int, int]:
        """Weights by port."""
        return {_port(host): host["weight"] for host in await self.hosts(pool)}

    async def health(self, pool: str = ONE_POOL.name) -> dict[int, dict[str, Any]]:
        """Health by port."""
        return {_port(host): host["health_status"] for host in await self.hosts(pool)}

    async def tries(self, port: int, pool: str = ONE_POOL.name) -> int:
        """How often Envoy has sent a request to the endpoint or tried to connect to it."""
        (host,) = [host for host in await self.hosts(pool) if _port(host) == port]
        stats = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
        return stats["rq_total"] + stats["cx_total"]

    async def stat(self, name: str) -> int:
        """Read one of Envoy's own counters."""
        url = f"{self.process.admin_url}/stats?format=json&filter={name}$"
        async with self.session.get(url) as answer:
            stats = (await answer.json())["stats"]
        return sum(stat.get("value", 0) for stat in stats if "value" in stat)

    async def split(self, requests: int) -> Counter[str]:
        """Ask in turn; count answers by the model of the engine that gave them."""
        answers = [await self.get("/v1/models") for _ in range(requests)]
        return Counter(body["data"][0]["id"] for _, body in answers)


def _port(host: Mapping[str, Any]) -> int:
    return int(host["address"]["socket_address"]["port_value"])


@dataclass
class Load:
    """Completions, `concurrency` at a time; started requests and their outcome by start order."""

    gateway: Gateway
    started: int = 0
    ended: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)
    """Start number and reason."""
    _progress: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: bool = False

    async def passes(self, requests: int) -> None:
        """Return when so many more requests have started and ended."""
        first, goal = self.started, self.started + requests
        async with asyncio.timeout(DEADLINE_S):
            while self.ended < goal and self.started >= first:
                self._progress.clear()
                await self._progress.wait()

    async def run(self) -> None:
        while not self._stopping:
            self.started += 1
            number = self.started
            try:
                problem = await self._one()
            except (aiohttp.ClientError, ValueError) as error:
                problem = repr(error)
            if problem:
                self.failed.append((number, problem))
            self.ended += 1
            self._progress.set()

    async def _one(self) -> str:
        async with self.gateway.open_stream(tokens=4) as answer:
            text = await answer.text()
        if answer.status == 200 and text.rstrip().endswith("data: [DONE]"):
            return ""
        return f"{answer.status} {text[-200:]}"

    def stop(self) -> None:
        self._stopping = True


@dataclass
class Rig:
    fleet: Fleet
    xds: XdsServer
    gateway: Gateway

    @property
    def endpoints(self) -> list[Endpoint]:
        return endpoints_of(self.fleet.ports)

    async def publish(self, snapshot: Snapshot, pool: str = ONE_POOL.name) -> None:
        """Publish, and return when every Envoy has taken it."""
        await self.xds.publish(pool, snapshot)
        async with asyncio.timeout(DEADLINE_S):
            await self.xds.wait_acked(pool, snapshot.version)

    @asynccontextmanager
    async def load(self, concurrency: int = 4) -> AsyncIterator[Load]:
        load = Load(self.gateway)
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(load.run())
            try:
                yield load
            finally:
                load.stop()


def endpoints_of(ports: Sequence[int]) -> list[Endpoint]:
    return [Endpoint(f"pod-{i}", "127.0.0.1", port) for i, port in enumerate(ports)]


@asynccontextmanager
async def run_gateway(
    *,
    xds_port: int,
    delta: bool = True,
    node: str = "a",
    pickers: Sequence[int] = (),
) -> AsyncIterator[Gateway]:
    """Start an Envoy; it need not be ready, for nobody may have told it anything."""
    port, admin_port = free_ports(2)
    process = EnvoyProcess(
        bootstrap(
            [Listener(LISTENER, port)],
            xds=("127.0.0.1", xds_port),
            admin_port=admin_port,
            node=node,
            delta=delta,
            pickers=[("127.0.0.1", port) for port in pickers],
        ),
        concurrency=1,
    )
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await process.start()
        try:
            yield Gateway(process, session, f"http://127.0.0.1:{port}")
        finally:
            await process.stop()


@asynccontextmanager
async def run_rig(
    models: Sequence[str] = (MODEL, MODEL),
    *,
    pools: Mapping[PoolRoute, Sequence[int]] | None = None,
    delta: bool = True,
    speed: float = FAST,
    pickers: Sequence[int] = (),
) -> AsyncIterator[Rig]:
    """Start an engine per model, all behind one listener; `pools` says which engine is whose."""
    members = {ONE_POOL: range(len(models))} if pools is None else pools
    async with AsyncExitStack() as stack:
        options = [EngineOptions(model=model, speed=speed) for model in models]
        fleet = await stack.enter_async_context(serve(options))
        xds = XdsServer(port=0)
        xds.set_pools({LISTENER: list(members)})
        endpoints = endpoints_of(fleet.ports)
        for pool, indices in members.items():
            await xds.publish(pool.name, Snapshot({endpoints[i]: 1000 for i in indices}))
        await xds.start()
        stack.push_async_callback(xds.stop)
        gateway = await stack.enter_async_context(
            run_gateway(xds_port=xds.port, delta=delta, pickers=pickers)
        )
        await gateway.process.wait_ready()
        yield Rig(fleet, xds, gateway)


async def serve_xds(port: int, weights: Mapping[str, int]) -> None:
    """Serve one pool until killed; `weights` by port, as text because JSON has no other keys."""
    xds = XdsServer(port=port)
    xds.set_pools({LISTENER: [ONE_POOL]})
    endpoints = endpoints_of([int(port) for port in weights])
    snapshot = Snapshot(dict(zip(endpoints, weights.values(), strict=True)))
    await xds.publish(ONE_POOL.name, snapshot)
    await xds.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_xds(int(sys.argv[1]), json.loads(sys.argv[2])))
