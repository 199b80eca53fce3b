"""Open-loop load: every request goes out when it is due, whatever became of those before it.

The law: a closed loop (wait for an answer, then send the next) sends less to a slow fleet and so
hides its slowness. Here the schedule is fixed beforehand, and latency counts from the moment a
request was *due*, so lateness of the generator itself cannot hide either; it is reported as lag.

The generator is a process of its own (`python -m trimtab.demo.load`), because the control loop
and the screen must not delay arrivals.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import uvloop

from trimtab.demo.child import end_of_input, hear, say, start_child
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

HEAD_START_S = 0.5  # between saying when the schedule starts and its start
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
        StartError: it ended before it began, or with an error later.
    """
    async with start_child("trimtab.demo.load", asdict(order)) as (start_s, lines):
        yield start_s, (Record(*line) async for line in lines)


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
        say(record)


async def _carry_out(order: Order, bodies: Sequence[bytes]) -> None:
    """Send what is due, then wait for the answers as long as patience lasts."""
    start_s = time.monotonic() + HEAD_START_S
    say(start_s)
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
    wanted = hear()
    order = Order(**wanted | {"requests": [Request(*r) for r in wanted["requests"]]})
    bodies = [prepare(order.model, request) for request in order.requests]
    gc.freeze()  # thousands of bodies that live to the end need no looking at
    carry_out = asyncio.create_task(_carry_out(order, bodies))
    stop = asyncio.create_task(end_of_input())
    await asyncio.wait({carry_out, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    carry_out.cancel()  # nothing to cancel unless told to stop
    with contextlib.suppress(asyncio.CancelledError):
        await carry_out


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads any more: end at once, silently
    uvloop.run(_generate())
