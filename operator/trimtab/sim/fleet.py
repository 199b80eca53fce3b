"""A fleet of simulated engines, stepped from event to event.

The law: nothing happens between two events, so time jumps from one to the next. Events of one
instant happen in the order in which they were planned, which makes every run repeatable bit for
bit. A fleet knows nothing of how requests are routed: a router is asked for every request and
told what became of it, and plans events of its own (scrapes, pushes, clocks).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from trimtab.core.model import Endpoint, Sample
from trimtab.engine_sim.model import Engine, EngineSpec, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Ordered

    from trimtab.workload import Request

COLD_SPEED_RATIO = 0.5  # an engine that has just started compiles and warms its caches
COLD_S = 20.0


class Ending(StrEnum):
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way: asked for, placed, answered."""

    id: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    pod: Pod | None = None
    sequence: Sequence | None = None
    first_s: float = math.nan
    end_s: float = math.nan
    ending: Ending | None = None
    placed: int = 0
    """How often: more than once when a pod crashed under it."""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_s) / (self.output_tokens - 1)


@dataclass(slots=True, eq=False)
class Pod:
    """An engine behind an address, and the requests that a proxy has open to it."""

    index: int
    endpoint: Endpoint
    engine: Engine
    speed: float
    """Of this machine when nothing is wrong with it."""
    pace: float = 1.0
    """What a fault leaves of it."""
    warm: float = 1.0
    ready: bool = True
    known: bool = True
    """Not before it has joined."""
    in_flight: dict[int, Ticket] = field(default_factory=dict)
    step_ends_s: float = 0.0

    def sample(self) -> Sample:
        """What a scrape of this moment would show, in the units of a vLLM page."""
        engine = self.engine
        counters = engine.counters
        return Sample(
            running=engine.running,
            waiting=len(engine.waiting),
            kv_used_ratio=engine.kv_used_ratio,
            kv_capacity_tokens=engine.spec.kv_capacity_tokens,
            steps_total=counters.steps_total,
            prompt_tokens_total=counters.prompt_tokens_total,
            generation_tokens_total=counters.generation_tokens_total,
            finished_total=counters.finished_total,
            finished_prompt_tokens_total=counters.finished_prompt_tokens_total,
            finished_generation_tokens_total=counters.finished_generation_tokens_total,
        )

    @property
    def owed_tokens(self) -> int:
        """Prompt tokens not yet computed and output tokens not yet emitted: the true backlog."""
        engine = self.engine
        return engine.prefill_backlog_tokens + sum(
            ticket.output_tokens - engine.generated_tokens(ticket.sequence)
            for ticket in self.in_flight.values()
            if ticket.sequence is not None
        )


class Router:
    """A way to choose pods. It may plan events of its own when it joins a fleet.

    Routers inherit, so that each says only what it hears.
    """

    fleet: Fleet

    def join(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def route(self, ticket: Ticket) -> Pod:
        """Choose one of the fleet's ready pods; there is at least one."""
        raise NotImplementedError

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        """`pod` is no longer busy with it, for whatever reason."""

    def membership_changed(self) -> None:
        """The set of ready pods is another one."""


class Traffic(Protocol):
    def join(self, fleet: Fleet) -> None:
        """Plan the first arrivals."""

    def ended(self, ticket: Ticket) -> None:
        """A client got its answer, or went away."""


class Fleet:
    """Pods, a router, traffic, and the clock that they share."""

    def __init__(self, speeds: Ordered[float], *, router: Router, spec: EngineSpec) -> None:
        self.now_s = 0.0
        self.spec = spec
        self.pods = [
            Pod(
                index=index,
                endpoint=Endpoint(f"pod-{index}", f"10.0.0.{index}", 8000),
                engine=Engine(spec=spec, speed=speed),
                speed=speed,
            )
            for index, speed in enumerate(speeds)
        ]
        self.ready = list(self.pods)
        self.tickets: list[Ticket] = []
        self.open = 0
        """Requests without an ending: those in flight, and those that traffic still plans."""
        self._router = router
        self._traffic: Traffic | None = None
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._planned = 0
        router.join(self)

    def at(self, when_s: float, action: Callable[[], object]) -> None:
        """Plan an action. Those of one instant happen in the order of planning."""
        self._planned += 1
        heapq.heappush(self._events, (when_s, self._planned, action))

    def every(self, period_s: float, action: Callable[[], None], *, start_s: float = 0.0) -> None:
        """Repeat an action, without drift."""

        def repeat(count: int) -> None:
            action()
            self.at(start_s + (count + 1) * period_s, partial(repeat, count + 1))

        self.at(start_s, partial(repeat, 0))

    def run(self, traffic: Traffic) -> list[Ticket]:
        """Carry on until every request has its ending; the tickets in order of arrival."""
        self._traffic = traffic
        traffic.join(self)
        events = self._events
        while self.open:
            self.now_s, _, action = heapq.heappop(events)
            action()
        return self.tickets

    def arrive(self, prompt_tokens: int, output_tokens: int) -> Ticket:
        """A client asks now. Whoever plans arrivals counts them in `open`."""
        ticket = Ticket(len(self.tickets), self.now_s, prompt_tokens, output_tokens)
        self.tickets.append(ticket)
        self._place(ticket)
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """The client goes away, if it still waits."""
        if ticket.ending is None and ticket.pod is not None and ticket.sequence is not None:
            ticket.pod.engine.abort(ticket.sequence)
            self._end(ticket, Ending.ABORTED)

    def crash(self, pod: Pod) -> None:
        """Lose an engine with all it holds.

        Requests that have shown nothing yet are placed anew, as a proxy's retry does; those that
        stream have failed.
        """
        lost = list(pod.in_flight.values())
        pod.engine = Engine(spec=self.spec)
        self._set_speed(pod, pod.pace, pod.warm)
        self._set_ready(pod, ready=False)
        for ticket in lost:
            if math.isnan(ticket.first_s):
                del pod.in_flight[ticket.id]
                self._router.ended(ticket, pod)
                self._place(ticket)
            else:
                self._end(ticket, Ending.FAILED)

    def start(self, pod: Pod) -> None:
        """A pod begins to serve, cold at first."""
        pod.known = True
        self._set_speed(pod, pod.pace, COLD_SPEED_RATIO)
        self._set_ready(pod, ready=True)
        self.at(self.now_s + COLD_S, lambda: self._set_speed(pod, pod.pace, 1.0))

    def set_pace(self, pod: Pod, pace: float) -> None:
        """From its next iteration on, a pod works at so much of its speed."""
        self._set_speed(pod, pace, pod.warm)

    def leave_out(self, pod: Pod) -> None:
        """A pod that is to join later is not there from the beginning."""
        pod.known = False
        self._set_ready(pod, ready=False)

    def _set_speed(self, pod: Pod, pace: float, warm: float) -> None:
        pod.pace, pod.warm = pace, warm
        pod.engine.speed = pod.speed * pace * warm

    def _set_ready(self, pod: Pod, *, ready: bool) -> None:
        pod.ready = ready
        self.ready = [p for p in self.pods if p.ready]
        self._router.membership_changed()

    def _place(self, ticket: Ticket) -> None:
        if not self.ready:
            self._end(ticket, Ending.FAILED)
            return
        pod = self._router.route(ticket)
        sequence = Sequence(
            id=ticket.id,
            prompt_tokens=ticket.prompt_tokens,
            output_tokens=ticket.output_tokens,
        )
        ticket.pod, ticket.sequence = pod, sequence
        ticket.placed += 1
        pod.in_flight[ticket.id] = ticket
        was_idle = pod.engine.idle
        pod.engine.submit(sequence)
        if was_idle:
            self._begin_step(pod)

    def _begin_step(self, pod: Pod) -> None:
        seconds = pod.engine.begin()
        if seconds:
            pod.step_ends_s = self.now_s + seconds
            self.at(pod.step_ends_s, partial(self._end_step, pod, pod.engine))

    def _end_step(self, pod: Pod, engine: Engine) -> None:
        if pod.engine is not engine:  # crashed within the step
            return
        outcome = engine.end()
        for sequence in outcome.first:
            pod.in_flight[sequence.id].first_s = self.now_s
        for sequence in outcome.finished:
            self._end(pod.in_flight[sequence.id], Ending.FINISHED)
        self._begin_step(pod)

    def _end(self, ticket: Ticket, ending: Ending) -> None:
        ticket.ending = ending
        ticket.end_s = self.now_s
        self.open -= 1
        pod = ticket.pod
        if pod is not None and pod.in_flight.pop(ticket.id, None) is not None:
            self._router.ended(ticket, pod)
        if self._traffic is not None:
            self._traffic.ended(ticket)


class OpenLoop:
    """Clients that do not wait for each other: requests come when they come."""

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        patience_s: Callable[[Request], float] = lambda _: math.inf,
    ) -> None:
        self._requests = list(requests)
        self._patience_s = patience_s

    def join(self, fleet: Fleet) -> None:
        fleet.open += len(self._requests)
        upcoming = iter(self._requests)

        def arrive(request: Request) -> None:
            plan()
            ticket = fleet.arrive(request.prompt_tokens, request.output_tokens)
            patience_s = self._patience_s(request)
            if patience_s < math.inf:
                fleet.at(fleet.now_s + patience_s, partial(fleet.abort, ticket))

        def plan() -> None:
            request = next(upcoming, None)
            if request is not None:
                fleet.at(request.at_s, partial(arrive, request))

        plan()

    def ended(self, ticket: Ticket) -> None:
        pass


class ClosedLoop:
    """Users that read an answer before they ask again, so that slowness holds traffic back."""

    def __init__(
        self, lengths: Iterable[Request], *, users: int, think_s: Callable[[], float]
    ) -> None:
        self._lengths = list(lengths)
        self._users = users
        self._think_s = think_s

    def join(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._upcoming = iter(self._lengths)
        fleet.open += len(self._lengths)
        for _ in range(self._users):
            self._plan()

    def ended(self, ticket: Ticket) -> None:
        del ticket
        self._plan()

    def _plan(self) -> None:
        request = next(self._upcoming, None)
        if request is not None:
            arrive = partial(self._fleet.arrive, request.prompt_tokens, request.output_tokens)
            self._fleet.at(self._fleet.now_s + self._think_s(), arrive)
