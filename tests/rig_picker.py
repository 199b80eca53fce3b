"""Real pickers as processes, told by a control plane and asked by an Envoy."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from rig_envoy import MODEL, Rig, free_ports, run_rig, until
from trimtab.envoy_config import PoolRoute

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Sequence

PICKED = PoolRoute("llama", picked=True)


@dataclass
class Picker:
    """One picker, seen from outside."""

    port: int
    telemetry_port: int
    session: aiohttp.ClientSession
    process: asyncio.subprocess.Process | None = None

    async def start(self, control_port: int) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "trimtab", "picker", "--log-level", "error"),
            *("--control", f"127.0.0.1:{control_port}"),
            *("--listen", f"127.0.0.1:{self.port}"),
            *("--telemetry", f"127.0.0.1:{self.telemetry_port}"),
        )

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    async def end(self) -> None:
        if self.process is not None:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
            self.process = None

    async def page(self) -> str:
        try:
            url = f"http://127.0.0.1:{self.telemetry_port}/metrics"
            async with self.session.get(url) as answer:
                return await answer.text()
        except aiohttp.ClientError:
            return ""

    async def values(self, name: str) -> dict[str, float]:
        """The samples of a metric by pod, or by pool where it has none."""
        return {
            sample.labels.get("pod", sample.labels.get("pool", "")): sample.value
            for family in text_string_to_metric_families(await self.page())
            for sample in family.samples
            if sample.name == f"trimtab_picker_{name}"
        }

    async def picks(self) -> float:
        return sum((await self.values("picks_total")).values())

    async def decisions(self) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.telemetry_port}/debug/decisions"
        async with self.session.get(url) as answer:
            return [json.loads(line) for line in (await answer.text()).splitlines()]


@dataclass
class PickedRig:
    rig: Rig
    pickers: list[Picker]

    async def healthy(self, count: int) -> None:
        """Return when Envoy finds so many pickers healthy."""

        async def are() -> bool:
            name = "cluster.trimtab_picker.membership_healthy"
            return await self.rig.gateway.stat(name) == count

        await until(are)


@asynccontextmanager
async def run_picked(
    models: Sequence[str] = (MODEL,) * 3, *, pickers: int = 1, speed: float = 50.0
) -> AsyncIterator[PickedRig]:
    """Start engines, a control plane, pickers and an Envoy that asks them."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ports = free_ports(2 * pickers)
        group = [Picker(*two, session) for two in zip(ports[::2], ports[1::2], strict=True)]
        rig = await stack.enter_async_context(
            run_rig(
                models,
                pools={PICKED: range(len(models))},
                speed=speed,
                pickers=[picker.port for picker in group],
            )
        )
        for picker in group:
            stack.push_async_callback(picker.end)
            await picker.start(rig.xds.port)
        picked = PickedRig(rig, group)
        await picked.healthy(pickers)
        yield picked
