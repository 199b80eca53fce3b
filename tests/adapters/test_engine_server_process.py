"""`python -m trimtab.engine_sim`, as a script starts and stops it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys

import aiohttp
import pytest
from click.testing import CliRunner

from engines import DEADLINE_S
from trimtab.engine_sim.__main__ import main

COMMAND = (sys.executable, "-m", "trimtab.engine_sim", "--model", "tiny")


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_where_it_listens_and_ends_with_a_signal_amid_streams(
    signum: signal.Signals,
) -> None:
    ports = free_ports(2)
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as session:
        process = await start("--ports", f"{ports[0]},{ports[1]}", "--speed", "0.5")
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        assert ready == {"host": "127.0.0.1", "ports": ports, "model": "tiny"}
        stream = await session.post(
            f"http://127.0.0.1:{ports[1]}/v1/completions",
            json={"prompt": "Hi", "stream": True, "max_tokens": 10_000, "ignore_eos": True},
        )
        await stream.content.readuntil(b"\n\n")

        process.send_signal(signum)
        _, errors = await process.communicate()
        stream.close()

    assert (process.returncode, errors) == (0, b"")


async def test_a_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with asyncio.timeout(DEADLINE_S):
            process = await start("--ports", str(port))
            output, errors = await process.communicate()

    assert (process.returncode, output) == (1, b"")
    assert errors.decode().splitlines() == [
        f"error: a simulated engine cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


@pytest.mark.parametrize("ports", ["", "x", "9001-", "-9001", "9002-9001", "99999", "1,,2"])
def test_ports_that_are_none_are_a_wrong_usage(ports: str) -> None:
    result = CliRunner().invoke(main, ["--model", "tiny", "--ports", ports])

    assert result.exit_code == 2
    assert "Invalid value for '--ports'" in result.output
