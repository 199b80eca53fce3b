"""Envoy has what was published, sends traffic accordingly, and says so when it refuses."""

from __future__ import annotations

import asyncio
import functools
import itertools
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from rig_envoy import DEADLINE_S, LISTENER, MODEL, ONE_POOL, Rig, run_gateway, run_rig, until
from trimtab.core.model import Endpoint, Snapshot
from trimtab.envoy_config import PoolRoute
from trimtab.ports import PublishError

if TYPE_CHECKING:
    import aiohttp

both_protocols = pytest.mark.parametrize("delta", [True, False], ids=["delta", "sotw"])


def by_port(snapshot: Snapshot) -> dict[int, int]:
    return {endpoint.port: weight for endpoint, weight in snapshot.weights.items()}


@both_protocols
async def test_envoy_shows_the_weights_that_were_published(*, delta: bool) -> None:
    async with run_rig([MODEL] * 3, delta=delta) as rig:
        for weights in ([1000, 1, 500], [7, 1000, 20], [1000, 1000, 1000]):
            snapshot = Snapshot(dict(zip(rig.endpoints, weights, strict=True)))
            await rig.publish(snapshot)
            assert await rig.gateway.weights() == by_port(snapshot)
            assert rig.xds.acked(ONE_POOL.name) == snapshot.version
        assert rig.xds.nacks_total == 0


@both_protocols
async def test_traffic_follows_each_push(*, delta: bool) -> None:
    async with run_rig(["left", "right"], delta=delta) as rig:
        left, right = rig.endpoints
        for heavy, light, name in ((left, right, "left"), (right, left, "right")) * 3:
            await rig.publish(Snapshot({heavy: 1000, light: 1}))
            split = await rig.gateway.split(20)
            assert split[name] >= 18, split


async def test_unreachable_and_draining_endpoints_get_nothing_new() -> None:
    async with run_rig(["up", "down", "leaving"]) as rig:
        up, down, leaving = rig.endpoints
        weights = {up: 1, down: 1000, leaving: 1000}
        await rig.publish(
            Snapshot(weights, unreachable=frozenset({down}), draining=frozenset({leaving}))
        )
        assert await rig.gateway.split(20) == {"up": 20}
        health = await rig.gateway.health()
        assert health[down.port]["eds_health_status"] == "UNHEALTHY"
        assert health[leaving.port]["eds_health_status"] == "DRAINING"


async def test_when_all_are_called_unreachable_all_are_tried() -> None:
    """Whoever says so may be the one who is cut off."""
    async with run_rig() as rig:
        everybody = dict.fromkeys(rig.endpoints, 1)
        await rig.publish(Snapshot(everybody, unreachable=frozenset(everybody)))
        assert await rig.gateway.split(10) == {MODEL: 10}


@both_protocols
async def test_a_refused_table_leaves_the_old_one_and_shows(*, delta: bool) -> None:
    async with run_rig(delta=delta) as rig:
        good = Snapshot(dict(zip(rig.endpoints, (1000, 10), strict=True)))
        await rig.publish(good)
        bad = Snapshot({**good.weights, Endpoint("pod-x", "not-an-address", 1): 5})
        with pytest.raises(PublishError, match="not-an-address"):
            await rig.publish(bad)
        assert await rig.gateway.weights() == by_port(good)
        assert rig.xds.nacks_total == 1
        assert rig.xds.last_nack is not None
        assert rig.xds.last_nack.names == (ONE_POOL.name,)
        assert "not-an-address" in rig.xds.last_nack.detail
        with pytest.raises(PublishError):
            await rig.xds.publish(ONE_POOL.name, bad)
        assert rig.xds.nacks_total == 1  # it is not offered again

        better = Snapshot(dict(zip(rig.endpoints, (10, 1000), strict=True)))
        with pytest.raises(PublishError):  # tells of the offer before; this one is on its way
            await rig.xds.publish(ONE_POOL.name, better)
        await rig.publish(better)
        assert await rig.gateway.weights() == by_port(better)


async def test_one_server_feeds_two_envoys() -> None:
    async with run_rig() as rig, run_gateway(xds_port=rig.xds.port, node="b") as second:
        await second.process.wait_ready()
        assert rig.xds.connected == 2
        snapshot = Snapshot(dict(zip(rig.endpoints, (3, 900), strict=True)))
        await rig.publish(snapshot)
        assert await rig.gateway.weights() == await second.weights() == by_port(snapshot)


async def read_on(answer: aiohttp.ClientResponse, events: int) -> None:
    for _ in range(events):
        assert (await answer.content.readuntil(b"\n\n")).startswith(b"data: {")


@both_protocols
async def test_a_changed_cluster_breaks_no_stream_and_fails_no_request(*, delta: bool) -> None:
    """Its endpoints are sent again unasked, or Envoy would wait 15 s for them."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(run_rig(delta=delta))
        streams = [
            await stack.enter_async_context(rig.gateway.open_stream(tokens=100_000))
            for _ in range(8)
        ]
        for changed in (PoolRoute(ONE_POOL.name, balance="round_robin"), ONE_POOL):
            async with asyncio.TaskGroup() as group:
                for answer in streams:
                    group.create_task(read_on(answer, 20))
            pushed = rig.xds.pushes_total
            async with rig.load() as load:
                await load.passes(20)
                rig.xds.set_pools({LISTENER: [changed]})
                await load.passes(20)
            assert load.failed == []
            assert rig.xds.pushes_total == pushed + 2  # the cluster and its endpoints
        async with asyncio.TaskGroup() as group:
            for answer in streams:
                group.create_task(read_on(answer, 200))
    assert rig.xds.nacks_total == 0


@both_protocols
async def test_a_pool_is_replaced_under_load_without_a_failed_request(*, delta: bool) -> None:
    """Routes never name a cluster that is not warm, and none goes before its routes."""
    async with run_rig(delta=delta) as rig:
        everybody = Snapshot(dict.fromkeys(rig.endpoints, 1))
        async with rig.load() as load:
            for old, new in itertools.pairwise([ONE_POOL.name, "second", "third"]):
                rig.xds.set_pools({LISTENER: [PoolRoute(new)]})
                await load.passes(50)  # the new pool has no endpoints yet: the old one serves on
                await rig.publish(everybody, pool=new)
                await load.passes(50)
                await until(functools.partial(is_gone, rig, old))
                assert await rig.gateway.weights(new) == by_port(everybody)
        assert load.failed == []


async def is_gone(rig: Rig, pool: str) -> bool:
    return not await rig.gateway.hosts(pool)


async def test_publishing_before_anybody_listens_is_enough() -> None:
    """An Envoy that comes later is told at once; until a pool has endpoints it stays closed."""
    async with run_rig() as rig:
        rig.xds.set_pools({LISTENER: [PoolRoute("fresh")]})
        async with (
            run_gateway(xds_port=rig.xds.port, node="b") as second,
            asyncio.timeout(DEADLINE_S),
        ):
            assert await second.hosts("fresh") == []
            await rig.xds.publish("fresh", Snapshot(dict.fromkeys(rig.endpoints, 1)))
            await second.process.wait_ready()
            assert await second.split(2) == {MODEL: 2}
