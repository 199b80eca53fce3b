"""What users feel: times to the first output and between outputs, and how many were served well.

The law: only requests that arrived after the warm-up count, those that failed count as not served,
and those whose client went away do not count.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from trimtab.sim.fleet import Ending

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trimtab.engine_sim.model import EngineSpec
    from trimtab.sim.fleet import Ticket

WARM_UP_RATIO = 0.15  # an empty fleet answers faster than any that has been running
SHORT_PROMPT_TOKENS = 256  # requests that have no reason to wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Served well: first output soon, and outputs that flow."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05
    prefill_factor: float = 3.0
    """A prompt may take this many times its own prefill: 20,000 tokens never fit a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One policy in one run. Times in seconds; NaN where there was nothing to measure."""

    requests: int
    failed: int
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    short_ttft_p99_s: float
    tpot_p99_s: float
    slo_ratio: float
    backlog_cv: float


def measured(tickets: Sequence[Ticket], warm_up_ratio: float = WARM_UP_RATIO) -> list[Ticket]:
    """Leave out the warm-up, which is a share of the time in which requests arrived."""
    if not tickets:
        return []
    start_s = tickets[0].at_s + warm_up_ratio * (tickets[-1].at_s - tickets[0].at_s)
    return [ticket for ticket in tickets if ticket.at_s >= start_s]


def report(
    tickets: Iterable[Ticket],
    *,
    spec: EngineSpec,
    objective: Objective,
    backlog_cv: float = math.nan,
) -> Report:
    tickets = [ticket for ticket in tickets if ticket.ending is not Ending.ABORTED]
    finished = [ticket for ticket in tickets if ticket.ending is Ending.FINISHED]
    ttft_s = sorted(ticket.ttft_s for ticket in finished)
    short_s = sorted(t.ttft_s for t in finished if t.prompt_tokens < SHORT_PROMPT_TOKENS)
    tpot_s = sorted(ticket.tpot_s for ticket in finished if ticket.output_tokens > 1)
    served = sum(_served_well(ticket, spec=spec, objective=objective) for ticket in finished)
    return Report(
        requests=len(tickets),
        failed=len(tickets) - len(finished),
        ttft_p50_s=quantile(ttft_s, 0.5),
        ttft_p95_s=quantile(ttft_s, 0.95),
        ttft_p99_s=quantile(ttft_s, 0.99),
        short_ttft_p99_s=quantile(short_s, 0.99),
        tpot_p99_s=quantile(tpot_s, 0.99),
        slo_ratio=served / len(tickets) if tickets else math.nan,
        backlog_cv=backlog_cv,
    )


def quantile(ordered: Sequence[float], level: float) -> float:
    """Linear between the neighbours, as most tools do."""
    if not ordered:
        return math.nan
    place = level * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy over all seeds: mean and standard deviation of each figure."""

    mean: dict[str, float]
    spread: dict[str, float]


def summarize(reports: Sequence[Report]) -> Summary:
    """Leave out what could not be measured; NaN where no seed measured anything."""
    rows = [asdict(one) for one in reports]
    columns = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return Summary(
        mean={
            name: statistics.fmean(column) if column else math.nan
            for name, column in columns.items()
        },
        spread={
            name: statistics.stdev(column) if len(column) > 1 else 0.0
            for name, column in columns.items()
        },
    )


def _served_well(ticket: Ticket, *, spec: EngineSpec, objective: Objective) -> bool:
    """TTFT and TPOT within the objective; a single output has no TPOT."""
    k = spec.coefficients
    steps = -(-ticket.prompt_tokens // spec.batch_tokens)
    prefill_s = steps * k.a_s + ticket.prompt_tokens * k.b_s
    ttft_limit_s = max(objective.ttft_s, objective.prefill_factor * prefill_s)
    flows = ticket.output_tokens == 1 or ticket.tpot_s <= objective.tpot_s
    return ticket.ttft_s <= ttft_limit_s and flows
