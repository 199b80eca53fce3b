"""What users notice when the picker or the control plane dies, beside a pool that goes by weights.

Two equal fleets get the same arrivals through one Envoy: one is picked for, the other goes by live
weights. In the middle something is done to the picker or to the control plane. Told are failed
requests, the TTFT p99 of requests that came meanwhile (as a ratio to the other fleet's, and after it
as a ratio to the one before), and how far the picker's count of requests in flight is from the
engines' own 2 s later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from benchmarks.picker import _free_ports
from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.scrape import PageScraper, client
from trimtab.adapters.xds import XdsServer
from trimtab.app import picker_process
from trimtab.core.model import Endpoint, Policy, Snapshot
from trimtab.demo.engines import MODEL, start_engines
from trimtab.demo.load import Order, Record, start_load
from trimtab.demo.rig import Watch
from trimtab.demo.summary import percentile
from trimtab.envoy_config import Listener, PoolRoute, bootstrap
from trimtab.loop import LoopClock, Pool, run_pool
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from trimtab.children import Child

SECONDS, BEGIN_S, END_S, AGAIN_S = 26.0, 10.0, 16.0, 18.0
WARM_S = 3.0
PODS = 8
RATE_PER_S = 80.0
PROMPT_TOKENS = (50, 1500)
OUTPUT_TOKENS = (10, 80)
SPEED = 0.6  # of an A100, with which this is 0.7 of what the fleet can do
POOLS = ("weights", "picked")


@dataclass(frozen=True, slots=True)
class Parts:
    """What can be made to fail."""

    pickers: Sequence[Child]
    control: Sequence[asyncio.Task[None]]
    xds: XdsServer


async def _kill(parts: Parts) -> None:
    _send(parts.pickers[0], signal.SIGKILL)


async def _hang(parts: Parts) -> None:
    _send(parts.pickers[0], signal.SIGSTOP)
    await asyncio.sleep(5)
    _send(parts.pickers[0], signal.SIGCONT)


async def _restart_loop(parts: Parts) -> None:
    for _ in range(6):
        _send(parts.pickers[0], signal.SIGKILL)
        await asyncio.sleep(1)


async def _lose_the_active(parts: Parts) -> None:
    await parts.pickers[0].stop()


async def _lose_control(parts: Parts) -> None:
    for loop in parts.control:
        loop.cancel()
    await parts.xds.stop()


FAULTS: dict[str, Callable[[Parts], Awaitable[None]]] = {
    "killed": _kill,
    "hung_5s": _hang,
    "restart_loop": _restart_loop,
    "standby": _lose_the_active,
    "control_dead": _lose_control,
}


def _send(picker: Child, number: signal.Signals) -> None:
    if picker.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it waits to be started again
            os.kill(picker.pid, number)


def run() -> dict[str, float]:
    """Measure, and return figures by name."""
    figures: dict[str, float] = {}
    for name, fault in FAULTS.items():
        for figure, value in asyncio.run(_measure(fault)).items():
            figures[f"{name}_{figure}"] = value
    return figures


def _requests() -> list[Request]:
    chance = random.Random(7)  # noqa: S311  # the same arrivals for each fault
    at_s, requests = 0.0, []
    while (at_s := at_s + chance.expovariate(RATE_PER_S)) < SECONDS:
        requests.append(
            Request(at_s, chance.randint(*PROMPT_TOKENS), chance.randint(*OUTPUT_TOKENS))
        )
    return requests


async def _measure(fault: Callable[[Parts], Awaitable[None]]) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        ports = await stack.enter_async_context(start_engines([SPEED] * 2 * PODS))
        pools = {
            name: [Endpoint(f"pod-{p}", "127.0.0.1", p) for p in ports[side * PODS :][:PODS]]
            for side, name in enumerate(POOLS)
        }
        xds = XdsServer(port=0)
        doors = dict(zip(POOLS, _free_ports(2), strict=True))
        xds.set_pools({name: [PoolRoute(name, picked=name == "picked")] for name in POOLS})
        for name, endpoints in pools.items():
            await xds.publish(name, Snapshot(dict.fromkeys(endpoints, 100)))
        await xds.start()
        stack.push_async_callback(xds.stop)
        admin_port, *asked = _free_ports(3)
        telemetry = _free_ports(2)
        pickers = [
            picker_process(
                control=(xds.host, xds.port),
                listen=("127.0.0.1", port),
                telemetry=("127.0.0.1", page),
                log_level="error",
            )
            for port, page in zip(asked, telemetry, strict=True)
        ]
        count = 2 if fault is _lose_the_active else 1
        for picker in pickers[:count]:
            await picker.start()
            stack.push_async_callback(picker.stop)
        envoy = EnvoyProcess(
            bootstrap(
                [Listener(name, port) for name, port in doors.items()],
                xds=(xds.host, xds.port),
                admin_port=admin_port,
                pickers=[("127.0.0.1", port) for port in asked[:count]],
            )
        )
        await envoy.start()
        stack.push_async_callback(envoy.stop)
        await envoy.wait_ready()
        session = await stack.enter_async_context(client())
        clock = LoopClock()
        loops = [
            asyncio.create_task(
                run_pool(
                    Pool(name, endpoints, Policy(), PageScraper(session, clock)),
                    publisher=xds,
                    clock=clock,
                    witness=Watch(),
                )
            )
            for name, endpoints in pools.items()
        ]
        stack.callback(lambda: [loop.cancel() for loop in loops])
        order = Order(
            urls=[f"http://127.0.0.1:{port}/v1/completions" for port in doors.values()],
            model=MODEL,
            requests=_requests(),
            patience_s=30,
        )
        start_s, records = await stack.enter_async_context(start_load(order))
        answering = telemetry[count - 1]
        script = asyncio.create_task(
            _act(fault, Parts(pickers[:count], loops, xds), start_s, answering, pools["picked"])
        )
        last: dict[tuple[int, int], Record] = {}
        async for record in records:
            last[record.side, record.number] = record
        wrong_ratio = await script
    return _figures(last.values()) | {"in_flight_wrong_ratio": wrong_ratio}


async def _act(
    fault: Callable[[Parts], Awaitable[None]],
    parts: Parts,
    start_s: float,
    page: int,
    endpoints: Sequence[Endpoint],
) -> float:
    await asyncio.sleep(start_s + BEGIN_S - time.monotonic())
    await fault(parts)
    await asyncio.sleep(start_s + AGAIN_S - time.monotonic())
    wrong = []
    async with aiohttp.ClientSession() as session:
        for _ in range(10):
            urls = [f"http://127.0.0.1:{endpoint.port}/metrics" for endpoint in endpoints]
            pages = await asyncio.gather(
                *(_text(session, url) for url in [f"http://127.0.0.1:{page}/metrics", *urls])
            )
            ours = _sum("trimtab_picker_endpoint_requests", pages[:1])
            theirs = _sum("vllm:num_requests_(?:running|waiting)", pages[1:])
            wrong.append(abs(ours - theirs) / max(1.0, theirs))
            await asyncio.sleep(0.2)
    return sum(wrong) / len(wrong)


async def _text(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        return await answer.text()


def _sum(name: str, pages: Iterable[str]) -> float:
    pattern = re.compile(rf"^{name}{{[^}}]*}} (\S+)$", re.MULTILINE)
    return sum(float(value) for page in pages for value in pattern.findall(page))


def _figures(records: Iterable[Record]) -> dict[str, float]:
    def p99_s(side: int, begin_s: float, end_s: float) -> float:
        ttfts_s = [
            r.ttft_s
            for r in records
            if r.side == side and r.ttft_s is not None and begin_s <= r.due_s < end_s
        ]
        return percentile(ttfts_s, 0.99) or float("nan")

    records = list(records)
    return {
        "failed": float(sum(r.failed for r in records if r.side == 1)),
        "ttft_p99_to_weights": p99_s(1, BEGIN_S, END_S) / p99_s(0, BEGIN_S, END_S),
        "ttft_p99_after_to_before": p99_s(1, AGAIN_S, SECONDS) / p99_s(1, WARM_S, BEGIN_S),
        "ttft_p99_before_to_weights": p99_s(1, WARM_S, BEGIN_S) / p99_s(0, WARM_S, BEGIN_S),
    }
