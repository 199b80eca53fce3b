"""What an Envoy sends is understood; what anybody else sends is refused, and costs little.

The oracle is aiohttp's parser: whatever the server takes for a request, it must take for the same
one. The other way round nothing is asked: to refuse more is safe, as Envoy then goes by weights.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.adapters.authz import MAX_HEAD_BYTES, AuthzServer
from trimtab.core.model import Endpoint
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

A, B = Endpoint("a", "10.0.0.1", 8000), Endpoint("b", "2001:db8::1", 80)
DEADLINE_S = 20.0
EXAMPLES = int(os.environ.get("TRIMTAB_FUZZ_EXAMPLES", "300"))
"""10^5 and more before a release: see benchmarks/picker.py."""

CHECK = (
    b"POST /pick/v1/completions HTTP/1.1\r\n"
    b"host: 127.0.0.1:9001\r\n"
    b"content-length: 0\r\n"
    b"x-trimtab-pool: llama\r\n"
    b"x-trimtab-bytes: 1234\r\n"
    b"x-envoy-expected-rq-timeout-ms: 50\r\n"
    b"\r\n"
)


@dataclass
class Chooser:
    answer: Sequence[Endpoint] = (A,)
    ready: bool = True
    asked: list[tuple[str, int | None]] = field(default_factory=list)

    def choose(self, pool: str, body_bytes: int | None) -> Sequence[Endpoint]:
        self.asked.append((pool, body_bytes))
        return self.answer


class Broken(Chooser):
    def choose(self, pool: str, body_bytes: int | None) -> Sequence[Endpoint]:
        raise ZeroDivisionError(pool, body_bytes)


def answered(head: bytes, chooser: Chooser | None = None) -> tuple[int, bytes]:
    """Give the answer's status and the endpoints it names."""
    answer = AuthzServer(chooser or Chooser()).answer(head)
    status, _, fields = answer.partition(b"\r\n")
    named = fields.partition(b"x-trimtab-endpoint: ")[2].partition(b"\r\n")[0]
    assert answer.endswith(b"\r\n\r\n")
    return int(status.split()[1]), named


def test_a_check_is_answered_with_the_endpoints_in_order() -> None:
    chooser = Chooser(answer=[A, B])
    assert answered(CHECK, chooser) == (200, b"10.0.0.1:8000,[2001:db8::1]:80")
    assert chooser.asked == [("llama", 1234)]


@pytest.mark.parametrize(
    ("read", "told", "size"),
    [
        (b"5", b"9", 9),
        (b"5", b"-", 5),
        (b"5", b"", 5),
        (b"0", b"", None),
        (b"0", b"0", 0),
        (b"", b"", None),
        (b"9" * 16, b"", None),
        (b"\xb2", b"-1", None),
    ],
)
def test_the_length_told_counts_before_what_is_read_so_far(
    read: bytes, told: bytes, size: int | None
) -> None:
    chooser = Chooser()
    head = CHECK.replace(b": 1234", b": %b\r\nx-trimtab-length: %b" % (read, told))
    assert answered(head, chooser)[0] == 200
    assert chooser.asked == [("llama", size)]


def test_without_a_choice_the_weights_decide() -> None:
    assert answered(CHECK, Chooser(answer=())) == (200, b"")


def test_a_request_without_a_prompt_is_nobodys_work() -> None:
    chooser = Chooser()
    assert answered(CHECK.replace(b"POST", b"GET"), chooser) == (200, b"")
    assert chooser.asked == []


def test_a_bug_in_the_choice_is_counted_and_leaves_it_to_the_weights() -> None:
    server = AuthzServer(Broken())
    for _ in range(3):
        assert server.answer(CHECK).startswith(b"HTTP/1.1 503 ")
    assert server.bugs_total == 3


def test_health_is_whether_it_is_of_use_to_ask() -> None:
    health = b"GET /readyz HTTP/1.1\r\nhost: picker\r\n\r\n"
    assert answered(health) == (200, b"")
    assert answered(health, Chooser(ready=False)) == (503, b"")


SMUGGLED = [
    CHECK.replace(b"content-length: 0", b"content-length: 5"),
    CHECK.replace(b"content-length: 0", b"content-length: 0\r\ncontent-length: 0"),
    CHECK.replace(b"content-length: 0", b"content-length: 0\r\nContent-Length: 7"),
    CHECK.replace(b"content-length: 0", b"content-length: +0"),
    CHECK.replace(b"content-length: 0", b"content-length : 0"),
    CHECK.replace(b"content-length: 0", b" content-length: 0"),
    CHECK.replace(b"content-length: 0", b"transfer-encoding: chunked"),
    CHECK.replace(b"content-length: 0", b"Transfer-Encoding:\tchunked\r\ncontent-length: 0"),
    CHECK.replace(b"x-trimtab-pool: llama", b"x-trimtab-pool: llama\r\nX-TRIMTAB-POOL: other"),
    CHECK.replace(b"x-trimtab-pool: llama", b"x-trimtab-pool: a\r\n b"),
    CHECK.replace(b"x-trimtab-pool: llama", b"x-trimtab-pool: a\nx-evil: b"),
    CHECK.replace(b"x-trimtab-pool: llama", b"x-trimtab-pool: a\rb"),
    CHECK.replace(b"x-trimtab-pool: llama", b"x-trimtab-pool: a\0"),
    CHECK.replace(b"x-trimtab-pool: llama", b": nameless"),
    CHECK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    CHECK.replace(b"HTTP/1.1", b"HTTP/2.0"),
    CHECK.replace(b" HTTP/1.1", b""),
    CHECK.replace(b"POST /pick", b"POST  /pick"),
    CHECK.replace(b"POST /pick", b"POST pick"),
    CHECK.replace(b"POST /pick", b"POST http://elsewhere/pick"),
    CHECK.replace(b"/pick/", b"/pick-me/"),
    b"\r\n" + CHECK,
    b"\r\n\r\n",
]


@pytest.mark.parametrize("head", SMUGGLED, ids=range(len(SMUGGLED)))
def test_what_could_be_read_in_two_ways_is_refused(head: bytes) -> None:
    chooser = Chooser()
    server = AuthzServer(chooser)
    assert server.answer(head).startswith(b"HTTP/1.1 503 ")
    assert (chooser.asked, server.garbage_total) == ([], 1)


def oracle(head: bytes) -> tuple[str, str, str] | None:
    """Method, pool and framing as aiohttp reads them; None if it refuses, or wants more."""
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
        messages, _, rest = parser.feed_data(head)
    except HttpProcessingError:
        return None
    finally:
        loop.close()
    if len(messages) != 1 or rest:
        return None
    message = messages[0][0]
    pools = message.headers.getall("x-trimtab-pool", [""])
    framing = [message.headers.get("content-length", "0"), str(message.chunked)]
    pool = ",".join(pools).encode("utf-8", "surrogateescape").decode("latin-1")
    return message.method, pool, " ".join(framing)


FRAGMENTS = (
    *(b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\xff", b"GET ", b"/pick/"),
    *(b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n", b"x-trimtab-pool: other\r\n"),
)
pieces = st.binary(max_size=12) | st.sampled_from(FRAGMENTS)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A check with some pieces put in or taken out, up to the first empty line."""
    head = CHECK
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(head)))
        head = head[:at] + draw(pieces) + head[at + draw(st.integers(0, 8)) :]
    return head.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


@given(damaged())
@example(CHECK)
@settings(max_examples=EXAMPLES, deadline=None)
def test_whatever_is_taken_for_a_check_is_one_to_others_too(head: bytes) -> None:
    chooser = Chooser()
    status, _ = answered(head, chooser)
    assert status in {200, 503}
    if chooser.asked:
        [(pool, _)] = chooser.asked
        assert oracle(head) in {("POST", pool, "0 False"), None}


# On the wire


@asynccontextmanager
async def listening(
    chooser: Chooser | None = None,
) -> AsyncIterator[tuple[AuthzServer, asyncio.StreamReader, asyncio.StreamWriter]]:
    server = AuthzServer(chooser or Chooser())
    async with asyncio.timeout(DEADLINE_S), server.serve("127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield server, reader, writer
        finally:
            writer.close()


async def test_checks_in_any_pieces_are_answered_in_turn() -> None:
    async with listening() as (_, reader, writer):
        for step in (1, 7, len(CHECK) - 1, 3 * len(CHECK)):
            stream = CHECK * 3
            for start in range(0, len(stream), step):
                writer.write(stream[start : start + step])
                await writer.drain()
            for _ in range(3):
                answer = await reader.readuntil(b"\r\n\r\n")
                assert b"x-trimtab-endpoint: 10.0.0.1:8000" in answer


async def test_after_garbage_nothing_more_is_read() -> None:
    chooser = Chooser()
    async with listening(chooser) as (_, reader, writer):
        writer.write(CHECK + b"garbage\r\n\r\n" + CHECK)
        answers = await reader.read()
        assert answers.count(b"HTTP/1.1 ") == 2
        assert answers.count(b"HTTP/1.1 503 ") == 1
    assert len(chooser.asked) == 1


async def test_a_head_without_end_is_hung_up_on() -> None:
    async with listening() as (server, reader, writer):
        writer.write(b"POST /pick/" + b"x" * (MAX_HEAD_BYTES + 1))
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        assert server.garbage_total == 1


async def test_whoever_does_not_fetch_his_answers_is_read_no_further() -> None:
    async with listening() as (server, reader, writer):
        while server.checks_total == 0 or writer.transport.get_write_buffer_size() == 0:
            writer.write(CHECK * 1000)
            await asyncio.sleep(0)
        taken = server.checks_total
        writer.write(CHECK * 10_000)
        await asyncio.sleep(0)
        assert server.checks_total - taken < 10_000
        while (await reader.read(1 << 20)).count(b"\r\n\r\n") and server.checks_total == taken:
            pass
        assert server.checks_total > taken


async def test_a_taken_port_is_told() -> None:
    async with AuthzServer(Chooser()).serve("127.0.0.1", 0) as port:
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Address already"):
            async with AuthzServer(Chooser()).serve("127.0.0.1", port):
                pass


async def test_stopping_hangs_up_on_everybody() -> None:
    async with asyncio.timeout(DEADLINE_S):
        async with AuthzServer(Chooser()).serve("127.0.0.1", 0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHECK)
            await reader.readuntil(b"\r\n\r\n")
        assert await reader.read() == b""
        writer.close()
