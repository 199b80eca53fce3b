"""What Trimtab says about itself: logs, metrics, health.

A log line is written when something changes, never per tick or request. Gauges are not kept but
read off the last decision of each pool when somebody asks, so a series cannot outlive its endpoint
and a tick pays nothing for them; the age of data goes on growing when ticks stop. /debug/pools is
read off likewise: it is what `trimtab explain` prints.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from trimtab import __version__
from trimtab.core.explaining import Deeds, explain
from trimtab.core.model import EndpointState, Failure
from trimtab.ports import PublishError, StartError, TrimtabError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prometheus_client.metrics_core import Metric

    from trimtab.core.model import Decision, Observation
    from trimtab.ports import Clock

OVERDUE_S = 10.0  # or three periods: one slow tick must not get the process restarted
_TICK_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

log = structlog.get_logger(__name__)


def configure_logs(level: str = "info") -> None:
    """Write our records and those of libraries to stderr: for people in a terminal, else JSON."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    last: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    if sys.stderr.isatty():
        # The default formatter prints local variables, at length.
        last = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class DataPlane(Protocol):
    """What the xDS server tells of itself."""

    @property
    def connected(self) -> int: ...

    @property
    def last_nack(self) -> object:
        """None, or what tells as a string which Envoy refused what, and why."""

    def following(self, pool: str) -> int:
        """Count the Envoys that have a pool's latest snapshot."""

    nacks_total: int
    pushes_total: int


class Source(Protocol):
    """What those who watch a cluster tell of themselves."""

    @property
    def synced(self) -> bool:
        """Whether everything was listed once, and the pools in it are known here."""

    @property
    def stale(self) -> list[str]:
        """What nobody watches any more."""


@dataclass(slots=True)
class _Pool:
    """The last that was heard of one pool."""

    overdue_s: float
    ticked_s: float
    """When a tick last ended that met no bug; at first, when the pool came."""
    ticks: int = 0
    decision: Decision | None = None
    decided_s: float = 0.0
    changed_s: float = 0.0
    """When the last snapshot came that was another."""
    published_s: float | None = None
    complaint: str = ""
    """What the log already says is wrong."""
    bug: bool = False


class Telemetry(Collector):
    """The witness of all loops; `expect` and `forget` say which pools there are."""

    def __init__(
        self, clock: Clock, *, data_plane: DataPlane | None = None, source: Source | None = None
    ) -> None:
        # One more series per counter, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's gap
        self.registry = CollectorRegistry()
        self._clock = clock
        self._data_plane = data_plane
        self._source = source
        self._pools: dict[str, _Pool] = {}
        self._ready = False
        self._held_because = ""
        Gauge(
            "trimtab_build_info", "Which Trimtab this is.", ["version"], registry=self.registry
        ).labels(__version__).set(1)
        self._tick_s = Histogram(
            "trimtab_pool_tick_seconds",
            "Time from the start of a tick to its end, publishing included.",
            ["pool"],
            registry=self.registry,
            buckets=_TICK_BUCKETS_S,
        )
        self._skipped = self._counter("ticks_skipped", "Periods that passed during a tick.")
        self._bugs = self._counter("tick_bugs", "Ticks that ended in an unexpected error.")
        self._scrape_failures = self._counter(
            "scrape_failures", "Pages that did not come, by kind of failure.", "kind"
        )
        self._publish_failures = self._counter(
            "publish_failures", "Snapshots that a data plane did not take."
        )
        self._sampled = self._timestamp("last_sample", "When a page last gave a sample.")
        self._published = self._timestamp("last_publish", "When a snapshot was last published.")
        self.registry.register(self)

    def _counter(self, what: str, text: str, *labels: str) -> Counter:
        return Counter(f"trimtab_pool_{what}", text, ["pool", *labels], registry=self.registry)

    def _timestamp(self, what: str, text: str) -> Gauge:
        name = f"trimtab_pool_{what}_timestamp_seconds"
        return Gauge(name, text, ["pool"], registry=self.registry)

    # Which pools there are

    def expect(self, pool: str, *, interval_s: float) -> None:
        """Take a pool into account, or hear that its period has changed."""
        overdue_s = max(OVERDUE_S, 3 * interval_s)
        if pool in self._pools:
            self._pools[pool].overdue_s = overdue_s
        else:
            self._pools[pool] = _Pool(overdue_s=overdue_s, ticked_s=self._clock.now_s())

    def forget(self, pool: str) -> None:
        del self._pools[pool]
        for metric in (
            self._tick_s,
            self._skipped,
            self._bugs,
            self._scrape_failures,
            self._publish_failures,
            self._sampled,
            self._published,
        ):
            metric.remove_by_labels({"pool": pool})
        log.info("pool is no longer served", pool=pool)

    def hold(self, why: str) -> None:
        """Be unready, whatever is published, until `release`."""
        self._held_because = why

    def release(self) -> None:
        self._held_because = ""

    # The witness of the loops

    def decided(self, pool: str, observation: Observation, decision: Decision) -> None:
        known = self._pools[pool]
        known.decided_s = self._clock.now_s()
        if known.decision is None or decision.snapshot is not known.decision.snapshot:
            known.changed_s = known.decided_s
        known.decision = decision
        known.ticks += 1
        for reading in observation.readings.values():
            if isinstance(reading.outcome, Failure):
                self._scrape_failures.labels(pool, reading.outcome.kind).inc()
        if any(not isinstance(r.outcome, Failure) for r in observation.readings.values()):
            self._sampled.labels(pool).set_to_current_time()
        for change in decision.changes:
            log.info(change, pool=pool, tick=known.ticks)

    def published(self, pool: str) -> None:
        known = self._pools[pool]
        self._published.labels(pool).set_to_current_time()
        if known.complaint:
            log.info("pool is all right again", pool=pool, tick=known.ticks)
        elif known.published_s is None and known.decision is not None:
            log.info("pool is served", pool=pool, endpoints=len(known.decision.endpoints))
        known.published_s, known.complaint, known.bug = self._clock.now_s(), "", False

    def failed(self, pool: str, error: Exception) -> None:
        known = self._pools[pool]
        known.bug = not isinstance(error, TrimtabError)
        if isinstance(error, PublishError):
            self._publish_failures.labels(pool).inc()
        if known.bug:
            self._bugs.labels(pool).inc()
        complaint = f"{type(error).__name__}: {error}"
        if complaint != known.complaint:
            known.complaint = complaint
            log.error(
                "tick failed, the next one tries again",
                pool=pool,
                tick=known.ticks,
                reason=complaint,
                exc_info=error if known.bug else None,
            )

    def ticked(self, pool: str, *, took_s: float, skipped: int) -> None:
        known = self._pools[pool]
        self._tick_s.labels(pool).observe(took_s)
        self._skipped.labels(pool).inc(skipped)
        if not known.bug:
            known.ticked_s = self._clock.now_s()

    # Health

    @property
    def overdue(self) -> list[str]:
        """Pools whose last good tick is so old that only a restart can help."""
        now_s = self._clock.now_s()
        return [name for name, p in self._pools.items() if now_s - p.ticked_s > p.overdue_s]

    @property
    def ready(self) -> bool:
        """Whether every pool has been published once; pools that come later change nothing."""
        known = bool(self._pools) if self._source is None else self._source.synced
        self._ready = self._ready or (known and not self._waiting)
        return self._ready and not self._held_because

    @property
    def _waiting(self) -> list[str]:
        return [name for name, pool in self._pools.items() if pool.published_s is None]

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[int]:
        """Answer /metrics, /healthz, /readyz and /debug/pools, and say on which port.

        Raises StartError.
        """
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._answer_metrics),
                web.get("/healthz", self._answer_healthz),
                web.get("/readyz", self._answer_readyz),
                web.get("/debug/pools", self._answer_pools),
                web.get("/debug/pools/{name:.+}", self._answer_pool),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            try:
                await site.start()
            except OSError as error:
                raise StartError(
                    f"telemetry cannot listen on {host}:{port}: {error.strerror}"
                ) from error
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def _answer_metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.registry), headers={"Content-Type": content_type})

    async def _answer_healthz(self, _: web.Request) -> web.Response:
        if self.overdue:
            return web.Response(status=503, text=f"no tick for long: {', '.join(self.overdue)}\n")
        if self._source is not None and (stale := self._source.stale):
            return web.Response(status=503, text=f"nobody watches {', '.join(stale)}\n")
        return web.Response(text="ok\n")

    async def _answer_readyz(self, _: web.Request) -> web.Response:
        if self.ready:
            return web.Response(text="ok\n")
        why = f"not yet published: {', '.join(self._waiting)}"
        if self._source is not None and not self._source.synced:
            why = "the cluster's objects are not yet known"
        why = self._held_because or why
        return web.Response(status=503, text=f"{why}\n")

    async def _answer_pools(self, _: web.Request) -> web.Response:
        return web.json_response(sorted(self._pools))

    async def _answer_pool(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._pools:
            return web.Response(status=404, text=f"no pool {name!r} is served here\n")
        known, plane = self._pools[name], self._data_plane
        decided = known.decision is not None
        deeds = Deeds(
            decided_s=known.decided_s if decided else None,
            changed_s=known.changed_s if decided else None,
            published_s=known.published_s,
            envoys=plane.connected if plane else 0,
            following=plane.following(name) if plane else 0,
            refusal=str(plane.last_nack or "") if plane else "",
            complaint=known.complaint,
        )
        explanation = explain(name, known.decision, deeds, now_s=self._clock.now_s())
        text = json.dumps(asdict(explanation), indent=2, allow_nan=False)
        return web.Response(text=text + "\n", content_type="application/json")

    # Series that are read off, not kept

    def collect(self) -> Iterator[Metric]:
        yield from self._of_data_plane()
        yield from self._of_pools()
        yield from self._of_endpoints()

    def _of_data_plane(self) -> Iterator[Metric]:
        if self._data_plane is None:
            return
        yield GaugeMetricFamily(
            "trimtab_xds_envoys_connected",
            "Envoys that listen.",
            value=self._data_plane.connected,
        )
        yield CounterMetricFamily(
            "trimtab_xds_nacks", "Pushes that an Envoy refused.", value=self._data_plane.nacks_total
        )
        yield CounterMetricFamily(
            "trimtab_xds_pushes", "Messages pushed.", value=self._data_plane.pushes_total
        )

    def _of_pools(self) -> Iterator[Metric]:
        count = GaugeMetricFamily(
            "trimtab_pool_endpoints", "Endpoints by state.", labels=["pool", "state"]
        )
        backlog = GaugeMetricFamily(
            "trimtab_pool_backlog_tokens", "Work owed, in prefill tokens.", labels=["pool"]
        )
        drain = GaugeMetricFamily(
            "trimtab_pool_drain_seconds", "Drain time of the fullest endpoint.", labels=["pool"]
        )
        for name, pool in self._pools.items():
            if pool.decision is not None:
                reports = pool.decision.endpoints.values()
                for state in EndpointState:
                    count.add_metric([name, state], sum(r.state == state for r in reports))
                backlog.add_metric([name], sum(r.backlog_tokens for r in reports))
                drain.add_metric([name], max((r.drain_s for r in reports), default=0.0))
        yield from (count, backlog, drain)

    def _of_endpoints(self) -> Iterator[Metric]:
        labels = ["pool", "pod", "address"]
        gauges = {
            name: GaugeMetricFamily(f"trimtab_endpoint_{name}", text, labels=labels)
            for name, text in _ENDPOINT_GAUGES.items()
        }
        states = GaugeMetricFamily(
            "trimtab_endpoint_state", "1 for the state it is in.", labels=[*labels, "state"]
        )
        now_s = self._clock.now_s()
        for name, pool in self._pools.items():
            if pool.decision is not None:
                for endpoint, report in pool.decision.endpoints.items():
                    values = [name, endpoint.pod, endpoint.where]
                    age_s = report.age_s + now_s - pool.decided_s
                    gauges["weight"].add_metric(values, report.weight)
                    gauges["backlog_tokens"].add_metric(values, report.backlog_tokens)
                    gauges["drain_seconds"].add_metric(values, report.drain_s)
                    gauges["speed_ratio"].add_metric(values, report.speed_ratio)
                    gauges["data_age_seconds"].add_metric(values, age_s)
                    for state in EndpointState:
                        states.add_metric([*values, state], state == report.state)
        yield from (*gauges.values(), states)


_ENDPOINT_GAUGES = {
    "weight": "Share of new work, 1 to 1000.",
    "backlog_tokens": "Work owed, in prefill tokens.",
    "drain_seconds": "Time it needs for its backlog.",
    "speed_ratio": "Measured speed over the median of the pool; 1 until known.",
    "data_age_seconds": "Age of the data on which its weight rests.",
}
