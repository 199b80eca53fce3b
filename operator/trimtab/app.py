"""The composition root: one function per long-running command.

Each builds the adapters it needs, starts them in an order in which a failure leaves nothing behind,
and stops them in the reverse order: unready first, so that whoever asks us is sent elsewhere.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import yaml

from trimtab.adapters import scrape
from trimtab.adapters.envoy_process import EnvoyProcess
from trimtab.adapters.files import Fleet, FleetFile
from trimtab.adapters.telemetry import Telemetry, configure_logs
from trimtab.adapters.xds import XdsServer
from trimtab.api import Mode
from trimtab.children import Child, refuse_taken
from trimtab.envoy_config import Listener, PoolRoute, bootstrap
from trimtab.loop import LoopClock, Pool, run_pool
from trimtab.ports import PublishError, TrimtabError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence
    from pathlib import Path

    import aiohttp

    from trimtab.api import PoolSpec
    from trimtab.core.model import Endpoint
    from trimtab.ports import Clock, Publisher

GATEWAY = "gateway"
"""Envoy's only listener; all pools of a fleet share it."""

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # told to Envoy, not listened on

log = structlog.get_logger(__name__)

Address = tuple[str, int]


def run(command: Coroutine[Any, Any, None], *, log_level: str) -> None:
    """Run a long-running command, with its logs on stderr."""
    configure_logs(log_level)
    asyncio.run(command)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pool that is to be served: what is asked for, and by whom it is served just now."""

    name: str
    spec: PoolSpec
    endpoints: frozenset[Endpoint]
    draining: frozenset[Endpoint] = frozenset()


class Control:
    """One loop for each pool, as tasks of `group`; `follow` says which pools."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        session: aiohttp.ClientSession,
        publisher: Publisher,
        telemetry: Telemetry,
        clock: Clock,
    ) -> None:
        self._group = group
        self._session = session
        self._publisher = publisher
        self._telemetry = telemetry
        self._clock = clock
        self._running: dict[str, tuple[Pool, asyncio.Task[None]]] = {}
        self._wanted: dict[str, Wanted] = {}

    async def follow(self, pools: Iterable[Wanted]) -> None:
        """Start loops of new pools, end those of pools that left, tell the others what is new.

        What a loop has learned about its endpoints outlives the change.
        """
        before, self._wanted = self._wanted, {pool.name: pool for pool in pools}
        for name in before.keys() - self._wanted.keys():
            self._running.pop(name)[1].cancel()
            self._telemetry.forget(name)
        for name, wanted in self._wanted.items():
            if wanted != before.get(name):
                await self._follow(wanted)

    def loop(self, name: str) -> Pool | None:
        """Give what a pool's loop works with, and what came of it."""
        return self._running[name][0] if name in self._running else None

    async def _follow(self, wanted: Wanted) -> None:
        name, spec = wanted.name, wanted.spec
        policy = spec.policy()
        scraper = scrape.PageScraper(
            self._session,
            self._clock,
            path=spec.metrics_path,
            engine=spec.engine,
            timeout_s=spec.metrics.timeout_milliseconds / 1000,
        )
        self._telemetry.expect(name, interval_s=policy.interval_s)
        if name not in self._running:
            pool = Pool(name, wanted.endpoints, policy, scraper, draining=wanted.draining)
            self._running[name] = pool, self._group.create_task(self._run(pool), name=name)
            return
        pool = self._running[name][0]
        pool.policy, pool.scraper = policy, scraper
        pool.changed.set()  # the period may be shorter now
        try:
            await pool.follow(wanted.endpoints, wanted.draining, self._publisher)
        except PublishError as error:
            self._telemetry.failed(name, error)

    async def _run(self, pool: Pool) -> None:
        await run_pool(pool, publisher=self._publisher, clock=self._clock, witness=self._telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standalone:
    """What the command line says. Addresses are (host, port)."""

    fleet: Path
    listen: Address
    xds: Address
    telemetry: Address
    picker: Address
    picker_telemetry: Address
    admin_port: int
    start_envoy: bool = True
    envoy: Path | None = None
    """The binary to start; None: the one that is found."""


async def standalone(options: Standalone) -> None:
    """Balance the fleet of a file until SIGTERM or SIGINT; the picker is a process beside us.

    Raises:
        ConfigurationError: the file cannot be carried out.
        StartError: a part could not be started; none is left running.
    """
    await until_told(_standalone(options))


async def until_told(serving: Coroutine[Any, Any, None]) -> None:
    """Serve until SIGTERM or SIGINT; of several errors raise one that the user can mend."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # we are in a coroutine
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, task.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        log.info("stopped")
    except ExceptionGroup as errors:
        if (expected := errors.subgroup(TrimtabError)) is None:
            raise
        raise expected.exceptions[0] from None


async def _standalone(options: Standalone) -> None:
    clock = LoopClock()
    file = FleetFile(options.fleet, clock)
    fleet = file.load()
    xds = XdsServer(*options.xds)
    telemetry = Telemetry(clock, data_plane=xds)
    telemetry.hold("the gateway is not yet open")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(telemetry.serve(*options.telemetry))
        await xds.start()
        stack.push_async_callback(xds.stop)
        picker = picker_process(
            control=(xds.host, xds.port), listen=options.picker, telemetry=options.picker_telemetry
        )
        await picker.start()
        stack.push_async_callback(picker.stop)
        envoy_bootstrap = gateway_bootstrap(
            listen=options.listen,
            xds=(xds.host, xds.port),
            admin_port=options.admin_port,
            pickers=[options.picker],
        )
        envoy: EnvoyProcess | None = None
        if options.start_envoy:
            envoy = EnvoyProcess(envoy_bootstrap, binary=options.envoy)
            await envoy.start()
            stack.push_async_callback(envoy.stop)
        else:
            print(as_yaml(envoy_bootstrap), flush=True)  # noqa: T201  # asked for
        session = await stack.enter_async_context(scrape.client())
        group = await stack.enter_async_context(asyncio.TaskGroup())
        stack.callback(telemetry.hold, "leaving")
        control = Control(group, session=session, publisher=xds, telemetry=telemetry, clock=clock)
        await _follow(fleet, control=control, xds=xds)
        if envoy is not None:
            await envoy.wait_ready()
        telemetry.release()
        log.info("ready", listen=told(options.listen), xds=told((xds.host, xds.port)))
        async for change in file.changes():
            if isinstance(change, Fleet):
                await _follow(change, control=control, xds=xds)
                log.info("the fleet file has changed", pools=[p.name for p in change.pools])
            else:
                log.error("the fleet file is refused, the old fleet stays", reason=str(change))


async def _follow(fleet: Fleet, *, control: Control, xds: XdsServer) -> None:
    routes = [route_of(pool.name, pool) for pool in fleet.pools]
    xds.set_pools({GATEWAY: routes})
    await control.follow(Wanted(pool.name, pool, frozenset(pool.endpoints)) for pool in fleet.pools)


def route_of(name: str, spec: PoolSpec, *, models: tuple[str, ...] = ()) -> PoolRoute:
    """Say what Envoy and the picker have to know of a pool; it serves `models` unless it says."""
    return PoolRoute(
        name,
        models=spec.routing.models or models,
        hostnames=spec.routing.hostnames,
        picked=spec.routing.mode is Mode.PER_REQUEST,
        metrics_path=spec.metrics_path,
        engine=spec.engine,
    )


def picker_process(
    *, control: Address, listen: Address, telemetry: Address, log_level: str = "info"
) -> Child:
    """Make the picker's process, which is yet to be started. Raises StartError: a port is taken."""
    command = [sys.executable, "-m", "trimtab", "picker", "--log-level", log_level]
    for name, address in (("listen", listen), ("telemetry", telemetry)):
        refuse_taken("the picker", *address)
        command += [f"--{name}", told(address)]
    return Child("picker", [*command, "--control", told(_reached(control))])


def gateway_bootstrap(
    *, listen: Address, xds: Address, admin_port: int, pickers: Sequence[Address] = ()
) -> dict[str, Any]:
    """Build what an Envoy has to be started with to become the gateway."""
    return bootstrap(
        [Listener(GATEWAY, listen[1], listen[0])],
        xds=_reached(xds),
        admin_port=admin_port,
        pickers=[_reached(picker) for picker in pickers],
    )


def _reached(address: Address) -> Address:
    """Where somebody is reached who listens there."""
    host, port = address
    return _ANY.get(host, host), port


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write the same thing twice, as people do."""
        del data
        return True


def as_yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


def told(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
