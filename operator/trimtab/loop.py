"""One pool's tick: observe, step, publish.

Every act is safe to repeat, so a failed tick needs no cleanup: the next one starts from the last
state that a step returned. Ticks keep their period whatever one of them costs; a period that
passes during a tick is skipped and counted, not made up for.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

from trimtab.core.step import State, step

if TYPE_CHECKING:
    from collections.abc import Collection

    from trimtab.core.model import Decision, Endpoint, Observation, Policy
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
    state: State = field(default_factory=State)


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
        await clock.sleep_until_s(due_s)


async def _tick(pool: Pool, *, publisher: Publisher, clock: Clock, witness: Witness) -> None:
    observation = await pool.scraper.observe(pool.endpoints)
    pool.state, decision = step(pool.state, observation, pool.policy, now_s=clock.now_s())
    witness.decided(pool.name, observation, decision)
    await publisher.publish(pool.name, decision.snapshot)
    witness.published(pool.name)
