"""The whole demo as a user runs it: real engines, a real Envoy, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

DEADLINE_S = 45.0
FIGURES = {"requests", "failed", "ttft_p50_s", "ttft_p99_s", "short_ttft_p99_s"}
QUICK = ("--seconds", "6", "--pods", "2", "--workload", "code", "--load", "0.3")
"""Short answers, so that the last of them is soon there."""


class Demo:
    """A demo whose processes can be told from all others by their environment."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._arguments = arguments
        self._cwd = cwd
        self._mark = f"TRIMTAB_TEST={uuid.uuid4()}"

    async def start(self) -> asyncio.subprocess.Process:
        name, _, value = self._mark.partition("=")
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "trimtab", "demo", *self._arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._cwd,
            env=os.environ | {name: value},
        )

    def running(self) -> list[str]:
        """Return the command lines of all that was started and has not ended."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
        return found


async def run(*arguments: str, cwd: Path) -> tuple[int | None, str, str]:
    demo = Demo(*arguments, cwd=cwd)
    process = await demo.start()
    async with asyncio.timeout(DEADLINE_S):
        stdout, stderr = await process.communicate()
    assert demo.running() == []
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_demo_serves_every_request_and_says_so_in_json(tmp_path: Path) -> None:
    code, stdout, stderr = await run(*QUICK, "--slow-pod", "0.5", "--json", cwd=tmp_path)
    assert (code, stderr) == (0, "")
    told = json.loads(stdout.splitlines()[-1])
    assert told.keys() == {"policies", "rig"}
    assert told["policies"].keys() == {"round_robin", "weights", "picker"}
    assert told["rig"].keys() == {"schedule_lag_p99_s", "cpu_ratio"}
    assert 0 < told["rig"]["cpu_ratio"] < 1
    for figures in told["policies"].values():
        assert figures.keys() == FIGURES
        assert figures["failed"] == 0
        assert 0 < figures["ttft_p50_s"] <= figures["ttft_p99_s"]
    [requests] = {figures["requests"] for figures in told["policies"].values()}
    assert requests > 0
    assert (tmp_path / "trimtab-demo.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
async def test_nothing_is_left_running_whoever_stops_the_demo(
    signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    demo = Demo(*QUICK, cwd=tmp_path)
    process = await demo.start()
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        async for line in process.stdout:
            if b"of 6 s" in line:
                break
        # The demo itself, load, engines, picker and Envoy.
        assert len(demo.running()) == 5
        process.send_signal(signum)
        _, stderr = await process.communicate()
        assert process.returncode == code
        assert b"Traceback" not in stderr
        # A killed demo cannot wait for its children; they end by themselves.
        while demo.running():  # noqa: ASYNC110  # the end of a grandchild is no event for us
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--load", "much"), 2, "'much' is not a valid float range"),
        (("--trace", "nowhere.csv"), 2, "'nowhere.csv' does not exist"),
        (("--trace", "bad.csv"), 2, "bad.csv: line 2"),
        (("--trace", "long.csv"), 2, "long.csv: a request of 1000001 tokens"),
        (("--plot", "nowhere/x.svg"), 2, "nowhere/x.svg: no such directory"),
        (("--plot", "x.bmp"), 2, "x.bmp: end the name in .svg or .png"),
    ],
)
async def test_what_cannot_be_done_is_told_in_a_line_and_starts_nothing(
    arguments: tuple[str, ...], code: int, told: str, tmp_path: Path
) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    (tmp_path / "bad.csv").write_text(header + "yesterday,1,1\n")
    (tmp_path / "long.csv").write_text(header + "2023-11-16 18:17:03.9799600,1000000,1\n")
    returned, stdout, stderr = await run(*arguments, cwd=tmp_path)
    assert (returned, stdout) == (code, "")
    assert told in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
