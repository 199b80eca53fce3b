"""What the study runs, one process a job: figures of a policy, verdicts, an hour of a ledger."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from trimtab.core import backlog
from trimtab.core.ledger import EngineModel
from trimtab.core.verdict import Verdict
from trimtab.engine_sim.model import A100
from trimtab.sim.brain import SHIPPED, Picker, Weighted
from trimtab.sim.omniscient import predicted_ttft_s
from trimtab.sim.report import measured, quantile, report
from trimtab.sim.routers import RoundRobin, least
from trimtab.sim.scenario import POLICIES, Scenario, play
from trimtab.simulate import seeded

if TYPE_CHECKING:
    from random import Random

    from trimtab.core.ledger import Ledger
    from trimtab.sim.fleet import Fleet, Pod, Router, Ticket

MINUTE_S = 60.0
CHECK_S = 5.0
FIRST_CHECK_S = 62.5  # the fleet has filled, and the verdict has its window
ADMITTED_RATIO = 0.95


class Job(Protocol):
    """Equal jobs give equal results, in any process."""

    def run(self) -> dict[str, float]: ...


def run(job: Job) -> dict[str, float]:
    return job.run()


class ExactPicker(Picker):
    """Sees the true state of every engine; its cost is that of the pick."""

    def choose(self, ticket: Ticket, ledger: Ledger, tokens: float) -> Pod:
        del ledger, tokens
        cost = partial(_exact_cost_s, prompt_tokens=ticket.prompt_tokens)
        return least(self.fleet.ready, cost, self._rng)


def _exact_cost_s(pod: Pod, prompt_tokens: int) -> float:
    engine = pod.engine
    context_tokens = engine.kv_reserved_tokens + sum(s.prompt_tokens for s in engine.waiting)
    limit_tokens = ADMITTED_RATIO * engine.spec.kv_capacity_tokens
    over_tokens = context_tokens + prompt_tokens - limit_tokens
    cost_s = predicted_ttft_s(pod, prompt_tokens)
    if over_tokens > 0:
        k = engine.spec.coefficients
        residual_steps = statistics.fmean(t.output_tokens for t in pod.in_flight.values()) / 2
        step_s = k.a_s + k.c_s * engine.kv_decoding_tokens + k.d_s * len(engine.decoding)
        cost_s += over_tokens / context_tokens * residual_steps * step_s / engine.speed
    return cost_s


@dataclass(frozen=True, slots=True)
class Compared:
    """Figures of one policy in one run."""

    scenario: Scenario
    policy: str
    """One of POLICIES, or "exact": a picker that sees the engines."""
    seed: int
    told: bool = False
    """The coefficients of the engines instead of the shipped constants."""

    def run(self) -> dict[str, float]:
        router = self._router()
        unlevel: list[bool] = []

        def look(fleet: Fleet) -> None:
            if isinstance(router, Weighted):
                speed_of = router.state.memory.speed_of
                unlevel.extend(speed_of(pod.endpoint) != 1.0 for pod in fleet.ready)

        # Shipped constants have no setting, so to know better the study overwrites them.
        shipped = backlog.STEP_TOKENS, backlog.KV_TOKENS, backlog.DECODE_TOKENS
        if self.told:
            model = self._model()
            backlog.STEP_TOKENS = model.a_tokens
            backlog.KV_TOKENS, backlog.DECODE_TOKENS = model.c_tokens, model.d_tokens
        try:
            tickets = play(
                self.scenario,
                router,
                stream=partial(seeded, self.seed),
                watch=lambda fleet: fleet.every(1.0, partial(look, fleet), start_s=0.5),
            )
        finally:
            backlog.STEP_TOKENS, backlog.KV_TOKENS, backlog.DECODE_TOKENS = shipped
        scenario = self.scenario
        figures = report(measured(tickets), spec=scenario.spec, objective=scenario.objective)
        minute_s = sorted(t.ttft_s for t in tickets if t.at_s < MINUTE_S and t.first_s < math.inf)
        return {
            "ttft_p50_s": figures.ttft_p50_s,
            "ttft_p95_s": figures.ttft_p95_s,
            "ttft_p99_s": figures.ttft_p99_s,
            "short_ttft_p99_s": figures.short_ttft_p99_s,
            "tpot_p99_s": figures.tpot_p99_s,
            "slo_ratio": figures.slo_ratio,
            "minute_ttft_p99_s": quantile(minute_s, 0.99),
            "unlevel_ratio": sum(unlevel) / len(unlevel) if unlevel else 0.0,
        }

    def _model(self) -> EngineModel:
        k = self.scenario.spec.coefficients if self.told else A100
        return EngineModel(
            a_tokens=k.a_s / k.b_s,
            c_tokens=k.c_s / k.b_s,
            d_tokens=k.d_s / k.b_s,
            batch_tokens=self.scenario.spec.batch_tokens,
        )

    def _router(self) -> Router:
        scenario, rng = self.scenario, seeded(self.seed, f"policy {self.policy}")
        kinds = {"picker": Picker, "exact": ExactPicker}
        if self.policy not in kinds:
            return POLICIES[self.policy](scenario, rng)
        return kinds[self.policy](
            rng,
            period_s=scenario.period_s,
            metrics_age_s=scenario.metrics_age_s,
            pickers=scenario.pickers,
            signals=scenario.signals,
            model=self._model() if self.told else SHIPPED,
            outage_s=(scenario.outage.at_s, scenario.outage.at_s + scenario.outage.for_s),
        )


class Observed(Weighted):
    """Traffic that another policy shapes, seen by ours."""

    def __init__(self, rng: Random, inner: Router) -> None:
        super().__init__(rng)
        self._inner = inner

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        self._inner.join(fleet)

    def route(self, ticket: Ticket) -> Pod:
        return self._inner.route(ticket)

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        self._inner.ended(ticket, pod)


class Skewed(RoundRobin):
    """Three of ten requests go to the first of eight pods: 2.6 times its share."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._rng = rng

    def route(self, ticket: Ticket) -> Pod:
        favoured = self._rng.random() < 0.2  # noqa: PLR2004  # and its eighth of the rest
        return self.fleet.ready[0] if favoured else super().route(ticket)


@dataclass(frozen=True, slots=True)
class Judged:
    """How often each verdict was given, looked at every 5 s."""

    scenario: Scenario
    policy: str
    """weights, picker, round_robin or skewed."""
    seed: int
    fault_s: float = math.inf
    """From when on something is wrong, so that it can be found."""
    sick: tuple[int, ...] = ()
    """The pods with which it is wrong."""

    def run(self) -> dict[str, float]:
        rng = seeded(self.seed, f"policy {self.policy}")
        router: Weighted
        if self.policy == "weights":
            router = Weighted(rng)
        elif self.policy == "picker":
            router = Picker(rng, signals=self.scenario.signals)
        else:
            router = Observed(rng, Skewed(rng) if self.policy == "skewed" else RoundRobin())
        counts: Counter[str] = Counter()
        found: dict[str, float] = {}

        def look(fleet: Fleet) -> None:
            judgement = router.decision.judgement if router.decision else None
            if judgement is None:
                return
            after_s = fleet.now_s - self.fault_s
            slow = {e.pod for e in judgement.evidence.slow}
            if judgement.verdict is not Verdict.SLOW_ENDPOINT:
                slow = set()
            right = {f"pod-{index}" for index in self.sick}
            if after_s >= 0 and slow & right:
                found.setdefault("slow_s", after_s)
            if after_s >= 0 and judgement.verdict is Verdict.SATURATED:
                found.setdefault("saturated_s", after_s)
            starts_s = FIRST_CHECK_S if math.isinf(self.fault_s) else self.fault_s + MINUTE_S
            if fleet.now_s >= starts_s and fleet.now_s % CHECK_S < 1:
                counts["checks"] += 1
                counts[judgement.verdict] += 1
                counts["right pod"] += bool(slow & right)
                counts["wrong pod"] += bool(slow - right)

        play(
            self.scenario,
            router,
            stream=partial(seeded, self.seed),
            watch=lambda fleet: fleet.every(1.0, partial(look, fleet), start_s=0.5),
        )
        return dict(counts) | found


@dataclass(frozen=True, slots=True)
class Hour:
    """How far the ledger is from the truth, by fifths of a long run."""

    scenario: Scenario
    seed: int

    def run(self) -> dict[str, float]:
        router = Picker(seeded(self.seed, "policy picker"), signals=self.scenario.signals)
        errors: list[tuple[float, float, float, float, float, float]] = []

        def look(fleet: Fleet) -> None:
            for pod in fleet.ready:
                said = router.ledgers[0].estimate(pod.endpoint, now_s=fleet.now_s)
                if said is None:
                    continue
                engine = pod.engine
                waiting_tokens = sum(s.prompt_tokens for s in engine.waiting)
                errors.append(
                    (
                        said.prefill_tokens,
                        engine.prefill_backlog_tokens,
                        said.requests,
                        len(pod.in_flight),
                        said.context_tokens,
                        engine.kv_reserved_tokens + waiting_tokens,
                    )
                )

        play(
            self.scenario,
            router,
            stream=partial(seeded, self.seed),
            watch=lambda fleet: fleet.every(1.0, partial(look, fleet), start_s=30.47),
        )
        figures: dict[str, float] = {}
        fifth = len(errors) // 5
        for place, name in ((0, "prefill"), (2, "requests"), (4, "context")):
            true = statistics.fmean(e[place + 1] for e in errors)
            for number, part in (("first", errors[:fifth]), ("last", errors[-fifth:])):
                bias = statistics.fmean(e[place] - e[place + 1] for e in part)
                figures[f"{name} bias {number}"] = bias / true
            off = statistics.fmean(abs(e[place] - e[place + 1]) for e in errors)
            figures[f"{name} error"] = off / true
        return figures
