"""Verdicts over simulated engines: shortage, sickness and imbalance are told apart, and in time.

A small part of what the study of docs/performance.md repeats over many seeds.
"""

from __future__ import annotations

from functools import cache, partial
from math import inf
from random import Random
from typing import TYPE_CHECKING

import pytest

from trimtab.core.verdict import Judgement, Verdict
from trimtab.engine_sim.model import EngineSpec
from trimtab.sim.brain import Picker, Weighted
from trimtab.sim.capacity import saturated_rate_per_s
from trimtab.sim.fleet import Fleet, OpenLoop, Pod, Ticket
from trimtab.workload import WORKLOADS, draw

if TYPE_CHECKING:
    from trimtab.core.model import Observation

PODS = 8
SPEC = EngineSpec()
SLOWED_S = 60.0
Checks = list[tuple[float, Judgement]]


@cache
def full_rate_per_s(name: str) -> float:
    rng = Random(0)  # noqa: S311 - traffic, not secrets
    return saturated_rate_per_s(draw(WORKLOADS[name], rate_per_s=1, rng=rng, count=4000), spec=SPEC)


class Judged(Weighted):
    """Routes by weights, and remembers every verdict."""

    def __init__(self, rng: Random, *, seconds: float) -> None:
        super().__init__(rng)
        self._seconds = seconds
        self.checks: Checks = []

    def _decide(self, observation: Observation) -> None:
        super()._decide(observation)
        judgement = self.decision.judgement if self.decision else None
        known = self.checks[-1][1] if self.checks else None
        if judgement is not None and judgement is not known and self.fleet.now_s < self._seconds:
            self.checks.append((self.fleet.now_s, judgement))


class JudgedPicker(Judged, Picker):
    """Routes by picks."""


class JudgedSkew(Judged):
    """Sends the first pod twice its share: an imbalance that routing could remove."""

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        return self.fleet.pods[max(0, self._rng.randrange(PODS + 1) - 1)]


def checks_of(
    router: type[Judged], name: str, load: float, *, seconds: float, slowed: float = 1.0
) -> Checks:
    rng = Random(3)  # noqa: S311 - traffic, not secrets
    rate_per_s = load * PODS * full_rate_per_s(name)
    requests = draw(WORKLOADS[name], rate_per_s=rate_per_s, rng=rng, seconds=seconds)
    judged = router(rng, seconds=seconds)
    fleet = Fleet([1.0] * PODS, router=judged, spec=SPEC)
    fleet.at(SLOWED_S, partial(setattr, fleet.pods[3].engine, "speed", slowed))
    fleet.run(OpenLoop(requests))
    return judged.checks


@pytest.mark.parametrize("name", ["chat", "mixed", "code"])
@pytest.mark.parametrize(
    ("router", "load"),
    [(JudgedPicker, 0.4), (JudgedPicker, 0.65), (Judged, 0.5), (JudgedSkew, 0.4)],
)
def test_nothing_that_routing_could_mend_is_called_shortage_or_sickness(
    router: type[Judged], load: float, name: str
) -> None:
    verdicts = {judgement.verdict for _, judgement in checks_of(router, name, load, seconds=120)}
    assert not verdicts & {Verdict.SATURATED, Verdict.SLOW_ENDPOINT}


@pytest.mark.parametrize("name", ["chat", "mixed"])
@pytest.mark.parametrize("speed", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("router", [Judged, JudgedPicker])
def test_a_pod_that_falls_slow_is_found_within_25_s_and_no_other(
    router: type[Judged], speed: float, name: str
) -> None:
    checks = checks_of(router, name, 0.6, seconds=SLOWED_S + 50, slowed=speed)
    late = [judgement for at_s, judgement in checks if at_s > SLOWED_S + 20.5]
    assert {judgement.verdict for judgement in late} == {Verdict.SLOW_ENDPOINT}
    named = {endpoint.pod for _, judgement in checks for endpoint in judgement.evidence.slow}
    assert named == {"pod-3"}


@pytest.mark.parametrize("name", ["chat", "code"])
@pytest.mark.parametrize("router", [Judged, JudgedPicker, JudgedSkew])
def test_an_overload_of_a_tenth_is_found_within_a_minute_and_measured(
    router: type[Judged], name: str
) -> None:
    checks = checks_of(router, name, 1.1, seconds=90)
    found_s = min((s for s, told in checks if told.verdict is Verdict.SATURATED), default=inf)
    assert found_s <= 60
    assert checks[-1][1].verdict is Verdict.SATURATED
    assert 9 <= checks[-1][1].evidence.needed_endpoints <= 15


def test_an_imbalance_that_hurts_is_named() -> None:
    verdicts = [j.verdict for _, j in checks_of(JudgedSkew, "code", 0.55, seconds=150)]
    assert Verdict.IMBALANCED in verdicts
    assert Verdict.SATURATED not in verdicts
