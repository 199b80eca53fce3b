"""`trimtab demo`: from options to a plan, and from an outcome to what is printed and written."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from rich.console import Console

from trimtab.adapters.telemetry import configure_logs
from trimtab.demo.plot import FORMATS, PlotError, plot
from trimtab.demo.rig import TITLES, Outcome, Plan, run
from trimtab.demo.screen import SideView, closing, open_screen
from trimtab.demo.summary import report, summarize
from trimtab.engine_sim.model import EngineSpec
from trimtab.envoy_config import Balance
from trimtab.ports import ConfigurationError
from trimtab.sim.capacity import saturated_rate_per_s
from trimtab.workload import WORKLOADS, draw, parse_trace, retime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.workload import Request

SPEED = 0.5  # of an A100: as many requests as make a p99 and leave the machine idle enough
SAMPLE_REQUESTS = 40_000  # at 4,000 the long ones of "mixed" put the load 6 % off
LONGEST_TOKENS = 131_072  # what a simulated engine takes, prompt and output together
DEFAULT_PLOT = Path("trimtab-demo.svg")


@click.command("demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--seconds",
    type=click.FloatRange(5, 3600),
    default=75,
    show_default=True,
    help="How long requests arrive; the first 15 % are not counted.",
)
@click.option(
    "--pods",
    type=click.IntRange(2, 64),
    default=8,
    show_default=True,
    help="Simulated engines on each side.",
)
@click.option(
    "--load",
    type=click.FloatRange(0.05, 2),
    default=0.95,
    show_default=True,
    help="Arriving work as a share of what the engines of a side can do at most.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Same seed, same arrivals.")
@click.option(
    "--slow-pod",
    type=click.FloatRange(0.05, 1),
    metavar="FACTOR",
    help="Run one pod of each side at this share of its speed, such as 0.4.",
)
@click.option(
    "--against",
    type=click.Choice(get_args(Balance)),
    default="round_robin",
    show_default=True,
    help="Envoy's own policy to compare with.",
)
@click.option(
    "--workload",
    type=click.Choice(["conversation", "mixed", "code"]),
    default="conversation",
    show_default=True,
    help="Lengths and arrivals of the requests.",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replay a CSV in the form of the Azure LLM inference traces 2023 instead, at --load.",
)
@click.option(
    "--period",
    "period_s",
    type=click.FloatRange(0.05, 60),
    default=0.25,
    show_default=True,
    help="Seconds between two sets of weights.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the figures as the last line, in JSON."
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Where to draw TTFT over time: .svg or .png.  [default: {DEFAULT_PLOT}]",
)
def demo_command(
    *,
    seconds: float,
    pods: int,
    load: float,
    seed: int,
    slow_pod: float | None,
    against: Balance,
    workload: str,
    trace: Path | None,
    period_s: float,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    """Compare Trimtab with Envoy's own balancing, on this machine.

    Starts three equal fleets of simulated vLLM engines behind one real Envoy, sends the same
    requests to each at the same moments, and shows what comes of it: with Envoy's own policy, with
    Trimtab's weights, and with Trimtab's picker.
    """
    console = Console()
    configure_logs("warning")  # on stderr: stdout is the screen's, and its last line may be JSON
    if plot_path is not None:
        _refuse_unwritable(plot_path)
    rng = random.Random(seed)  # noqa: S311  # arrivals, not secrets
    capacity = SPEED * (pods - 1 + (1.0 if slow_pod is None else slow_pod))
    requests = _requests(workload, trace, speed=load * capacity, seconds=seconds, rng=rng)
    plan = Plan(
        heading=_heading(
            trace.name if trace else workload, pods=pods, load=load, slow_pod=slow_pod
        ),
        requests=requests,
        seconds=seconds,
        pods=pods,
        speed=SPEED,
        slow_pod=slow_pod,
        against=against,
        period_s=period_s,
    )
    try:
        outcome = asyncio.run(_run_until_told(plan, console))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    _tell(plan, outcome, console, plot_path or DEFAULT_PLOT)
    if as_json:
        summaries = {side.name: summarize(side.counted) for side in outcome.sides}
        click.echo(json.dumps(report(summaries, outcome.rig)))


async def _run_until_told(plan: Plan, console: Console) -> Outcome:
    """Let SIGTERM and a closed terminal stop everything as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # we are in it
    for signum in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    console.print(plan.heading, highlight=False)
    return await run(plan, open_screen(console))


def _requests(
    workload: str, trace: Path | None, *, speed: float, seconds: float, rng: random.Random
) -> Sequence[Request]:
    """Make the arrivals: as many a second as an engine of `speed` can finish at most."""
    known = WORKLOADS[workload]
    if trace is None:
        rng_of_sample = random.Random(0)  # noqa: S311  # the same load for every seed
        sample = draw(known, rate_per_s=1.0, count=SAMPLE_REQUESTS, rng=rng_of_sample)
    else:
        sample = _read(trace)
    rate_per_s = saturated_rate_per_s(sample, spec=EngineSpec(), speed=speed)
    if trace is None:
        requests = draw(known, rate_per_s=rate_per_s, seconds=seconds, rng=rng)
    else:
        many = math.ceil(rate_per_s * seconds) + len(sample)
        replayed = retime(sample, rate_per_s=rate_per_s, cv=None, rng=rng, count=many)
        requests = [request for request in replayed if request.at_s < seconds]
    if not requests:
        raise ConfigurationError(
            f"no request arrives within {seconds:g} s at this load: raise --seconds or --load"
        )
    return requests


def _read(trace: Path) -> list[Request]:
    try:
        requests = parse_trace(trace.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{trace}: {error}") from error
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    if longest > LONGEST_TOKENS:
        raise ConfigurationError(
            f"{trace}: a request of {longest} tokens; the engines take {LONGEST_TOKENS} at most"
        )
    return requests


def _refuse_unwritable(path: Path) -> None:
    """Say so before the run, not after it."""
    if path.suffix not in FORMATS:
        raise ConfigurationError(f"--plot {path}: end the name in {' or '.join(FORMATS)}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigurationError(f"--plot {path}: no such directory, or not writable")


def _heading(what: str, *, pods: int, load: float, slow_pod: float | None) -> str:
    slow = f", pod-{pods} at {slow_pod:g} of its speed" if slow_pod is not None else ""
    return f"{what}, {pods} pods at {load:.0%} load{slow}"


def _tell(plan: Plan, outcome: Outcome, console: Console, plot_path: Path) -> None:
    views = [
        SideView(title=TITLES[side.name], endpoints={}, shares={}, summary=summarize(side.counted))
        for side in outcome.sides
    ]
    closing(console, views, outcome.rig, cores=len(os.sched_getaffinity(0)))
    curves = [(TITLES[side.name], list(side.records.values())) for side in outcome.sides]
    try:
        plot(plot_path, curves, heading=plan.heading, counted_from_s=plan.warm_up_s)
        console.print(f"TTFT over time: {plot_path}", highlight=False, soft_wrap=True)
    except PlotError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
