"""What is written into the cluster, when, and by whom."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fakes import FakeLeases, FakeRecorder, Timeline
from pools import pool as pool_object
from strategies import endpoints
from trimtab.core.conditions import QUIET_S, Facts
from trimtab.core.model import Decision, EndpointReport, EndpointState, Snapshot
from trimtab.leadership import ROUND_S, Leadership
from trimtab.ports import AbsentError, ClusterError
from trimtab.registry import Kind, Registry
from trimtab.reporting import FIRST_PAUSE_S, LONGEST_PAUSE_S, Pace, Reports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from trimtab.registry import Pool

A, B = endpoints(2)
AWAY = ClusterError("no answer")


def decision(*, stale: bool = False, backlog_tokens: float = 0.0) -> Decision:
    report = EndpointReport(
        state=EndpointState.STALE if stale else EndpointState.SERVING,
        weight=1000,
        backlog_tokens=backlog_tokens,
        drain_s=backlog_tokens / 20_000,
        speed_ratio=1.0,
        age_s=30.0 if stale else 0.5,
    )
    return Decision(snapshot=Snapshot({A: 1000, B: 1000}), endpoints={A: report, B: report})


class Rig:
    """Pools, what is known of them, and who writes it down."""

    def __init__(self, *names: str) -> None:
        self.time = Timeline()
        self.registry = Registry()
        self.recorder = FakeRecorder()
        self.recorder.answer = self._answer
        self.decided: Decision | None = decision()
        self.known = Facts(generation=1, pods=2, gateways=1, accepted=True)
        self.leads = True
        self.version = 1
        self.objects = {name: self._object(name, {}) for name in names or ("llama",)}
        self.registry.listed(Kind.POOLS, self.objects.values(), version="1")
        self.reports = Reports(
            self.registry,
            self,
            self.recorder,
            may_write=lambda: self.leads,
            clock=self.time,
            wall_s=lambda: 1_800_000_000 + self.time.now_s(),
            jitter=lambda: 1.0,
        )

    def decision(self, pool: Pool) -> Decision | None:
        del pool
        return self.decided

    def facts(self, pool: Pool) -> Facts:
        return replace(self.known, generation=pool.generation)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reports.run())
        try:
            await self.time.run_until(0.0)
            yield
        finally:
            task.cancel()

    def tell(self, name: str, **changes: Any) -> None:
        """Let the API server say something about a pool."""
        self.version += 1
        item = self.objects[name] = {**self.objects[name], **changes}
        item["metadata"] = {**item["metadata"], "resourceVersion": str(self.version)}
        self.registry.told(Kind.POOLS, item)

    def _answer(self, namespace: str, name: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
        del namespace
        self.version += 1
        self.objects[name] = self._object(name, status)
        return self.objects[name]

    def _object(self, name: str, status: Mapping[str, Any]) -> dict[str, Any]:
        metadata = {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "resourceVersion": str(self.version),
            "generation": 1,
        }
        return {**pool_object(name), "metadata": metadata, "status": dict(status)}


def conditions(status: Mapping[str, Any]) -> dict[str, str]:
    return {each["type"]: each["status"] for each in status["conditions"]}


async def test_a_new_pool_is_told_of_at_once() -> None:
    rig = Rig()
    async with rig.running():
        (written,) = rig.recorder.statuses
    assert written[0] == "team/llama"
    assert conditions(written[1])["Ready"] == "True"
    assert rig.recorder.events == [("team/llama", "Serving", False)]


async def test_nothing_new_is_not_written() -> None:
    rig = Rig()
    async with rig.running():
        await rig.time.run_until(600.0)
    assert len(rig.recorder.statuses) == 1
    assert len(rig.recorder.events) == 1


async def test_numbers_are_written_every_30_s_and_conditions_at_once() -> None:
    rig = Rig()
    async with rig.running():
        rig.decided = decision(backlog_tokens=10_000)
        await rig.time.run_until(QUIET_S - 1)
        assert len(rig.recorder.statuses) == 1
        await rig.time.run_until(QUIET_S)
        assert len(rig.recorder.statuses) == 2
        rig.decided = decision(stale=True)
        await rig.time.run_until(QUIET_S + 1)
        assert len(rig.recorder.statuses) == 3
    assert conditions(rig.recorder.statuses[-1][1])["MetricsAvailable"] == "False"
    assert rig.recorder.events[1:] == [("team/llama", "AllStale", True)]


async def test_numbers_that_never_rest_cost_one_write_in_30_s() -> None:
    rig = Rig()
    async with rig.running():
        for second in range(1, 601):
            rig.decided = decision(backlog_tokens=1000.0 * second)
            await rig.time.run_until(float(second))
    assert len(rig.recorder.statuses) == 1 + 600 / QUIET_S
    assert len(rig.recorder.events) == 1


async def test_idle_for_ten_minutes_only_the_lease_is_written() -> None:
    rig = Rig(*(f"pool-{i}" for i in range(50)))
    leases = FakeLeases()
    leader = Leadership(leases, identity="a", clock=rig.time, jitter=lambda: 0.5)
    rig.reports._may_write = lambda: leader.may_write
    lease = asyncio.create_task(leader.run())
    async with rig.running():
        await rig.time.run_until(10.0)
        assert len(rig.recorder.statuses) == 50
        renewals = len(leases.writes)
        await rig.time.run_until(610.0)
    lease.cancel()
    assert len(rig.recorder.statuses) == 50
    assert len(rig.recorder.events) == 50
    assert len(leases.writes) - renewals <= 600 / (ROUND_S * 0.8)


async def test_who_does_not_lead_writes_nothing_and_who_comes_to_lead_only_what_is_new() -> None:
    rig = Rig("llama", "mistral")
    async with rig.running():
        assert len(rig.recorder.statuses) == 2
        rig.leads = False
        rig.decided = decision(stale=True)
        await rig.time.run_until(60.0)
        assert len(rig.recorder.statuses) == 2
    other = Rig("llama", "mistral")
    for name, item in rig.objects.items():
        other.tell(name, status=item["status"])
    async with other.running():
        await other.time.run_until(60.0)
        assert other.recorder.statuses == []


async def test_leadership_lost_between_status_and_events_ends_the_writing() -> None:
    rig = Rig()

    def lose(namespace: str, name: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
        rig.leads = False
        return rig._answer(namespace, name, status)

    rig.recorder.answer = lose
    async with rig.running():
        await rig.time.run_until(5.0)
    assert len(rig.recorder.statuses) == 1
    assert rig.recorder.events == []


async def test_a_status_that_somebody_spoils_is_mended() -> None:
    rig = Rig()
    async with rig.running():
        rig.tell("llama", status={"replicas": 7})
        await rig.time.run_until(1.0)
    assert len(rig.recorder.statuses) == 2
    first, second = (status for _, status in rig.recorder.statuses)
    assert (second["replicas"], conditions(second)) == (first["replicas"], conditions(first))


async def test_a_spec_that_was_seen_is_said_to_be_seen_at_once() -> None:
    rig = Rig()
    async with rig.running():
        item = rig.objects["llama"]
        rig.tell("llama", metadata={**item["metadata"], "generation": 2})
        await rig.time.run_until(1.0)
    assert [status["observedGeneration"] for _, status in rig.recorder.statuses] == [1, 2]


@pytest.mark.parametrize("trouble", [AWAY, ClusterError("busy", retry_after_s=20.0)])
async def test_a_write_that_fails_is_tried_again_later_and_not_before_it_may(
    trouble: ClusterError,
) -> None:
    rig = Rig()
    rig.recorder.troubles = [trouble]
    async with rig.running():
        assert rig.recorder.statuses == []
        pause_s = max(FIRST_PAUSE_S, trouble.retry_after_s)
        await rig.time.run_until(pause_s - 0.1)
        assert rig.recorder.statuses == []
        await rig.time.run_until(pause_s)
        assert len(rig.recorder.statuses) == 1


async def test_one_pool_that_cannot_be_written_does_not_keep_others_from_it() -> None:
    rig = Rig("bad", "good", "other")

    def refuse(namespace: str, name: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
        if name == "bad":
            raise ClusterError("422 Invalid")
        return rig._answer(namespace, name, status)

    rig.recorder.answer = refuse
    async with rig.running():
        await rig.time.run_until(1.0)
    assert {name for name, _ in rig.recorder.statuses} >= {"team/good", "team/other"}


async def test_a_pool_deleted_meanwhile_is_no_trouble() -> None:
    rig = Rig("llama", "mistral")
    rig.recorder.troubles = [AbsentError("404 Not Found")]
    async with rig.running():
        assert len(rig.recorder.statuses) == 1


async def test_an_event_that_cannot_be_posted_is_left_out() -> None:
    """The status says the same, and an event told twice would be a lie."""
    rig = Rig()
    rig.recorder.troubles = [None, AWAY]
    async with rig.running():
        await rig.time.run_until(60.0)
    assert len(rig.recorder.statuses) == 1
    assert rig.recorder.events == []


async def test_a_pool_whose_spec_is_not_understood_is_told_so() -> None:
    rig = Rig()
    rig.decided = None
    rig.known = Facts(generation=1, complaint="spec.engine: unknown")
    async with rig.running():
        pass
    assert conditions(rig.recorder.statuses[0][1])["Ready"] == "False"
    assert rig.recorder.events == [("team/llama", "InvalidSpec", True)]


def test_pauses_grow_and_stay_bounded() -> None:
    pace, pauses_s = Pace(), []
    for _ in range(10):
        pace = pace.failed(0.0, retry_after_s=0.0, jitter=1.0)
        pauses_s.append(pace.not_before_s)
    assert pauses_s[:4] == [1.0, 2.0, 4.0, 8.0]
    assert pauses_s[-1] == LONGEST_PAUSE_S
    assert Pace().failed(0.0, retry_after_s=0.0, jitter=0.0).not_before_s == FIRST_PAUSE_S / 2
    assert pace.wrote(5.0) == Pace(written_s=5.0, tried_s=5.0)
