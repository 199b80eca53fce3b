"""Processes of ours: on ports that are free, never left behind, started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from typing import TYPE_CHECKING

import structlog

from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import Sequence

STOP_GRACE_S = 5.0
BACKOFF_S = (0.1, 5.0)  # a crash costs little; a crash loop must not burn a core
HEALTHY_AFTER_S = 30.0  # whoever lived so long crashed for a new reason: the back-off starts anew

# Ties the child's life to ours even when we are SIGKILLed. A wrapper rather than preexec_fn, which
# may dead-lock in a process with threads (gRPC's). PR_SET_PDEATHSIG is 1 and survives exec.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

log = structlog.get_logger(__name__)


def dying_with_us(command: Sequence[str]) -> list[str]:
    """Wrap a command, which begins with the path of its program."""
    return [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command]


def backoff_after(backoff_s: float, *, lived_s: float) -> float:
    """Say how long to wait before a start, given the wait before the last and what came of it."""
    return BACKOFF_S[0] if lived_s > HEALTHY_AFTER_S else min(2 * backoff_s, BACKOFF_S[1])


async def end(process: asyncio.subprocess.Process) -> None:
    """Ask it to stop, and make it."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.communicate(), STOP_GRACE_S)
    except TimeoutError:
        process.kill()
        await process.communicate()


def refuse_taken(what: str, address: str, port: int) -> None:
    """Say now that a port is taken, while it can still be told in one line. Raises StartError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise StartError(
                f"{what} cannot listen on {address}:{port}: {os.strerror(error.errno or 0)}; "
                "free the port or choose another"
            ) from error


class Child:
    """One supervised process, whose output is ours."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.restarts_total = 0
        self._name = name
        self._command = dying_with_us(command)
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        self._process = await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"{self._name}'s supervisor")

    async def stop(self) -> None:
        """End it and its supervision."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        if self._process is not None:
            await end(self._process)
            self._process = None

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we end it when its turn has come
        )

    async def _supervise(self) -> None:
        backoff_s = BACKOFF_S[0]
        while self._process is not None:
            started_s = time.monotonic()
            status = await self._process.wait()
            log.error(
                "a process died and is started again",
                process=self._name,
                status=status,
                backoff_s=backoff_s,
            )
            await asyncio.sleep(backoff_s)
            backoff_s = backoff_after(backoff_s, lived_s=time.monotonic() - started_s)
            self.restarts_total += 1
            try:
                self._process = await self._spawn()
            except OSError:  # no memory, no descriptors: perhaps next time
                log.exception("a process could not be started again", process=self._name)
