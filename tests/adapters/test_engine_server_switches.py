"""What can be made to go wrong with a simulated engine, and how it comes back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from engines import DEADLINE_S, MODEL, events_of, running, value_of
from trimtab.engine_sim.server import EngineOptions, MetricsMode, serve
from trimtab.ports import StartError

STUCK = 1e-6  # a speed at which no iteration ends while a test runs


async def test_switches_are_changed_and_shown_over_http() -> None:
    async with running() as rig:
        async with rig.session.put("/sim/switches", json={"speed": 0.4}) as answer:
            assert answer.status == 200
        async with rig.session.get("/sim/switches") as answer:
            shown = await answer.json()

        assert shown["speed"] == rig.engine.switches.speed == rig.engine.engine.speed == 0.4
        assert shown["metrics"] == "normal"


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b'{"speed": 0}', b'{"speed": "NaN"}', b'{"metrics": "odd"}', b'{"x": 1}']
)
async def test_a_wrong_switch_changes_nothing(body: bytes) -> None:
    async with running() as rig:
        before = rig.engine.switches
        async with rig.session.put("/sim/switches", data=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"]

        assert rig.engine.switches == before


async def test_a_neighbour_is_addressed_by_its_port() -> None:
    async with serve([EngineOptions(model=MODEL)] * 2) as fleet, aiohttp.ClientSession() as session:
        one, other = fleet.engines
        url = f"{one.url}/sim/switches"
        async with session.put(url, params={"port": other.port}, json={"speed": 2}) as answer:
            assert answer.status == 200
        async with session.put(url, params={"port": 1}, json={"speed": 2}) as answer:
            assert answer.status == 404

        assert (one.switches.speed, other.switches.speed) == (1, 2)


async def test_half_the_speed_takes_twice_the_time() -> None:
    async with running(speed=1.0) as rig:
        sums_s = []
        for speed in (1.0, 0.5):
            await rig.engine.switch(speed=speed)
            await rig.ask(prompt=[0] * 100, max_tokens=1)
            sums_s.append(await rig.value("vllm:request_prefill_time_seconds_sum"))

    assert sums_s[1] - sums_s[0] == pytest.approx(2 * sums_s[0])


async def test_a_frozen_page_shows_what_was() -> None:
    async with running() as rig:
        await rig.ask(prompt=[0] * 100)
        await rig.engine.switch(metrics=MetricsMode.FROZEN)
        before = await rig.page()
        await rig.ask(prompt=[0] * 100)
        assert await rig.page() == before
        await rig.engine.switch(metrics="normal")

        assert value_of(before, "vllm:prompt_tokens_total") == 100
        assert await rig.value("vllm:prompt_tokens_total") == 200


async def test_garbage_is_neither_text_nor_metrics() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="garbage")
        async with rig.session.get("/metrics") as answer:
            assert answer.status == 200
            with pytest.raises(UnicodeDecodeError):
                (await answer.read()).decode()


async def test_a_missing_page_is_not_found() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="missing")
        async with rig.session.get("/metrics") as answer:
            assert answer.status == 404


async def test_a_slow_page_takes_its_time() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="slow", metrics_delay_s=0.2)
        asked_s = time.monotonic()
        await rig.page()

        assert time.monotonic() - asked_s >= 0.19


async def test_a_huge_page_is_larger_than_anybody_reads() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="huge")
        async with rig.session.get("/metrics") as answer:
            assert await answer.content.readexactly(2**20)
            assert answer.content_length is None


async def test_a_redirect_leads_to_a_page_that_would_do() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="redirect")
        async with rig.session.get("/metrics", allow_redirects=False) as answer:
            assert answer.status == 307
        assert value_of(await rig.page(), "vllm:num_requests_running") == 0


async def test_a_renamed_page_has_none_of_the_names() -> None:
    async with running() as rig:
        await rig.engine.switch(metrics="renamed")
        page = await rig.page()

    assert "vllm:" not in page
    assert value_of(page, "renamed:num_requests_running") == 0


async def test_an_engine_that_is_not_ready_says_so_and_serves_on() -> None:
    async with running() as rig:
        await rig.engine.switch(ready=False)
        async with rig.session.get("/health") as answer:
            assert answer.status == 503
        assert (await rig.ask(prompt="Hi"))[0] == 200


@pytest.mark.parametrize(
    ("limit", "reason", "accepted"),
    [
        ({"max_num_queued_reqs": 2}, "max_num_queued_reqs", 2),
        ({"max_num_queued_tokens": 25}, "max_num_queued_tokens", 3),
    ],
)
async def test_over_its_limit_an_engine_rejects(
    limit: dict[str, Any], reason: str, accepted: int
) -> None:
    """As vLLM: a limit is compared with what is there already, so the last may go over it."""
    body = {"prompt": [0] * 10, "stream": True}
    async with running(speed=STUCK) as rig:
        await rig.engine.switch(**limit)
        answers = [await rig.session.post("/v1/completions", json=body) for _ in range(5)]

        assert [a.status for a in answers] == [200] * accepted + [503] * (5 - accepted)
        error = (await answers[-1].json())["error"]
        assert (error["code"], error["type"]) == (503, "Service Unavailable")
        page = await rig.page()
        rejected = value_of(page, "vllm:admission_rejections_total", reason=reason)
        assert rejected == 5 - accepted
        for answer in answers:
            answer.close()


async def test_a_share_of_rejected_streams_is_told_by_an_event() -> None:
    async with running() as rig:
        await rig.engine.switch(max_num_queued_reqs=0, rejection_event_ratio=0.5)
        statuses = []
        for _ in range(4):
            body = {"prompt": "Hi", "stream": True}
            async with rig.session.post("/v1/completions", json=body) as answer:
                statuses.append(answer.status)
                if answer.status == 200:
                    [event] = events_of(await answer.text())
                    assert event["error"]["code"] == 503
        whole, _ = await rig.ask(prompt="Hi")

    assert statuses == [503, 200, 503, 200]
    assert whole == 503


async def test_a_limit_counts_only_what_is_there() -> None:
    async with running() as rig:
        await rig.engine.switch(max_num_queued_reqs=1, max_num_queued_tokens=1)

        assert [(await rig.ask(prompt="Hello there"))[0] for _ in range(5)] == [200] * 5


async def test_a_crash_cuts_what_runs_and_a_restart_begins_at_zero() -> None:
    async with running(speed=1.0) as rig:
        port = rig.engine.port
        await rig.ask(prompt="Hi", max_tokens=1)
        body = {"prompt": "Hi", "stream": True, "max_tokens": 100_000, "ignore_eos": True}
        stream = await rig.session.post("/v1/completions", json=body)
        await stream.content.readuntil(b"\n\n")

        await rig.engine.switch(crashed=True)

        with pytest.raises(aiohttp.ClientError):
            await stream.read()
        stream.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await rig.page()

        await rig.engine.switch(crashed=False)

        assert rig.engine.port == port
        page = await rig.page()
        assert value_of(page, "vllm:prompt_tokens_total") == 0
        assert value_of(page, "vllm:num_requests_running") == 0
        assert (await rig.ask(prompt="Hi"))[0] == 200
        assert rig.engine.switches.speed == 1.0


async def test_a_crashed_engine_is_brought_back_through_a_neighbour() -> None:
    options = [EngineOptions(model=MODEL, speed=STUCK)] * 2
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with serve(options) as fleet, aiohttp.ClientSession(timeout=timeout) as session:
        one, other = fleet.engines
        params = {"port": str(other.port)}
        for crashed in (True, False):
            async with session.put(
                f"{one.url}/sim/switches", params=params, json={"crashed": crashed}
            ) as answer:
                assert (await answer.json())["crashed"] is crashed
            if crashed:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await session.get(f"{other.url}/health")
        async with session.get(f"{other.url}/health") as answer:
            assert answer.status == 200


async def test_an_engine_that_crashes_itself_cuts_the_request_that_asked_for_it() -> None:
    async with running() as rig:
        with pytest.raises(aiohttp.ClientError):
            await rig.session.put("/sim/switches", json={"crashed": True})
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await rig.page()
                except aiohttp.ClientConnectorError:
                    break
        assert rig.engine.switches.crashed


async def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    async with running() as rig:
        options = [EngineOptions(model=MODEL), EngineOptions(model=MODEL, port=rig.engine.port)]
        with pytest.raises(StartError, match=f"127.0.0.1:{rig.engine.port}: .*in use"):
            async with serve(options):
                pytest.fail("two engines on one port")
