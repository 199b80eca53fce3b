"""The load generator against real and broken servers.

What it calls a failure is what the demo counts, and what it sends must not depend on answers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from trimtab.demo.load import COMPLETE, UNFINISHED, Order, Record, start_load
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.ports import StartError
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PATIENCE_S = 20.0
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n'
TOKEN = b'data: {"choices":[{"text":" a"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_post("/{what}", handler)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def drive(urls: list[str], requests: list[Request], patience_s: float) -> list[Record]:
    """Return the last record of every request on every side."""
    order = Order(urls=urls, model="m", requests=requests, patience_s=patience_s)
    latest: dict[tuple[int, int], Record] = {}
    async with start_load(order) as (_, records):
        async for record in records:
            latest[record.side, record.number] = record
    return list(latest.values())


async def test_engines_get_the_same_requests_and_all_answers_are_found_complete() -> None:
    requests = [Request(0.01 * n, 10 + n, 1 + n % 3) for n in range(20)]
    options = [EngineOptions(model="m", speed=50.0) for _ in range(2)]
    async with serve(options) as fleet:
        urls = [f"http://127.0.0.1:{port}/v1/completions" for port in fleet.ports]
        records = await drive(urls, requests, PATIENCE_S)
        prompts = [engine.engine.counters.prompt_tokens_total for engine in fleet.engines]
        outputs = [engine.engine.counters.generation_tokens_total for engine in fleet.engines]
    assert Counter(r.outcome for r in records) == {COMPLETE: 40}
    assert Counter(r.side for r in records) == {0: 20, 1: 20}
    assert prompts == [sum(r.prompt_tokens for r in requests)] * 2
    assert outputs == [sum(r.output_tokens for r in requests)] * 2
    assert all(r.ttft_s is not None and r.end_s is not None for r in records)
    assert all(r.due_s + (r.ttft_s or 0) <= (r.end_s or 0) for r in records)


async def test_each_kind_of_failure_is_told_by_its_name() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        what = request.match_info["what"]
        if what == "busy":
            return web.json_response({"error": {"code": 503}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        match what:
            case "refused-late":
                await response.write(b'data: {"error":{"code":503}}\n\n' + DONE)
            case "broken-late":
                await response.write(TOKEN)
                await response.write(b'data: {"error":{"code":500}}\n\n' + DONE)
            case "short":
                await response.write(TOKEN + USAGE % 1 + DONE)
            case "ends-early":
                await response.write(TOKEN)
            case "cut":
                await response.write(TOKEN)
                assert request.transport is not None
                request.transport.abort()
            case "good":
                await response.write(TOKEN + USAGE % 2 + DONE)
        return response

    expected = {
        "busy": "HTTP 503",
        "refused-late": "error event",
        "broken-late": "error event",
        "short": "wrong token count",
        "ends-early": "cut stream",
        "cut": "cut stream",
        "good": COMPLETE,
    }
    async with listening(answer) as url:
        urls = [f"{url}/{what}" for what in expected]
        records = await drive(urls, [Request(0.0, 1, 2)], PATIENCE_S)
        nobodys_url = url
    gone = await drive([nobodys_url], [Request(0.0, 1, 2)], PATIENCE_S)
    told = {list(expected)[r.side]: r.outcome for r in records}
    assert told == expected
    assert [r.outcome for r in gone] == ["connection refused"]
    assert {r.side for r in records if r.failed} == set(range(6))
    with_token = {list(expected)[r.side] for r in records if r.ttft_s is not None}
    assert with_token >= {"good", "short", "ends-early"}
    assert with_token.isdisjoint({"busy", "refused-late"})


async def test_requests_go_out_on_schedule_while_no_answer_comes() -> None:
    """A closed loop would send the first and wait for ever."""
    arrived = 0

    async def stall(_: web.Request) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        await asyncio.Event().wait()
        raise AssertionError

    requests = [Request(0.01 * n, 5, 5) for n in range(30)]
    async with listening(stall) as url:
        records = await drive([f"{url}/x"] * 2, requests, 1.0)
    assert arrived == 60
    assert Counter(r.outcome for r in records) == {UNFINISHED: 60}
    # What has waited for so long has a TTFT of at least that.
    assert all((r.ttft_s or 0) >= 1.0 for r in records)


async def test_leaving_early_ends_the_generator_and_its_connections() -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def stall(_: web.Request) -> web.StreamResponse:
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        raise AssertionError

    requests = [Request(0.0, 5, 5), Request(1000.0, 5, 5)]
    async with listening(stall) as url:
        order = Order(urls=[f"{url}/x"], model="m", requests=requests, patience_s=1000.0)
        async with start_load(order):
            await arrived.wait()
        await left.wait()


async def test_a_generator_that_breaks_is_not_taken_for_one_that_is_done() -> None:
    """More bytes than memory holds: the process dies before the schedule starts."""
    with pytest.raises(StartError, match=r"trimtab\.demo\.load did not start"):
        await drive(["http://127.0.0.1:1/"], [Request(0.0, -1, 1), Request(0.0, 10**15, 1)], 1.0)
