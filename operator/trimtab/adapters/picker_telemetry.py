"""What the picker says about itself: metrics, health, and its last decisions.

Like all telemetry here it is read off when somebody asks; a pick pays for nothing but the one entry
that it leaves in the bounded log. Neither names nor contents of requests are in it, only sizes.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from trimtab import __version__
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from prometheus_client.metrics_core import Metric

    from trimtab.adapters.ads import PoolsClient
    from trimtab.adapters.authz import AuthzServer
    from trimtab.picks import Decided, Picks
    from trimtab.ports import Clock


class PickerTelemetry(Collector):
    """Reads off what the picker's parts count."""

    def __init__(
        self, clock: Clock, *, picks: Picks, authz: AuthzServer, control: PoolsClient
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._clock = clock
        self._picks = picks
        self._authz = authz
        self._control = control

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[int]:
        """Answer /metrics, /healthz, /readyz and /debug/decisions. Raises StartError."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._answer_metrics),
                web.get("/healthz", self._answer_healthz),
                web.get("/readyz", self._answer_readyz),
                web.get("/debug/decisions", self._answer_decisions),
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
                    f"the picker's telemetry cannot listen on {host}:{port}: {error.strerror}"
                ) from error
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def _answer_metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.registry), headers={"Content-Type": content_type})

    async def _answer_healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _answer_readyz(self, _: web.Request) -> web.Response:
        if self._picks.ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the control plane has not yet said who serves\n")

    async def _answer_decisions(self, request: web.Request) -> web.Response:
        """Show the last decisions, the newest last; `?pool=NAME` only that pool's."""
        pool = request.query.get("pool")
        now_s = self._clock.now_s()
        lines = [
            json.dumps(_line(decided, now_s)) + "\n"
            for decided in self._picks.decisions
            if pool in {None, decided.pool}
        ]
        return web.Response(text="".join(lines), content_type="application/jsonl")

    def collect(self) -> Iterator[Metric]:
        yield _gauge("trimtab_build_info", "Which Trimtab this is.", 1, version=__version__)
        yield _gauge(
            "trimtab_picker_control_connected",
            "1 while the control plane is heard.",
            int(self._control.connected),
        )
        for name, text, value in (
            ("checks", "Requests that Envoy asked about.", self._authz.checks_total),
            ("garbage", "Messages that were no checks.", self._authz.garbage_total),
            ("bugs", "Choices that ended in an unexpected error.", self._authz.bugs_total),
            ("unknown_pools", "Checks for pools not known here.", self._picks.unknown_total),
        ):
            yield CounterMetricFamily(f"trimtab_picker_{name}", text, value=value)
        picks = CounterMetricFamily("trimtab_picker_picks", "Choices made.", labels=["pool"])
        size = GaugeMetricFamily(
            "trimtab_picker_bytes_per_token", "Bytes of body for a token.", labels=["pool"]
        )
        for name, books in self._picks.pools.items():
            picks.add_metric([name], books.picks_total)
            size.add_metric([name], books.size.bytes_per_token)
        yield from (picks, size, *self._of_endpoints())

    def _of_endpoints(self) -> Iterator[Metric]:
        labels = ["pool", "pod", "address"]
        gauges = {
            name: GaugeMetricFamily(f"trimtab_picker_endpoint_{name}", text, labels=labels)
            for name, text in _GAUGES.items()
        }
        now_s = self._clock.now_s()
        for name, books in self._picks.pools.items():
            for endpoint in books.endpoints:
                estimate = books.ledger.estimate(endpoint, now_s=now_s)
                if estimate is not None:
                    values = [name, endpoint.pod, endpoint.where]
                    gauges["prefill_tokens"].add_metric(values, estimate.prefill_tokens)
                    gauges["context_tokens"].add_metric(values, estimate.context_tokens)
                    gauges["requests"].add_metric(values, estimate.requests)
                    gauges["data_age_seconds"].add_metric(values, estimate.age_s)
                    gauges["excluded"].add_metric(values, int(endpoint in books.excluded))
        yield from gauges.values()


_GAUGES = {
    "prefill_tokens": "Prompt tokens sent and not yet prefilled, as reckoned.",
    "context_tokens": "Context in flight, as reckoned.",
    "requests": "Requests in flight, as reckoned.",
    "data_age_seconds": "Age of the page on which that rests.",
    "excluded": "1 while it is not chosen: it leaves, or nobody listens there.",
}


def _gauge(name: str, text: str, value: float, **labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _line(decided: Decided, now_s: float) -> dict[str, Any]:
    pick = decided.pick
    return {
        "number": decided.number,
        "age_s": round(now_s - decided.at_s, 3),
        "pool": decided.pool,
        "body_bytes": decided.body_bytes,
        "prompt_tokens": round(decided.tokens),
        "chosen": pick.endpoint.pod,
        "address": pick.endpoint.where,
        "predicted_ttft_s": round(pick.ttft_s, 4),
        "candidates": [
            {"pod": endpoint.pod, "address": endpoint.where, "ttft_s": round(cost_s, 4)}
            for endpoint, cost_s in pick.costs_s
        ],
    }
