"""`trimtab explain` and the page it reads, from a real loop to what an on-call engineer sees."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner
from rich.console import Console

from engines import DEADLINE_S, MODEL
from fakes import FakeClock, FakePublisher
from rig_envoy import free_ports
from trimtab import explain
from trimtab.adapters.scrape import PageScraper, client
from trimtab.adapters.telemetry import Telemetry
from trimtab.adapters.xds import EDS, Nack, XdsServer
from trimtab.cli import main
from trimtab.core.explaining import Explanation, Row
from trimtab.core.model import Decision, Endpoint, Observation, Policy, Snapshot
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.loop import LoopClock, Pool, run_pool
from trimtab.ports import ConfigurationError, PublishError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trimtab.ports import Clock

A = Endpoint("llama-a", "10.0.0.1", 8000)


@dataclass
class Envoys:
    """A data plane that says what it is told to say."""

    connected: int = 0
    nacks_total: int = 0
    pushes_total: int = 0
    last_nack: Nack | None = None
    followers: int = 0

    def following(self, pool: str) -> int:
        del pool
        return self.followers


class Watched(Telemetry):
    """Lets tests wait for ticks."""

    def __init__(self, clock: Clock, envoys: Envoys) -> None:
        super().__init__(clock, data_plane=envoys)
        self.tick = asyncio.Event()

    def ticked(self, pool: str, *, took_s: float, skipped: int) -> None:
        super().ticked(pool, took_s=took_s, skipped=skipped)
        self.tick.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self.tick.clear()
                await self.tick.wait()


@dataclass
class Rig:
    telemetry: Telemetry
    clock: FakeClock
    envoys: Envoys
    port: int

    def decide(self, pool: str, snapshot: Snapshot) -> None:
        self.telemetry.decided(pool, Observation({}), Decision(snapshot=snapshot))

    async def page(self, name: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/debug/pools/{name}"
        async with aiohttp.ClientSession(raise_for_status=True) as session, session.get(url) as got:
            return dict(await got.json())

    async def command(self, *arguments: str) -> tuple[int, str]:
        return await command(self.port, *arguments)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    clock, envoys = FakeClock(), Envoys()
    telemetry = Telemetry(clock, data_plane=envoys)
    async with telemetry.serve("127.0.0.1", 0) as port:
        yield Rig(telemetry, clock, envoys, port)


async def command(port: int, *arguments: str) -> tuple[int, str]:
    """Run the command beside the server it asks; its exit code, and what it prints."""
    line = ["explain", "--telemetry", f"127.0.0.1:{port}", *arguments]
    result = await asyncio.to_thread(CliRunner().invoke, main, line)
    return result.exit_code, result.output


@asynccontextmanager
async def answering(body: str, *, status: int = 200) -> AsyncIterator[int]:
    """Serve something else than Trimtab."""

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(text=body, status=status)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


# From a real loop to the terminal


async def test_an_engine_that_is_loaded_past_the_balancer_is_the_answer() -> None:
    """Whoever is paged finds out by one command where the work sits."""
    async with (
        serve([EngineOptions(model=MODEL)] * 3) as fleet,
        client() as session,
        asyncio.TaskGroup() as group,
    ):
        clock, envoys = LoopClock(), Envoys(connected=1, followers=1)
        telemetry = Watched(clock, envoys)
        endpoints = [
            Endpoint(f"llama-{n}", engine.host, engine.port)
            for n, engine in enumerate(fleet.engines)
        ]
        full, *others = endpoints
        policy = Policy(interval_s=0.1)
        pool = Pool("team/llama", endpoints, policy, PageScraper(session, clock, timeout_s=5.0))
        telemetry.expect(pool.name, interval_s=policy.interval_s)
        tasks: list[asyncio.Task[None]] = [
            group.create_task(
                run_pool(pool, publisher=FakePublisher(), clock=clock, witness=telemetry)
            )
        ]
        asked = {"model": MODEL, "prompt": [1] * 10_000, "max_tokens": 1}
        for _ in range(40):
            post = session.post(f"{fleet.engines[0].url}/v1/completions", json=asked)
            tasks.append(group.create_task(_wait_for(post)))
        await telemetry.until(lambda: _waiting(pool, full) > 20)
        async with telemetry.serve("127.0.0.1", 0) as port:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "trimtab", "explain", "llama"),
                *("--telemetry", f"127.0.0.1:{port}"),
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            code, text = await command(port, "team/llama", "--json")
        for task in tasks:
            task.cancel()

    told = output.decode()
    assert process.returncode == code == 0
    assert "Short requests are slow because 1 of 3 endpoints holds" in told
    assert f"sent to {full.pod}:{full.port} waits behind" in told
    (row,) = [line for line in told.splitlines() if line.startswith(f"{full.pod}:{full.port} ")]
    assert row.endswith("Serving")
    assert "1 of 1 connected Envoys follow it." in told
    said = json.loads(text)
    shares = {row["pod"]: row["backlog_percent"] for row in said["rows"]}
    assert shares[full.pod] > 90
    assert all(shares[other.pod] < 5 for other in others)
    assert said["answer"].startswith("Short requests are slow because 1 of 3 endpoints holds")


async def _wait_for(post: Any) -> None:
    async with post as answer:
        await answer.read()


def _waiting(pool: Pool, endpoint: Endpoint) -> float:
    return pool.decision.endpoints[endpoint].waiting if pool.decision else 0.0


# The page


async def test_the_page_tells_what_was_done_and_when(rig: Rig) -> None:
    rig.telemetry.expect("llama", interval_s=1.0)
    assert (await rig.page("llama"))["deeds"] == ["Nothing has been published yet."]
    snapshot = Snapshot({A: 1000})
    rig.decide("llama", snapshot)
    rig.telemetry.published("llama")
    rig.clock.time_s += 5.0
    rig.decide("llama", snapshot)
    rig.clock.time_s += 1.0
    rig.envoys.connected, rig.envoys.followers = 2, 1
    rig.envoys.last_nack = Nack("envoy-1", EDS, ("llama",), "no such address")
    refused = PublishError("Envoy envoy-1", "no such address")
    rig.telemetry.failed("llama", refused)
    page = await rig.page("llama")
    assert page["snapshot"] == snapshot.version
    assert page["deeds"] == [
        f"The last tick failed, and the next one tries again: PublishError: {refused}",
        f"Decided 1.0 s ago: snapshot {snapshot.version} since 6.0 s.",
        "Published 6.0 s ago; 1 of 2 connected Envoys follow it.",
        "The last refusal: Envoy envoy-1 refused ClusterLoadAssignment llama: no such address",
    ]


async def test_another_snapshot_is_told_from_the_same_one(rig: Rig) -> None:
    rig.telemetry.expect("llama", interval_s=1.0)
    rig.decide("llama", Snapshot({A: 1000}))
    rig.clock.time_s += 5.0
    rig.decide("llama", Snapshot({A: 999}))
    assert "since 0.0 s" in (await rig.page("llama"))["deeds"][0]


async def test_without_a_data_plane_the_page_says_that_no_envoy_is_there() -> None:
    telemetry = Telemetry(FakeClock())
    telemetry.expect("llama", interval_s=1.0)
    telemetry.published("llama")
    async with telemetry.serve("127.0.0.1", 0) as port:
        code, text = await command(port)
    assert code == 0
    assert "Published 0.0 s ago, but no Envoy is connected." in text


async def test_an_unknown_pool_has_no_page(rig: Rig) -> None:
    with pytest.raises(aiohttp.ClientResponseError, match="404"):
        await rig.page("team/llama")


async def test_a_server_without_a_pool_counts_no_followers() -> None:
    assert XdsServer().following("llama") == 0


# Which pool


@pytest.mark.parametrize(
    ("meant", "names", "found"),
    [
        ("", ["team/llama"], "team/llama"),
        ("llama", ["team/llama", "team/qwen"], "team/llama"),
        ("team/llama", ["other/llama", "team/llama"], "team/llama"),
        ("llama", ["llama", "team/llama"], "llama"),
    ],
)
def test_a_pool_is_found_by_what_tells_it_from_others(
    meant: str, names: list[str], found: str
) -> None:
    assert explain.choose(meant, names) == found


@pytest.mark.parametrize(
    ("meant", "names", "complaint"),
    [
        ("llama", [], "no pool is served yet"),
        (
            "mistral",
            ["a/llama", "b/qwen"],
            "no pool 'mistral' is served; there are: a/llama, b/qwen",
        ),
        ("b/llama", ["a/llama"], "no pool 'b/llama' is served; there are: a/llama"),
        ("", ["a/llama", "b/qwen"], "which pool? One of: a/llama, b/qwen"),
        ("llama", ["a/llama", "b/llama", "b/qwen"], "which pool? One of: a/llama, b/llama"),
    ],
)
def test_whoever_names_no_pool_is_told_which_there_are(
    meant: str, names: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        explain.choose(meant, names)
    assert str(refused.value) == complaint


async def test_the_command_says_which_pools_there_are_in_one_line(rig: Rig) -> None:
    rig.telemetry.expect("b/qwen", interval_s=1.0)
    rig.telemetry.expect("a/llama", interval_s=1.0)
    assert await rig.command() == (2, "trimtab: which pool? One of: a/llama, b/qwen\n")


# Nobody, or somebody else, answers


async def test_where_nobody_listens_the_command_says_what_to_do() -> None:
    (port,) = free_ports(1)
    code, text = await command(port)
    assert code == 1
    assert text == (
        f"trimtab: nobody answers on 127.0.0.1:{port}: is Trimtab running here? "
        "--telemetry HOST:PORT says where else\n"
    )


@pytest.mark.parametrize(
    ("body", "status"), [("", 404), ("hello", 200), ('{"pools": 1}', 200), ('["llama"]', 200)]
)
async def test_another_server_is_told_from_trimtab(body: str, status: int) -> None:
    async with answering(body, status=status) as port:
        code, text = await command(port)
    assert code == 1
    assert text.startswith(f"trimtab: what answers on 127.0.0.1:{port} does not explain pools (")
    assert text.count("\n") == 1


# What is printed

ROW = Row(
    name="10.0.0.1:8000",
    pod="10.0.0.1:8000",
    address="10.0.0.1:8000",
    running=3,
    waiting=0,
    kv_percent=12.3,
    speed_percent=100,
    age_s=0.4,
    backlog_tokens=1234,
    backlog_percent=50,
    drain_s=0.06,
    weight_percent=50,
    state="Serving",
    reason="",
)
SAID = Explanation(
    pool="llama",
    verdict="Unknown",
    verdict_for_s=None,
    sentence="[bold]so[/bold] it is",
    evidence="0 of 1 endpoints heard",
    answer="",
    deeds=(),
    snapshot="",
    rows=(ROW,),
)


def printed(said: Explanation, *, columns: int = 80, terminal: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=explain.WIDE_COLUMNS, force_terminal=terminal, color_system=None
    )
    explain.show(said, console, columns=columns)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_row_reads_from_the_page_to_the_share() -> None:
    assert printed(SAID)[2:] == [
        "endpoint      run wait   KV speed   age → backlog of all  drain → share state",
        "─" * 79,
        "10.0.0.1:8000   3    0 12 % 100 % 0.4 s     1,234   50 % 0.06 s  50.0 % Serving",
    ]


def test_what_others_wrote_is_printed_as_it_is() -> None:
    """Envoy's complaints have brackets in them."""
    assert printed(SAID)[0] == "llama: Unknown: [bold]so[/bold] it is"


def test_a_table_on_hosts_fits_a_terminal_of_80_columns() -> None:
    assert all(len(line) <= 80 for line in printed(SAID))


def test_an_endpoint_stays_on_one_line_however_narrow_the_terminal_is() -> None:
    """A line in pieces cannot be searched, and names of pods are long."""
    name = f"llama-{'x' * 60}:8000"
    lines = printed(replace(SAID, rows=(replace(ROW, name=name),)), terminal=True)
    assert any(name in line and line.endswith("Serving") for line in lines)


def test_sentences_fold_in_a_terminal_and_nowhere_else() -> None:
    said = replace(SAID, rows=(), sentence="long " * 60)
    assert len(printed(said)) == 2
    assert len(printed(said, terminal=True)) == 5
    assert all(len(line) <= 80 for line in printed(said, terminal=True))


def test_reasons_stand_in_full_below_the_table() -> None:
    stale = replace(ROW, state="Stale", age_s=None, reason="never a sample")
    said = replace(SAID, rows=(stale,))
    *_, row, reason = printed(said)
    assert " never " in row
    assert reason == "10.0.0.1:8000 is Stale: never a sample."
    in_a_pod = replace(SAID, rows=(replace(stale, name="llama-a:8000"),))
    assert printed(in_a_pod)[-1].startswith("llama-a:8000 (10.0.0.1:8000) is Stale: ")
