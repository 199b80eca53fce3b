"""One engine model: the simulator and the simulated server give the same times to first token."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import aiohttp
import pytest

from trimtab.engine_sim.model import EngineSpec
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.sim.fleet import Fleet, OpenLoop
from trimtab.sim.report import quantile
from trimtab.sim.routers import RoundRobin
from trimtab.workload import WORKLOADS, Request, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINES = 2
LOAD_PER_S = 12.0  # 0.7 of what two engines can do with such requests
SECONDS = 12.0


async def _served(requests: Sequence[Request]) -> list[float]:
    """TTFT of each request, from the moment it was due, in turns over real HTTP and real time."""
    loop = asyncio.get_running_loop()

    async def ask(session: aiohttp.ClientSession, url: str, request: Request) -> float:
        due_s = start_s + request.at_s
        await asyncio.sleep(due_s - loop.time())
        body = {
            "model": "simulated",
            "prompt": [1] * request.prompt_tokens,
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200
            await response.content.readany()
            ttft_s = loop.time() - due_s
            await response.read()
            return ttft_s

    options = [EngineOptions(model="simulated") for _ in range(ENGINES)]
    connector = aiohttp.TCPConnector(limit=0)
    async with serve(options) as fleet, aiohttp.ClientSession(connector=connector) as session:
        start_s = loop.time() + 0.2
        return await asyncio.gather(
            *(
                ask(session, fleet.engines[number % ENGINES].url, request)
                for number, request in enumerate(requests)
            )
        )


async def test_the_simulated_server_and_the_simulator_agree() -> None:
    """Same arrivals, no proxy between: TTFT within 10 % at the median and at the 99th percentile."""
    rng = Random(3)  # noqa: S311  # traffic, not secrets
    drawn = draw(WORKLOADS["code"], rate_per_s=LOAD_PER_S, seconds=SECONDS, rng=rng)
    requests = [r._replace(output_tokens=min(r.output_tokens, 60)) for r in drawn]
    fleet = Fleet([1.0] * ENGINES, router=RoundRobin(), spec=EngineSpec())
    simulated_s = sorted(t.ttft_s for t in fleet.run(OpenLoop(requests)))
    served_s = sorted(await _served(requests))
    assert len(served_s) > 100
    for level in (0.5, 0.99):
        assert quantile(served_s, level) == pytest.approx(quantile(simulated_s, level), rel=0.1)
