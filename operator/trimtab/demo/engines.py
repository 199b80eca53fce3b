"""`python -m trimtab.demo.engines`: all simulated engines of a run, in one process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import uvloop

from trimtab.demo.child import end_of_input, hear, say, start_child
from trimtab.engine_sim.server import EngineOptions, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

MODEL = "demo"
STREAM_INTERVAL_TOKENS = 8  # an event for each token would cost the rig more than all else


@asynccontextmanager
async def start_engines(speeds: Sequence[float]) -> AsyncIterator[list[int]]:
    """Run an engine of each speed beside us: their ports, in the same order.

    Raises:
        StartError: they did not start.
    """
    async with start_child("trimtab.demo.engines", speeds) as (ports, _):
        yield ports


async def _serve() -> None:
    options = [
        EngineOptions(model=MODEL, speed=speed, stream_interval=STREAM_INTERVAL_TOKENS)
        for speed in hear()
    ]
    async with serve(options) as fleet:
        say(fleet.ports)
        await end_of_input()


if __name__ == "__main__":
    uvloop.run(_serve())
