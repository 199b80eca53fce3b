"""One pool's loop among fakes: what it does with time, change and trouble."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from fakes import FakeClock, FakePublisher, FakeScraper, FakeWitness
from trimtab.core.model import Endpoint, Policy, Sample
from trimtab.loop import Pool, run_pool
from trimtab.ports import PublishError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from trimtab.core.model import Observation

A, B, C = (Endpoint(name, "10.0.0.1", port) for port, name in enumerate("abc", start=8000))
IDLE, BUSY = Sample(running=0, waiting=0), Sample(running=50, waiting=50)


class Rig:
    """A loop and all that is around it."""

    def __init__(self, *, seconds: float) -> None:
        self.clock = FakeClock(end_s=seconds)
        self.scraper = FakeScraper(self.clock, {A: IDLE, B: BUSY})
        self.publisher = FakePublisher()
        self.witness = FakeWitness()
        self.pool = Pool("pool", (A, B), Policy(), self.scraper)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self._run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def to_its_end(self) -> None:
        async with self.running(), asyncio.timeout(20):
            await self.clock.ended.wait()

    async def _run(self) -> None:
        await run_pool(self.pool, publisher=self.publisher, clock=self.clock, witness=self.witness)


async def test_what_is_observed_becomes_weights_that_are_published() -> None:
    rig = Rig(seconds=0.5)
    await rig.to_its_end()
    (snapshot,) = rig.publisher.snapshots
    assert snapshot.weights[A] > snapshot.weights[B]
    assert rig.witness.decisions[0].snapshot == snapshot
    assert rig.witness.publications == 1
    assert rig.witness.ticks == [(0.0, 0)]


async def test_ticks_keep_their_period_whatever_they_cost() -> None:
    """Sleeping for a period after each tick would add up what ticks take."""
    rig = Rig(seconds=9.5)
    asked_s = []

    class Slow(FakeScraper):
        async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
            asked_s.append(rig.clock.time_s)
            rig.clock.time_s += 0.3
            return await super().observe(endpoints)

    rig.pool.scraper = Slow(rig.clock, {A: IDLE, B: IDLE})
    await rig.to_its_end()
    assert asked_s == [float(second) for second in range(10)]
    assert [skipped for _, skipped in rig.witness.ticks] == [0] * 10


async def test_periods_that_pass_during_a_tick_are_skipped_and_counted() -> None:
    rig = Rig(seconds=6.5)
    asked_s = []

    class Late(FakeScraper):
        async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
            asked_s.append(rig.clock.time_s)
            rig.clock.time_s += 2.5 if len(asked_s) == 2 else 0.0
            return await super().observe(endpoints)

    rig.pool.scraper = Late(rig.clock, {A: IDLE, B: IDLE})
    await rig.to_its_end()
    assert asked_s == [0.0, 1.0, 4.0, 5.0, 6.0]
    assert rig.witness.ticks[1] == (2.5, 2)


@pytest.mark.parametrize("trouble", [PublishError("Envoy", "no"), ZeroDivisionError("a bug")])
async def test_a_tick_that_fails_is_told_and_the_next_one_goes_on(trouble: Exception) -> None:
    rig = Rig(seconds=2.5)
    rig.publisher.troubles = [trouble]
    await rig.to_its_end()
    assert rig.witness.failures == [trouble]
    assert len(rig.witness.ticks) == 3
    assert rig.witness.publications == len(rig.publisher.snapshots) == 2


def replaces(**fields: object) -> Callable[[Rig], None]:
    def replace(rig: Rig) -> None:
        for name, value in fields.items():
            setattr(rig.pool, name, value)

    return replace


async def test_endpoints_and_policy_may_change_between_two_ticks() -> None:
    rig = Rig(seconds=3.5)
    rig.scraper.outcomes = {A: IDLE, B: IDLE, C: IDLE}
    change = replaces(endpoints=(B, C), policy=Policy(interval_s=0.5))
    rig.clock.at(2.0, lambda: change(rig))
    await rig.to_its_end()
    assert rig.scraper.asked == [{A, B}] * 2 + [{B, C}] * 4
    assert set(rig.publisher.snapshots[-1].weights) == {B, C}


async def test_what_was_learned_outlives_a_failed_tick() -> None:
    rig = Rig(seconds=3.5)
    rig.publisher.troubles = [PublishError("Envoy", "no")] * 3
    await rig.to_its_end()
    assert rig.pool.state.memory.now_s == 3.0
    assert len({id(decision) for decision in rig.witness.decisions}) == 4


async def test_a_loop_ends_when_it_is_cancelled_even_while_a_tick_fails() -> None:
    """A task group that fails while it is cancelled tells only of the failure."""
    rig = Rig(seconds=3.5)
    asked = asyncio.Event()

    class BreaksOnce(FakeScraper):
        async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
            if not asked.is_set():
                asked.set()
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._break_when_cancelled())
            return await super().observe(endpoints)

        async def _break_when_cancelled(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError

    rig.pool.scraper = BreaksOnce(rig.clock, {})
    async with rig.running() as task:
        await asked.wait()
        task.cancel()
        went_on = asyncio.create_task(rig.clock.ended.wait())
        await asyncio.wait((task, went_on), return_when=asyncio.FIRST_COMPLETED)
        went_on.cancel()
        assert task.done()
    assert task.cancelled() or task.exception()
    assert rig.witness.failures == []
