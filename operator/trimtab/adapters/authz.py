"""ext_authz over HTTP/1.1: Envoy asks where a request should go, and is answered in one write.

A check is a small request without a body (the client's stays in Envoy), and a general HTTP server
would be most of its cost: see docs/adr/0004. What is not plainly such a check, in one strict form,
is answered 503 and hung up on. Never 4xx: Envoy takes that for a denial and would refuse the
client, whereas after a 5xx it balances by the weights.

The port is for Envoy alone. Still, whatever is sent to it costs at most 64 KB for each connection.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

import structlog

from trimtab import envoy_picker
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from trimtab.core.model import Endpoint

MAX_HEAD_BYTES = 64 << 10  # Envoy takes 60 KB of head itself and sends the client's path along
MAX_DIGITS = 15  # of a number of bytes
BACKLOG = 4096  # each check of a burst has a connection; those refused would go by the weights

_POOL, _READ, _TOLD, _ANSWER = (
    name.encode()
    for name in (
        envoy_picker.POOL,
        envoy_picker.BYTES_READ,
        envoy_picker.BYTES_TOLD,
        envoy_picker.ANSWER,
    )
)
# Possessive (++), or hostile heads could make the search try again without end.
_HEAD = re.compile(
    rb"([A-Z]++) (/[!-~\x80-\xff]*+) HTTP/1\.1\r\n"
    rb"(?:[-!#$%&'*+.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)*+\r\n"
)
_FIELD = re.compile(
    rb"(?im)^(content-length|transfer-encoding|%b|%b|%b):([^\r]*+)" % (_POOL, _READ, _TOLD)
)
_CHECK = envoy_picker.CHECK_PREFIX.encode() + b"/"
_HEALTH = envoy_picker.HEALTH_PATH.encode()
_END = b"\r\n\r\n"

_NO_CHOICE = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_NOT_NOW = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
_NOT_UNDERSTOOD = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)

log = structlog.get_logger(__name__)


class Chooser(Protocol):
    """Who knows where requests should go."""

    @property
    def ready(self) -> bool:
        """Whether it is of any use to ask; if not, another picker is."""

    def choose(self, pool: str, body_bytes: int | None) -> Sequence[Endpoint]:
        """Give the endpoint to take, and those to try next; empty where the weights know better.

        Args:
            pool: as Envoy has routed the request.
            body_bytes: of the request; None if nobody knows.
        """


class AuthzServer:
    """Answers any number of Envoys."""

    def __init__(self, chooser: Chooser) -> None:
        self.checks_total = 0
        self.garbage_total = 0
        self.bugs_total = 0
        self._chooser = chooser

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[int]:
        """Listen, and say on which port. Raises StartError."""
        loop = asyncio.get_running_loop()
        connections: set[_Connection] = set()
        try:
            server = await loop.create_server(
                lambda: _Connection(self, connections), host, port, backlog=BACKLOG
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(f"the picker cannot listen on {host}:{port}: {reason}") from error
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for connection in list(connections):
                connection.hang_up()

    def answer(self, head: bytes) -> bytes:
        """Answer one request, given up to the empty line that ends it."""
        match = _HEAD.fullmatch(head)
        if match is None:
            return self._not_understood()
        found = _FIELD.findall(head)
        fields = {name.lower(): value.strip(b" \t") for name, value in found}
        if (
            len(fields) < len(found)
            or b"transfer-encoding" in fields
            or fields.get(b"content-length", b"0") != b"0"
        ):
            return self._not_understood()
        method, path = match.groups()
        if path == _HEALTH:
            return _NO_CHOICE if self._chooser.ready else _NOT_NOW
        if not path.startswith(_CHECK):
            return self._not_understood()
        self.checks_total += 1
        # Without a prompt there is no work that is worth a choice.
        return self._choice(fields) if method == b"POST" else _NO_CHOICE

    def _choice(self, fields: Mapping[bytes, bytes]) -> bytes:
        body_bytes = _number(fields.get(_TOLD, b""))
        if body_bytes is None:
            body_bytes = _number(fields.get(_READ, b"")) or None
        try:
            endpoints = self._chooser.choose(fields.get(_POOL, b"").decode("latin-1"), body_bytes)
        except Exception as error:
            self.bugs_total += 1
            if self.bugs_total == 1:
                log.exception("a choice failed; requests go by the weights", reason=repr(error))
            return _NOT_NOW
        if not endpoints:
            return _NO_CHOICE
        return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n%b: %b\r\n\r\n" % (
            _ANSWER,
            b",".join(map(_written, endpoints)),
        )

    def _not_understood(self) -> bytes:
        self.garbage_total += 1
        return _NOT_UNDERSTOOD

    def too_long(self) -> bytes:
        """Answer a request whose end is not worth waiting for."""
        return self._not_understood()


class _Connection(asyncio.Protocol):
    def __init__(self, server: AuthzServer, connections: set[_Connection]) -> None:
        self._server = server
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not derived from it
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = self._rest + data
        answers: list[bytes] = []
        begin = 0
        while (end := data.find(_END, begin)) >= 0:
            begin, head = end + len(_END), data[begin : end + len(_END)]
            answers.append(self._server.answer(head))
            if answers[-1] is _NOT_UNDERSTOOD:
                break
        else:
            self._rest = data[begin:]
            if len(self._rest) > MAX_HEAD_BYTES:
                answers.append(self._server.too_long())
        if answers:
            self._transport.write(b"".join(answers))
            if answers[-1] is _NOT_UNDERSTOOD:
                self.hang_up()

    def pause_writing(self) -> None:
        """Take no more from whoever does not fetch his answers."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def hang_up(self) -> None:
        self._rest = b""
        if self._transport is not None:
            self._transport.close()


def _number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) <= MAX_DIGITS else None


@functools.lru_cache(maxsize=4096)
def _written(endpoint: Endpoint) -> bytes:
    return endpoint.where.encode()
