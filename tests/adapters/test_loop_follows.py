"""A pool whose pods come and go: who leaves is gone at once, who comes need not wait."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fakes import FakePublisher, FakeScraper, FakeWitness, Timeline
from strategies import endpoints
from trimtab.core.model import Policy, Sample
from trimtab.loop import Pool, run_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from trimtab.core.model import Endpoint, Observation

A, B, C = endpoints(3)
IDLE = Sample(running=0, waiting=0)
PERIOD_S = 60.0  # nobody in these tests waits for it


class SlowScraper(FakeScraper):
    """Answers when it is told to."""

    def __init__(self, time: Timeline) -> None:
        super().__init__(time, dict.fromkeys((A, B, C), IDLE))
        self.asks = asyncio.Event()
        self.answer = asyncio.Event()

    async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
        seen = await super().observe(endpoints)
        self.asks.set()
        await self.answer.wait()
        return seen


class Rig:
    def __init__(self) -> None:
        self.time = Timeline()
        self.scraper = SlowScraper(self.time)
        self.scraper.answer.set()
        self.publisher = FakePublisher()
        self.witness = FakeWitness()
        self.pool = Pool("pool", (A, B), Policy(interval_s=PERIOD_S), self.scraper)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(
            run_pool(self.pool, publisher=self.publisher, clock=self.time, witness=self.witness)
        )
        try:
            await self.time.run_until(1.0)
            yield
        finally:
            task.cancel()

    async def follow(self, *serving: Endpoint, draining: Collection[Endpoint] = ()) -> None:
        await self.pool.follow(serving, draining, self.publisher)

    @property
    def published(self) -> list[set[Endpoint]]:
        return [set(snapshot.weights) for snapshot in self.publisher.snapshots]


async def test_who_leaves_is_gone_before_anything_else_is_awaited() -> None:
    rig = Rig()
    async with rig.running():
        rig.scraper.answer.clear()
        await rig.follow(A)
        assert rig.published == [{A, B}, {A}]


async def test_who_is_asked_to_leave_drains_at_once_and_is_watched_until_he_is_gone() -> None:
    rig = Rig()
    async with rig.running():
        await rig.follow(A, draining=[B])
        assert rig.publisher.snapshots[-1].draining == {B}
        await rig.time.run_until(2.0)
        assert rig.scraper.asked[-1] == {A, B}
        assert rig.publisher.snapshots[-1].draining == {B}
        await rig.follow(A)
        assert rig.publisher.snapshots[-1].draining == set()


async def test_who_leaves_while_a_tick_waits_for_pages_does_not_come_back_with_them() -> None:
    rig = Rig()
    async with rig.running():
        rig.scraper.answer.clear()
        await rig.follow(A, B, C)
        await rig.scraper.asks.wait()
        await rig.time.run_until(2.0)
        await rig.follow(A, C)
        rig.scraper.answer.set()
        await rig.time.run_until(3.0)
        assert rig.published[0] == {A, B}
        assert all(B not in each for each in rig.published[1:])
        assert rig.published[-1] == {A, C}


async def test_who_comes_is_asked_and_served_without_waiting_for_the_period() -> None:
    rig = Rig()
    async with rig.running():
        await rig.follow(A, B, C)
        await rig.time.run_until(2.0)
        assert rig.published[-1] == {A, B, C}
        assert rig.time.now_s() < PERIOD_S


async def test_a_tick_brought_forward_begins_a_new_period() -> None:
    rig = Rig()
    async with rig.running():
        await rig.time.run_until(30.0)
        await rig.follow(A, B, C)
        await rig.time.run_until(30.0 + PERIOD_S - 1)
        assert len(rig.witness.ticks) == 2
        await rig.time.run_until(30.0 + PERIOD_S)
        assert len(rig.witness.ticks) == 3


async def test_hearing_the_same_again_changes_nothing() -> None:
    rig = Rig()
    async with rig.running():
        await rig.follow(B, A)
        await rig.time.run_until(5.0)
        assert len(rig.witness.ticks) == 1
        assert len(rig.published) == 1


async def test_a_pool_that_never_ticked_is_not_published_by_a_change() -> None:
    """An empty table would take from Envoy what it may have from another replica."""
    rig = Rig()
    await rig.follow(C, draining=[A])
    assert rig.published == []
