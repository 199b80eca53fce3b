"""Simulated engines over real HTTP, for tests of the engines and of what talks to them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from trimtab.engine_sim.server import EngineOptions, EngineServer, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODEL = "tiny"  # as on the captured pages
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Rig:
    """One engine and a client of it."""

    engine: EngineServer
    session: aiohttp.ClientSession

    async def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        """Post a request; the answer's status and JSON."""
        async with self.session.post(path, json={"model": MODEL, **body}) as response:
            return response.status, await response.json()

    async def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The events of a stream, which must end as it should."""
        async with self.session.post(path, json={"stream": True, **body}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            return events_of(await response.text())

    async def page(self) -> str:
        async with self.session.get("/metrics") as response:
            assert response.status == 200
            return await response.text()

    async def value(self, name: str, **labels: str) -> float:
        """One sample of the metrics page."""
        return value_of(await self.page(), name, **labels)

    async def until(self, name: str, value: float) -> None:
        """Return when the metrics page shows the value."""
        async with asyncio.timeout(DEADLINE_S):
            while await self.value(name) != value:
                pass


def events_of(text: str) -> list[Any]:
    *blocks, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def value_of(page: str, name: str, **labels: str) -> float:
    [value] = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return value


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Rig]:
    """One engine, fast unless told otherwise, and a client."""
    wanted = EngineOptions(**{"model": MODEL, "speed": 50.0, **options})
    async with (
        serve([wanted]) as fleet,
        aiohttp.ClientSession(
            fleet.engines[0].url, timeout=aiohttp.ClientTimeout(total=DEADLINE_S)
        ) as session,
    ):
        yield Rig(fleet.engines[0], session)
