"""One run: a fleet, its traffic, what goes wrong, and the policy that has to cope.

The law: everything random is drawn from streams that the caller seeds, one per purpose, so two
policies meet the same arrivals, and a run can be repeated bit for bit on any machine.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from trimtab.engine_sim.model import EngineSpec
from trimtab.sim.brain import Picker, Signals, Weighted
from trimtab.sim.fleet import ClosedLoop, Fleet, OpenLoop
from trimtab.sim.omniscient import Omniscient
from trimtab.sim.report import Objective, Report, measured, quantile, report
from trimtab.sim.routers import (
    LeastRequest,
    QueueKvScorer,
    RandomChoice,
    RoundRobin,
    ShortestQueue,
    TokenCount,
)
from trimtab.workload import Workload, draw, retime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from trimtab.sim.fleet import Router, Ticket, Traffic
    from trimtab.workload import Request

THINK_S = 10.0  # mean of what a user takes to read an answer and to ask again; exponential
CV_SAMPLE_S = 0.5  # the fleet's balance changes with prompts, which take about as long
TAIL_LEVELS = tuple(1 - 10 ** (-k / 20) for k in range(61))
"""From all requests to one in a thousand, evenly on a logarithmic scale: for plots."""


class Fault(Protocol):
    def plan(self, fleet: Fleet) -> None: ...


@dataclass(frozen=True, slots=True)
class Crash:
    """A pod loses everything, and is back after a while (infinite: never), cold."""

    pod: int
    at_s: float
    for_s: float = math.inf

    def plan(self, fleet: Fleet) -> None:
        pod = fleet.pods[self.pod]
        fleet.at(self.at_s, partial(fleet.crash, pod))
        if self.for_s < math.inf:
            fleet.at(self.at_s + self.for_s, partial(fleet.start, pod))


@dataclass(frozen=True, slots=True)
class Slow:
    """A pod works at a share of its speed for a while."""

    pod: int
    at_s: float
    speed: float
    for_s: float = math.inf

    def plan(self, fleet: Fleet) -> None:
        fleet.at(self.at_s, partial(fleet.set_pace, fleet.pods[self.pod], self.speed))
        if self.for_s < math.inf:
            fleet.at(self.at_s + self.for_s, partial(fleet.set_pace, fleet.pods[self.pod], 1.0))


@dataclass(frozen=True, slots=True)
class Join:
    """A pod is not there at first, and comes cold."""

    pod: int
    at_s: float

    def plan(self, fleet: Fleet) -> None:
        fleet.leave_out(fleet.pods[self.pod])
        fleet.at(self.at_s, partial(fleet.start, fleet.pods[self.pod]))


@dataclass(frozen=True, slots=True)
class Outage:
    """No picker answers for a while."""

    at_s: float
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What all policies of a comparison have in common."""

    workload: Workload
    rate_per_s: float
    """Of the whole fleet."""
    trace: Sequence[Request] = ()
    """Lengths in their order instead of drawn ones; arrivals with the workload's CV."""
    recorded_gaps: bool = False
    """Arrivals of the trace, scaled, instead of drawn ones."""
    requests: int = 12_000
    speeds: Sequence[float] = (1.0,) * 8
    spec: EngineSpec = field(default_factory=EngineSpec)
    objective: Objective = field(default_factory=Objective)
    period_s: float = 1.0
    metrics_age_s: float = 0.0
    pickers: int = 1
    signals: Signals = field(default_factory=Signals)
    faults: Sequence[Fault] = ()
    outage: Outage = field(default_factory=lambda: Outage(math.inf, 0.0))
    users: int = 0
    """Instead of open arrivals: so many users that wait for their answers."""
    impatient_ratio: float = 0.0
    """Clients that go away: half of them soon, half in the middle of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    report: Report
    ttft_tail_s: tuple[float, ...]
    """TTFT at each of TAIL_LEVELS."""


def _weighted(scenario: Scenario, rng: Random) -> Router:
    return Weighted(rng, period_s=scenario.period_s, metrics_age_s=scenario.metrics_age_s)


def _picker(scenario: Scenario, rng: Random) -> Router:
    return Picker(
        rng,
        period_s=scenario.period_s,
        metrics_age_s=scenario.metrics_age_s,
        pickers=scenario.pickers,
        signals=scenario.signals,
        outage_s=(scenario.outage.at_s, scenario.outage.at_s + scenario.outage.for_s),
    )


POLICIES: Mapping[str, Callable[[Scenario, Random], Router]] = MappingProxyType(
    {
        "random": lambda _, rng: RandomChoice(rng),
        "round_robin": lambda _, __: RoundRobin(),
        "least_request": lambda _, rng: LeastRequest(rng),
        "join_shortest_queue": lambda _, rng: ShortestQueue(rng),
        "token_count": lambda _, rng: TokenCount(rng),
        "inference_extension": lambda _, rng: QueueKvScorer(rng),
        "weights": _weighted,
        "picker": _picker,
        "omniscient": lambda _, rng: Omniscient(rng),
    }
)


def simulate(scenario: Scenario, policy: str, *, stream: Callable[[str], Random]) -> Run:
    """Run one policy. `stream` gives a generator for a purpose, the same for equal purposes."""
    router = POLICIES[policy](scenario, stream(f"policy {policy}"))
    spreads: list[tuple[float, float]] = []

    def watch(fleet: Fleet) -> None:
        fleet.every(CV_SAMPLE_S, lambda: spreads.append((fleet.now_s, backlog_cv(fleet))))

    counted = measured(play(scenario, router, stream=stream, watch=watch))
    start_s, end_s = counted[0].at_s, counted[-1].at_s
    spread = [cv for at_s, cv in spreads if start_s <= at_s <= end_s]
    ttft_s = sorted(ticket.ttft_s for ticket in counted if ticket.first_s < math.inf)
    return Run(
        report=report(
            counted,
            spec=scenario.spec,
            objective=scenario.objective,
            backlog_cv=statistics.fmean(spread) if spread else math.nan,
        ),
        ttft_tail_s=tuple(quantile(ttft_s, level) for level in TAIL_LEVELS),
    )


def play(
    scenario: Scenario,
    router: Router,
    *,
    stream: Callable[[str], Random],
    watch: Callable[[Fleet], None] = lambda _: None,
) -> list[Ticket]:
    """Let a router meet the scenario; `watch` may plan looks at the fleet."""
    fleet = Fleet(scenario.speeds, router=router, spec=scenario.spec)
    for fault in scenario.faults:
        fault.plan(fleet)
    watch(fleet)
    return fleet.run(_traffic(scenario, stream))


def backlog_cv(fleet: Fleet) -> float:
    """How unequal the true backlogs are now; 0 in an empty fleet."""
    owed = [pod.owed_tokens for pod in fleet.ready]
    mean = statistics.fmean(owed) if owed else 0.0
    return statistics.pstdev(owed, mean) / mean if mean else 0.0


def _traffic(scenario: Scenario, stream: Callable[[str], Random]) -> Traffic:
    rng = stream("traffic")
    if scenario.trace:
        requests = retime(
            scenario.trace,
            rate_per_s=scenario.rate_per_s,
            cv=None if scenario.recorded_gaps else scenario.workload.cv,
            rng=rng,
            count=scenario.requests,
        )
    else:
        requests = draw(
            scenario.workload, rate_per_s=scenario.rate_per_s, rng=rng, count=scenario.requests
        )
    if scenario.users:
        think = partial(stream("thinking").expovariate, 1 / THINK_S)
        return ClosedLoop(requests, users=scenario.users, think_s=think)
    if scenario.impatient_ratio:
        patience = partial(_patience_s, ratio=scenario.impatient_ratio, rng=stream("patience"))
        return OpenLoop(requests, patience_s=patience)
    return OpenLoop(requests)


def _patience_s(request: Request, *, ratio: float, rng: Random) -> float:
    """How long a client waits: for ever, hardly, or into the middle of the answer."""
    kind, when = rng.random(), rng.random()
    if kind >= ratio:
        return math.inf
    return 0.3 * when if kind < ratio / 2 else 0.3 + 0.04 * request.output_tokens * when
