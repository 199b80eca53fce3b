"""What it costs to watch 100 endpoints each second: scrape, parse, step, publish, telemetry.

The pages are a captured one of vLLM under load (58 KB) with a counter that moves, served by
another process, so that the CPU time of this one is the watcher's alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import resource
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.adapters import scrape
from trimtab.adapters.telemetry import Telemetry
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Policy
from trimtab.loop import LoopClock, Pool, run_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ENDPOINTS = 100
SECONDS = 15.0
WARM_UP_S = 3.0  # connections and code paths are made once
PAGE = Path(__file__).parent.parent / "tests/fixtures/metrics/vllm-0.32.0-loaded.prom"


def run() -> dict[str, float]:
    return asyncio.run(_watch())


async def _watch() -> dict[str, float]:
    clock = LoopClock()
    xds = XdsServer()
    telemetry = Telemetry(clock, data_plane=xds)
    async with _pages() as ports, scrape.client() as session:
        endpoints = [Endpoint(f"pod-{port}", "127.0.0.1", port) for port in ports]
        pool = Pool("pool", endpoints, Policy(), scrape.PageScraper(session, clock))
        telemetry.expect(pool.name, interval_s=pool.policy.interval_s)
        ticking = asyncio.create_task(run_pool(pool, publisher=xds, clock=clock, witness=telemetry))
        await asyncio.sleep(WARM_UP_S)
        began_s, used_s = time.monotonic(), time.process_time()
        await asyncio.sleep(SECONDS)
        ratio = (time.process_time() - used_s) / (time.monotonic() - began_s)
        ticking.cancel()
        await asyncio.wait([ticking])
        failures = _count(telemetry, "trimtab_pool_scrape_failures_total")
    return {
        "CPU share of one core": ratio,
        "CPU per page, ms": 1000 * ratio / ENDPOINTS,
        "pages that failed": failures,
        "RSS, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _count(telemetry: Telemetry, name: str) -> float:
    metrics = telemetry.registry.collect()
    return sum(s.value for metric in metrics for s in metric.samples if s.name == name)


@asynccontextmanager
async def _pages() -> AsyncIterator[list[int]]:
    """Serve the page on as many ports as there are endpoints, in another process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None  # noqa: S101  # PIPEs were asked for
    assert process.stdout is not None  # noqa: S101
    yield json.loads(await process.stdout.readline())
    process.stdin.close()
    await process.wait()


class _Page(asyncio.Protocol):
    def __init__(self, before: bytes, after: bytes) -> None:
        self._before, self._after = before, after
        self._tokens = itertools.count(10**9)  # ten digits, so that no answer differs in length

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\r\n\r\n") and isinstance(self._transport, asyncio.WriteTransport):
            self._transport.write(self._before + b"%d" % next(self._tokens) + self._after)


async def _serve() -> None:
    before, line, after = re.split(
        rb"(\nvllm:generation_tokens_total.* )[0-9.e+]+", PAGE.read_bytes()
    )
    length = len(before) + len(line) + 10 + len(after)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(
            lambda: _Page(head.encode() + before + line, after), "127.0.0.1", 0
        )
        for _ in range(ENDPOINTS)
    ]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)  # noqa: T201  # to our parent
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
