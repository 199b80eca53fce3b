"""Trimtab's own policies: the step and the pick of production, fed by simulated pages.

The law: nothing here decides. Pages are taken at the period, arrive at their age, go through
`core.step.step`, and its snapshot reaches the simulated Envoy one push later.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from trimtab.core.backlog import PUSH_S
from trimtab.core.model import Failure, FailureKind, Observation, Policy, Reading
from trimtab.core.step import State, step
from trimtab.sim.routers import LeastRequest

if TYPE_CHECKING:
    from random import Random

    from trimtab.core.model import Decision, Endpoint, Snapshot
    from trimtab.sim.fleet import Fleet

_REFUSED = Failure(FailureKind.REFUSED)


class Weighted(LeastRequest):
    """Weights pushed to Envoy's LEAST_REQUEST every period."""

    def __init__(self, rng: Random, *, period_s: float = 1.0, metrics_age_s: float = 0.0) -> None:
        super().__init__(rng)
        self._policy = Policy(interval_s=period_s)
        self._metrics_age_s = metrics_age_s
        self.state = State()
        self.decision: Decision | None = None

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        fleet.every(self._policy.interval_s, self._observe)

    def _observe(self) -> None:
        fleet = self.fleet
        readings: dict[Endpoint, Reading] = {
            pod.endpoint: Reading(
                asked_s=fleet.now_s,
                answered_s=fleet.now_s,
                outcome=pod.sample() if pod.ready else _REFUSED,
            )
            for pod in fleet.pods
            if pod.known
        }
        fleet.at(fleet.now_s + self._metrics_age_s, partial(self._decide, Observation(readings)))

    def _decide(self, observation: Observation) -> None:
        fleet = self.fleet
        before = self.state.snapshot
        self.state, self.decision = step(self.state, observation, self._policy, now_s=fleet.now_s)
        if self.state.snapshot is not before:
            fleet.at(fleet.now_s + PUSH_S, partial(self._push, self.state.snapshot))

    def _push(self, snapshot: Snapshot) -> None:
        self.publish({pod: snapshot.weights.get(pod.endpoint, 1) for pod in self.fleet.pods})
