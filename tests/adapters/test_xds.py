"""The xDS protocol, spoken by a client that does what Envoy would not do at will."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.rpc import status_pb2

from trimtab.adapters.xds import CDS, EDS, RDS, XdsServer
from trimtab.core.model import Endpoint, Snapshot
from trimtab.envoy_config import PoolRoute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

POOL = PoolRoute("pool")
POD = Endpoint("pod", "127.0.0.1", 9000)
DEADLINE_S = 10.0


def weighing(weight: int) -> Snapshot:
    return Snapshot({POD: weight})


class Client:
    """One stream. `say` sends a request, `hear` returns the next answer."""

    def __init__(self, call: Any, request_type: Any) -> None:
        self._call = call
        self._request_type = request_type

    async def say(self, type_url: str, **fields: Any) -> None:
        await self._call.write(self._request_type(type_url=type_url, **fields))

    async def hear(self) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await self._call.read()

    async def ack(self, answer: Any, **fields: Any) -> None:
        await self.say(answer.type_url, response_nonce=answer.nonce, **fields)


@asynccontextmanager
async def serving() -> AsyncIterator[XdsServer]:
    server = XdsServer(port=0)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: XdsServer, *, delta: bool) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
        call = stub.DeltaAggregatedResources() if delta else stub.StreamAggregatedResources()
        kind = discovery_pb2.DeltaDiscoveryRequest if delta else discovery_pb2.DiscoveryRequest
        yield Client(call, kind)
        call.cancel()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110  # a connection ends somewhere inside gRPC
            await asyncio.sleep(0.01)


def weight_in(answer: Any) -> int:
    (resource,) = answer.resources
    packed = resource.resource if isinstance(resource, discovery_pb2.Resource) else resource
    message = endpoint_pb2.ClusterLoadAssignment.FromString(packed.value)
    return int(message.endpoints[0].lb_endpoints[0].load_balancing_weight.value)


@pytest.mark.parametrize("delta", [True, False])
async def test_a_server_that_knows_no_pools_yet_says_nothing(*, delta: bool) -> None:
    """An empty answer would make a running Envoy drop its clusters."""
    async with serving() as server, connected(server, delta=delta) as client:
        await client.say(CDS)
        await client.say(EDS)
        await until(lambda: any(EDS in stream.subscriptions for stream in server._streams))
        server.set_pools({"door": [POOL]})
        answer = await client.hear()
        assert (answer.type_url, len(answer.resources)) == (CDS, 1)


async def test_only_the_newest_follows_a_push_that_is_under_way() -> None:
    async with serving() as server, connected(server, delta=True) as client:
        server.set_pools({"door": [POOL]})
        await server.publish(POOL.name, weighing(1))
        await client.say(EDS, resource_names_subscribe=[POOL.name])
        first = await client.hear()
        for weight in range(2, 50):
            await server.publish(POOL.name, weighing(weight))
            await asyncio.sleep(0)
        await client.ack(first)
        second = await client.hear()
        assert (weight_in(first), weight_in(second)) == (1, 49)
        assert server.pushes_total == 2


@pytest.mark.parametrize("delta", [True, False])
async def test_an_answer_with_an_overtaken_nonce_settles_nothing(*, delta: bool) -> None:
    async with serving() as server, connected(server, delta=delta) as client:
        server.set_pools({"door": [POOL]})
        await server.publish(POOL.name, weighing(1))
        names = {} if delta else {"resource_names": [POOL.name]}
        await client.say(EDS, **(names or {"resource_names_subscribe": [POOL.name]}))
        answer = await client.hear()
        refusal = status_pb2.Status(message="no")
        await client.say(EDS, response_nonce="of old", error_detail=refusal, **names)
        await client.ack(answer, **names)
        async with asyncio.timeout(DEADLINE_S):
            await server.wait_acked(POOL.name, weighing(1).version)
        assert server.nacks_total == 0


async def test_whoever_returns_with_what_it_has_is_told_only_what_changed() -> None:
    async with serving() as old, serving() as new:
        for server in (old, new):
            server.set_pools({"door": [POOL]})
            await server.publish(POOL.name, weighing(7))
        versions = {}
        async with connected(old, delta=True) as client:
            for type_url, name in ((CDS, POOL.name), (EDS, POOL.name), (RDS, "door")):
                await client.say(type_url, resource_names_subscribe=[name])
                answer = await client.hear()
                versions[type_url] = {r.name: r.version for r in answer.resources}
                await client.ack(answer)
        async with connected(new, delta=True) as client:
            for type_url, held in versions.items():
                await client.say(
                    type_url, resource_names_subscribe=list(held), initial_resource_versions=held
                )
            async with asyncio.timeout(DEADLINE_S):
                await new.wait_acked(POOL.name, weighing(7).version)
            assert new.pushes_total == 0
            await new.publish(POOL.name, weighing(8))
            assert weight_in(await client.hear()) == 8


async def test_who_asks_again_is_told_again() -> None:
    async with serving() as server, connected(server, delta=True) as client:
        server.set_pools({"door": [POOL]})
        await server.publish(POOL.name, weighing(1))
        for _ in range(2):
            await client.say(EDS, resource_names_subscribe=[POOL.name])
            answer = await client.hear()
            assert weight_in(answer) == 1
            await client.ack(answer)
            await client.say(EDS, resource_names_unsubscribe=[POOL.name])


async def test_who_has_the_latest_snapshot_follows() -> None:
    async with serving() as server, connected(server, delta=True) as client:
        server.set_pools({"door": [POOL]})
        await server.publish(POOL.name, weighing(1))
        await client.say(EDS, resource_names_subscribe=[POOL.name])
        answer = await client.hear()
        assert server.following(POOL.name) == 0
        await client.ack(answer)
        async with asyncio.timeout(DEADLINE_S):
            await server.wait_acked(POOL.name, weighing(1).version)
        assert server.following(POOL.name) == 1
        await server.publish(POOL.name, weighing(2))
        assert server.following(POOL.name) == 0


async def test_who_hangs_up_no_longer_counts() -> None:
    async with serving() as server:
        server.set_pools({"door": [POOL]})
        async with connected(server, delta=True) as client:
            await client.say(CDS)
            await client.hear()
            assert server.connected == 1
        await until(lambda: server.connected == 0)
        assert server.acked(POOL.name) is None


async def test_a_type_that_is_not_served_is_ignored() -> None:
    async with serving() as server, connected(server, delta=True) as client:
        server.set_pools({"door": [POOL]})
        await client.say("type.googleapis.com/envoy.config.listener.v3.Listener")
        await client.say(CDS)
        assert (await client.hear()).type_url == CDS
