"""The xDS server: each connected Envoy is told what changed, one push at a time, in a safe order.

Per Envoy and type there is at most one push on its way; what changes meanwhile is coalesced into
the next. A cluster's endpoints follow its change unasked, because Envoy warms a changed cluster
until they arrive. Routes wait for the clusters they name, and clusters wait to be removed for the
routes that named them, so a request never meets a route without a cluster. Versions are derived
from content: an Envoy that returns to another replica is not told what it knows.

Protocol: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol (ADS, both variants).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import grpc
import grpc.aio
import structlog
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import any_pb2

from trimtab import envoy_config, envoy_picker
from trimtab.ports import PublishError, StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from trimtab.core.model import Snapshot
    from trimtab.envoy_config import PoolRoute

CDS = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
EDS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
RDS = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
IN_ORDER = (CDS, EDS, RDS)

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # with it a second server would silently share the port
    # Envoy pings every 5 s on a silent stream; gRPC's default calls that abuse and hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 10_000),  # an Envoy whose host vanished is not counted for long
    ("grpc.keepalive_timeout_ms", 5_000),
)


class _Context(Protocol):
    async def write(self, message: Any) -> None: ...


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Nack:
    """One refusal: which Envoy, what it refused, and its reason."""

    node: str
    type_url: str
    names: tuple[str, ...]
    detail: str

    def __str__(self) -> str:
        kind = self.type_url.rpartition(".")[2]
        return f"Envoy {self.node} refused {kind} {', '.join(self.names)}: {self.detail}"


@dataclass(frozen=True, slots=True)
class _Resource:
    name: str
    version: str
    body: any_pb2.Any | None = None
    """Serialised once for all Envoys; None where only the version is known."""


def _resource(name: str, message: Any, version: str = "") -> _Resource:
    body = any_pb2.Any()
    body.Pack(message, deterministic=True)
    return _Resource(name, version or hashlib.sha256(body.value).hexdigest()[:16], body)


_Table = dict[str, dict[str, _Resource]]


@dataclass(slots=True)
class _Subscription:
    """What one Envoy asked of one type, what it has, and what is on its way to it."""

    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    taken: dict[str, _Resource] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Versions not to be offered again: the same answer would follow for ever."""
    nonce: str = ""
    sent: dict[str, _Resource | None] | None = None
    """On its way, by name; None stands for a removal. No second push before the answer."""
    answered: bool = False

    def forget(self, name: str) -> None:
        self.taken.pop(name, None)
        self.refused.pop(name, None)
        if self.sent is not None:
            self.sent.pop(name, None)

    def missing(self, known: Mapping[str, _Resource]) -> dict[str, _Resource]:
        wanted = known if self.wildcard else {n: known[n] for n in self.names if n in known}
        return {
            name: resource
            for name, resource in wanted.items()
            if resource.version != self.refused.get(name)
            and (name not in self.taken or resource.version != self.taken[name].version)
        }

    def settle(self, *, accepted: bool) -> None:
        for name, resource in (self.sent or {}).items():
            if resource is None:
                self.taken.pop(name, None)
            elif accepted:
                self.taken[name] = resource
                self.refused.pop(name, None)
            else:
                self.refused[name] = resource.version
        self.sent = None


@dataclass(frozen=True, slots=True)
class _Change:
    """What an Envoy is to hear next about one type."""

    send: dict[str, _Resource]
    remove: list[str]


class _Stream:
    """One connected Envoy. What the two protocol variants share; they differ in hear and word."""

    method: ClassVar[str]
    request_type: ClassVar[Any]
    response_type: ClassVar[Any]

    def __init__(self) -> None:
        self.node = "?"
        self.last_nack: Nack | None = None
        self.wake = asyncio.Event()
        self.subscriptions: dict[str, _Subscription] = {}
        self._nonces = itertools.count(1)

    def hear(self, request: Any) -> Nack | None:
        raise NotImplementedError

    def word(self, type_url: str, change: _Change) -> Any:
        raise NotImplementedError

    def next_push(self, table: _Table) -> Any | None:
        """Say what is due now, if anything; to be called until it has nothing more to say."""
        for type_url, subscription in self.subscriptions.items():
            if subscription.sent is None and (change := self._due(type_url, table)) is not None:
                if type_url == CDS:
                    for name in change.send:
                        self._of(EDS).forget(name)
                subscription.sent = change.send | dict.fromkeys(change.remove)
                subscription.answered = True
                subscription.nonce = str(next(self._nonces))
                return self.word(type_url, change)
        return None

    def taken(self, type_url: str, name: str) -> str | None:
        resource = self._of(type_url).taken.get(name)
        return resource.version if resource else None

    def refused(self, type_url: str, name: str) -> str | None:
        return self._of(type_url).refused.get(name)

    def _of(self, type_url: str) -> _Subscription:
        return self.subscriptions.get(type_url) or _Subscription()

    def _subscribe(self, type_url: str) -> _Subscription:
        """Find or add; kept in the order in which changes are safe: clusters before routes."""
        if type_url not in self.subscriptions:
            self.subscriptions[type_url] = _Subscription()
            self.subscriptions = {
                t: self.subscriptions[t]
                for t in sorted(self.subscriptions, key=lambda t: (*IN_ORDER, t).index(t))
            }
        return self.subscriptions[type_url]

    def _due(self, type_url: str, table: _Table) -> _Change | None:
        subscription = self.subscriptions[type_url]
        known = table.get(type_url, {})
        send = subscription.missing(known)
        gone: list[str] = []
        if type_url == RDS and not self._clusters_stand(table):
            return None
        if type_url == CDS and self._routes_stand(table):
            gone = [name for name in subscription.taken if name not in known]
        first = subscription.wildcard and not subscription.answered
        return _Change(send, gone) if send or gone or first else None

    def _clusters_stand(self, table: _Table) -> bool:
        """Whether every cluster that routes may name is warm in this Envoy, or was refused."""
        clusters, assignments = self._of(CDS), self._of(EDS)
        return (
            clusters.sent is None
            and not clusters.missing(table[CDS])
            and all(n in assignments.taken or n in assignments.refused for n in clusters.taken)
        )

    def _routes_stand(self, table: _Table) -> bool:
        return self._of(RDS).sent is None and not self._of(RDS).missing(table[RDS])

    def _settle(self, type_url: str, subscription: _Subscription, error: Any | None) -> Nack | None:
        names = tuple(sorted(subscription.sent or ()))
        subscription.settle(accepted=error is None)
        if error is None:
            return None
        self.last_nack = Nack(self.node, type_url, names, error.message)
        return self.last_nack


class _WholeStream(_Stream):
    """State of the world: each answer lists all clusters, and any subset of the other types."""

    method = "StreamAggregatedResources"
    request_type: ClassVar[Any] = discovery_pb2.DiscoveryRequest
    response_type: ClassVar[Any] = discovery_pb2.DiscoveryResponse

    def hear(self, request: Any) -> Nack | None:
        self.node = request.node.id or self.node
        subscription = self._subscribe(request.type_url)
        if request.response_nonce != subscription.nonce:
            return None  # an answer to what has been overtaken; its successor will follow
        error = request.error_detail if request.HasField("error_detail") else None
        nack = self._settle(request.type_url, subscription, error)
        names = set(request.resource_names)
        for name in subscription.names - names:
            subscription.forget(name)
        subscription.names = names - {"*"}
        subscription.wildcard = request.type_url == CDS and (not names or "*" in names)
        return nack

    def word(self, type_url: str, change: _Change) -> Any:
        subscription = self.subscriptions[type_url]
        listed = change.send
        if type_url == CDS:
            stay = {n: r for n, r in subscription.taken.items() if n not in change.remove}
            listed = stay | change.send
        content = sorted((r.name, r.version) for r in listed.values())
        return discovery_pb2.DiscoveryResponse(
            type_url=type_url,
            version_info=hashlib.sha256(repr(content).encode()).hexdigest()[:16],
            nonce=subscription.nonce,
            resources=[resource.body for resource in listed.values()],
        )


class _DeltaStream(_Stream):
    """Incremental: each answer lists what changed and what is gone."""

    method = "DeltaAggregatedResources"
    request_type: ClassVar[Any] = discovery_pb2.DeltaDiscoveryRequest
    response_type: ClassVar[Any] = discovery_pb2.DeltaDiscoveryResponse

    def hear(self, request: Any) -> Nack | None:
        self.node = request.node.id or self.node
        first = request.type_url not in self.subscriptions
        subscription = self._subscribe(request.type_url)
        nack = None
        if request.response_nonce and request.response_nonce == subscription.nonce:
            error = request.error_detail if request.HasField("error_detail") else None
            nack = self._settle(request.type_url, subscription, error)
        for name in (*request.resource_names_subscribe, *request.resource_names_unsubscribe):
            subscription.forget(name)  # whoever asks again has lost it
        if first:
            for name, version in request.initial_resource_versions.items():
                subscription.taken[name] = _Resource(name, version)
        names = set(request.resource_names_subscribe)
        if request.type_url == CDS and ("*" in names or (first and not names)):
            subscription.wildcard = True
        subscription.names |= names - {"*"}
        subscription.names -= set(request.resource_names_unsubscribe)
        return nack

    def word(self, type_url: str, change: _Change) -> Any:
        return discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url,
            nonce=self.subscriptions[type_url].nonce,
            removed_resources=change.remove,
            resources=[
                discovery_pb2.Resource(name=r.name, version=r.version, resource=r.body)
                for r in change.send.values()
            ],
        )


class XdsServer:
    """ADS for any number of Envoys; the Publisher of pools that an Envoy serves.

    Silent until `set_pools` was called once: an empty answer would delete what a running Envoy
    has. A pool without a snapshot is held back likewise, and with it the routes of its listener.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 18000) -> None:
        self.host = host
        self.port = port
        self.nacks_total = 0
        self.pushes_total = 0
        self.last_nack: Nack | None = None
        self._pools_known = False
        self._table: _Table = {CDS: {}, EDS: {}, RDS: {}}
        self._streams: set[_Stream] = set()
        self._heard = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def connected(self) -> int:
        """How many Envoys listen."""
        return sum(1 for _ in self._envoys())

    async def start(self) -> None:
        """Listen. Port 0 takes a free one and `port` says which. Raises StartError."""
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handlers(),))
        try:
            self.port = server.add_insecure_port(
                f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
            )
        except RuntimeError as error:
            raise StartError(
                f"xDS cannot listen on {self.host}:{self.port}: is another Trimtab running? "
                "Stop it or choose another port"
            ) from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Hang up. Envoys keep what they have and look for the server to return."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    def set_pools(self, listeners: Mapping[str, Sequence[PoolRoute]]) -> None:
        """Say which pools exist and which listener leads to which of them."""
        pools = {pool.name: pool for members in listeners.values() for pool in members}
        self._table[CDS] = {n: _resource(n, envoy_config.cluster(p)) for n, p in pools.items()}
        self._table[RDS] = {
            n: _resource(n, envoy_config.routes(n, p)) for n, p in listeners.items()
        }
        self._table[EDS] = {n: r for n, r in self._table[EDS].items() if n in pools}
        self._pools_known = True
        self._tell()

    async def publish(self, pool: str, snapshot: Snapshot) -> None:
        """Offer `snapshot` to every Envoy, now and when it connects; does not wait for answers.

        Raises PublishError if the previous offer for this pool was refused.
        """
        previous = self._table[EDS].get(pool)
        version = snapshot.version
        if previous is None or previous.version != version:
            message = envoy_config.assignment(pool, snapshot)
            self._table[EDS][pool] = _resource(pool, message, version)
            self._tell()
        if previous is not None:
            self._raise_if_refused(pool, previous.version)

    def acked(self, pool: str) -> str | None:
        """Return the version that every connected Envoy has; None while they differ or none is."""
        versions = {stream.taken(EDS, pool) for stream in self._envoys()}
        return versions.pop() if len(versions) == 1 else None

    def following(self, pool: str) -> int:
        """Count the Envoys that have the latest of a pool."""
        current = self._table[EDS].get(pool)
        return sum(
            1 for each in self._envoys() if current and each.taken(EDS, pool) == current.version
        )

    def standing(self, pool: str) -> tuple[bool, str]:
        """Say whether every Envoy has taken something of a pool, and why one refused the latest."""
        envoys = list(self._envoys())
        current = self._table[EDS].get(pool)
        refusal = next(
            (
                f"Envoy {each.node}: {each.last_nack.detail if each.last_nack else ''}"
                for each in envoys
                if current and each.refused(EDS, pool) == current.version
            ),
            "",
        )
        return bool(envoys) and all(each.taken(EDS, pool) for each in envoys), refusal

    async def wait_acked(self, pool: str, version: str) -> None:
        """Return when every connected Envoy has `version`, or the one that took its place."""
        while True:
            current = self._table[EDS].get(pool)
            if self.acked(pool) in {version, current and current.version} - {None}:
                return
            self._raise_if_refused(pool, version)
            await self._heard.wait()

    def _envoys(self) -> Iterator[_Stream]:
        """Those that carry requests: pickers hear the same, but nothing waits for them."""
        return (each for each in self._streams if not each.node.startswith(envoy_picker.NODE))

    def _raise_if_refused(self, pool: str, version: str) -> None:
        for stream in self._envoys():
            if stream.refused(EDS, pool) == version:
                detail = stream.last_nack.detail if stream.last_nack else ""
                raise PublishError(f"Envoy {stream.node}", detail)

    def _tell(self) -> None:
        for stream in self._streams:
            stream.wake.set()

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "envoy.service.discovery.v3.AggregatedDiscoveryService",
            {
                variant.method: grpc.stream_stream_rpc_method_handler(
                    functools.partial(self._serve, variant),
                    request_deserializer=variant.request_type.FromString,
                    response_serializer=variant.response_type.SerializeToString,
                )
                for variant in (_WholeStream, _DeltaStream)
            },
        )

    async def _serve(
        self, variant: type[_Stream], requests: AsyncIterator[Any], context: _Context
    ) -> None:
        stream = variant()
        self._streams.add(stream)
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(stream, context))
                async for request in requests:
                    self._hear(stream, request)
                writer.cancel()
        finally:
            self._streams.discard(stream)
            self._announce()
            log.info("xDS client left", node=stream.node)

    def _hear(self, stream: _Stream, request: Any) -> None:
        known = stream.node
        if nack := stream.hear(request):
            self.nacks_total += 1
            self.last_nack = nack
            log.error("Envoy refused a change", **asdict(nack))
        if stream.node != known:
            log.info("xDS client connected", node=stream.node)
        stream.wake.set()
        self._announce()

    async def _write(self, stream: _Stream, context: _Context) -> None:
        while True:
            await stream.wake.wait()
            stream.wake.clear()
            while self._pools_known and (push := stream.next_push(self._table)) is not None:
                self.pushes_total += 1
                await context.write(push)

    def _announce(self) -> None:
        """Wake all who wait for answers."""
        self._heard.set()
        self._heard = asyncio.Event()
