"""Trimtab's own policies: the step and the pick of production, fed by simulated pages.

The law: nothing here decides. Pages are taken at the period, arrive at their age, go through
`core.step.step`, and its snapshot reaches the simulated Envoy one push later. The picker's ledger
hears of its own picks at once, of everything else as well or badly as `Signals` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trimtab.core.backlog import PUSH_S
from trimtab.core.ledger import EngineModel, Ledger
from trimtab.core.model import Failure, FailureKind, Observation, Policy, Reading
from trimtab.core.picking import pick
from trimtab.core.step import State, step
from trimtab.sim.routers import LeastRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from trimtab.core.model import Decision, Endpoint, Snapshot
    from trimtab.sim.fleet import Fleet, Pod, Ticket

SHIPPED = EngineModel()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """How well a picker hears. The defaults are a quiet day; ratios are of all requests."""

    scrape_s: float = 0.2
    scrape_takes_s: float = 0.0
    """From question to answer, at most; uniform, the snapshot somewhere between."""
    lost_scrapes_ratio: float = 0.0
    length_error_ratio: float = 0.0
    """A prompt is taken for up to so much longer or shorter; uniform."""
    length_bias_ratio: float = 1.0
    event_delay_s: float = 0.0
    """At most; uniform."""
    lost_events_ratio: float = 0.0
    doubled_events_ratio: float = 0.0
    misplaced_ratio: float = 0.0
    """Sent to another pod than the picked one; the start event says so."""
    unseen_ratio: float = 0.0
    """Placed by others in turn, and never announced."""
    seen_ratio: float = 0.0
    """Placed by others in turn, and announced by their start event."""
    restart_s: float = math.inf
    """When the picker starts anew, knowing nothing."""


class Picker(Weighted):
    """A pick for every request; weights where no picker answers."""

    def __init__(
        self,
        rng: Random,
        *,
        period_s: float = 1.0,
        metrics_age_s: float = 0.0,
        pickers: int = 1,
        signals: Signals = Signals(),
        model: EngineModel = SHIPPED,
        outage_s: tuple[float, float] = (math.inf, math.inf),
    ) -> None:
        super().__init__(rng, period_s=period_s, metrics_age_s=metrics_age_s)
        self._signals = signals
        self._model = model
        self._outage_s = outage_s
        self._pickers = pickers
        self._others_turn = 0
        self._booked: dict[int, Ledger] = {}
        self.ledgers: list[Ledger] = []

    def join(self, fleet: Fleet) -> None:
        self._pods = {pod.endpoint: pod for pod in fleet.pods}
        super().join(fleet)
        self.forget()
        fleet.every(self._signals.scrape_s, self._scrape)
        for when_s in (self._signals.restart_s, self._outage_s[1]):
            if when_s < math.inf:
                fleet.at(when_s, self.forget)

    def forget(self) -> None:
        """Start anew: no picker keeps its ledger over a restart."""
        self.ledgers = [Ledger(model=self._model) for _ in range(self._pickers)]
        self._booked = {}
        self.membership_changed()

    def membership_changed(self) -> None:
        super().membership_changed()
        for ledger in self.ledgers:
            ledger.follow(pod.endpoint for pod in self.fleet.ready)

    def route(self, ticket: Ticket) -> Pod:
        signals, rng, now_s = self._signals, self._rng, self.fleet.now_s
        if self._is_out():
            return super().route(ticket)
        ledger = (
            self.ledgers[rng.randrange(self._pickers)] if self._pickers > 1 else self.ledgers[0]
        )
        tokens = ticket.prompt_tokens * signals.length_bias_ratio
        if signals.length_error_ratio:
            tokens *= 1 + signals.length_error_ratio * rng.uniform(-1, 1)
        by_whom = rng.random()
        if by_whom < signals.unseen_ratio + signals.seen_ratio:
            pod = self._in_turn()
            if by_whom < signals.unseen_ratio:
                return pod
        else:
            pod = self.choose(ticket, ledger, tokens)
            self._booked[ticket.id] = ledger
            if not signals.misplaced_ratio or rng.random() >= signals.misplaced_ratio:
                return pod
            pod = self._in_turn()
        self._booked[ticket.id] = ledger
        self._tell(
            lambda told_s: ledger.add(
                ticket.id, pod.endpoint, tokens=tokens, at_s=now_s, now_s=told_s
            )
        )
        return pod

    def choose(self, ticket: Ticket, ledger: Ledger, tokens: float) -> Pod:
        """Pick and book."""
        start = self._rng.randrange(len(self.fleet.ready))
        picked = pick(ledger, ticket.id, tokens=tokens, now_s=self.fleet.now_s, start=start)
        assert picked is not None  # noqa: S101  # the ledger follows the ready pods
        return self._pods[picked.endpoint]

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        ledger = self._booked.pop(ticket.id, None)
        if ledger is not None:
            at_s, answered = self.fleet.now_s, not math.isnan(ticket.first_s)
            self._tell(
                lambda told_s: ledger.end(
                    ticket.id, pod.endpoint, answered=answered, at_s=at_s, now_s=told_s
                )
            )

    def _in_turn(self) -> Pod:
        self._others_turn += 1
        return self.fleet.ready[self._others_turn % len(self.fleet.ready)]

    def _is_out(self) -> bool:
        return self._outage_s[0] <= self.fleet.now_s < self._outage_s[1]

    def _tell(self, event: Callable[[float], None]) -> None:
        """Deliver an event, unless it is lost; perhaps late, perhaps twice."""
        signals, rng, now_s = self._signals, self._rng, self.fleet.now_s
        if signals.lost_events_ratio and rng.random() < signals.lost_events_ratio:
            return
        doubled = signals.doubled_events_ratio and rng.random() < signals.doubled_events_ratio
        for _ in range(2 if doubled else 1):
            if signals.event_delay_s:
                told_s = now_s + rng.uniform(0, signals.event_delay_s)
                self.fleet.at(told_s, partial(event, told_s))
            else:
                event(now_s)

    def _scrape(self) -> None:
        signals, rng, fleet = self._signals, self._rng, self.fleet
        if self._is_out():
            return
        for pod in fleet.ready:
            if signals.lost_scrapes_ratio and rng.random() < signals.lost_scrapes_ratio:
                continue
            if signals.scrape_takes_s:
                takes_s = rng.uniform(0, signals.scrape_takes_s)
                snapshot_s = fleet.now_s + rng.uniform(0, takes_s)
                fleet.at(snapshot_s, partial(self._snapshot, pod, fleet.now_s, takes_s))
            else:
                self._snapshot(pod, fleet.now_s, 0.0)

    def _snapshot(self, pod: Pod, asked_s: float, takes_s: float) -> None:
        reading = Reading(asked_s=asked_s, answered_s=asked_s + takes_s, outcome=pod.sample())

        def answer() -> None:
            for ledger in self.ledgers:
                ledger.scrape(pod.endpoint, reading)

        if takes_s:
            self.fleet.at(reading.answered_s, answer)
        else:
            answer()

    def _decide(self, observation: Observation) -> None:
        super()._decide(observation)
        memory = self.state.memory
        for ledger in self.ledgers:
            ledger.learn(
                memory.speed_ratio,
                tokens_per_s=memory.rate_tokens_per_s,
                mean_output_tokens=memory.lengths.mean_output_tokens,
            )
