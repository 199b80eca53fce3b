"""Stand-ins for the world around a loop: time that passes when it is waited for, pages, a table.

Each passes the contract of its real twin: see adapters/test_ports.py.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.core.model import Failure, FailureKind, Observation, Reading, Sample
from trimtab.ports import AbsentError, ClusterError, ConflictError, LeaseRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from trimtab.core.model import Decision, Endpoint, Snapshot
    from trimtab.ports import Clock


class FakeClock:
    """Waiting takes no time but makes it pass; at `end_s` it ends, and who waits, waits on."""

    def __init__(self, end_s: float = math.inf) -> None:
        self.time_s = 0.0
        self.ended = asyncio.Event()
        self._end_s = end_s
        self._planned: list[tuple[float, Callable[[], object]]] = []

    def at(self, then_s: float, act: Callable[[], object]) -> None:
        """Do something when time comes to `then_s`."""
        self._planned.append((then_s, act))

    def now_s(self) -> float:
        return self.time_s

    async def sleep_until_s(self, then_s: float) -> None:
        if then_s > self._end_s:
            self.ended.set()
            await asyncio.Event().wait()
        self.time_s = max(self.time_s, then_s)
        due = [plan for plan in self._planned if plan[0] <= self.time_s]
        for plan in due:
            self._planned.remove(plan)
            plan[1]()
        await asyncio.sleep(0)


class Timeline:
    """One simulated time for several who wait for it; it passes in `run_until` only."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        return self.time_s

    async def sleep_until_s(self, then_s: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (then_s, next(self._numbers), future))
        await future

    async def run_until(self, end_s: float) -> None:
        """Let time pass, and everybody act in its order. Fakes answer within a few turns."""
        await self._settle()
        while self._waiting and self._waiting[0][0] <= end_s:
            then_s, _, future = heapq.heappop(self._waiting)
            self.time_s = max(self.time_s, then_s)
            if not future.done():
                future.set_result(None)
                await self._settle()
        self.time_s = max(self.time_s, end_s)

    async def _settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


class FakeScraper:
    """Says what it was told to say of each endpoint; of others, that nobody listens."""

    def __init__(self, clock: Clock, outcomes: Mapping[Endpoint, Sample | Failure]) -> None:
        self.outcomes = outcomes
        self.asked: list[set[Endpoint]] = []
        self._clock = clock

    async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
        self.asked.append(set(endpoints))
        now_s = self._clock.now_s()
        nobody = Failure(FailureKind.REFUSED)
        return Observation(
            {
                endpoint: Reading(
                    asked_s=now_s, answered_s=now_s, outcome=self.outcomes.get(endpoint, nobody)
                )
                for endpoint in endpoints
            }
        )


class FakePublisher:
    """Keeps what was published; raises what it is told to raise, once each."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.troubles: list[Exception] = []

    async def publish(self, pool: str, snapshot: Snapshot) -> None:
        del pool
        if self.troubles:
            raise self.troubles.pop(0)
        self.snapshots.append(snapshot)


class FakeWitness:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.failures: list[Exception] = []
        self.publications = 0
        self.ticks: list[tuple[float, int]] = []

    def decided(self, pool: str, observation: Observation, decision: Decision) -> None:
        del pool, observation
        self.decisions.append(decision)

    def published(self, pool: str) -> None:
        del pool
        self.publications += 1

    def failed(self, pool: str, error: Exception) -> None:
        del pool
        self.failures.append(error)

    def ticked(self, pool: str, *, took_s: float, skipped: int) -> None:
        del pool
        self.ticks.append((took_s, skipped))


class FakeLeases:
    """A Lease as the API server keeps it: whoever writes must know the last version."""

    def __init__(self) -> None:
        self.record: LeaseRecord | None = None
        self.writes: list[LeaseRecord] = []
        self.troubles: list[ClusterError] = []

    async def read_lease(self) -> LeaseRecord:
        self._raise()
        if self.record is None:
            raise AbsentError("not there")
        return self.record

    async def write_lease(self, record: LeaseRecord) -> LeaseRecord:
        self._raise()
        if record.version != (self.record.version if self.record else ""):
            raise ConflictError("another was faster")
        self.writes.append(record)
        self.record = replace(record, version=str(len(self.writes)), acquired="then")
        return self.record

    def _raise(self) -> None:
        if self.troubles:
            raise self.troubles.pop(0)


class FakeRecorder:
    """Keeps statuses and events as the API server would; raises what it is told to, once each."""

    def __init__(self) -> None:
        self.statuses: list[tuple[str, Mapping[str, Any]]] = []
        self.events: list[tuple[str, str, bool]] = []
        self.troubles: list[ClusterError | None] = []
        self.answer: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]] = _an_object

    async def apply_status(
        self, namespace: str, name: str, status: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        self._raise()
        self.statuses.append((f"{namespace}/{name}", status))
        return self.answer(namespace, name, status)

    async def post_event(
        self, regarding: Mapping[str, str], *, reason: str, note: str, warning: bool
    ) -> None:
        del note
        self._raise()
        self.events.append((f"{regarding['namespace']}/{regarding['name']}", reason, warning))

    def _raise(self) -> None:
        if self.troubles and (trouble := self.troubles.pop(0)):
            raise trouble


def _an_object(namespace: str, name: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name}, "status": status}
