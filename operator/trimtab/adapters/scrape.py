"""Metrics pages over HTTP: all endpoints asked at once, each answer bounded in size and time.

A page comes from a machine that may be broken or hostile, so nothing it does costs more than the
deadline and the cap, whether its bytes are compressed or not; redirects are not followed and no
proxy is used, so that only the pool's own addresses are ever asked. Whatever happens instead of a
page is a Failure with its kind; only a refused connection says that nobody listens.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from trimtab.core.exposition import parse
from trimtab.core.model import Failure, FailureKind, Observation, Reading

if TYPE_CHECKING:
    from collections.abc import Collection

    from trimtab.core.model import Endpoint
    from trimtab.ports import Clock

MAX_PAGE_BYTES = 4 << 20  # a vLLM page has 60 KB; 256 endless ones at once must fit into memory
MAX_AT_ONCE = 256  # over all pools: file descriptors are often limited to 1024
KEEP_ALIVE_S = 75.0  # above the longest period, or each tick would connect anew

_HEADERS = {
    "Accept": "text/plain;version=0.0.4, */*;q=0.1",
    # Bytes on the wire are cheaper than the engine's CPU time for compressing them.
    "Accept-Encoding": "identity",
    "User-Agent": "trimtab",
}


def client() -> aiohttp.ClientSession:
    """Make the one HTTP client that the scrapers of all pools share; the caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=MAX_AT_ONCE, keepalive_timeout=KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=_HEADERS,
        timeout=aiohttp.ClientTimeout(total=None),  # one deadline per tick, see PageScraper
        trust_env=False,
    )


class PageScraper:
    """The Scraper of one pool: one path, one engine, one deadline for all its endpoints."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        clock: Clock,
        *,
        path: str = "/metrics",
        engine: str = "Auto",
        timeout_s: float = 0.5,
        max_page_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        self._session = session
        self._clock = clock
        self._path = path
        self._engine = engine
        self._timeout_s = timeout_s
        self._max_page_bytes = max_page_bytes

    async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
        """Return within the deadline, with a reading of every endpoint."""
        async with asyncio.TaskGroup() as group:
            tasks = {each: group.create_task(self._read(each)) for each in endpoints}
        return Observation({endpoint: task.result() for endpoint, task in tasks.items()})

    async def _read(self, endpoint: Endpoint) -> Reading:
        asked_s = self._clock.now_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._fetch(_url(endpoint, self._path))
        except TimeoutError:
            answer = Failure(FailureKind.TIMED_OUT, f"no page within {self._timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            refused = error.os_error.errno == errno.ECONNREFUSED
            kind = FailureKind.REFUSED if refused else FailureKind.DISCONNECTED
            answer = Failure(kind, error.strerror or str(error))
        except aiohttp.ClientResponseError as error:
            complaint = error.message.partition("\n")[0]  # what follows quotes the page
            answer = Failure(FailureKind.UNPARSABLE, f"not HTTP (is it TLS?): {complaint}")
        except (aiohttp.ClientError, OSError) as error:
            answer = Failure(FailureKind.DISCONNECTED, str(error) or type(error).__name__)
        answered_s = self._clock.now_s()
        outcome = answer if isinstance(answer, Failure) else parse(answer, engine=self._engine)
        return Reading(asked_s=asked_s, answered_s=answered_s, outcome=outcome)

    async def _fetch(self, url: URL) -> bytes | Failure:
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status in range(HTTPStatus.MULTIPLE_CHOICES, HTTPStatus.BAD_REQUEST):
                location = response.headers.get("Location", "")[:200]
                return Failure(FailureKind.REDIRECTED, f"to {location!r}, not followed")
            if response.status != HTTPStatus.OK:
                return Failure(FailureKind.HTTP_STATUS, f"{response.status} at {url.path}")
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > self._max_page_bytes:
                    return Failure(FailureKind.TOO_LARGE, f"over {self._max_page_bytes} bytes")
            return bytes(page)


@functools.lru_cache(maxsize=4096)
def _url(endpoint: Endpoint, path: str) -> URL:
    host = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    return URL(f"http://{host}:{endpoint.port}{path}", encoded=True)
