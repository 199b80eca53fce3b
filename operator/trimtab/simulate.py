"""`trimtab simulate`: from options to scenarios, over all cores, to a table, JSON and a picture.

The simulator is pure; seeds, files, processes and the screen are here. Every (policy, seed) is a
job of its own, and its result depends on nothing but its own seed, so neither the number of cores
nor the order in which jobs end can change a figure.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trimtab.engine_sim.model import EngineSpec
from trimtab.ports import ConfigurationError, TrimtabError
from trimtab.sim.capacity import saturated_rate_per_s
from trimtab.sim.report import Summary, summarize
from trimtab.sim.scenario import (
    POLICIES,
    TAIL_LEVELS,
    Crash,
    Join,
    Outage,
    Run,
    Scenario,
    Slow,
    simulate,
)
from trimtab.workload import WORKLOADS, Workload, draw, parse_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trimtab.sim.scenario import Fault
    from trimtab.workload import Request

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

DEFAULT_POLICIES = "round_robin,least_request,weights,picker"
CAPACITY_REQUESTS = 40_000  # fewer misjudge a mixed load by 5 %
MAX_LOAD_RATIO = 0.95  # of the requests inside the objective
LOADS = (0.05, 1.25)  # between which the highest load is looked for
LOAD_STEP = 0.01

TABLE_COLUMNS = 112  # a wide table is better cut by a terminal than folded by us
SECONDS = r"(\d+(?:\.\d+)?)"
COLUMNS = (
    ("TTFT\np50", "ttft_p50_s", "{:.3f}"),
    ("p95", "ttft_p95_s", "{:.3f}"),
    ("p99", "ttft_p99_s", "{:.3f}"),
    ("±", "±", "{:.3f}"),
    ("short\np99", "short_ttft_p99_s", "{:.3f}"),
    ("TPOT\np99", "tpot_p99_s", "{:.3f}"),
    ("inside\nSLO", "slo_ratio", "{:.1%}"),
    ("backlog\nCV", "backlog_cv", "{:.2f}"),
    ("failed", "failed", "{:g}"),
)


def seeded(seed: int, purpose: str) -> Random:
    """A stream of its own for every purpose; text seeds are hashed alike on every machine."""
    return Random(f"{seed}/{purpose}")  # noqa: S311  # traffic, not secrets


def run_seed(scenario: Scenario, job: tuple[str, int]) -> Run:
    policy, seed = job
    return simulate(scenario, policy, stream=partial(seeded, seed))


def find_max_load(scenario: Scenario, policy: str, *, seeds: Sequence[int], load: float) -> float:
    """Return the highest load at which enough requests are inside the objective, by bisection.

    Args:
        scenario: at `load`.
        policy: its name.
        seeds: over which the share of requests is averaged.
        load: of the scenario, as a share of the fleet's saturated throughput.
    """
    low, high = LOADS
    while high - low > LOAD_STEP:
        middle = (low + high) / 2
        there = replace(scenario, rate_per_s=scenario.rate_per_s * middle / load)
        served = [run_seed(there, (policy, seed)).report.slo_ratio for seed in seeds]
        if statistics.fmean(served) >= MAX_LOAD_RATIO:
            low = middle
        else:
            high = middle
    return low


class _Policies(click.ParamType[list[str]]):
    name = "names"

    def convert(
        self, value: str | list[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        if isinstance(value, list):
            return value
        names = [name.strip().replace("-", "_") for name in value.split(",")]
        names = list(POLICIES) if names == ["all"] else names
        for name in names:
            if name not in POLICIES:
                self.fail(f"{name!r} is not one of {', '.join(POLICIES)}, all", param, ctx)
        return list(dict.fromkeys(names))


class _Speeds(click.ParamType[list[float]]):
    name = "factors"

    def convert(
        self, value: str | list[float], param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            speeds = [float(speed) for speed in value.split(",")]
        except ValueError:
            speeds = [math.nan]
        if not all(0 < speed < math.inf for speed in speeds):
            self.fail(f"{value!r} is not like 1,1,0.5", param, ctx)
        return speeds


class _Event(click.ParamType["Fault | Outage"]):
    """Something that happens at a time, written as its example shows."""

    def __init__(
        self, name: str, pattern: str, example: str, make: Callable[..., Fault | Outage]
    ) -> None:
        self.name = name
        self._pattern = pattern
        self._example = example
        self._make = make

    def convert(
        self, value: str | Fault | Outage, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fault | Outage:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(self._pattern, value)
        if match is None:
            self.fail(f"{value!r} is not like {self._example}", param, ctx)
        return self._make(*match.groups())


_CRASH = _Event(
    "pod@second[+seconds]",
    rf"(\d+)@{SECONDS}(?:\+{SECONDS})?",
    "3@60+20",
    lambda pod, at, lasts: Crash(int(pod), float(at), float(lasts or math.inf)),
)
_SLOW = _Event(
    "pod@second[+seconds]=factor",
    rf"(\d+)@{SECONDS}(?:\+{SECONDS})?=(0*\.?\d*[1-9]\d*(?:\.\d+)?)",
    "3@60+20=0.4",
    lambda pod, at, lasts, speed: Slow(int(pod), float(at), float(speed), float(lasts or math.inf)),
)
_JOIN = _Event(
    "pod@second",
    rf"(\d+)@{SECONDS}",
    "7@60",
    lambda pod, at: Join(int(pod), float(at)),
)
_OUTAGE = _Event(
    "second+seconds",
    rf"{SECONDS}\+{SECONDS}",
    "60+30",
    lambda at, lasts: Outage(float(at), float(lasts)),
)


@click.command("simulate")
@click.option(
    "--workload",
    type=click.Choice(list(WORKLOADS)),
    default="conversation",
    show_default=True,
    help="Lengths and arrivals of the requests, as statistics.",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Lengths from a CSV in the form of the Azure LLM inference traces 2023, in its order.",
)
@click.option(
    "--cv",
    type=click.FloatRange(0, 20, min_open=True),
    help="Burstiness of arrivals (1: Poisson).  [default: the workload's, with --trace as well]",
)
@click.option("--recorded-gaps", is_flag=True, help="Arrivals of the trace, scaled to the load.")
@click.option(
    "--users",
    type=click.IntRange(1, 100_000),
    help="So many users who wait for their answers, instead of a load.",
)
@click.option(
    "--policies",
    type=_Policies(),
    default=DEFAULT_POLICIES,
    show_default=True,
    help=f"Of {', '.join(POLICIES)}; or all.",
)
@click.option("--pods", type=click.IntRange(1, 1000), help="[default: 8, or one for each speed]")
@click.option("--speeds", type=_Speeds(), help="One for each pod: 1,1,0.5.  [default: all 1]")
@click.option(
    "--load",
    type=click.FloatRange(0.01, 2),
    default=0.85,
    show_default=True,
    help="Arriving work as a share of what the fleet can do at most.",
)
@click.option("--requests", type=click.IntRange(100, 10_000_000), default=12_000, show_default=True)
@click.option("--seeds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option(
    "--period",
    "period_s",
    type=click.FloatRange(0.01, 600),
    default=1.0,
    show_default=True,
    help="Seconds between two sets of weights.",
)
@click.option(
    "--metrics-age",
    "metrics_age_s",
    type=click.FloatRange(0, 600),
    default=0.0,
    show_default=True,
    help="How old pages are when they are read.",
)
@click.option(
    "--pickers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Active at the same time, each with its own ledger.",
)
@click.option("--crash", "crashes", type=_CRASH, multiple=True, help="A pod is lost, and back.")
@click.option("--slow", "slows", type=_SLOW, multiple=True, help="A pod works at a lower speed.")
@click.option("--join", "joins", type=_JOIN, multiple=True, help="A pod comes only then, cold.")
@click.option("--picker-outage", "outage", type=_OUTAGE, help="No picker: weights take over.")
@click.option(
    "--max-load",
    is_flag=True,
    help=f"Find the highest load with {MAX_LOAD_RATIO:.0%} of the requests inside the objective.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Draw how many requests waited how long.",
)
def simulate_command(
    *,
    workload: str,
    trace: Path | None,
    cv: float | None,
    recorded_gaps: bool,
    users: int | None,
    policies: list[str],
    pods: int | None,
    speeds: list[float] | None,
    load: float,
    requests: int,
    seeds: int,
    period_s: float,
    metrics_age_s: float,
    pickers: int,
    crashes: tuple[Crash, ...],
    slows: tuple[Slow, ...],
    joins: tuple[Join, ...],
    outage: Outage | None,
    max_load: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Compare ways to balance on simulated pods, with the decisions of production.

    Every policy meets the same requests at the same moments; figures are means over seeds. Pods
    are numbered from 0.
    """
    speeds = _speeds(pods, speeds)
    faults = _faults(crashes, slows, joins, pods=len(speeds))
    lengths, traffic = _lengths(workload, trace, cv=cv)
    if recorded_gaps and trace is None:
        raise ConfigurationError("--recorded-gaps are those of a trace: give --trace")
    if max_load and users:
        raise ConfigurationError("--users make their own load: there is no highest one to find")
    spec = EngineSpec()
    longest_tokens = max(r.prompt_tokens + r.output_tokens for r in lengths)
    if longest_tokens > spec.kv_capacity_tokens:
        raise ConfigurationError(
            f"a request of {longest_tokens} tokens does not fit a pod, which holds"
            f" {spec.kv_capacity_tokens}"
        )
    rate_per_s = load * sum(speeds) * saturated_rate_per_s(lengths, spec=spec)
    scenario = Scenario(
        workload=traffic,
        rate_per_s=rate_per_s,
        trace=lengths if trace else (),
        recorded_gaps=recorded_gaps,
        requests=requests,
        speeds=tuple(speeds),
        spec=spec,
        period_s=period_s,
        metrics_age_s=metrics_age_s,
        pickers=pickers,
        faults=faults,
        outage=outage or Outage(math.inf, 0.0),
        users=users or 0,
    )
    console = Console(width=max(Console().width, TABLE_COLUMNS))
    numbers = range(1, seeds + 1)
    jobs = [(policy, seed) for policy in policies for seed in numbers]
    runs = dict(zip(jobs, compute(partial(run_seed, scenario), jobs, what="runs"), strict=True))
    by_policy = {policy: [runs[policy, seed] for seed in numbers] for policy in policies}
    summaries = {p: summarize([run.report for run in one]) for p, one in by_policy.items()}
    max_loads: dict[str, float] = {}
    if max_load:
        find = partial(find_max_load, scenario, seeds=numbers, load=load)
        max_loads = dict(zip(policies, compute(find, policies, what="highest loads"), strict=True))
    if as_json:
        click.echo(json.dumps(_document(summaries, max_loads), allow_nan=False))
    else:
        console.print(_table(summaries, max_loads))
    if plot is not None:
        draw_tails(plot, {p: _mean_tail(one) for p, one in by_policy.items()})


def compute(work: Callable[[_Job], _Result], jobs: Sequence[_Job], *, what: str) -> list[_Result]:
    """Do the jobs on all cores, with a bar on stderr if that is a terminal; results in order."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    workers = min(len(jobs), os.cpu_count() or 1)
    # Spawned, not forked: a fork copies the locks that the bar's thread may hold.
    with bar, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        task = bar.add_task(what, total=len(jobs))
        futures = [pool.submit(work, job) for job in jobs]
        for _ in as_completed(futures):
            bar.advance(task)
        return [future.result() for future in futures]


def draw_tails(path: Path, tails: dict[str, Sequence[float]]) -> None:
    """Draw which share of the requests waited longer than how long, one line a policy.

    Raises:
        TrimtabError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  # an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise TrimtabError("matplotlib is missing: pip install 'trimtab[plot]'") from error
    mpl.rcParams["svg.hashsalt"] = "trimtab"  # equal runs, equal files
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for policy, tail_s in tails.items():
        axes.plot(tail_s, [1 - level for level in TAIL_LEVELS], label=policy.replace("_", " "))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="time to first token (s)",
        ylabel="share of requests that waited longer",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise TrimtabError(f"no plot: {path}: {error}") from error


def _lengths(
    workload: str, trace: Path | None, *, cv: float | None
) -> tuple[list[Request], Workload]:
    """Requests that say how much work there is, and the traffic they make."""
    known = replace(WORKLOADS[workload], cv=cv or WORKLOADS[workload].cv)
    if trace is None:
        sample = draw(known, rate_per_s=1, count=CAPACITY_REQUESTS, rng=seeded(0, "capacity"))
        return sample, known
    try:
        return parse_trace(trace.read_text(encoding="utf-8")), known
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{trace}: {error}") from error


def _speeds(pods: int | None, speeds: list[float] | None) -> list[float]:
    if speeds is None:
        return [1.0] * (pods or 8)
    if pods is not None and pods != len(speeds):
        raise ConfigurationError(f"{len(speeds)} speeds for {pods} pods: give one for each")
    return speeds


def _faults(
    crashes: Sequence[Crash], slows: Sequence[Slow], joins: Sequence[Join], *, pods: int
) -> list[Fault]:
    for pod in (fault.pod for group in (crashes, slows, joins) for fault in group):
        if pod >= pods:
            raise ConfigurationError(f"there is no pod {pod}: {pods} pods, counted from 0")
    if len({join.pod for join in joins}) == pods:
        raise ConfigurationError("at least one pod must be there from the beginning")
    return [*crashes, *slows, *joins]


def _mean_tail(runs: Iterable[Run]) -> list[float]:
    return [statistics.fmean(at) for at in zip(*(run.ttft_tail_s for run in runs), strict=True)]


def _document(summaries: dict[str, Summary], max_loads: dict[str, float]) -> dict[str, object]:
    """Give figures that could not be measured as null: JSON knows no NaN."""

    def finite(figures: dict[str, float]) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in figures.items()}

    return {
        "policies": {
            policy: finite(summary.mean)
            | ({"max_load": max_loads[policy]} if policy in max_loads else {})
            | {"spread": finite(summary.spread)}
            for policy, summary in summaries.items()
        }
    }


def _table(summaries: dict[str, Summary], max_loads: dict[str, float]) -> Table:
    first = next(iter(summaries))
    table = Table(
        caption="seconds; ±: standard deviation of the p99 of one seed",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    table.add_column(f"p99 /\n{first}", justify="right")
    if max_loads:
        table.add_column("highest\nload", justify="right")
    for policy, summary in summaries.items():
        figures = summary.mean | {"±": summary.spread["ttft_p99_s"]}
        cells = [form.format(figures[name]) for _, name, form in COLUMNS]
        ratio = summary.mean["ttft_p99_s"] / summaries[first].mean["ttft_p99_s"]
        highest = [f"{max_loads[policy]:.2f}"] if max_loads else []
        table.add_row(policy, *cells, f"{ratio:.2f}", *highest)
    return table
