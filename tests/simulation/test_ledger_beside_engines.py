"""The ledger beside the engines that it reckons: near the truth under every fault, without drift."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import isnan
from random import Random
from statistics import fmean

import pytest

from trimtab.core.ledger import Ledger
from trimtab.core.model import Endpoint, Reading
from trimtab.core.picking import pick
from trimtab.engine_sim.model import EngineSpec
from trimtab.sim.fleet import Fleet, OpenLoop, Pod, Router, Ticket
from trimtab.workload import WORKLOADS, draw

SECONDS = 120.0
WARM_UP_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of the requests, but for the two last."""

    foreign: float = 0.0
    """Come another way, in turn, and are never told of."""
    lost: float = 0.0
    """Their end is never told."""
    doubled: float = 0.0
    aborted: float = 0.0
    length_error: float = 0.0
    restart_s: float = -1.0
    """When the picker loses its memory; never, if negative."""


@dataclass
class Errors:
    """What the ledger said and what was true, one pair per look."""

    requests: list[tuple[float, float]] = field(default_factory=list)
    context: list[tuple[float, float]] = field(default_factory=list)
    prefill: list[tuple[float, float]] = field(default_factory=list)


class Watched(Router):
    """Picks by a ledger that is told the truth late, in part, or not at all; scraped at 1 Hz."""

    def __init__(self, rng: Random, faults: Faults) -> None:
        self._rng, self._faults = rng, faults
        self._turn = 0
        self.errors = Errors()

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        self._start_over()
        for pod in fleet.pods:
            fleet.every(1.0, partial(self._scrape, pod), start_s=self._rng.random())
        fleet.every(0.37, self._look, start_s=WARM_UP_S)
        if self._faults.restart_s >= 0:
            fleet.at(self._faults.restart_s, self._start_over)

    def _start_over(self) -> None:
        self.ledger = Ledger()
        self.ledger.follow(pod.endpoint for pod in self.fleet.pods)

    def route(self, ticket: Ticket) -> Pod:
        faults, fleet, rng = self._faults, self.fleet, self._rng
        if rng.random() < faults.aborted:
            fleet.at(fleet.now_s + rng.expovariate(0.5), partial(fleet.abort, ticket))
        if rng.random() < faults.foreign:
            self._turn += 1
            return fleet.pods[self._turn % len(fleet.pods)]
        error = faults.length_error
        made = pick(
            self.ledger,
            ticket.id,
            tokens=ticket.prompt_tokens * rng.uniform(1 - error, 1 + error),
            now_s=fleet.now_s,
            start=rng.randrange(len(fleet.pods)),
        )
        assert made is not None
        return next(pod for pod in fleet.pods if pod.endpoint == made.endpoint)

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        if self._rng.random() < self._faults.lost:
            return
        at_s, answered = self.fleet.now_s, not isnan(ticket.first_s)
        for _ in range(1 + (self._rng.random() < self._faults.doubled)):
            tell = partial(self._end, ticket.id, pod.endpoint, answered=answered, at_s=at_s)
            self.fleet.at(at_s + self._rng.uniform(0, 0.1), tell)

    def _end(self, request: int, endpoint: Endpoint, *, answered: bool, at_s: float) -> None:
        now_s = self.fleet.now_s
        self.ledger.end(request, endpoint, answered=answered, at_s=at_s, now_s=now_s)

    def _scrape(self, pod: Pod) -> None:
        asked_s, sample = self.fleet.now_s, pod.sample()
        answered_s = asked_s + self._rng.uniform(0, 0.05)
        reading = Reading(asked_s=asked_s, answered_s=answered_s, outcome=sample)
        self.fleet.at(answered_s, lambda: self.ledger.scrape(pod.endpoint, reading))

    def _look(self) -> None:
        if self.fleet.now_s > SECONDS:
            return
        for pod in self.fleet.pods:
            engine = pod.engine
            estimate = self.ledger.estimate(pod.endpoint, now_s=self.fleet.now_s)
            assert estimate is not None
            waiting_tokens = sum(sequence.prompt_tokens for sequence in engine.waiting)
            true_context = engine.kv_reserved_tokens + waiting_tokens
            true_requests = engine.running + len(engine.waiting)
            self.errors.requests.append((estimate.requests, true_requests))
            self.errors.context.append((estimate.context_tokens, true_context))
            self.errors.prefill.append((estimate.prefill_tokens, engine.prefill_backlog_tokens))


def run(name: str, faults: Faults, *, seed: int = 1) -> Errors:
    rng = Random(seed)  # noqa: S311 - traffic, not secrets
    rate_per_s = {"conversation": 36.0, "mixed": 32.0}[name]  # about 0.8 of what four can do
    requests = draw(WORKLOADS[name], rate_per_s=rate_per_s, rng=rng, seconds=SECONDS)
    router = Watched(rng, faults)
    Fleet([1.0] * 4, router=router, spec=EngineSpec()).run(OpenLoop(requests))
    return router.errors


def error_ratio(pairs: list[tuple[float, float]]) -> float:
    """Mean error, without sign, over the mean of what is true."""
    return fmean(abs(said - true) for said, true in pairs) / fmean(true for _, true in pairs)


def bias_ratio(pairs: list[tuple[float, float]]) -> float:
    return fmean(said - true for said, true in pairs) / fmean(true for _, true in pairs)


ALL = Faults(foreign=0.3, lost=0.05, doubled=0.05, aborted=0.3, length_error=0.3, restart_s=60.0)


@pytest.mark.parametrize("name", ["conversation", "mixed"])
@pytest.mark.parametrize(
    ("faults", "within"),
    [
        (Faults(), 0.03),
        (Faults(foreign=0.3), 0.07),
        (Faults(lost=1.0), 0.10),
        (Faults(aborted=0.3, length_error=0.3), 0.04),
        (Faults(lost=0.05, doubled=0.05), 0.03),
        (ALL, 0.10),
    ],
    ids=["none", "foreign", "no ends", "aborts", "lost and doubled", "all"],
)
def test_requests_and_context_in_flight_stay_near_the_truth(
    name: str, faults: Faults, within: float
) -> None:
    """Scraped once a second, so half a second of unseen changes is what may be wrong."""
    errors = run(name, faults)
    assert error_ratio(errors.requests) < within
    assert error_ratio(errors.context) < within


@pytest.mark.parametrize("name", ["conversation", "mixed"])
@pytest.mark.parametrize("faults", [Faults(), ALL], ids=["none", "all"])
def test_the_prefill_backlog_does_not_drift(name: str, faults: Faults) -> None:
    """The engines count a chunk as done when its step ends, the ledger as it goes on: some less."""
    pairs = run(name, faults).prefill
    fifth = len(pairs) // 5
    assert error_ratio(pairs) < 0.75
    assert abs(bias_ratio(pairs[-fifth:]) - bias_ratio(pairs[:fifth])) < 0.3
