"""A server of metrics pages that behaves as badly as a test wants."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab.core.model import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

PAGE = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
"""


@dataclass
class PageServer:
    endpoint: Endpoint
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    """Their heads."""
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the other side closes a connection."""


@asynccontextmanager
async def page_server(answer: Answer, *, host: str = "127.0.0.1") -> AsyncIterator[PageServer]:
    """Serve each request with `answer`, which writes raw bytes; to close is up to it."""
    connected: set[asyncio.StreamWriter] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.connections += 1
        connected.add(writer)
        try:
            while not writer.is_closing():
                served.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            served.hung_up.set()
        finally:
            connected.discard(writer)
            writer.close()

    server = await asyncio.start_server(converse, host, 0)
    served = PageServer(Endpoint("pod", host, server.sockets[0].getsockname()[1]))
    try:
        yield served
    finally:
        server.close()
        for writer in connected:
            writer.transport.abort()
        await server.wait_closed()


def response(body: bytes = PAGE, *, status: str = "200 OK", head: str = "") -> bytes:
    lines = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    return lines.encode() + body


def says(content: bytes, *, close: bool = False) -> Answer:
    """Answer each request with these bytes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        if close:
            writer.close()

    return answer
