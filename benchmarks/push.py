"""How long until Envoy does what was published: push to acknowledgement, push to traffic.

Two engines behind one Envoy on loopback change places: weights 1000 and 1, then 1 and 1000. One
client asks in turn; traffic follows when it gets the first answer of the engine that is preferred
now, so one request (half of it on average, and all of it where the push came just after its
choice) is part of the figure.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from socket import create_server
from typing import TYPE_CHECKING

import aiohttp

from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Snapshot
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.envoy_config import Listener, PoolRoute, bootstrap

if TYPE_CHECKING:
    from collections.abc import Sequence

PUSHES = 100
POOL = PoolRoute("pool")
FILLERS = (0, 98)  # endpoints that only make the table longer


def run() -> dict[str, float]:
    """Measure, and return milliseconds by name; medians over 100 pushes."""
    figures: dict[str, float] = {}
    for fillers in FILLERS:
        figures |= asyncio.run(_measure(fillers))
    return figures


async def _measure(fillers: int) -> dict[str, float]:
    port, admin_port = _free_port(), _free_port()
    options = [EngineOptions(model="left"), EngineOptions(model="right")]
    xds = XdsServer(port=0)
    xds.set_pools({"gateway": [POOL]})
    async with serve(options) as fleet:
        left, right = (Endpoint(f"pod-{port}", "127.0.0.1", port) for port in fleet.ports)
        # Draining, so that nobody connects to them; in the table all the same.
        rest = [Endpoint(f"pod-{i}", f"127.1.0.{i + 1}", 9) for i in range(fillers)]
        await xds.publish(POOL.name, _table(left, right, rest))
        await xds.start()
        config = bootstrap(
            [Listener("gateway", port)], xds=("127.0.0.1", xds.port), admin_port=admin_port
        )
        envoy = EnvoyProcess(config, concurrency=1)
        try:
            await envoy.start()
            await envoy.wait_ready()
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                return await _change_places(xds, session, left, right, rest)
        finally:
            await envoy.stop()
            await xds.stop()


async def _change_places(
    xds: XdsServer,
    session: aiohttp.ClientSession,
    left: Endpoint,
    right: Endpoint,
    rest: Sequence[Endpoint],
) -> dict[str, float]:
    acked_ms, followed_ms, cpu_ms = [], [], []
    for turn in range(PUSHES):
        heavy, light, name = ((right, left, "right"), (left, right, "left"))[turn % 2]
        snapshot = _table(heavy, light, rest)
        cpu_s = _cpu_s()
        pushed_s = time.monotonic()
        await xds.publish(POOL.name, snapshot)
        ack = asyncio.create_task(_acked_at_s(xds, snapshot.version))
        cpu_ms.append((_cpu_s() - cpu_s) * 1e3)
        while await _answered_by(session) != name:
            pass
        followed_ms.append((time.monotonic() - pushed_s) * 1e3)
        acked_ms.append((await ack - pushed_s) * 1e3)
    size = len(rest) + 2
    return {
        f"push_to_ack_{size}_endpoints_ms": statistics.median(acked_ms),
        f"push_to_traffic_{size}_endpoints_ms": statistics.median(followed_ms),
        f"push_to_traffic_{size}_endpoints_p90_ms": statistics.quantiles(followed_ms, n=10)[-1],
        f"publish_cpu_{size}_endpoints_ms": statistics.median(cpu_ms),
    }


def _table(heavy: Endpoint, light: Endpoint, rest: Sequence[Endpoint]) -> Snapshot:
    return Snapshot({heavy: 1000, light: 1, **dict.fromkeys(rest, 500)}, draining=frozenset(rest))


async def _acked_at_s(xds: XdsServer, version: str) -> float:
    await xds.wait_acked(POOL.name, version)
    return time.monotonic()


async def _answered_by(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as answer:
        return str((await answer.json())["data"][0]["id"])


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _free_port() -> int:
    with create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:42} {value:8.2f}")  # noqa: T201  # a command's answer
