"""Many simulated vLLM servers in one process, each on its own port.

To a client, a proxy or a scraper each of them is a vLLM 0.32 with one model: OpenAI's API,
`/metrics`, `/health`, `/load`; behind it runs the engine model, in real time. What can go wrong
with a real one can be switched on while it runs, from Python (`await engine.switch(speed=0.4)`)
or over HTTP: `PUT /sim/switches` with the fields of `Switches` to change, `GET` shows them.
`?port=N` addresses another engine of the same process, such as one that has crashed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion11, web
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from trimtab.engine_sim import wire
from trimtab.engine_sim.clocked import ClockedEngine
from trimtab.engine_sim.pages import EngineMetrics
from trimtab.engine_sim.switches import EngineOptions, MetricsMode, Switches
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from trimtab.engine_sim.model import Engine

__all__ = ["EngineOptions", "EngineServer", "Fleet", "MetricsMode", "Switches", "serve"]

VERSION = "0.32.0"  # of the vLLM whose page and forms these are
MAX_MODEL_LEN = 131_072  # tokens; less where the KV cache is smaller
MAX_BODY_BYTES = 64 * 2**20  # a prompt of token ids takes several bytes a token
BACKLOG = 1024  # connections of a burst that the kernel holds until the loop takes them
HUGE_PAGE_BYTES = 256 * 2**20  # more than any scraper should be willing to read
REQUESTS_REJECTED = (
    "The engine is currently busy and cannot accept new requests."
    " Please try again later or on a different instance."
)
TOKENS_REJECTED = (
    "The engine has reached its prefill token backlog limit."
    " Please try again later or on a different instance."
)
COUNTED = {"/v1/completions", "/v1/chat/completions", "/v1/models"}
"""Paths that vLLM's web server counts in its own metrics."""


class EngineServer:
    """One simulated vLLM server."""

    def __init__(
        self, options: EngineOptions, *, host: str, fleet: dict[int, EngineServer]
    ) -> None:
        self.options = options
        self.host = host
        self.port = options.port
        self.switches = Switches(speed=options.speed)
        self.max_model_len = min(MAX_MODEL_LEN, options.spec.kv_capacity_tokens)
        self._fleet = fleet
        self._routes: dict[
            tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
        ] = {
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._complete,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics_page,
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/load"): self._load,
            ("GET", "/version"): self._version,
            ("GET", "/sim/page"): self._plain_page,
            ("GET", "/sim/switches"): self._show_switches,
            ("PUT", "/sim/switches"): self._change_switches,
        }
        self._frozen_page = ""
        self._event_debt = 0.0
        self._listener: asyncio.Server | None = None
        self._boot()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def engine(self) -> Engine:
        """The model inside, to look at; another one after a restart."""
        return self._clocked.engine

    async def start(self) -> None:
        """Listen.

        Raises:
            StartError: the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(
                self._server, self.host, self.port, backlog=BACKLOG
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(
                f"a simulated engine cannot listen on {self.host}:{self.port}: {reason}"
            ) from None
        self.port = self._listener.sockets[0].getsockname()[1]
        self._fleet[self.port] = self

    async def stop(self) -> None:
        """Stop as a killed process does: every connection is cut, nothing is finished."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        listener.close()
        self._clocked.stop()
        for connection in self._server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self._server.shutdown(0)
        await listener.wait_closed()

    async def switch(self, **changes: object) -> None:
        """Change some of the switches.

        Raises:
            ValueError: no such switch, or not such a value; nothing is changed.
            StartError: the port is taken when a crashed engine is to come back.
        """
        before = self.switches
        self.switches = Switches.model_validate(before.model_dump() | changes)
        if self.switches.metrics is MetricsMode.FROZEN is not before.metrics:
            self._frozen_page = self._render()
        self._clocked.engine.speed = self.switches.speed
        if self.switches.crashed and not before.crashed:
            await self.stop()
        elif before.crashed and not self.switches.crashed:
            self._boot()
            await self.start()

    def _boot(self) -> None:
        """Begin with an empty engine and counters at zero."""
        loop, options = asyncio.get_running_loop(), self.options
        self.metrics = EngineMetrics(
            model=options.model, spec=options.spec, max_model_len=self.max_model_len
        )
        self._clocked = ClockedEngine(loop, self.metrics, options.spec, options.stream_interval)
        self._clocked.engine.speed = self.switches.speed
        self._server = web.Server(
            self._handle,
            request_factory=_make_request,
            handler_cancellation=True,  # a client that goes away frees its slot
            access_log=None,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked_s = time.monotonic()
        metrics = self.metrics
        route = self._routes.get((request.method, request.path))
        try:
            response = await route(request) if route else self._no_route(request)
        except wire.ApiError as error:
            response = _json(error.body, error.status)
        if request.path in COUNTED:
            metrics.observe_http(
                method=request.method,
                handler=request.path,
                status=response.status,
                sizes=(request.content_length or 0, response.content_length or 0),
                duration_s=time.monotonic() - asked_s,
            )
        if not response.prepared and (request_id := request.headers.get("X-Request-Id")):
            response.headers["X-Request-Id"] = request_id
        return response

    def _no_route(self, request: web.BaseRequest) -> web.Response:
        if any(path == request.path for _, path in self._routes):
            return _json(b'{"detail":"Method Not Allowed"}', HTTPStatus.METHOD_NOT_ALLOWED)
        return _json(b'{"detail":"Not Found"}', HTTPStatus.NOT_FOUND)

    async def _complete(self, request: web.BaseRequest) -> web.StreamResponse:
        ask = wire.parse(
            await request.read(),
            chat=request.path == "/v1/chat/completions",
            model=self.options.model,
            max_model_len=self.max_model_len,
        )
        answer = wire.Answer(
            ask,
            request_id=request.headers.get("X-Request-Id") or uuid.uuid4().hex,
            model=self.options.model,
            created=int(time.time()),  # noqa: TID251  # the API shows wall time
        )
        if rejection := self._rejection():
            if ask.stream and self._told_by_event():
                return await _stream_error(request, rejection)
            raise rejection
        if ask.stream:
            return await self._stream(request, ask, answer)
        return await self._whole(request, ask, answer)

    def _rejection(self) -> wire.ApiError | None:
        """What vLLM's admission check says: both limits look at what is there already."""
        switches = self.switches
        limit = switches.max_num_queued_reqs
        if limit is not None and self._clocked.in_flight >= limit:
            self.metrics.rejections["max_num_queued_reqs"] += 1
            return wire.ApiError(HTTPStatus.SERVICE_UNAVAILABLE, REQUESTS_REJECTED)
        limit = switches.max_num_queued_tokens
        if limit is not None and self._clocked.queued_tokens >= limit:
            self.metrics.rejections["max_num_queued_tokens"] += 1
            return wire.ApiError(HTTPStatus.SERVICE_UNAVAILABLE, TOKENS_REJECTED)
        return None

    def _told_by_event(self) -> bool:
        """Every so manieth rejection, exactly in the ratio asked for, without a die."""
        self._event_debt += self.switches.rejection_event_ratio
        due = self._event_debt >= 1
        self._event_debt -= due
        return due

    async def _stream(
        self, request: web.BaseRequest, ask: wire.Ask, answer: wire.Answer
    ) -> web.StreamResponse:
        """Send the answer token by token.

        The engine's timer writes the events to the connection itself: waking a task for each
        would cost more than the write. The kernel and the transport buffer for a slow reader,
        at most one answer.
        """
        response = _event_stream(request)
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        chunked = request.version >= HttpVersion11
        ended = asyncio.get_running_loop().create_future()
        events: dict[int, bytes] = {}
        opening = answer.opening()

        def deliver(tokens: int, *, last: bool) -> None:
            nonlocal opening
            if last:
                data = answer.event(tokens, last=True) + answer.closing()
            elif not (data := events.get(tokens, b"")):
                data = events[tokens] = _chunk(answer.event(tokens, last=False), chunked=chunked)
            if last:
                data = _chunk(data, chunked=chunked)
            if opening:
                data = _chunk(opening, chunked=chunked) + data
                opening = b""
            if not transport.is_closing():
                transport.write(data)
            if last and not ended.done():
                ended.set_result(None)

        await self._run(ask, deliver, ended)
        await response.write_eof()
        return response

    async def _whole(
        self, request: web.BaseRequest, ask: wire.Ask, answer: wire.Answer
    ) -> web.Response:
        ended = asyncio.get_running_loop().create_future()

        def deliver(tokens: int, *, last: bool) -> None:  # noqa: ARG001  # all at once, at the end
            if not ended.done():
                ended.set_result(None)

        await self._run(ask, deliver, ended)
        response = _json(answer.whole())
        if form := request.headers.get("endpoint-load-metrics-format"):
            response.headers["endpoint-load-metrics"] = self._load_report(form)
        return response

    async def _run(
        self, ask: wire.Ask, deliver: Callable[..., None], ended: asyncio.Future[None]
    ) -> None:
        """Have the engine generate; leave it when the client does."""
        clocked = self._clocked
        generation = clocked.submit(
            ask.prompt_tokens,
            ask.output_tokens,
            max_tokens=ask.max_tokens,
            deliver=deliver,
            stream=ask.stream,
        )
        try:
            await ended
        finally:
            clocked.abort(generation)

    def _load_report(self, form: str) -> str:
        """The ORCA header, which vLLM puts on answers that are not streamed, and only there."""
        named = {
            "kv_cache_usage_perc": self.engine.kv_used_ratio,
            "num_requests_waiting": float(len(self.engine.waiting)),
        }
        if form.upper() == "JSON":
            return "JSON " + json.dumps({"named_metrics": named})
        return "TEXT " + ", ".join(f"named_metrics.{k}={v}" for k, v in named.items())

    async def _models(self, _: web.BaseRequest) -> web.Response:
        created = int(self.metrics.started_s)
        return _json(
            wire.models(self.options.model, max_model_len=self.max_model_len, created=created)
        )

    async def _health(self, _: web.BaseRequest) -> web.Response:
        status = HTTPStatus.OK if self.switches.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.Response(status=status)

    async def _load(self, _: web.BaseRequest) -> web.Response:
        return _json(b'{"server_load":%d}' % self._clocked.in_flight)

    async def _version(self, _: web.BaseRequest) -> web.Response:
        return _json(b'{"version":"%s"}' % VERSION.encode())

    async def _plain_page(self, _: web.BaseRequest) -> web.Response:
        """The page as it is, whatever the switches say: where a redirect leads."""
        return _page(self._render().encode())

    async def _metrics_page(self, request: web.BaseRequest) -> web.StreamResponse:
        mode = self.switches.metrics
        if mode is MetricsMode.SLOW:
            await asyncio.sleep(self.switches.metrics_delay_s)
        match mode:
            case MetricsMode.GARBAGE:
                return _page(bytes(range(256)) * 64)
            case MetricsMode.MISSING:
                return _json(b'{"detail":"Not Found"}', HTTPStatus.NOT_FOUND)
            case MetricsMode.HUGE:
                return await self._huge_page(request)
            case MetricsMode.REDIRECT:
                where = {"Location": "/sim/page"}
                return web.Response(status=HTTPStatus.TEMPORARY_REDIRECT, headers=where)
        text = self._frozen_page if mode is MetricsMode.FROZEN else self._render()
        if mode is MetricsMode.RENAMED:
            text = text.replace("vllm:", "renamed:")
        return _page(text.encode())

    def _render(self) -> str:
        return self.metrics.render(self.engine)

    async def _huge_page(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE_LATEST})
        await response.prepare(request)
        await response.write(self._render().encode())
        padding = b"# and so on\n" * 4096
        for _ in range(HUGE_PAGE_BYTES // len(padding)):
            await response.write(padding)
        await response.write_eof()
        return response

    async def _show_switches(self, request: web.BaseRequest) -> web.Response:
        return _json(self._addressed(request).switches.model_dump_json().encode())

    async def _change_switches(self, request: web.BaseRequest) -> web.Response:
        engine = self._addressed(request)
        try:
            changes = json.loads(await request.read())
            await engine.switch(**changes)
        except ValidationError as error:
            raise wire.ApiError(HTTPStatus.BAD_REQUEST, wire.complaints(error)) from None
        except (ValueError, TypeError) as error:
            raise wire.ApiError(
                HTTPStatus.BAD_REQUEST, f"a JSON object of switches is wanted: {error}"
            ) from None
        except StartError as error:
            raise wire.ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
        return _json(engine.switches.model_dump_json().encode())

    def _addressed(self, request: web.BaseRequest) -> EngineServer:
        port = request.query.get("port", str(self.port))
        if not port.isdecimal() or int(port) not in self._fleet:
            raise wire.ApiError(HTTPStatus.NOT_FOUND, f"no engine of this process has port {port}")
        return self._fleet[int(port)]


@dataclass(frozen=True, slots=True)
class Fleet:
    engines: tuple[EngineServer, ...]

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(engine.port for engine in self.engines)


@asynccontextmanager
async def serve(options: Sequence[EngineOptions], host: str = "127.0.0.1") -> AsyncIterator[Fleet]:
    """Run engines while the context lasts; all of them, or none.

    Raises:
        StartError: a port cannot be had.
    """
    by_port: dict[int, EngineServer] = {}
    engines = tuple(EngineServer(o, host=host, fleet=by_port) for o in options)
    try:
        for engine in engines:
            await engine.start()
        yield Fleet(engines)
    finally:
        for engine in engines:
            await engine.stop()


def _make_request(*parts: Any) -> web.BaseRequest:
    """Make what aiohttp would, but for the size that it allows a body."""
    more: dict[str, Any] = {"loop": asyncio.get_running_loop(), "client_max_size": MAX_BODY_BYTES}
    return web.BaseRequest(*parts, **more)


def _event_stream(request: web.BaseRequest) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream; charset=utf-8"}
    if request_id := request.headers.get("X-Request-Id"):
        headers["X-Request-Id"] = request_id
    return web.StreamResponse(headers=headers)


async def _stream_error(request: web.BaseRequest, error: wire.ApiError) -> web.StreamResponse:
    """Refuse with status 200 and an error as the only event."""
    response = _event_stream(request)
    await response.prepare(request)
    await response.write(b"data: " + error.body + b"\n\n" + wire.DONE)
    await response.write_eof()
    return response


def _chunk(data: bytes, *, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data


def _json(body: bytes, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _page(body: bytes) -> web.Response:
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
