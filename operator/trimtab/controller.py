"""`trimtab operator`: every pool of a cluster served as the API server has it.

Every replica watches, decides and serves xDS; only the holder of the Lease writes. So readiness
says that this replica serves, never that it leads, and a replica that goes takes nothing along.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import Gauge

from trimtab.adapters import scrape
from trimtab.adapters.kube import KubeApi, own_namespace
from trimtab.adapters.telemetry import Telemetry
from trimtab.adapters.watch import Watch
from trimtab.adapters.xds import XdsServer
from trimtab.app import GATEWAY, Control, Wanted, route_of, told, until_told
from trimtab.core.conditions import Facts
from trimtab.leadership import Leadership
from trimtab.loop import LoopClock
from trimtab.registry import Kind, Registry
from trimtab.reporting import Reports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from trimtab.app import Address
    from trimtab.core.model import Decision
    from trimtab.envoy_config import PoolRoute
    from trimtab.registry import Pool, Served

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What the command line says. Addresses are (host, port)."""

    xds: Address
    telemetry: Address
    watch_namespace: str = ""
    """The only namespace whose pools are served; empty: all."""
    pod_selector: str = ""
    """Labels without which pods are not even looked at; empty: all are."""
    namespace: str = ""
    """Where the Lease is; empty: where this runs."""
    lease: str = "trimtab"


class Cluster:
    """The registry, told by Kopf's thread and read in ours. Telemetry's source."""

    def __init__(self, options: Operator) -> None:
        self.registry = Registry()
        self.changed = asyncio.Event()
        self.synced = False
        """Whether everything is known, and followed."""
        self.watch = Watch(
            self, namespace=options.watch_namespace, pod_selector=options.pod_selector
        )
        self._loop = asyncio.get_running_loop()

    @property
    def stale(self) -> list[str]:
        return self.watch.stale

    def told(self, kind: str, item: Mapping[str, Any], *, gone: bool) -> None:
        self._bring(partial(self.registry.told, Kind(kind), item, gone=gone))

    def listed(self, kind: str, items: Iterable[Mapping[str, Any]], *, version: str) -> None:
        self._bring(partial(self.registry.listed, Kind(kind), items, version=version))

    def _bring(self, word: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(self._hear, word)

    def _hear(self, word: Callable[[], None]) -> None:
        word()
        self.changed.set()


class Knowledge:
    """What is known of a pool, gathered from where it is known."""

    def __init__(self, registry: Registry, control: Control, xds: XdsServer) -> None:
        self._registry = registry
        self._control = control
        self._xds = xds

    def decision(self, pool: Pool) -> Decision | None:
        loop = self._control.loop(pool.key)
        return loop.decision if loop else None

    def facts(self, pool: Pool) -> Facts:
        loop = self._control.loop(pool.key)
        served = self._registry.served().get(pool.key)
        pods = served.pods if served else ()
        accepted, refusal = self._xds.standing(pool.key)
        return Facts(
            generation=pool.generation,
            complaint=pool.complaint,
            pods=len(pods),
            unready=[pod.name for pod in pods if not pod.ready and not pod.leaving],
            nodes={pod.name: pod.node for pod in pods if pod.node},
            refused=loop.state.refused if loop else (),
            gateways=self._xds.connected,
            accepted=accepted,
            refusal=refusal,
        )


async def operator(options: Operator) -> None:
    """Serve the cluster's pools until SIGTERM or SIGINT.

    Raises:
        StartError: a part could not be started; none is left running.
    """
    await until_told(_operator(options))


async def _operator(options: Operator) -> None:
    clock = LoopClock()
    cluster = Cluster(options)
    xds = XdsServer(*options.xds)
    telemetry = Telemetry(clock, data_plane=xds, source=cluster)
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    jitter = random.SystemRandom().random
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(
            KubeApi.connect(
                identity=identity, lease=(options.namespace or own_namespace(), options.lease)
            )
        )
        await stack.enter_async_context(telemetry.serve(*options.telemetry))
        await xds.start()
        stack.push_async_callback(xds.stop)
        session = await stack.enter_async_context(scrape.client())
        cluster.watch.start()
        stack.push_async_callback(cluster.watch.stop)
        leadership = Leadership(api, identity=identity, clock=clock, jitter=jitter)
        stack.push_async_callback(leadership.release)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        stack.callback(telemetry.hold, "leaving")
        control = Control(group, session=session, publisher=xds, telemetry=telemetry, clock=clock)
        reports = Reports(
            cluster.registry,
            Knowledge(cluster.registry, control, xds),
            api,
            may_write=lambda: cluster.synced and leadership.may_write,
            clock=clock,
            wall_s=time.time,  # noqa: TID251  # for people
            jitter=jitter,
        )
        _measure(telemetry, cluster, leadership)
        group.create_task(leadership.run(), name="lease")
        group.create_task(reports.run(), name="reports")
        await _follow(cluster, control=control, xds=xds)


def _measure(telemetry: Telemetry, cluster: Cluster, leadership: Leadership) -> None:
    for name, text, look in (
        ("leader", "1 for the replica that writes.", lambda: leadership.may_write),
        ("watch_failures", "Failures of the watch.", lambda: cluster.watch.failures_total),
    ):
        Gauge(f"trimtab_{name}", text, registry=telemetry.registry).set_function(look)


async def _follow(cluster: Cluster, *, control: Control, xds: XdsServer) -> None:
    """Make loops and Envoys follow the cluster, for ever. Nothing happens before all is known."""
    routes: list[PoolRoute] | None = None
    while True:
        await cluster.changed.wait()
        cluster.changed.clear()
        if not cluster.registry.synced:
            continue
        served = cluster.registry.served().values()
        before, routes = routes, _routes(served)
        if routes != before:
            xds.set_pools({GATEWAY: routes})
        await control.follow(
            Wanted(each.pool.key, each.spec, each.endpoints, each.draining) for each in served
        )
        if not cluster.synced:
            cluster.synced = True
            log.info("ready", pools=len(served), xds=told((xds.host, xds.port)))


def _routes(served: Iterable[Served]) -> list[PoolRoute]:
    """Say which requests belong to which pool; of two that claim the same, the older has them."""
    return [
        route_of(each.pool.key, each.spec, models=(each.pool.name,))
        for each in sorted(served, key=lambda each: (each.pool.created, each.pool.key))
    ]
