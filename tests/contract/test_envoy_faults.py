"""Whatever dies, requests go on; whatever returns is followed again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

import rig_envoy
from rig_envoy import DEADLINE_S, LISTENER, MODEL, free_ports, run_gateway, run_rig, until
from trimtab.adapters.envoy_process import EnvoyProcess, find_envoy
from trimtab.adapters.xds import XdsServer
from trimtab.core.model import Snapshot
from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.envoy_config import Listener, bootstrap
from trimtab.ports import StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from rig_envoy import Gateway


@asynccontextmanager
async def xds_alone(
    port: int, weights: Mapping[int, int]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run an xDS server in a process of its own, to be killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, rig_envoy.__file__, str(port), json.dumps(weights)
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_requests_go_on_while_xds_is_dead_and_envoy_follows_its_successor() -> None:
    async with serve([EngineOptions(model=MODEL, speed=rig_envoy.FAST)] * 2) as fleet:
        (port,) = free_ports(1)
        left, right = fleet.ports
        before, after = {left: 1000, right: 30}, {left: 30, right: 1000}
        async with run_gateway(xds_port=port) as gateway:
            load = rig_envoy.Load(gateway)
            async with asyncio.TaskGroup() as group:
                async with xds_alone(port, before) as first:
                    await gateway.process.wait_ready()
                    for _ in range(4):
                        group.create_task(load.run())
                    await load.passes(50)
                    first.send_signal(signal.SIGKILL)
                    await first.wait()
                    await load.passes(200)
                    assert await gateway.weights() == before
                async with xds_alone(port, after):
                    await until(lambda: _has(gateway, after))
                    await load.passes(50)
                load.stop()
            assert load.failed == []


async def _has(gateway: Gateway, weights: dict[int, int]) -> bool:
    return await gateway.weights() == weights


async def test_a_killed_envoy_is_started_again_and_configured_again() -> None:
    async with run_rig() as rig:
        snapshot = Snapshot(dict(zip(rig.endpoints, (5, 900), strict=True)))
        await rig.publish(snapshot)
        first = rig.gateway.process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)

        async def is_another() -> bool:
            return rig.gateway.process.restarts_total == 1

        await until(is_another)
        await rig.gateway.process.wait_ready()
        assert rig.gateway.process.pid != first
        weights = {endpoint.port: weight for endpoint, weight in snapshot.weights.items()}
        assert await rig.gateway.weights() == weights
        assert await rig.gateway.split(4) == {MODEL: 4}


async def test_no_request_that_starts_after_a_crash_of_its_endpoint_fails() -> None:
    async with run_rig([MODEL] * 3) as rig, rig.load(concurrency=8) as load:
        await load.passes(50)
        await rig.fleet.engines[0].switch(crashed=True)
        begun = load.started
        await load.passes(200)
        assert [failure for failure in load.failed if failure[0] > begun] == []

        dead = rig.endpoints[0]
        weights = dict.fromkeys(rig.endpoints, 1)
        await rig.publish(Snapshot(weights, unreachable=frozenset({dead})))
        tried = await rig.gateway.tries(dead.port)
        await load.passes(100)
        assert await rig.gateway.tries(dead.port) == tried

        await rig.fleet.engines[0].switch(crashed=False)
        await rig.publish(Snapshot(weights))
        await until(lambda: _is_tried_again(rig.gateway, dead.port, tried))
        assert [failure for failure in load.failed if failure[0] > begun] == []


async def _is_tried_again(gateway: Gateway, port: int, tried: int) -> bool:
    return await gateway.tries(port) > tried


async def test_without_xds_envoy_itself_avoids_a_dead_endpoint() -> None:
    """It has nothing in flight, so LEAST_REQUEST would send it more than its share."""
    async with run_rig([MODEL] * 3) as rig:
        await rig.xds.stop()
        async with rig.load(concurrency=8) as load:
            await load.passes(50)
            await rig.fleet.engines[0].switch(crashed=True)
            begun = load.started
            await load.passes(200)
            dead = rig.endpoints[0].port
            assert (await rig.gateway.health())[dead].get("failed_outlier_check")
        assert [failure for failure in load.failed if failure[0] > begun] == []


def config(*ports: int) -> dict[str, object]:
    port, admin_port = ports
    return bootstrap([Listener(LISTENER, port)], xds=("127.0.0.1", 1), admin_port=admin_port)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_missing_binary_is_told_with_its_remedy(tmp_path: Path) -> None:
    envoy = EnvoyProcess(config(*free_ports(2)), binary=tmp_path / "envoy")
    with pytest.raises(StartError, match=r"trimtab\[envoy\]"):
        await envoy.start()
    await envoy.stop()


def test_a_binary_that_may_not_be_executed_is_told(tmp_path: Path) -> None:
    (tmp_path / "envoy").touch(mode=0o600)
    with pytest.raises(StartError, match="chmod"):
        find_envoy(tmp_path / "envoy")


async def test_a_binary_that_is_no_envoy_is_told(tmp_path: Path) -> None:
    (tmp_path / "envoy").write_text("#!/bin/sh\necho no such animal >&2\nexit 3\n")
    (tmp_path / "envoy").chmod(0o700)
    envoy = EnvoyProcess(config(*free_ports(2)), binary=tmp_path / "envoy")
    with pytest.raises(StartError, match="no such animal"):
        await envoy.start()
    assert envoy.pid is None


async def test_a_taken_listener_port_is_told(taken_port: int) -> None:
    envoy = EnvoyProcess(config(taken_port, *free_ports(1)))
    with pytest.raises(StartError, match=f"listener {LISTENER} .*:{taken_port}.*in use"):
        await envoy.start()


async def test_a_taken_admin_port_is_told(taken_port: int) -> None:
    envoy = EnvoyProcess(config(*free_ports(1), taken_port))
    with pytest.raises(StartError, match=f"admin .*:{taken_port}.*in use"):
        await envoy.start()


async def test_a_port_that_another_envoy_has_is_told_too() -> None:
    """Two Envoys of one user would share it, each with half of the connections."""
    async with run_rig() as rig:
        port = int(rig.gateway.url.rpartition(":")[2])
        with pytest.raises(StartError, match="in use"):
            await EnvoyProcess(config(port, *free_ports(1))).start()


async def test_a_taken_xds_port_is_told(taken_port: int) -> None:
    with pytest.raises(StartError, match=f"{taken_port}.*another port"):
        await XdsServer(port=taken_port).start()


async def test_a_second_xds_server_does_not_share_the_port() -> None:
    first = XdsServer(port=0)
    await first.start()
    second = XdsServer(port=first.port)
    try:
        with pytest.raises(StartError):
            await second.start()
    finally:
        await second.stop()
        await first.stop()


async def test_without_xds_envoy_is_never_ready_and_says_what_it_waits_for() -> None:
    async with run_gateway(xds_port=free_ports(1)[0]) as gateway:
        with pytest.raises(StartError, match="xDS"):
            await gateway.process.wait_ready(timeout_s=0.1)


PARENT = """
import asyncio, json, sys
from trimtab.adapters.envoy_process import EnvoyProcess
async def main():
    envoy = EnvoyProcess(json.loads(sys.argv[1]))
    await envoy.start()
    print("started", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_envoy_dies_with_a_parent_that_was_killed() -> None:
    admin_port, port = free_ports(2)
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, json.dumps(config(port, admin_port))),
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await parent.stdout.readline() == b"started\n"
        parent.kill()
        await parent.communicate()

    async def is_gone() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", admin_port)
        except ConnectionRefusedError:
            return True
        writer.close()
        await writer.wait_closed()
        return False

    await until(is_gone)
