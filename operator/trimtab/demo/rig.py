"""Three equal fleets, each behind a listener of one Envoy, and the same arrivals at all doors.

The law: the sides differ in nothing but who decides. All have engines of the same speeds, are
watched by the same loop and pass through the same Envoy. On one side Envoy's own policy decides, on
one the weights that the loop publishes, on one the picker with such weights beneath it. Whatever is
started is stopped again in reverse, however the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.scrape import PageScraper, client
from trimtab.adapters.xds import XdsServer
from trimtab.app import picker_process
from trimtab.core.model import Endpoint, Policy, Snapshot
from trimtab.demo.engines import MODEL, start_engines
from trimtab.demo.load import Order, start_load
from trimtab.demo.screen import Screen, SideView, View
from trimtab.demo.summary import RigSummary, Side, percentile, summarize
from trimtab.envoy_config import Listener, PoolRoute, bootstrap
from trimtab.loop import LoopClock, Pool, run_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from trimtab.core.model import Decision, Observation
    from trimtab.envoy_config import Balance
    from trimtab.ports import Publisher
    from trimtab.workload import Request

WEIGHTS, PICKER = OURS = ("weights", "picker")
TITLES = {
    "round_robin": "round robin",
    "least_request": "least request",
    WEIGHTS: "Trimtab weights",
    PICKER: "Trimtab picker",
}

WARM_UP_RATIO = 0.15  # of the schedule: engines start empty, and their speeds are unknown
PATIENCE_S = 60.0  # the longest answers take half of it; an overloaded pod may never end
SCRAPE_TIMEOUT_S = 0.5
EQUAL_WEIGHT = 100

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    heading: str
    requests: Sequence[Request]
    seconds: float
    pods: int
    speed: float
    """Of all engines, against the real one they model."""
    slow_pod: float | None
    """Factor on the speed of the last pod."""
    against: Balance
    period_s: float

    @property
    def warm_up_s(self) -> float:
        return WARM_UP_RATIO * self.seconds

    @property
    def balances(self) -> dict[str, Balance]:
        """How Envoy spreads each side's requests; the side that is beaten, or not, comes first."""
        return {self.against: self.against} | dict.fromkeys(OURS, "least_request")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    sides: tuple[Side, ...]
    rig: RigSummary


async def run(plan: Plan, screen: Screen) -> Outcome:
    """Start everything, send the requests, wait for their answers, stop everything.

    Raises:
        StartError: a part could not be started; what ran already is stopped.
    """
    _allow_many_connections()
    names = tuple(plan.balances)
    sides = tuple(Side(name=name, counted_from_s=plan.warm_up_s) for name in names)
    watch = Watch()
    async with AsyncExitStack() as stack:
        pools = await stack.enter_async_context(start_pools(plan, names))
        xds, urls = await stack.enter_async_context(start_gateway(plan, pools))
        await stack.enter_async_context(start_loops(plan, pools, watch=watch, xds=xds))
        order = Order(
            urls=[f"{urls[name]}/v1/completions" for name in names],
            model=MODEL,
            requests=plan.requests,
            patience_s=PATIENCE_S,
        )
        start_s, records = await stack.enter_async_context(start_load(order))
        cpu = asyncio.create_task(_cpu_ratio(start_s + plan.warm_up_s, start_s + plan.seconds))
        stack.callback(cpu.cancel)
        stack.enter_context(screen)

        def show() -> None:
            elapsed_s = time.monotonic() - start_s
            screen.show(_view(plan, elapsed_s, sides=sides, watch=watch))

        async with _beside(_repeat(show, screen.interval_s)):
            async for record in records:
                sides[record.side].note(record)
            cpu_ratio = await cpu
    lags_s = [record.lag_s for side in sides for record in side.counted]
    rig = RigSummary(schedule_lag_p99_s=percentile(lags_s, 0.99), cpu_ratio=cpu_ratio)
    return Outcome(sides=sides, rig=rig)


# The parts


@asynccontextmanager
async def start_pools(
    plan: Plan, names: Sequence[str]
) -> AsyncIterator[Mapping[str, tuple[Endpoint, ...]]]:
    """Run the engines of every side."""
    speeds = [plan.speed] * plan.pods
    if plan.slow_pod is not None:
        speeds[-1] *= plan.slow_pod
    async with start_engines(speeds * len(names)) as ports:
        yield {
            name: tuple(
                Endpoint(f"pod-{number:0{len(str(plan.pods))}}", "127.0.0.1", port)
                for number, port in enumerate(ports[side * plan.pods :][: plan.pods], start=1)
            )
            for side, name in enumerate(names)
        }


@asynccontextmanager
async def start_gateway(
    plan: Plan, pools: Mapping[str, tuple[Endpoint, ...]]
) -> AsyncIterator[tuple[XdsServer, Mapping[str, str]]]:
    """Run an Envoy with a listener for each pool, and a picker: whom to tell weights, and URLs."""
    xds = XdsServer(port=0)
    await xds.start()
    try:
        for name, endpoints in pools.items():
            await xds.publish(name, Snapshot(dict.fromkeys(endpoints, EQUAL_WEIGHT)))
        xds.set_pools(
            {
                name: [PoolRoute(name, balance=plan.balances[name], picked=name == PICKER)]
                for name in pools
            }
        )
        admin_port, picker_port, telemetry_port, *ports = _free_ports(3 + len(pools))
        listeners = [Listener(name, port) for name, port in zip(pools, ports, strict=True)]
        asked = ("127.0.0.1", picker_port)
        picker = picker_process(
            control=(xds.host, xds.port),
            listen=asked,
            telemetry=("127.0.0.1", telemetry_port),
            log_level="warning",
        )
        envoy = EnvoyProcess(
            bootstrap(listeners, xds=(xds.host, xds.port), admin_port=admin_port, pickers=[asked])
        )
        await picker.start()
        try:
            await envoy.start()
            await envoy.wait_ready()
            yield xds, {door.name: f"http://{door.address}:{door.port}" for door in listeners}
        finally:
            await envoy.stop()
            await picker.stop()
    finally:
        await xds.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@asynccontextmanager
async def start_loops(
    plan: Plan, pools: Mapping[str, tuple[Endpoint, ...]], *, watch: Watch, xds: XdsServer
) -> AsyncIterator[None]:
    """Watch all pools with the real loop; only ours have a publisher."""
    clock = LoopClock()
    policy = Policy(interval_s=plan.period_s)
    async with client() as session:
        loops: list[Coroutine[Any, Any, None]] = []
        for name, endpoints in pools.items():
            timeout_s = min(SCRAPE_TIMEOUT_S, plan.period_s)
            scraper = PageScraper(session, clock, engine="VLLM", timeout_s=timeout_s)
            pool = Pool(name, endpoints, policy, scraper)
            publisher: Publisher = xds if name in OURS else Nobody()
            loops.append(run_pool(pool, publisher=publisher, clock=clock, witness=watch))
        async with _beside(*loops):
            yield


class Watch:
    """The loops' witness: keeps what they decided last, for the screen."""

    def __init__(self) -> None:
        self.decisions: dict[str, Decision] = {}

    def decided(self, pool: str, observation: Observation, decision: Decision) -> None:
        del observation
        self.decisions[pool] = decision

    def published(self, pool: str) -> None:
        """Nothing to show."""

    def failed(self, pool: str, error: Exception) -> None:
        log.error("a tick failed", pool=pool, error=repr(error))

    def ticked(self, pool: str, *, took_s: float, skipped: int) -> None:
        """Nothing to show."""


class Nobody:
    """The publisher of a pool that is only watched."""

    async def publish(self, pool: str, snapshot: Snapshot) -> None:
        """Leave the data plane as it is."""


# What is seen of it


def _view(plan: Plan, elapsed_s: float, *, sides: Sequence[Side], watch: Watch) -> View:
    views = []
    for side in sides:
        decision = watch.decisions.get(side.name)
        endpoints = decision.endpoints if decision else {}
        weights = {e: r.weight if side.name == WEIGHTS else 1 for e, r in endpoints.items()}
        total = sum(weights.values())
        shares = {endpoint: weight / total for endpoint, weight in weights.items()}
        views.append(
            SideView(
                title=TITLES[side.name],
                endpoints=endpoints,
                shares={} if side.name == PICKER else shares,
                summary=summarize(side.counted),
            )
        )
    return View(elapsed_s=elapsed_s, total_s=plan.seconds, warm_up_s=plan.warm_up_s, sides=views)


async def _cpu_ratio(from_s: float, until_s: float) -> float:
    """Measure our share of all cores' time between two moments of the monotonic clock."""
    await asyncio.sleep(from_s - time.monotonic())
    began_s, used_s = time.monotonic(), _cpu_s()
    await asyncio.sleep(until_s - time.monotonic())
    cores = len(os.sched_getaffinity(0))
    return (_cpu_s() - used_s) / (time.monotonic() - began_s) / cores


def _cpu_s() -> float:
    """CPU time that we and our children have used so far; see proc(5)."""
    ticks = 0
    children = " ".join(p.read_text() for p in Path("/proc/self/task").glob("*/children"))
    for pid in ("self", *children.split()):
        with contextlib.suppress(FileNotFoundError):
            # After the command's name, which is in parentheses and may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _allow_many_connections() -> None:
    """Raise our limit of open files and so our children's; an overloaded pod holds hundreds."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _repeat(act: Callable[[], None], interval_s: float) -> None:
    while True:
        act()
        await asyncio.sleep(interval_s)


@asynccontextmanager
async def _beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run them while the context lasts; one that breaks is heard of at its end."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
