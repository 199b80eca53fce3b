"""`trimtab standalone` as a user starts, changes and stops it: one process, a real Envoy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import yaml

from rig_envoy import DEADLINE_S, free_ports, until
from trimtab import __version__
from trimtab.engine_sim.server import EngineOptions, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

COMMAND = (sys.executable, "-m", "trimtab")
MODEL = "llama"


@dataclass
class Ports:
    """Where one standalone listens."""

    listen: int
    xds: int
    telemetry: int
    admin: int
    picker: int
    picker_telemetry: int

    @classmethod
    def free(cls) -> Ports:
        return cls(*free_ports(6))

    @property
    def options(self) -> tuple[str, ...]:
        return (
            *("--listen", f"127.0.0.1:{self.listen}", "--xds", f"127.0.0.1:{self.xds}"),
            *("--telemetry", f"127.0.0.1:{self.telemetry}", "--envoy-admin-port", str(self.admin)),
            *("--picker", f"127.0.0.1:{self.picker}"),
            *("--picker-telemetry", f"127.0.0.1:{self.picker_telemetry}"),
        )

    def left_running(self) -> list[int]:
        """Processes that know of our ports: Envoy's command line holds its bootstrap."""
        return self.envoys() + self.pickers()

    def envoys(self) -> list[int]:
        return processes(f'"port_value": {self.admin}')

    def pickers(self) -> list[int]:
        return processes(f"--listen\x00127.0.0.1:{self.picker}\x00")


def processes(needle: str) -> list[int]:
    """Whose command lines have it."""
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if needle.encode() in _command_line(process)
    ]


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def write(path: Path, text: str) -> None:
    """Replace the file at once, as editors and Kubernetes do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def write_fleet(path: Path, ports: Sequence[int], *, name: str = MODEL, **routing: str) -> None:
    pool = {
        "name": name,
        "routing": routing,
        "endpoints": [f"127.0.0.1:{port}" for port in ports],
        "metrics": {"intervalMilliseconds": 100, "timeoutMilliseconds": 100},
    }
    write(path, yaml.safe_dump({"pools": [pool]}))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    write_fleet(path, free_ports(2))
    return path


@dataclass
class Running:
    process: asyncio.subprocess.Process
    ports: Ports
    session: aiohttp.ClientSession

    async def answers(self, path: str) -> bool:
        try:
            async with self.session.get(f"http://127.0.0.1:{self.ports.telemetry}{path}") as got:
                return got.status == 200
        except aiohttp.ClientError:
            return False

    async def ready(self) -> None:
        await until(lambda: self.answers("/readyz"))

    async def line(self, event: str) -> dict[str, Any]:
        """The next line of the log with this event."""
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            while written := await self.process.stderr.readline():
                if (line := json.loads(written))["event"] == event:
                    return dict(line)
        raise AssertionError(f"no {event!r} before the end of the log")


@asynccontextmanager
async def running(fleet: Path, *options: str) -> AsyncIterator[Running]:
    ports = Ports.free()
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        "standalone",
        str(fleet),
        *ports.options,
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with aiohttp.ClientSession() as session:
            yield Running(process, ports, session)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def fails(*arguments: str) -> tuple[int, str]:
    """Exit code and the only line of stderr of a command that must end by itself."""
    ended = subprocess.run(
        (*COMMAND, *arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    (line,) = ended.stderr.splitlines()
    assert ended.stdout == ""
    return ended.returncode, line


# What cannot work is told in one line, and nothing is left running


def test_a_bad_fleet_file_is_told_with_line_field_and_rule(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("pools:\n- name: llama\n  endpoints: []\n")
    told = fails("standalone", str(path))
    assert told == (2, f"trimtab: {path}:3: pools[0].endpoints must have at least 1 item")


def test_a_fleet_file_that_is_missing_is_told(tmp_path: Path) -> None:
    code, line = fails("standalone", str(tmp_path / "none.yaml"))
    assert (code, line) == (2, f"trimtab: {tmp_path}/none.yaml: No such file or directory")


@pytest.mark.parametrize("taken", ["listen", "xds", "telemetry", "admin"])
def test_a_port_that_is_taken_is_told_and_nothing_is_left(fleet: Path, taken: str) -> None:
    ports = Ports.free()
    with socket.create_server(("127.0.0.1", getattr(ports, taken))):
        code, line = fails("standalone", str(fleet), *ports.options)
    assert code == 1
    assert line.startswith("trimtab: ")
    assert f"127.0.0.1:{getattr(ports, taken)}" in line
    assert ports.left_running() == []


def test_an_envoy_that_is_missing_or_may_not_be_run_is_told(fleet: Path, tmp_path: Path) -> None:
    missing, forbidden = tmp_path / "none", tmp_path / "envoy"
    forbidden.touch(mode=0o644)
    for binary, reason in ((missing, "there is no Envoy at"), (forbidden, "may not be executed")):
        code, line = fails("standalone", str(fleet), *Ports.free().options, "--envoy", str(binary))
        assert code == 1
        assert line.startswith("trimtab: ")
        assert reason in line
        assert str(binary) in line


def test_what_is_no_envoy_is_told_and_nothing_is_left(fleet: Path) -> None:
    ports = Ports.free()
    code, line = fails("standalone", str(fleet), *ports.options, "--envoy", "/bin/false")
    assert (code, line.split(":")[1]) == (1, " Envoy did not start")
    assert ports.left_running() == []


# What works


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_its_envoy_and_exit_code_0(
    fleet: Path, number: signal.Signals
) -> None:
    async with running(fleet) as trimtab:
        await trimtab.ready()
        await trimtab.line("ready")
        assert trimtab.ports.left_running() != []
        trimtab.process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            await trimtab.line("stopped")
            assert trimtab.ports.left_running() == []  # ended by us, not by our end
            assert await trimtab.process.wait() == 0


async def test_a_changed_file_is_followed_and_a_bad_one_ignored_without_a_failed_request(
    fleet: Path,
) -> None:
    options = [EngineOptions(model=MODEL, speed=50.0) for _ in range(3)]
    async with serve(options) as engines, running(fleet) as trimtab:
        engine_ports = [engine.port for engine in engines.engines]
        write_fleet(fleet, engine_ports[:2])
        await trimtab.line("ready")
        body = {"model": MODEL, "prompt": "tell", "max_tokens": 4}
        url = f"http://127.0.0.1:{trimtab.ports.listen}/v1/completions"
        statuses: list[int] = []

        async def ask() -> None:
            while True:
                async with trimtab.session.post(url, json=body) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        async with asyncio.timeout(DEADLINE_S):
            asking = [asyncio.create_task(ask()) for _ in range(4)]
            try:
                await _served_by(trimtab, engine_ports[:2])
                write_fleet(fleet, engine_ports[1:])
                await _served_by(trimtab, engine_ports[1:])
                write(fleet, "pools: none of your business\n")
                refusal = await trimtab.line("the fleet file is refused, the old fleet stays")
                assert "fleet.yaml:1: pools must be a list" in refusal["reason"]
                seen = len(statuses)
                await until(lambda: _grown(statuses, seen + 20))
                await _served_by(trimtab, engine_ports[1:])
            finally:
                for task in asking:
                    task.cancel()
                results = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert set(statuses) == {200}


async def test_a_pool_that_leaves_the_file_is_watched_and_shown_no_more(fleet: Path) -> None:
    async with running(fleet, "--no-envoy") as trimtab:
        await trimtab.ready()
        write_fleet(fleet, free_ports(1), name="other")
        assert (await trimtab.line("pool is no longer served"))["pool"] == MODEL
        assert (await trimtab.line("pool is served"))["pool"] == "other"
        url = f"http://127.0.0.1:{trimtab.ports.telemetry}/metrics"
        async with trimtab.session.get(url) as answer:
            shown = await answer.text()
        assert 'pool="other"' in shown
        assert f'pool="{MODEL}"' not in shown


async def _grown(statuses: list[int], count: int) -> bool:
    return len(statuses) >= count


async def _served_by(trimtab: Running, ports: list[int]) -> None:
    """Return when Envoy's table holds exactly these endpoints."""
    url = f"http://127.0.0.1:{trimtab.ports.admin}/clusters?format=json"

    async def follows() -> bool:
        async with trimtab.session.get(url) as answer:
            clusters = {c["name"]: c for c in (await answer.json())["cluster_statuses"]}
        hosts = clusters.get(MODEL, {}).get("host_statuses", ())
        return {host["address"]["socket_address"]["port_value"] for host in hosts} == set(ports)

    await until(follows)


async def test_without_an_envoy_it_prints_the_bootstrap_for_one(fleet: Path) -> None:
    async with running(fleet, "--no-envoy") as trimtab:
        await trimtab.ready()
        assert trimtab.ports.envoys() == []
        trimtab.process.terminate()
        assert trimtab.process.stdout is not None
        printed = yaml.safe_load(await trimtab.process.stdout.read())
    ports = trimtab.ports
    listen, xds, picker = (f"127.0.0.1:{port}" for port in (ports.listen, ports.xds, ports.picker))
    options = ("--listen", listen, "--xds", xds, "--picker", picker)
    assert printed == bootstrap(*options, "--envoy-admin-port", str(ports.admin))


def bootstrap(*options: str) -> Any:
    """What `trimtab envoy-bootstrap` prints."""
    command = (*COMMAND, "envoy-bootstrap", *options)
    return yaml.safe_load(subprocess.check_output(command, timeout=DEADLINE_S))


def test_the_bootstrap_for_an_envoy_elsewhere_may_name_trimtab_by_name() -> None:
    printed = bootstrap("--listen", "0.0.0.0:80", "--xds", "trimtab.llm.svc:18000")
    (listener,), (cluster,) = printed["static_resources"].values()
    assert listener["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 80}
    assert cluster["type"] == "STRICT_DNS"


@pytest.mark.parametrize(
    "listen", ["localhost:8000", "127.0.0.1", "::1:8000", "127.0.0.1:99999", "127.0.0.1:http"]
)
def test_an_address_that_envoy_would_refuse_is_refused_at_once(listen: str) -> None:
    ended = subprocess.run(
        (*COMMAND, "envoy-bootstrap", "--listen", listen),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 2
    assert "--listen" in ended.stderr


def test_the_version_is_that_of_the_package() -> None:
    told = subprocess.check_output((*COMMAND, "--version"), text=True, timeout=DEADLINE_S)
    assert told == f"trimtab {__version__}\n"


def test_help_loads_nothing_that_takes_time() -> None:
    loads = "import sys, trimtab.cli; print(*sys.modules)"
    told = subprocess.check_output((sys.executable, "-c", loads), text=True, timeout=DEADLINE_S)
    assert {"aiohttp", "grpc", "pydantic", "yaml", "structlog"}.isdisjoint(told.split())


async def test_each_request_is_picked_for_unless_the_pool_says_weights(fleet: Path) -> None:
    async with serve([EngineOptions(model=MODEL, speed=50.0)] * 2) as engines:
        write_fleet(fleet, engines.ports)
        async with running(fleet) as standalone:
            await standalone.ready()
            await until(lambda: _is_picked_for(standalone))
            [first] = standalone.ports.pickers()
            os.kill(first, signal.SIGKILL)
            assert await _ask(standalone) == 200
            await until(lambda: _is_picked_for(standalone))
            assert standalone.ports.pickers() != [first]

            write_fleet(fleet, engines.ports, mode="Weights")
            await standalone.line("the fleet file has changed")
            await until(lambda: _has_no_pool(standalone))
            assert await _ask(standalone) == 200
            standalone.process.send_signal(signal.SIGTERM)
            assert await standalone.process.wait() == 0
            assert standalone.ports.left_running() == []


async def _ask(standalone: Running) -> int:
    url = f"http://127.0.0.1:{standalone.ports.listen}/v1/completions"
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1}
    async with standalone.session.post(url, json=body) as answer:
        return answer.status


async def _picker_page(standalone: Running) -> str:
    url = f"http://127.0.0.1:{standalone.ports.picker_telemetry}/metrics"
    try:
        async with standalone.session.get(url) as answer:
            return await answer.text()
    except aiohttp.ClientError:
        return ""


async def _is_picked_for(standalone: Running) -> bool:
    before = await _picker_page(standalone)
    assert await _ask(standalone) == 200
    after = await _picker_page(standalone)
    return f'picks_total{{pool="{MODEL}"}}' in before and before != after


async def _has_no_pool(standalone: Running) -> bool:
    return MODEL not in await _picker_page(standalone)


async def test_a_port_that_the_picker_needs_is_told_when_taken(fleet: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = replace(Ports.free(), picker=taken.getsockname()[1])
        status, line = fails("standalone", str(fleet), *ports.options)
    assert status == 1
    assert f"the picker cannot listen on 127.0.0.1:{ports.picker}" in line
