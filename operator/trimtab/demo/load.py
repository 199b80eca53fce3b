"""Open-loop load: every request goes out when it is due, whatever became of those before it.

The law: a closed loop (wait for an answer, then send the next) sends less to a slow fleet and so
hides its slowness. Here the schedule is fixed beforehand, and latency counts from the moment a
request was *due*, so lateness of the generator itself cannot hide either; it is reported as lag.

The generator is a process of its own (`python -m trimtab.demo.load`), because the control loop
and the screen must not delay arrivals. One JSON line on stdin says what to send; one JSON array a
line comes back on stdout. End of input stops it, so it cannot outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import uvloop

from trimtab.ports import StartError
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

HEAD_START_S = 0.5  # between saying when the schedule starts and its start
STOP_S = 5.0  # a generator told to stop has only to close its connections
ANSWER_TAIL_BYTES = 2048  # holds the last two events: usage and [DONE]

COMPLETE = "complete"
UNFINISHED = "unfinished"
"""Still being served when the load ended: no failure, and the TTFT of one without a first token
is the time it had waited by then."""

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to send. Every target gets every request, at the same moment."""

    urls: Sequence[str]
    model: str
    requests: Sequence[Request]
    patience_s: float
    """How long to wait for answers after the last arrival."""


class Record(NamedTuple):
    """What is known of one request on one side. Sent at its first token and again at its end."""

    side: int
    """Index of the target."""
    number: int
    """Index of the request in the order."""
    due_s: float
    """From the start of the schedule, as all times of a record that are not durations."""
    prompt_tokens: int
    lag_s: float
    ttft_s: float | None
    """From due to the first token's event."""
    end_s: float | None
    outcome: str
    """Empty while it streams, then COMPLETE, UNFINISHED or the reason of the failure."""

    @property
    def failed(self) -> bool:
        return self.outcome not in {"", COMPLETE, UNFINISHED}


@asynccontextmanager
async def start_load(order: Order) -> AsyncIterator[tuple[float, AsyncIterator[Record]]]:
    """Run the generator beside us: its start on our monotonic clock, and records as they come.

    Raises:
        StartError: the process ended before it began, or with an error.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trimtab.demo.load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent, who then closes our stdin
    )
    # PIPEs were asked for; the type checker cannot know.
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        first_line = await process.stdout.readline()
        if not first_line:
            raise StartError(f"the load generator did not start (exit code {await process.wait()})")
        yield json.loads(first_line), _records(process, process.stdout)
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _records(
    process: asyncio.subprocess.Process, lines: asyncio.StreamReader
) -> AsyncIterator[Record]:
    async for line in lines:
        yield Record(*json.loads(line))
    if code := await process.wait():
        raise StartError(f"the load generator ended with exit code {code}")


def prepare(model: str, request: Request) -> bytes:
    """Write the body of a completion request: token ids, so that the prompt's length is exact."""
    ids = b"[" + b"7," * (request.prompt_tokens - 1) + b"7]"
    return (
        b'{"model":%b,"prompt":%b,"max_tokens":%d,"ignore_eos":true,'
        b'"stream":true,"stream_options":{"include_usage":true}}'
    ) % (json.dumps(model).encode(), ids, request.output_tokens)


def judge(tail: bytes, *, expected_tokens: int) -> str:
    """Tell from the end of a stream whether all of the answer came."""
    if not tail.rstrip().endswith(b"data: [DONE]"):
        return "cut stream"
    counts = _COMPLETION_TOKENS.findall(tail)
    if not counts or int(counts[-1]) != expected_tokens:
        return "wrong token count"
    return COMPLETE


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request on its way; `run` always ends by reporting it."""

    side: int
    number: int
    request: Request
    start_s: float
    lag_s: float = 0.0
    ttft_s: float | None = None

    async def run(self, session: aiohttp.ClientSession, url: str, body: bytes) -> None:
        self.lag_s = self._since_due_s()
        try:
            outcome = await self._exchange(session, url, body)
        except asyncio.CancelledError:
            outcome = UNFINISHED
            self.ttft_s = self.ttft_s or self._since_due_s()
        except aiohttp.ClientPayloadError:
            outcome = "cut stream"
        except aiohttp.ServerDisconnectedError:
            outcome = "disconnected"
        except aiohttp.ClientConnectorError:
            outcome = "connection refused"
        except (aiohttp.ClientError, OSError) as error:
            outcome = type(error).__name__
        self._report(outcome)

    async def _exchange(self, session: aiohttp.ClientSession, url: str, body: bytes) -> str:
        async with session.post(url, data=body) as response:
            if response.status != 200:  # noqa: PLR2004  (HTTP's own number)
                return f"HTTP {response.status}"
            tail = b""
            async for chunk in response.content.iter_any():
                tail = (tail + chunk)[-ANSWER_TAIL_BYTES:]
                if self.ttft_s is None and b"data:" in tail:
                    # An engine that refuses after its headers went out says so in the first event.
                    if b'data: {"error"' in tail:
                        return "error event"
                    self.ttft_s = self._since_due_s()
                    self._report("")
            if b'data: {"error"' in tail:
                return "error event"
            return judge(tail, expected_tokens=self.request.output_tokens)

    def _since_due_s(self) -> float:
        return time.monotonic() - self.start_s - self.request.at_s

    def _report(self, outcome: str) -> None:
        end_s = time.monotonic() - self.start_s if outcome else None
        record = Record(
            side=self.side,
            number=self.number,
            due_s=self.request.at_s,
            prompt_tokens=self.request.prompt_tokens,
            lag_s=self.lag_s,
            ttft_s=self.ttft_s,
            end_s=end_s,
            outcome=outcome,
        )
        _say(record)


async def _carry_out(order: Order, bodies: Sequence[bytes]) -> None:
    """Send what is due, then wait for the answers as long as patience lasts."""
    start_s = time.monotonic() + HEAD_START_S
    _say(start_s)
    exchanges: set[asyncio.Task[None]] = set()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # a limit would close the loop
        headers={"Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=None),  # patience bounds the whole
        auto_decompress=False,
    ) as session:
        try:
            for number, (request, body) in enumerate(zip(order.requests, bodies, strict=True)):
                # The timer counts milliseconds, so this may be half of one early.
                await asyncio.sleep(max(0.0, start_s + request.at_s - time.monotonic()))
                for turn in range(len(order.urls)):
                    side = (number + turn) % len(order.urls)  # nobody is always first
                    exchange = _Exchange(side, number, request, start_s)
                    task = asyncio.create_task(exchange.run(session, order.urls[side], body))
                    exchanges.add(task)
                    task.add_done_callback(exchanges.discard)
            if exchanges:
                await asyncio.wait(exchanges, timeout=order.patience_s)
        finally:
            left = list(exchanges)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


async def _generate() -> None:
    wanted = json.loads(sys.stdin.buffer.readline())
    order = Order(**wanted | {"requests": [Request(*r) for r in wanted["requests"]]})
    bodies = [prepare(order.model, request) for request in order.requests]
    gc.freeze()  # thousands of bodies that live to the end need no looking at
    carry_out = asyncio.create_task(_carry_out(order, bodies))
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), carry_out.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await carry_out


def _say(what: Record | float) -> None:
    # Blocking, but 64 KiB of pipe hold several seconds of lines and the reader has only to read.
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Speak to the process that started us until the work is done or its end of the pipe closes."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads any more: end at once, silently
    uvloop.run(_generate())


if __name__ == "__main__":
    main()
