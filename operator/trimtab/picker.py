"""`trimtab picker`: a process of its own that chooses an endpoint for each request.

It has no access to Kubernetes. Three things run in it and none waits for another: the control plane
says which pools there are, pages set the books right, and Envoy's checks are answered from them. So
whatever is late or dead, an answer takes a fraction of a millisecond; and when this process is dead
itself, Envoy balances by the weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import uvloop

from trimtab.adapters import scrape
from trimtab.adapters.ads import PoolsClient
from trimtab.adapters.authz import AuthzServer
from trimtab.adapters.picker_telemetry import PickerTelemetry
from trimtab.adapters.telemetry import configure_logs
from trimtab.loop import LoopClock
from trimtab.picks import Picks
from trimtab.ports import TrimtabError

if TYPE_CHECKING:
    from trimtab.envoy_config import PoolRoute
    from trimtab.ports import Scraper

PAGE_TIMEOUT_S = 0.5

log = structlog.get_logger(__name__)

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says. Addresses are (host, port)."""

    control: Address
    listen: Address
    telemetry: Address


def run(options: Options, *, log_level: str) -> None:
    """Choose until SIGTERM or SIGINT. Raises StartError."""
    configure_logs(log_level)
    uvloop.run(_until_told(options))


async def _until_told(options: Options) -> None:
    serving = asyncio.current_task()
    assert serving is not None  # noqa: S101  # we are in a coroutine
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        await _serve(options)
    except asyncio.CancelledError:
        log.info("stopped")
    except ExceptionGroup as errors:
        if (expected := errors.subgroup(TrimtabError)) is None:
            raise
        raise expected.exceptions[0] from None


async def _serve(options: Options) -> None:
    _allow_many_connections()
    clock = LoopClock()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(scrape.client())

        def make_scraper(route: PoolRoute) -> Scraper:
            return scrape.PageScraper(
                session,
                clock,
                path=route.metrics_path,
                engine=route.engine,
                timeout_s=PAGE_TIMEOUT_S,
            )

        picks = Picks(clock, make_scraper)
        authz = AuthzServer(picks)
        control = PoolsClient(*options.control)
        telemetry = PickerTelemetry(clock, picks=picks, authz=authz, control=control)
        await stack.enter_async_context(telemetry.serve(*options.telemetry))
        port = await stack.enter_async_context(authz.serve(*options.listen))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        group.create_task(picks.watch(), name="pages")
        gc.freeze()  # what is there now stays; looking through it would only delay answers
        log.info("picker is there", host=options.listen[0], port=port)
        async for pools in control.changes():
            before = picks.pools.keys()
            picks.follow(pools)
            if picks.pools.keys() != before:
                log.info("picking for", pools=sorted(picks.pools))


def _allow_many_connections() -> None:
    """Raise our limit of open files: a burst brings a connection for each of its requests."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
