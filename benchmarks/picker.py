"""What a pick costs: time added to a request, CPU of the picker, memory, and what fuzz does to it.

The requests with and without a pick go through one Envoy, by turns, to the same backends: two pools
that differ only in their mode. Backends answer at once and show a captured page of vLLM (58 KB).
Picker and backends are processes of their own, so the CPU time of the picker is its alone; what it
spends on pages is measured while nobody asks, and taken off.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from socket import create_server
from typing import TYPE_CHECKING, cast

import uvloop

from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Endpoint, Snapshot
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.envoy_config import Listener, PoolRoute, bootstrap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

PAGE = Path(__file__).parent.parent / "tests/fixtures/metrics/vllm-0.32.0-loaded.prom"
POOLS = (PoolRoute("plain"), PoolRoute("picked", picked=True))
SIZES = {"1kb": 1_000, "100kb": 100_000}
TURNS = 1500  # requests of each kind, one after the other
LOADED = 4000  # requests for the CPU time of a pick
CONNECTIONS = 8
IDLE_S = 10.0
WARM_UP_S = 2.0
MEMORY_PICKS = 1_000_000
FUZZED = 100_000
BURST = 800


def run() -> dict[str, float]:
    """Measure, and return figures by name."""
    figures = asyncio.run(_measure(endpoints=8))
    figures |= {
        name: value
        for name, value in asyncio.run(_measure(endpoints=100)).items()
        if "cpu" in name or "added" in name
    }
    return figures | _memory() | asyncio.run(_fuzz()) | asyncio.run(_burst())


async def _measure(*, endpoints: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    async with _rig(endpoints) as (url_port, picker):
        await asyncio.sleep(WARM_UP_S)
        idle_cpu_s = _cpu_s(picker)
        await asyncio.sleep(IDLE_S)
        idle_ratio = (_cpu_s(picker) - idle_cpu_s) / IDLE_S
        figures[f"idle_cpu_{endpoints}_endpoints_cores"] = idle_ratio
        for size, length in SIZES.items():
            body = json.dumps({"model": "m", "prompt": "x" * length}).encode()
            plain, picked = await _by_turns(url_port, body)
            added_ms = statistics.median(picked) - statistics.median(plain)
            figures[f"plain_{size}_{endpoints}_endpoints_ms"] = statistics.median(plain)
            figures[f"added_{size}_{endpoints}_endpoints_ms"] = added_ms
            cpu_s, began_s = _cpu_s(picker), time.monotonic()
            await _loaded(url_port, body)
            spent_s = _cpu_s(picker) - cpu_s - idle_ratio * (time.monotonic() - began_s)
            figures[f"cpu_{size}_{endpoints}_endpoints_us"] = spent_s / LOADED * 1e6
    return figures


@asynccontextmanager
async def _rig(endpoints: int) -> AsyncIterator[tuple[int, int]]:
    """Give the port of a gateway and the pid of its picker."""
    port, admin_port, ask_port, telemetry_port, *backends = _free_ports(4 + endpoints)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_child("benchmarks.picker", *map(str, backends)))
        xds = XdsServer(port=0)
        xds.set_pools({"gateway": list(POOLS)})
        snapshot = Snapshot({Endpoint(f"pod-{p}", "127.0.0.1", p): 100 for p in backends})
        for pool in POOLS:
            await xds.publish(pool.name, snapshot)
        await xds.start()
        stack.push_async_callback(xds.stop)
        pid = await stack.enter_async_context(_picker(xds.port, ask_port, telemetry_port))
        envoy = EnvoyProcess(
            bootstrap(
                [Listener("gateway", port)],
                xds=("127.0.0.1", xds.port),
                admin_port=admin_port,
                pickers=[("127.0.0.1", ask_port)],
            ),
            concurrency=1,
        )
        await envoy.start()
        stack.push_async_callback(envoy.stop)
        await envoy.wait_ready()
        yield port, pid


@asynccontextmanager
async def _picker(control: int, ask: int, telemetry: int) -> AsyncIterator[int]:
    options = {"control": control, "listen": ask, "telemetry": telemetry}
    addresses = [word for k, v in options.items() for word in (f"--{k}", f"127.0.0.1:{v}")]
    async with _child("trimtab", "picker", "--log-level", "error", *addresses) as pid:
        await _until(lambda: _is_ready(ask))
        yield pid


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110  # nothing over there tells us
            await asyncio.sleep(0.05)


async def _is_ready(port: int) -> bool:
    return b" 200 " in await _readiness(port)


async def _readiness(port: int) -> bytes:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    writer.write(b"GET /readyz HTTP/1.1\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return line


@asynccontextmanager
async def _child(module: str, *arguments: str) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, *arguments)
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


def _request(pool: str, body: bytes) -> bytes:
    return (
        b"POST /%b/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (pool.encode(), len(body), body)
    )


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> None:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head:
        raise RuntimeError(head.decode())
    await reader.readexactly(2)


async def _by_turns(port: int, body: bytes) -> tuple[list[float], list[float]]:
    """Milliseconds of requests without and with a pick, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took_ms: tuple[list[float], list[float]] = ([], [])
    requests = [_request(pool.name, body) for pool in POOLS]
    for _ in range(TURNS):
        for request, times_ms in zip(requests, took_ms, strict=True):
            began_s = time.perf_counter()
            await _exchange(reader, writer, request)
            times_ms.append((time.perf_counter() - began_s) * 1e3)
    writer.close()
    return took_ms


async def _loaded(port: int, body: bytes) -> None:
    request = _request("picked", body)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(LOADED // CONNECTIONS):
            await _exchange(reader, writer, request)
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(client())


# Memory and fuzz


def _memory() -> dict[str, float]:
    """Whether memory stays as it is after the first 200,000 picks of 10^6."""
    from trimtab.adapters.authz import AuthzServer  # noqa: PLC0415  # figures of processes first
    from trimtab.loop import LoopClock  # noqa: PLC0415
    from trimtab.picks import Picks  # noqa: PLC0415

    async def pick() -> dict[str, float]:
        picks = Picks(LoopClock(), lambda _: None)  # type: ignore[arg-type, return-value]  # no page is read
        endpoints = {Endpoint(f"pod-{n}", "127.0.0.1", n): 1 for n in range(8)}
        picks.follow({"picked": (POOLS[1], Snapshot(endpoints))})
        server = AuthzServer(picks)
        check = (
            b"POST /pick/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n"
            b"x-trimtab-pool: picked\r\nx-trimtab-bytes: 1000\r\nx-trimtab-length: 1000\r\n\r\n"
        )
        first_mb, began_s = 0.0, time.process_time()
        for number in range(MEMORY_PICKS):
            server.answer(check)
            if number == MEMORY_PICKS // 5:
                first_mb = _rss_mb(os.getpid())
        return {
            "rss_growth_over_800k_picks_mb": _rss_mb(os.getpid()) - first_mb,
            "answer_alone_us": (time.process_time() - began_s) / MEMORY_PICKS * 1e6,
        }

    return asyncio.run(pick())


FRAGMENTS = (
    *(b"\r\n", b"\n", b"\r\n\r\n", b"\0", b" ", b":", b"\xff\xfe", b"\t", b"%00", b"../"),
    *(b"content-length: 99999999999\r\n", b"transfer-encoding: chunked\r\n", b"HTTP/1.1\r\n"),
    *(b"GET /readyz HTTP/1.1\r\n\r\n", b"x" * 3000, b"x-trimtab-pool: picked\r\n"),
)


async def _fuzz() -> dict[str, float]:
    """Send damaged checks to a picker; then it must be alive, as large as before, and right."""
    control, ask, telemetry = _free_ports(3)
    xds = XdsServer(port=control)
    xds.set_pools({"gateway": [POOLS[1]]})
    await xds.publish("picked", Snapshot({Endpoint("pod", "127.0.0.1", 9): 1}))
    await xds.start()
    chance = random.Random(1)  # noqa: S311  # the same fuzz each time
    failures = 0
    try:
        async with _picker(control, ask, telemetry) as pid:
            before_mb = _rss_mb(pid)

            async def one(stream: bytes) -> bool:
                reader, writer = await asyncio.open_connection("127.0.0.1", ask)
                try:
                    async with asyncio.timeout(5):
                        writer.write(stream)
                        writer.write_eof()
                        await reader.read()
                except ConnectionError:
                    pass  # hung up on, as it may
                except TimeoutError:
                    return False
                finally:
                    writer.close()
                return True

            for _ in range(FUZZED // 200):
                streams = [_damaged(chance) for _ in range(200)]
                failures += (await asyncio.gather(*map(one, streams))).count(False)
            alive = await _is_ready(ask)
            grown_mb = _rss_mb(pid) - before_mb
    finally:
        await xds.stop()
    return {
        "fuzzed_requests": float(FUZZED),
        "fuzz_hangs": float(failures),
        "fuzz_alive": float(alive),
        "fuzz_rss_growth_mb": grown_mb,
    }


def _damaged(chance: random.Random) -> bytes:
    stream = bytearray(
        b"POST /pick/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n"
        b"x-trimtab-pool: picked\r\nx-trimtab-bytes: 1000\r\n\r\n"
    )
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(stream) + 1)
        end = min(len(stream), at + chance.choice((0, 0, 1, 5, 40)))
        piece = chance.choice((chance.choice(FRAGMENTS), chance.randbytes(8)))
        stream[at:end] = piece
    return bytes(stream)


async def _burst() -> dict[str, float]:
    """800 mixed requests at once over 8 idle engines: the fullest engine's tokens over the mean."""
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(serve([EngineOptions(model="m", speed=1.0)] * 8))
        port, admin_port, ask, telemetry = _free_ports(4)
        xds = XdsServer(port=0)
        xds.set_pools({"gateway": [POOLS[1]]})
        endpoints = [Endpoint(f"pod-{p}", "127.0.0.1", p) for p in engines.ports]
        await xds.publish("picked", Snapshot(dict.fromkeys(endpoints, 100)))
        await xds.start()
        stack.push_async_callback(xds.stop)
        await stack.enter_async_context(_picker(xds.port, ask, telemetry))
        envoy = EnvoyProcess(
            bootstrap(
                [Listener("gateway", port)],
                xds=("127.0.0.1", xds.port),
                admin_port=admin_port,
                pickers=[("127.0.0.1", ask)],
            )
        )
        await envoy.start()
        stack.push_async_callback(envoy.stop)
        await envoy.wait_ready()
        await asyncio.sleep(WARM_UP_S)
        # Connections to the picker are there in a gateway that has seen a burst before.
        await _all_at_once(port, [10] * BURST, answered=True)
        for each in engines.engines:
            await each.switch(speed=1e-3)
        writers = await _all_at_once(
            port, [10_000, *(200 + 10 * n for n in range(19))] * (BURST // 20)
        )
        loads: list[float] = []

        async def all_came() -> bool:
            inside = (each.engine for each in engines.engines)
            return sum(engine.running + len(engine.waiting) for engine in inside) == BURST

        await _until(all_came)
        for each in engines.engines:
            engine = each.engine
            inside = [*engine.waiting, *engine.prefilling, *engine.decoding]
            loads.append(sum(sequence.prompt_tokens for sequence in inside))
        for writer in writers:
            writer.close()
    return {"burst_800_max_over_mean": max(loads) / statistics.mean(loads)}


async def _all_at_once(
    port: int, lengths: Sequence[int], *, answered: bool = False
) -> list[asyncio.StreamWriter]:
    """Send a request of each length, to a pod each; wait for the answers or leave them open."""
    streams = []
    for tokens in lengths:
        body = json.dumps({"model": "m", "prompt": "x" * 4 * tokens, "max_tokens": 1}).encode()
        streams.append(
            (*await asyncio.open_connection("127.0.0.1", port), _request("picked", body))
        )
    for _, writer, request in streams:
        writer.write(request)
    for reader, writer, _ in streams:
        if answered:
            await reader.readuntil(b"\r\n\r\n")
            writer.close()
    return [writer for _, writer, _ in streams]


# The backends


class _Backend(asyncio.Protocol):
    """Answers anything at once; `/metrics` with the page."""

    page = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.missing = 0
        self.is_page = False

    def data_received(self, data: bytes) -> None:
        if not self.missing:
            head, _, rest = data.partition(b"\r\n\r\n")
            self.is_page = head.startswith(b"GET /metrics")
            _, _, length = head.lower().partition(b"content-length: ")
            self.missing = int(length.split(b"\r\n")[0]) if length else 0
            data = rest
        self.missing -= len(data)
        if not self.missing:
            body = self.page if self.is_page else b"ok"
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )


async def _serve_backends(ports: Sequence[int]) -> None:
    _Backend.page = PAGE.read_bytes()
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(_Backend, "127.0.0.1", port)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _free_ports(count: int) -> list[int]:
    def each() -> Iterator[int]:
        probes = [create_server(("127.0.0.1", 0)) for _ in range(count)]
        for probe in probes:
            yield probe.getsockname()[1]
        for probe in probes:
            probe.close()

    return list(each())


if __name__ == "__main__":
    uvloop.run(_serve_backends([int(port) for port in sys.argv[1:]]))
