"""What the loop relies on, asked of the real parts and of the fakes alike."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from fakes import FakeClock, FakePublisher, FakeScraper
from pages import page_server, response, says
from trimtab.adapters.scrape import PageScraper, client
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Failure, Sample, Snapshot
from trimtab.envoy_config import PoolRoute
from trimtab.loop import LoopClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trimtab.ports import Clock, Publisher, Scraper

NOBODY = Endpoint("nobody", "127.0.0.1", 9)  # the discard service: who runs it?
SAMPLE = Sample(running=3, waiting=2)


@pytest.fixture(params=["real", "fake"])
async def clock(request: pytest.FixtureRequest) -> Clock:
    return LoopClock() if request.param == "real" else FakeClock()


async def test_a_clock_goes_forward_to_the_time_that_is_waited_for(clock: Clock) -> None:
    began_s = clock.now_s()
    await clock.sleep_until_s(began_s + 0.01)
    assert clock.now_s() >= began_s + 0.01


async def test_a_clock_does_not_wait_for_the_past_nor_go_back_to_it(clock: Clock) -> None:
    began_s = clock.now_s()
    await clock.sleep_until_s(began_s - 1e6)
    assert began_s <= clock.now_s() < began_s + 1e3


@pytest.fixture(params=["real", "fake"])
async def scraper(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Scraper, Endpoint]]:
    """A scraper, and an endpoint that has a page."""
    if request.param == "fake":
        endpoint = Endpoint("pod", "10.0.0.1", 8000)
        yield FakeScraper(FakeClock(), {endpoint: SAMPLE}), endpoint
        return
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(page_server(says(response())))
        session = await stack.enter_async_context(client())
        yield PageScraper(session, LoopClock(), timeout_s=20.0), server.endpoint


async def test_an_observation_names_exactly_the_endpoints_asked(
    scraper: tuple[Scraper, Endpoint],
) -> None:
    observe, endpoint = scraper[0].observe, scraper[1]
    assert set((await observe([endpoint, NOBODY])).readings) == {endpoint, NOBODY}
    assert (await observe([])).readings == {}


async def test_a_page_is_a_sample_and_its_lack_a_value(scraper: tuple[Scraper, Endpoint]) -> None:
    observation = await scraper[0].observe([scraper[1], NOBODY])
    assert observation.readings[scraper[1]].outcome == SAMPLE
    assert isinstance(observation.readings[NOBODY].outcome, Failure)
    assert all(r.asked_s <= r.answered_s for r in observation.readings.values())


@pytest.fixture(params=["real", "fake"])
async def publisher(request: pytest.FixtureRequest) -> AsyncIterator[Publisher]:
    if request.param == "fake":
        yield FakePublisher()
        return
    xds = XdsServer(port=0)
    xds.set_pools({"gateway": [PoolRoute("pool")]})
    await xds.start()
    yield xds
    await xds.stop()


async def test_publishing_is_safe_to_repeat_with_or_without_anybody_who_listens(
    publisher: Publisher,
) -> None:
    for weight in (1, 1, 1000):
        await publisher.publish("pool", Snapshot({NOBODY: weight}))
