"""Pages from machines that are broken, slow or hostile."""

from __future__ import annotations

import asyncio
import gzip
import socket
from typing import TYPE_CHECKING

import pytest

from pages import PAGE, page_server, response, says
from trimtab.adapters.scrape import PageScraper, client
from trimtab.core.model import Endpoint, Failure, FailureKind, Sample
from trimtab.loop import LoopClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from trimtab.core.model import Reading

PATIENT_S = 20.0  # a deadline that only a hang meets
SAMPLE = Sample(running=3, waiting=2)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with client() as opened:
        yield opened


async def read(
    session: aiohttp.ClientSession, endpoint: Endpoint, *, timeout_s: float = PATIENT_S
) -> Reading:
    scraper = PageScraper(session, LoopClock(), timeout_s=timeout_s, max_page_bytes=100_000)
    return (await scraper.observe([endpoint])).readings[endpoint]


async def fails(
    session: aiohttp.ClientSession, endpoint: Endpoint, *, timeout_s: float = PATIENT_S
) -> Failure:
    outcome = (await read(session, endpoint, timeout_s=timeout_s)).outcome
    assert isinstance(outcome, Failure)
    return outcome


async def test_a_page_becomes_a_sample_with_the_times_between_which_it_was_made(
    session: aiohttp.ClientSession,
) -> None:
    before_s = LoopClock().now_s()
    async with page_server(says(response())) as server:
        reading = await read(session, server.endpoint)
    assert reading.outcome == SAMPLE
    assert before_s <= reading.asked_s <= reading.answered_s <= LoopClock().now_s()


async def test_connections_are_kept_from_tick_to_tick(session: aiohttp.ClientSession) -> None:
    async with page_server(says(response())) as server:
        for _ in range(3):
            assert (await read(session, server.endpoint)).outcome == SAMPLE
    assert (server.connections, len(server.requests)) == (1, 3)


async def test_a_connection_that_was_closed_between_ticks_costs_no_page(
    session: aiohttp.ClientSession,
) -> None:
    async with page_server(says(response(), close=True)) as server:
        for _ in range(3):
            assert (await read(session, server.endpoint)).outcome == SAMPLE


async def test_all_endpoints_are_asked_at_once(session: aiohttp.ClientSession) -> None:
    """One after the other, ten slow engines would each make the next one's news older."""
    everybody = asyncio.Barrier(10)

    async def wait_for_all(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await everybody.wait()
        writer.write(response())

    async with page_server(wait_for_all) as server:
        endpoints = [Endpoint(f"pod-{n}", *server.endpoint[1:]) for n in range(10)]
        scraper = PageScraper(session, LoopClock(), timeout_s=PATIENT_S)
        observation = await scraper.observe(endpoints)
    assert [observation.readings[e].outcome for e in endpoints] == [SAMPLE] * 10


async def test_only_a_refused_connection_says_that_nobody_listens(
    session: aiohttp.ClientSession,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    failure = await fails(session, Endpoint("pod", "127.0.0.1", port))
    assert failure.kind is FailureKind.REFUSED


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param(b"", FailureKind.DISCONNECTED, id="closed without a word"),
        pytest.param(response()[:-20], FailureKind.DISCONNECTED, id="cut mid-page"),
        pytest.param(
            CHUNKED + b"%x\r\n" % len(PAGE) + PAGE + b"\r\n",
            FailureKind.DISCONNECTED,
            id="cut between chunks",
        ),
        pytest.param(
            response(b"never gzip", head="Content-Encoding: gzip\r\n"),
            FailureKind.DISCONNECTED,
            id="not the encoding it claims",
        ),
        pytest.param(response(status="500 Oh"), FailureKind.HTTP_STATUS, id="an error with a page"),
        pytest.param(response(status="404 No"), FailureKind.HTTP_STATUS, id="no such page"),
        pytest.param(b"HTTP/1.1 204 No\r\n\r\n", FailureKind.HTTP_STATUS, id="no content"),
        pytest.param(
            b"\x15\x03\x01\x00\x02\x02\x50", FailureKind.UNPARSABLE, id="a TLS alert, not HTTP"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, FailureKind.UNPARSABLE, id="endless header"
        ),
        pytest.param(response(b"<html>\xff\0"), FailureKind.UNPARSABLE, id="a page of no engine"),
        pytest.param(response(b""), FailureKind.UNPARSABLE, id="an empty page"),
        pytest.param(response(b"#" * 100_001), FailureKind.TOO_LARGE, id="one byte over the cap"),
    ],
)
async def test_what_is_no_page_is_a_failure_with_its_kind(
    session: aiohttp.ClientSession, content: bytes, kind: FailureKind
) -> None:
    async with page_server(says(content, close=True)) as server:
        failure = await fails(session, server.endpoint)
    assert failure.kind is kind
    assert failure.detail


async def test_a_silent_endpoint_costs_its_deadline_and_holds_no_other_up(
    session: aiohttp.ClientSession,
) -> None:
    async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"no client says this")

    async with page_server(never) as silent, page_server(says(response())) as good:
        scraper = PageScraper(session, LoopClock(), timeout_s=1.0)
        observation = await scraper.observe([silent.endpoint, good.endpoint])
        failure = observation.readings[silent.endpoint].outcome
        assert isinstance(failure, Failure)
        assert failure.kind is FailureKind.TIMED_OUT
        assert observation.readings[good.endpoint].outcome == SAMPLE
        await asyncio.wait_for(silent.hung_up.wait(), PATIENT_S)


async def test_a_page_that_only_drips_is_given_up_at_the_deadline(
    session: aiohttp.ClientSession,
) -> None:
    """A limit on the time between two bytes would wait for it for ever."""

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        while True:
            writer.write(b"1\r\n#\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with page_server(drip) as server:
        assert (await fails(session, server.endpoint, timeout_s=0.2)).kind is FailureKind.TIMED_OUT


async def test_an_endless_page_is_cut_off_at_the_cap(session: aiohttp.ClientSession) -> None:
    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        while True:
            writer.write(b"1000\r\n" + b"#" * 0x1000 + b"\r\n")
            await writer.drain()

    async with page_server(pour) as server:
        assert (await fails(session, server.endpoint)).kind is FailureKind.TOO_LARGE
        await asyncio.wait_for(server.hung_up.wait(), PATIENT_S)


async def test_compressed_pages_are_read_and_bombs_are_not(session: aiohttp.ClientSession) -> None:
    head = "Content-Encoding: gzip\r\n"
    async with page_server(says(response(gzip.compress(PAGE), head=head))) as server:
        assert (await read(session, server.endpoint)).outcome == SAMPLE
    bomb = gzip.compress(bytes(50_000_000), compresslevel=1)
    async with page_server(says(response(bomb, head=head))) as server:
        assert (await fails(session, server.endpoint)).kind is FailureKind.TOO_LARGE


async def test_a_redirect_is_told_and_not_followed(session: aiohttp.ClientSession) -> None:
    """Otherwise a pod could make the operator ask any address of the cluster."""
    async with page_server(says(response())) as elsewhere:
        to = f"http://127.0.0.1:{elsewhere.endpoint.port}/metrics"
        moved = response(b"", status="302 Found", head=f"Location: {to}\r\n")
        async with page_server(says(moved)) as server:
            failure = await fails(session, server.endpoint)
    assert failure.kind is FailureKind.REDIRECTED
    assert to in failure.detail
    assert elsewhere.requests == []


async def test_no_proxy_stands_between_us_and_the_endpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy for the way to the internet is often set, and knows nothing of pods."""
    async with page_server(says(b"")) as proxy, page_server(says(response())) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.endpoint.port}")
        async with client() as session:
            assert (await read(session, server.endpoint)).outcome == SAMPLE
    assert proxy.requests == []


async def test_an_ipv6_endpoint_is_asked_like_any_other(session: aiohttp.ClientSession) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with page_server(says(response()), host="::1") as server:
        assert (await read(session, server.endpoint)).outcome == SAMPLE
    assert f"Host: [::1]:{server.endpoint.port}".encode() in server.requests[0]


async def test_the_path_is_asked_as_it_is_written(session: aiohttp.ClientSession) -> None:
    async with page_server(says(response())) as server:
        scraper = PageScraper(session, LoopClock(), path="/a%2Fb%7E?c=%20", timeout_s=PATIENT_S)
        await scraper.observe([server.endpoint])
    assert server.requests[0].startswith(b"GET /a%2Fb%7E?c=%20 HTTP/1.1\r\n")
