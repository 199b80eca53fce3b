"""`python -m trimtab.engine_sim`: a fleet of simulated vLLM servers until SIGTERM or SIGINT.

When all of them listen, one line of JSON on stdout says where.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys

import click
import uvloop

from trimtab.engine_sim.server import EngineOptions, serve
from trimtab.ports import StartError


class Ports(click.ParamType[list[int]]):
    """Ports and ranges of them: `9001-9008,9100`."""

    name = "ports"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        ports: list[int] = []
        for part in value.split(","):
            if not (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)):
                self.fail(f"{part!r} is neither a port nor a range such as 9001-9008", param, ctx)
            ports += range(int(match[1]), int(match[2] or match[1]) + 1)
        if not ports or max(ports) > 65535:  # noqa: PLR2004  # the largest there is
            self.fail(f"{value!r} names no ports", param, ctx)
        return ports


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--ports", type=Ports(), required=True, help="One engine each: 9001-9008,9100.")
@click.option("--model", required=True, help="Name of the model that all engines serve.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor on the speed of all engines; one engine's is a switch (PUT /sim/switches).",
)
@click.option(
    "--stream-interval",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tokens an event of a stream brings, after the first.",
)
def main(host: str, ports: list[int], model: str, speed: float, stream_interval: int) -> None:
    """Serve simulated vLLM engines."""
    options = [
        EngineOptions(model=model, port=port, speed=speed, stream_interval=stream_interval)
        for port in ports
    ]
    try:
        uvloop.run(_run(options, host=host))
    except StartError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


async def _run(options: list[EngineOptions], *, host: str) -> None:
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    async with serve(options, host) as fleet:
        click.echo(json.dumps({"host": host, "ports": fleet.ports, "model": options[0].model}))
        sys.stdout.flush()
        await stopped.wait()


if __name__ == "__main__":
    main(prog_name="python -m trimtab.engine_sim")
