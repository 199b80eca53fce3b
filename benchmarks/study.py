"""The simulation study behind docs/performance.md: `python -m benchmarks.study --traces DIR`.

Every table compares policies that met the same requests at the same moments, from fixed seeds, so
it can be made again bit for bit. The Azure LLM inference traces 2023 (CC-BY 4.0; Patel et al.,
Splitwise, ISCA 2024) are read from DIR and are no part of this repository.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from benchmarks.study_jobs import Compared, Hour, Job, Judged, run
from trimtab.engine_sim.model import A100, H100, EngineSpec
from trimtab.sim.brain import Signals
from trimtab.sim.capacity import saturated_rate_per_s
from trimtab.sim.scenario import POLICIES, Crash, Join, Outage, Scenario, Slow
from trimtab.simulate import CAPACITY_REQUESTS, compute, seeded
from trimtab.workload import WORKLOADS, draw, parse_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trimtab.workload import Request

    Known = Mapping[Job, dict[str, float]]

TRACES = {
    "conversation": "AzureLLMInferenceTrace_conv.csv",
    "code": "AzureLLMInferenceTrace_code.csv",
}
LOADS = {"conversation": 0.85, "code": 0.7, "mixed-long": 0.85, "reasoning": 0.9}
KV_BOUND = EngineSpec(kv_capacity_tokens=100_000)  # full of KV before they are full of work
REASONING_REQUESTS = 2000  # of two thousand tokens each
QUADRATIC_S = 1.57e-9  # per chunk and context token, from FLOP counts of the A100
ORDINARY = Signals(  # a day like others; rows of the table of signals add their fault to it
    length_error_ratio=0.3, scrape_takes_s=0.2, lost_scrapes_ratio=0.1, event_delay_s=0.1
)
BAD_DAY = replace(
    ORDINARY,
    unseen_ratio=0.3,
    length_bias_ratio=1.2,
    lost_events_ratio=0.05,
    doubled_events_ratio=0.05,
    misplaced_ratio=0.02,
    restart_s=80.0,
)
FOUR_KINDS = ("conversation", "mixed", "mixed-long", "code")
VERDICT_S = 400.0
WITH_OMNISCIENT = ("conversation", "mixed")  # a minute a seed: it tries every request four times
FLAPS = (Crash(2, 40.0, 10.0), Crash(5, 70.0, 10.0), Crash(2, 100.0, 10.0))


class Row(NamedTuple):
    """One line of a table: what to run, and what to say of it."""

    label: str
    jobs: Sequence[Job]
    cells: Callable[[Known], Sequence[str]]


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Study:
    """The scenarios of all sections."""

    traces: Path | None
    seeds: int

    @cache  # noqa: B019  # one study a process
    def scenario(self, name: str, load: float, spec: EngineSpec | None = None) -> Scenario:
        trace: tuple[Request, ...] = ()
        workload = WORKLOADS[name]
        if self.traces and name in TRACES:
            trace = tuple(parse_trace((self.traces / TRACES[name]).read_text(encoding="utf-8")))
        lengths = trace or draw(
            workload, rate_per_s=1, count=CAPACITY_REQUESTS, rng=seeded(0, "capacity")
        )
        if spec is None:
            spec = KV_BOUND if name == "reasoning" else EngineSpec()
        return Scenario(
            workload=workload,
            rate_per_s=load * 8 * saturated_rate_per_s(lengths, spec=spec),
            trace=trace,
            requests=REASONING_REQUESTS if name == "reasoning" else 12_000,
            spec=spec,
        )

    def jobs(
        self, scenario: Scenario, policy: str, *, seeds: int | None = None, told: bool = False
    ) -> list[Job]:
        numbers = range(1, (seeds or self.seeds) + 1)
        return [Compared(scenario, policy, seed, told) for seed in numbers]


def mean(known: Known, jobs: Sequence[Job], figure: str) -> float:
    return statistics.fmean(known[job][figure] for job in jobs)


def ratios(known: Known, jobs: Sequence[Job], base: Sequence[Job], *figures: str) -> str:
    """Give ratios of means over seeds, as `TTFT p99 / short p99` and the like."""
    return " / ".join(f"{mean(known, jobs, f) / mean(known, base, f):.2f}" for f in figures)


P99 = "ttft_p99_s"
BOTH = (P99, "short_ttft_p99_s")


def policies(study: Study) -> list[Table]:
    """All policies at 85 % load, five workloads."""
    tables = []
    for name in ("conversation", "code", "mixed", "mixed-long", "reasoning"):
        scenario = study.scenario(name, 0.85)
        rows = []
        names = [p for p in POLICIES if p != "omniscient" or name in WITH_OMNISCIENT]
        for policy in names:
            jobs, base = study.jobs(scenario, policy), study.jobs(scenario, "round_robin")

            def cells(known: Known, jobs: list[Job] = jobs, base: list[Job] = base) -> list[str]:
                spread = statistics.stdev(known[job][P99] for job in jobs)
                return [
                    *(f"{mean(known, jobs, f):.3f}" for f in ("ttft_p50_s", "ttft_p95_s", P99)),
                    f"{spread:.3f}",
                    ratios(known, jobs, base, P99),
                    ratios(known, jobs, base, "short_ttft_p99_s"),
                    ratios(known, jobs, base, "tpot_p99_s"),
                    f"{mean(known, jobs, 'slo_ratio'):.3f}",
                ]

            rows.append(Row(policy, [*base, *jobs], cells))
        columns = ["TTFT p50 s", "p95 s", "p99 s", "±", "p99 / RR", "short p99 / RR"]
        columns += ["TPOT p99 / RR", "inside SLO"]
        tables.append(Table(f"{name}, 8 pods, load 0.85", columns, rows))
    return tables


def periods(study: Study) -> list[Table]:
    """Weights against round robin, by period and by age of the metrics."""
    rows = []
    for period_s, age_s in product((0.1, 0.5, 1.0, 5.0), (0.0, 1.0, 5.0)):
        change = partial(replace, period_s=period_s, metrics_age_s=age_s)
        label = f"period {period_s:g} s, age {age_s:g} s"
        rows.append(_over_workloads(study, label, change, ("weights", "round_robin"), (P99,)))
    title = "weights, TTFT p99 / round robin, by period and metric age"
    return [Table(title, _workload_columns(), rows)]


def _workload_columns() -> list[str]:
    return [f"{name} {load:g}" for name, load in LOADS.items()] + ["geometric mean"]


def _over_workloads(
    study: Study,
    label: str,
    change: Callable[[Scenario], Scenario],
    pair: tuple[str, str],
    figures: Sequence[str],
    *,
    seeds: int = 3,
) -> Row:
    """Compare two policies over the four workloads; `change` says under which conditions."""
    pairs = []
    for name, load in LOADS.items():
        scenario = study.scenario(name, load)
        jobs = study.jobs(change(scenario), pair[0], seeds=seeds)
        base = study.jobs(change(scenario), pair[1], seeds=seeds)
        pairs.append((jobs, base))

    def cells(known: Known) -> list[str]:
        means = [
            statistics.geometric_mean(mean(known, j, f) / mean(known, b, f) for j, b in pairs)
            for f in figures
        ]
        each = [ratios(known, jobs, base, *figures) for jobs, base in pairs]
        return [*each, " / ".join(f"{value:.2f}" for value in means)]

    return Row(label, [job for jobs, base in pairs for job in (*jobs, *base)], cells)


def slow(study: Study) -> list[Table]:
    """One pod of eight at 0.4 of its speed; a crash; a newcomer; an outage of the picker."""
    tables = []
    names = ("round_robin", "least_request", "join_shortest_queue", "weights", "picker")
    for name, load in (("mixed", 0.6), ("mixed-long", 0.6), ("conversation", 0.65)):
        healthy = study.scenario(name, load)
        slowed = replace(healthy, faults=(Slow(0, 0.0, 0.4),))
        rows = []
        for policy in names:
            jobs, base = study.jobs(slowed, policy), study.jobs(healthy, policy)

            def cells(known: Known, jobs: list[Job] = jobs, base: list[Job] = base) -> list[str]:
                p99s = [f"{mean(known, group, P99):.2f}" for group in (base, jobs)]
                return [*p99s, *(ratios(known, jobs, base, f) for f in (*BOTH, "tpot_p99_s"))]

            rows.append(Row(policy, [*jobs, *base], cells))
        columns = ("healthy p99 s", "slow p99 s", "ratio", "short p99 ratio", "TPOT p99 ratio")
        tables.append(Table(f"{name} {load:g}, pod 0 at 0.4 of its speed", columns, rows))
    scenario = study.scenario("conversation", 0.8)
    events: Mapping[str, Scenario] = {
        "no fault": scenario,
        "pod 3 crashes at 60 s, back cold at 70 s": replace(scenario, faults=(Crash(3, 60, 10),)),
        "pod 7 joins cold at 60 s (load 0.8 of eight)": replace(scenario, faults=(Join(7, 60),)),
        "no picker from 60 s to 120 s": replace(scenario, outage=Outage(60, 60)),
    }
    rows = []
    for label, changed in events.items():
        groups = [study.jobs(changed, policy) for policy in names]

        def told(known: Known, groups: list[list[Job]] = groups) -> list[str]:
            return [f"{mean(known, jobs, P99):.2f}" for jobs in groups]

        rows.append(Row(label, [job for jobs in groups for job in jobs], told))
    tables.append(Table("conversation 0.8, TTFT p99 s over the whole run", names, rows))
    return tables


def ignorance(study: Study) -> list[Table]:
    """Shipped constants and learned speeds on other engines, against knowing the coefficients."""
    engines = {"A100": A100, "H100": H100, "quadratic attention": replace(A100, e_s=QUADRATIC_S)}
    for letter in "abcd":
        for factor in (0.25, 4.0):
            value = getattr(A100, f"{letter}_s") * factor
            engines[f"{letter} x{factor:g}"] = replace(A100, **{f"{letter}_s": value})
    tables = []
    figures = (*BOTH, "tpot_p99_s", "minute_ttft_p99_s")
    for policy in ("picker", "weights"):
        rows = []
        for label, coefficients in engines.items():
            pairs = []
            for name, load in LOADS.items():
                usual = study.scenario(name, load).spec
                spec = replace(usual, coefficients=coefficients)
                scenario = study.scenario(name, load, spec)
                pairs.append(
                    [study.jobs(scenario, policy, seeds=3, told=told) for told in (False, True)]
                )

            def cells(known: Known, pairs: list[list[list[Job]]] = pairs) -> list[str]:
                unlevel = max(mean(known, jobs, "unlevel_ratio") for jobs, _ in pairs)
                return [
                    *(ratios(known, jobs, base, *figures) for jobs, base in pairs),
                    f"{unlevel:.4f}",
                ]

            rows.append(Row(label, [j for pair in pairs for jobs in pair for j in jobs], cells))
        title = f"{policy}: TTFT / short / TPOT / first minute's TTFT p99, over knowing a-d"
        columns = [*_workload_columns()[:-1], "out of level"]
        tables.append(Table(title, columns, rows))
    return tables


def signals(study: Study) -> list[Table]:
    """The picker's ledger under faults, against a picker that sees the engines themselves."""
    plain: dict[str, Signals] = {
        "exact lengths": replace(ORDINARY, length_error_ratio=0.0),
        "lengths ±30 %": ORDINARY,
        "lengths x1.2": replace(ORDINARY, length_bias_ratio=1.2),
        "events 5 % lost, 5 % doubled, 2 % misplaced": replace(
            ORDINARY, lost_events_ratio=0.05, doubled_events_ratio=0.05, misplaced_ratio=0.02
        ),
        "no events at all": replace(ORDINARY, lost_events_ratio=1.0),
        "30 % by others, seen": replace(ORDINARY, seen_ratio=0.3),
        "30 % by others, unseen": replace(ORDINARY, unseen_ratio=0.3),
        "picker restarts at 80 s": replace(ORDINARY, restart_s=80.0),
    }
    conditions: dict[str, Callable[[Scenario], Scenario]] = {
        label: partial(replace, signals=given) for label, given in plain.items()
    }
    conditions["30 % of the clients go away"] = lambda s: replace(
        s, signals=ORDINARY, impatient_ratio=0.3
    )
    conditions["same, no events at all"] = lambda s: replace(
        s, signals=replace(ORDINARY, lost_events_ratio=1.0), impatient_ratio=0.3
    )
    conditions["pods flap"] = lambda s: replace(s, signals=ORDINARY, faults=FLAPS)
    conditions["all"] = lambda s: replace(s, signals=BAD_DAY, impatient_ratio=0.3, faults=FLAPS)
    rows = []
    for label, change in conditions.items():
        for scrape_s in (0.2, 1.0):

            def scraped(
                scenario: Scenario,
                change: Callable[[Scenario], Scenario] = change,
                scrape_s: float = scrape_s,
            ) -> Scenario:
                changed = change(scenario)
                return replace(changed, signals=replace(changed.signals, scrape_s=scrape_s))

            rate = f"{1 / scrape_s:g} Hz"
            rows.append(
                _over_workloads(study, f"{label}, {rate}", scraped, ("picker", "exact"), BOTH)
            )
        rows.append(_over_workloads(study, f"{label}, weights", change, ("weights", "exact"), BOTH))
    return [Table("TTFT p99 / short p99, over exact", _workload_columns(), rows)]


def verdicts(study: Study) -> list[Table]:
    """How often each verdict is right."""
    rows = []
    for label, policy, names, load, faults, fault_s in (
        ("healthy", "picker", FOUR_KINDS, 0.4, (), math.inf),
        ("healthy", "picker", FOUR_KINDS, 0.7, (), math.inf),
        ("healthy", "weights", FOUR_KINDS, 0.4, (), math.inf),
        ("healthy", "weights", FOUR_KINDS, 0.7, (), math.inf),
        ("healthy, turns taken", "round_robin", ("mixed", "mixed-long"), 0.6, (), math.inf),
        ("one pod gets 2.6 shares", "skewed", FOUR_KINDS[:3], 0.35, (), math.inf),
        *(
            (f"pod 0 at {speed}", policy, (name,), 0.5, (Slow(0, 90.0, speed),), 90.0)
            for speed, policy, name in product(
                (0.3, 0.5, 0.7), ("picker", "weights"), ("conversation", "mixed", "code")
            )
        ),
        *(
            (f"load from 0.6 to {rho}", policy, (name,), 0.6, _overload(rho), 90.0)
            for rho, policy, name in product(
                (1.1,), ("picker", "weights"), ("conversation", "code", "mixed")
            )
        ),
    ):
        jobs = []
        for name in names:
            scenario = study.scenario(name, load)
            requests = round(scenario.rate_per_s * VERDICT_S)
            scenario = replace(scenario, requests=requests, faults=faults, signals=ORDINARY)
            sick = (0,) if len(faults) == 1 else ()
            jobs += [Judged(scenario, policy, seed, fault_s, sick) for seed in range(1, 9)]
        rows.append(Row(f"{label}, {policy}, {', '.join(names)} {load:g}", jobs, _counted(jobs)))
    columns = ["checks", "Saturated", "right pod slow", "wrong pod slow", "Imbalanced"]
    columns += ["Oversized", "slow found after s (median, worst)", "Saturated after s"]
    return [Table("verdicts: share of the checks, every 5 s, 8 seeds", columns, rows)]


def _overload(load: float) -> tuple[Slow, ...]:
    """All pods become slower at once: the same arrivals are a higher load."""
    return tuple(Slow(pod, 90.0, 0.6 / load) for pod in range(8))


def _counted(jobs: Sequence[Job]) -> Callable[[Known], list[str]]:
    def cells(known: Known) -> list[str]:
        counts = [known[job] for job in jobs]
        checks = sum(one["checks"] for one in counts)
        names = ("Saturated", "right pod", "wrong pod", "Imbalanced", "Oversized")
        shares = [f"{sum(one.get(n, 0) for one in counts) / checks:.2%}" for n in names]
        found = []
        for name in ("slow_s", "saturated_s"):
            times = sorted(one.get(name, math.inf) for one in counts)
            found.append(f"{statistics.median(times):.0f}, {times[-1]:.0f}")
        return [f"{checks:.0f}", *shares, *found]

    return cells


def hour(study: Study) -> list[Table]:
    """One hour of a bad day, with a third of the clients going away."""
    rows = []
    figures = [
        f"{what} {figure}"
        for what in ("prefill", "requests", "context")
        for figure in ("bias first", "bias last", "error")
    ]
    for name, load in (("conversation", 0.85), ("mixed", 0.85), ("mixed-long", 0.85)):
        scenario = study.scenario(name, load)
        scenario = replace(
            scenario,
            requests=round(scenario.rate_per_s * 3600),
            signals=replace(BAD_DAY, restart_s=1800.0),
            impatient_ratio=0.3,
        )
        job = Hour(scenario, 1)

        def cells(known: Known, job: Job = job) -> list[str]:
            return [f"{known[job][figure]:+.2f}" for figure in figures]

        rows.append(Row(f"{name} {load:g}", [job], cells))
    title = "the ledger over one hour: bias in the first and last fifth, mean error, over the mean"
    return [Table(title, figures, rows)]


SECTIONS: Mapping[str, Callable[[Study], list[Table]]] = {
    "policies": policies,
    "slow": slow,
    "periods": periods,
    "ignorance": ignorance,
    "signals": signals,
    "verdicts": verdicts,
    "hour": hour,
}


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice([*SECTIONS]))
@click.option("--traces", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", type=click.IntRange(2, 100), default=5, show_default=True)
def main(sections: tuple[str, ...], traces: Path | None, seeds: int) -> None:
    """Print the tables of the sections named, or of all, as Markdown."""
    known: dict[Job, dict[str, float]] = {}
    for section in sections or SECTIONS:
        for table in SECTIONS[section](Study(traces, seeds)):
            click.echo(f"\n**{table.title}**\n\n| | {' | '.join(table.columns)} |")
            click.echo("|---" * (len(table.columns) + 1) + "|")
            for row in table.rows:
                missing = list(dict.fromkeys(job for job in row.jobs if job not in known))
                known |= zip(missing, compute(run, missing, what=row.label), strict=True)
                click.echo(f"| {row.label} | {' | '.join(row.cells(known))} |")


if __name__ == "__main__":
    main()
