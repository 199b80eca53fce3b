"""What the control plane says of the pools, heard as one more client of what it tells Envoys.

The picker needs no protocol of its own: clusters (CDS) are the pools, assignments (EDS) are who
serves them and who takes no new work. In the whole-state variant of ADS each answer is complete, so
nothing has to be remembered over a reconnect. What was heard last stays true for the caller until
something else is heard, however long nobody is there to say it.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from trimtab.core.model import Endpoint, Snapshot
from trimtab.envoy_config import METADATA, PoolRoute, facts
from trimtab.envoy_picker import NODE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CDS = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_EDS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
_AGAIN_S = (0.1, 0.5)  # at random: all pickers of a restarted control plane return at once
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A control plane that hangs or whose host vanished would go unnoticed for good.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_jitter = random.SystemRandom()

log = structlog.get_logger(__name__)

Pools = dict[str, tuple[PoolRoute, Snapshot]]


class PoolsClient:
    """Hears from one control plane."""

    def __init__(self, host: str, port: int) -> None:
        self.connected = False
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def changes(self) -> AsyncIterator[Pools]:
        """Yield the pools that are to be picked for, at first and whenever they change; for ever.

        A pool is left out while it is not known who serves it.
        """
        async with grpc.aio.insecure_channel(self._target, options=_OPTIONS) as channel:
            method = channel.stream_stream(
                _METHOD,
                request_serializer=discovery_pb2.DiscoveryRequest.SerializeToString,
                response_deserializer=discovery_pb2.DiscoveryResponse.FromString,
            )
            while True:
                heard = _Heard()
                call = method(wait_for_ready=True)
                try:
                    await call.write(_request(_CDS))
                    async for answer in call:
                        self._note(connected=True)
                        for request in heard.take(answer):
                            await call.write(request)
                        if heard.complete:
                            yield heard.pools()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    self._note(connected=False, reason=str(error))
                finally:
                    call.cancel()
                self._note(connected=False)
                await asyncio.sleep(_jitter.uniform(*_AGAIN_S))

    def _note(self, *, connected: bool, reason: str = "") -> None:
        if connected and not self.connected:
            log.info("the control plane is heard", at=self._target)
        elif self.connected and not connected:
            log.warning("the control plane is gone, what it said stays", reason=reason)
        self.connected = connected


@dataclass(slots=True)
class _Heard:
    """What one stream has brought so far."""

    clusters: dict[str, PoolRoute] | None = None
    assignments: dict[str, Snapshot] = field(default_factory=dict)
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Version and nonce of the last answer that was taken, by type."""

    @property
    def complete(self) -> bool:
        return self.clusters is not None and self.clusters.keys() <= self.assignments.keys()

    def pools(self) -> Pools:
        return {
            name: (pool, self.assignments[name]) for name, pool in (self.clusters or {}).items()
        }

    def take(self, answer: Any) -> list[Any]:
        """Take an answer in, and say what is to be sent in return."""
        try:
            if answer.type_url == _CDS:
                self._take_clusters(answer.resources)
            else:
                self._take_assignments(answer.resources)
        except (DecodeError, TypeError, ValueError) as error:
            log.warning("the control plane said what makes no sense", reason=str(error))
            refusal = self._next(answer.type_url)
            refusal.response_nonce = answer.nonce
            refusal.error_detail.message = str(error)
            return [refusal]
        self.versions[answer.type_url] = (answer.version_info, answer.nonce)
        told = [self._next(answer.type_url)]
        if answer.type_url == _CDS:
            told.append(self._next(_EDS))
        return told

    def _take_clusters(self, resources: Any) -> None:
        pools = [pool_of(_unpacked(each, cluster_pb2.Cluster())) for each in resources]
        self.clusters = {pool.name: pool for pool in pools if pool.picked}
        self.assignments = {n: s for n, s in self.assignments.items() if n in self.clusters}

    def _take_assignments(self, resources: Any) -> None:
        for each in resources:
            message = _unpacked(each, endpoint_pb2.ClusterLoadAssignment())
            self.assignments[message.cluster_name] = snapshot_of(message)

    def _next(self, type_url: str) -> Any:
        version, nonce = self.versions.get(type_url, ("", ""))
        names = sorted(self.clusters or ()) if type_url == _EDS else ()
        return _request(type_url, names=names, version_info=version, response_nonce=nonce)


def _request(type_url: str, *, names: Any = (), **more: str) -> Any:
    request = discovery_pb2.DiscoveryRequest(type_url=type_url, resource_names=names, **more)
    request.node.id = NODE
    return request


def _unpacked(packed: Any, message: Any) -> Any:
    if not packed.Unpack(message):
        raise TypeError(f"a {packed.type_url} among resources of another type")
    return message


def pool_of(message: cluster_pb2.Cluster) -> PoolRoute:
    """What a cluster says of its pool to whoever picks for it; all else is as by default."""
    told = MessageToDict(message.metadata.filter_metadata[METADATA])
    known = facts(PoolRoute(message.name))
    return PoolRoute(message.name, **(known | {k: told[k] for k in known.keys() & told.keys()}))


def snapshot_of(message: endpoint_pb2.ClusterLoadAssignment) -> Snapshot:
    """Who serves a pool: the inverse of `envoy_config.assignment`."""
    weights: dict[Endpoint, int] = {}
    unreachable: set[Endpoint] = set()
    draining: set[Endpoint] = set()
    for host in (host for locality in message.endpoints for host in locality.lb_endpoints):
        address = host.endpoint.address.socket_address
        told = MessageToDict(host.metadata.filter_metadata[METADATA])
        endpoint = Endpoint(str(told.get("pod", "")), address.address, address.port_value)
        weights[endpoint] = host.load_balancing_weight.value
        if host.health_status == health_check_pb2.UNHEALTHY:
            unreachable.add(endpoint)
        elif host.health_status == health_check_pb2.DRAINING:
            draining.add(endpoint)
    return Snapshot(
        MappingProxyType(weights),
        unreachable=frozenset(unreachable),
        draining=frozenset(draining),
    )
