"""What the control plane says, the picker hears; nonsense and silence change nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from envoy.service.discovery.v3 import discovery_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from rig_envoy import DEADLINE_S
from trimtab.adapters.ads import PoolsClient, pool_of, snapshot_of
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Snapshot
from trimtab.envoy_config import PoolRoute, assignment, cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trimtab.adapters.ads import Pools

A, B, C = (Endpoint(f"pod-{n}", f"10.0.0.{n}", 8000) for n in range(3))
PICKED = PoolRoute("team/picked", picked=True, metrics_path="/m", engine="VLLM")
PLAIN = PoolRoute("plain")
CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"

endpoints = st.builds(
    Endpoint, st.text(max_size=20), st.ip_addresses().map(str), st.integers(1, 65_535)
)


@given(
    st.dictionaries(endpoints, st.integers(1, 1000), max_size=8),
    st.sets(endpoints, max_size=2),
    st.sets(endpoints, max_size=2),
)
@settings(max_examples=100)
def test_a_snapshot_comes_back_as_it_was_said(
    weights: dict[Endpoint, int], unreachable: set[Endpoint], draining: set[Endpoint]
) -> None:
    gone, leaving = frozenset(unreachable), frozenset(draining - unreachable)
    said = Snapshot({**dict.fromkeys(gone | leaving, 1), **weights}, gone, leaving)
    heard = snapshot_of(assignment("pool", said))
    assert (dict(heard.weights), heard.unreachable, heard.draining) == (said.weights, gone, leaving)


@pytest.mark.parametrize("pool", [PICKED, PLAIN])
def test_what_is_to_be_known_of_a_pool_comes_back_as_it_was_said(pool: PoolRoute) -> None:
    assert pool_of(cluster(pool)) == pool


def test_a_cluster_of_another_control_plane_is_not_picked_for() -> None:
    message = cluster(PICKED)
    message.ClearField("metadata")
    assert pool_of(message) == PoolRoute(PICKED.name)


async def hear(changes: AsyncIterator[Pools]) -> dict[str, set[Endpoint]]:
    """The next change: who serves which pool."""
    async with asyncio.timeout(DEADLINE_S):
        pools = await anext(changes)
    return {name: set(snapshot.weights) for name, (_, snapshot) in pools.items()}


async def test_pools_are_heard_as_they_come_change_and_go() -> None:
    xds = XdsServer(port=0)
    await xds.start()
    changes = PoolsClient("127.0.0.1", xds.port).changes()
    try:
        xds.set_pools({"gateway": [PICKED, PLAIN]})
        await xds.publish(PLAIN.name, Snapshot({C: 1}))
        await xds.publish(PICKED.name, Snapshot({A: 1}))
        assert await hear(changes) == {PICKED.name: {A}}
        await xds.publish(PICKED.name, Snapshot({A: 1, B: 1}))
        assert await hear(changes) == {PICKED.name: {A, B}}
        xds.set_pools({"gateway": [PICKED, replace(PLAIN, picked=True)]})
        while (heard := await hear(changes)).keys() != {PICKED.name, PLAIN.name}:
            pass
        assert heard == {PICKED.name: {A, B}, PLAIN.name: {C}}
        xds.set_pools({"gateway": [PLAIN]})
        while await hear(changes):
            pass
        assert xds.nacks_total == 0
        assert xds.connected == 0  # it carries no requests
    finally:
        await changes.aclose()  # type: ignore[attr-defined]  # it is a generator
        await xds.stop()


async def test_a_control_plane_that_returns_is_heard_again() -> None:
    first = XdsServer(port=0)
    first.set_pools({"gateway": [PICKED]})
    await first.publish(PICKED.name, Snapshot({A: 1}))
    await first.start()
    client = PoolsClient("127.0.0.1", first.port)
    changes = client.changes()
    try:
        assert await hear(changes) == {PICKED.name: {A}}
        await first.stop()
        second = XdsServer(port=first.port)
        second.set_pools({"gateway": [PICKED]})
        await second.publish(PICKED.name, Snapshot({B: 1}))
        await second.start()
        first = second
        assert await hear(changes) == {PICKED.name: {B}}
        assert client.connected
    finally:
        await changes.aclose()  # type: ignore[attr-defined]  # it is a generator
        await first.stop()


async def test_nonsense_is_refused_by_its_nonce_and_the_next_answer_counts() -> None:
    refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def speak(requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        await anext(requests)
        nonsense = discovery_pb2.DiscoveryResponse(type_url=CLUSTER, nonce="1", version_info="1")
        nonsense.resources.add(type_url=CLUSTER, value=b"\xff\xff")
        yield nonsense
        refused.set_result(await anext(requests))
        yield discovery_pb2.DiscoveryResponse(type_url=CLUSTER, nonce="2", version_info="2")
        async for _ in requests:
            pass

    server = grpc.aio.server()
    service = "envoy.service.discovery.v3.AggregatedDiscoveryService"
    handler = grpc.stream_stream_rpc_method_handler(
        speak,
        request_deserializer=discovery_pb2.DiscoveryRequest.FromString,
        response_serializer=discovery_pb2.DiscoveryResponse.SerializeToString,
    )
    handlers = {"StreamAggregatedResources": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    changes = PoolsClient("127.0.0.1", port).changes()
    try:
        assert await hear(changes) == {}
        request = await refused
        assert (request.response_nonce, request.version_info) == ("1", "")
        assert request.error_detail.message
    finally:
        await changes.aclose()  # type: ignore[attr-defined]  # it is a generator
        await server.stop(None)
