"""Processes beside us that cannot outlive us: the end of their input is their order to stop.

Load and engines have processes of their own, so that neither delays the other. They are told what
to do in one line of JSON on stdin, answer in lines of JSON on stdout, and stop when stdin ends:
because we close it, or because we are gone, however that came about.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STOP_S = 5.0  # a child told to stop has only to close its connections


@asynccontextmanager
async def start_child(module: str, order: object) -> AsyncIterator[tuple[Any, AsyncIterator[Any]]]:
    """Run `python -m module` with this order: what it says first, and what it says later.

    Raises:
        StartError: it ended before it said anything, or with an error later.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us; we end the child when its turn has come
    )
    # PIPEs were asked for; the type checker cannot know.
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        first = await process.stdout.readline()
        if not first:
            raise StartError(f"{module} did not start (exit code {await process.wait()})")
        yield json.loads(first), _later(module, process, process.stdout)
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _later(
    module: str, process: asyncio.subprocess.Process, lines: asyncio.StreamReader
) -> AsyncIterator[Any]:
    async for line in lines:
        yield json.loads(line)
    if code := await process.wait():
        raise StartError(f"{module} ended with exit code {code}")


# What a child does


def hear() -> Any:
    """Read the order."""
    return json.loads(sys.stdin.buffer.readline())


def say(what: object) -> None:
    # Blocking, but 64 KiB of pipe hold several seconds of lines and the reader has only to read.
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def end_of_input() -> None:
    """Return when we are to stop."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
