"""One replica writes at a time, and another soon after it is gone: law by law, in no time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeLeases, Timeline
from trimtab.leadership import JITTER_RATIO, LEASE_S, ROUND_S, WRITE_S, Leadership
from trimtab.ports import ClusterError, ConflictError, LeaseRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TAKE_OVER_S = LEASE_S + ROUND_S  # it was seen renewed a round after it was
AWAY = ClusterError("no answer")


class Replicas:
    """Some replicas that want one Lease."""

    def __init__(self, *, jitter: float = 0.0) -> None:
        self.time = Timeline()
        self.leases = FakeLeases()
        self._jitter = jitter

    def replica(self, name: str) -> Leadership:
        return Leadership(self.leases, identity=name, clock=self.time, jitter=lambda: self._jitter)

    @asynccontextmanager
    async def running(
        self, *names: str
    ) -> AsyncIterator[list[tuple[Leadership, asyncio.Task[None]]]]:
        async with AsyncExitStack() as stack:
            replicas = []
            for name in names:
                replica = self.replica(name)
                task: asyncio.Task[None] = asyncio.create_task(replica.run())
                stack.callback(task.cancel)
                replicas.append((replica, task))
                await self.time.run_until(self.time.now_s())
            yield replicas


async def test_the_first_takes_the_lease_and_renews_it() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, _)]:
        await rig.time.run_until(60.0)
        assert one.may_write
    assert len(rig.leases.writes) == 60 / ROUND_S + 1
    writes = {(w.holder, w.duration_s, w.transitions) for w in rig.leases.writes}
    assert writes == {("a", LEASE_S, 1)}
    assert rig.leases.writes[-1].acquired == "then"


async def test_renewals_of_many_do_not_fall_together() -> None:
    rig = Replicas(jitter=1.0)
    async with rig.running("a"):
        await rig.time.run_until(60.0)
    assert len(rig.leases.writes) == int(60 / (ROUND_S * (1 - JITTER_RATIO))) + 1


async def test_the_second_waits_as_long_as_the_first_renews() -> None:
    rig = Replicas()
    async with rig.running("a", "b") as [(one, _), (other, _)]:
        for second in range(60):
            await rig.time.run_until(float(second))
            assert one.may_write
            assert not other.may_write


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("killed_s", [20.0, 20.81, 21.9])
async def test_when_the_holder_is_killed_another_writes_soon(
    killed_s: float, jitter: float
) -> None:
    rig = Replicas(jitter=jitter)
    async with AsyncExitStack() as stack:
        [(_, task)] = await stack.enter_async_context(rig.running("a"))
        await rig.time.run_until(1.5)  # it looks long after each renewal
        [(other, _)] = await stack.enter_async_context(rig.running("b"))
        await rig.time.run_until(killed_s)
        task.cancel()
        await rig.time.run_until(killed_s + TAKE_OVER_S)
        assert other.may_write
    assert rig.leases.writes[-1].transitions == 2


async def test_a_lease_given_up_is_taken_at_the_next_look() -> None:
    rig = Replicas()
    async with rig.running("a", "b") as [(one, task), (other, _)]:
        await rig.time.run_until(5.0)
        task.cancel()
        await one.release()
        assert not one.may_write
        assert rig.leases.record is not None
        assert rig.leases.record.holder == ""
        await rig.time.run_until(5.0 + ROUND_S)
        assert other.may_write


async def test_a_renewal_cut_off_on_its_way_does_not_keep_the_lease_from_being_given_up() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, task)]:
        await rig.time.run_until(5.0)
        task.cancel()
        assert rig.leases.record is not None
        await rig.leases.write_lease(rig.leases.record)  # it arrived, its answer did not
        await one.release()
        assert rig.leases.record.holder == ""


async def test_who_does_not_hold_the_lease_gives_nothing_up() -> None:
    rig = Replicas()
    async with rig.running("a", "b") as [_, (other, _)]:
        await rig.time.run_until(5.0)
        await other.release()
    assert rig.leases.record is not None
    assert rig.leases.record.holder == "a"


async def test_a_lease_that_cannot_be_given_up_runs_out() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, _)]:
        await rig.time.run_until(5.0)
        rig.leases.troubles = [AWAY]
        await one.release()
        assert not one.may_write


async def test_who_cannot_renew_stops_before_another_may_begin() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, _)]:
        rig.leases.troubles = [AWAY] * 100
        await rig.time.run_until(LEASE_S - WRITE_S)
        assert one.may_write
        await rig.time.run_until(LEASE_S - WRITE_S + 0.1)
        assert not one.may_write


async def test_who_was_cut_off_and_not_replaced_goes_on_at_once() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, _)]:
        rig.leases.troubles = [AWAY] * 30
        await rig.time.run_until(59.0)
        assert not one.may_write
        await rig.time.run_until(61.0)
        assert rig.leases.troubles == []
        await rig.time.run_until(61.0 + ROUND_S)
        assert one.may_write
    assert rig.leases.writes[-1].transitions == 1


async def test_who_was_replaced_while_cut_off_writes_no_more() -> None:
    rig = Replicas()
    async with rig.running("a") as [(one, _)]:
        rig.leases.record = LeaseRecord(holder="b", duration_s=LEASE_S, transitions=2, version="99")
        await rig.time.run_until(2 * ROUND_S)
        assert not one.may_write
    assert rig.leases.record.holder == "b"


async def test_of_two_that_take_a_free_lease_at_once_one_has_it() -> None:
    rig = Replicas()
    rig.leases.record = LeaseRecord(holder="", duration_s=1, version="0")
    rig.leases.troubles = [ConflictError("another was faster")]
    async with rig.running("a") as [(one, _)]:
        assert not one.may_write
        await rig.time.run_until(ROUND_S)
        assert one.may_write


@given(
    killed_s=st.floats(0, 30),
    late_s=st.floats(0, 2),
    jitter=st.floats(0, 1),
    outages=st.lists(st.booleans(), max_size=60),
)
def test_no_write_of_one_overlaps_with_those_of_another(
    killed_s: float, late_s: float, jitter: float, outages: list[bool]
) -> None:
    """Whatever fails: a write that begins while it may ends WRITE_S later at most."""

    async def story() -> None:
        rig = Replicas(jitter=jitter)
        async with rig.running("a") as [(one, task)]:
            await rig.time.run_until(late_s)
            async with rig.running("b") as [(other, _)]:
                writing_until_s = 0.0
                for tenth in range(int(late_s * 10) + 1, 450):
                    if outages and outages.pop():
                        rig.leases.troubles = [AWAY]
                    await rig.time.run_until(tenth / 10)
                    if tenth / 10 > killed_s:
                        task.cancel()
                    if one.may_write:
                        writing_until_s = rig.time.now_s() + WRITE_S
                    assert not (other.may_write and rig.time.now_s() < writing_until_s)
                assert other.may_write

    asyncio.run(story())
