"""One pool's tick: observe, step, publish.

Who leaves is taken out of the data plane at once, between two ticks or in the middle of one; who
comes brings the next tick forward.

Every act is safe to repeat, so a failed tick needs no cleanup: the next one starts from the last
state that a step returned. Ticks keep their period whatever one of them costs; a period that
passes during a tick is skipped and counted, not made up for.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

from trimtab.core.model import Observation
from trimtab.core.step import State, restrict, step

if TYPE_CHECKING:
    from collections.abc import Collection

    from trimtab.core.model import Decision, Endpoint, Policy
    from trimtab.ports import Clock, Publisher, Scraper


class LoopClock:
    """The Clock of the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def now_s(self) -> float:
        return self._loop.time()

    async def sleep_until_s(self, then_s: float) -> None:
        await asyncio.sleep(then_s - self._loop.time())


class Witness(Protocol):
    """Whoever wants to know how the ticks went: telemetry, the demo's screen."""

    def decided(self, pool: str, observation: Observation, decision: Decision) -> None: ...

    def published(self, pool: str) -> None: ...

    def failed(self, pool: str, error: Exception) -> None:
        """Hear why a tick ended early: a TrimtabError, or a bug."""

    def ticked(self, pool: str, *, took_s: float, skipped: int) -> None:
        """Hear that a tick is over, how long it took and how many periods passed meanwhile."""


@dataclass(slots=True)
class Pool:
    """What a loop works for. Fields may be replaced at any time: the next tick sees them."""

    name: str
    endpoints: Collection[Endpoint]
    policy: Policy
    scraper: Scraper
    draining: Collection[Endpoint] = ()
    """Who is asked to leave; none of `endpoints`."""
    state: State = field(default_factory=State)
    decision: Decision | None = None
    """The last one."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(
        self, endpoints: Collection[Endpoint], draining: Collection[Endpoint], publisher: Publisher
    ) -> None:
        """Hear who is there now. Raises PublishError."""
        if (set(endpoints), set(draining)) == (set(self.endpoints), set(self.draining)):
            return
        self.endpoints, self.draining = endpoints, draining
        self.changed.set()
        before, self.state = self.state, restrict(self.state, endpoints, draining)
        if self.state is not before:
            await publisher.publish(self.name, self.state.snapshot)


async def run_pool(pool: Pool, *, publisher: Publisher, clock: Clock, witness: Witness) -> NoReturn:
    """Tick for ever."""
    due_s = clock.now_s()
    while True:
        began_s = clock.now_s()
        try:
            await _tick(pool, publisher=publisher, clock=clock, witness=witness)
        except Exception as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise  # a task group that is cancelled while a part of it fails tells the failure
            witness.failed(pool.name, error)
        ended_s = clock.now_s()
        due_s += pool.policy.interval_s
        skipped = max(0, math.ceil((ended_s - due_s) / pool.policy.interval_s))
        due_s += skipped * pool.policy.interval_s
        witness.ticked(pool.name, took_s=ended_s - began_s, skipped=skipped)
        if await _woken(pool, clock, due_s):
            due_s = clock.now_s()


async def _woken(pool: Pool, clock: Clock, due_s: float) -> bool:
    """Sleep until the next tick is due, or until it is wanted earlier."""
    sleep = asyncio.ensure_future(clock.sleep_until_s(due_s))
    change = asyncio.ensure_future(pool.changed.wait())
    try:
        await asyncio.wait((sleep, change), return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleep.cancel()
        change.cancel()
    return not sleep.done()


async def _tick(pool: Pool, *, publisher: Publisher, clock: Clock, witness: Witness) -> None:
    pool.changed.clear()
    seen = await pool.scraper.observe((*pool.endpoints, *pool.draining))
    there = {*pool.endpoints, *pool.draining}  # by now
    observation = Observation(
        {endpoint: reading for endpoint, reading in seen.readings.items() if endpoint in there},
        draining=frozenset(pool.draining).intersection(seen.readings),
    )
    pool.state, decision = step(pool.state, observation, pool.policy, now_s=clock.now_s())
    pool.decision = decision
    witness.decided(pool.name, observation, decision)
    await publisher.publish(pool.name, decision.snapshot)
    witness.published(pool.name)
