"""The policies that Trimtab is compared with, as their authors describe them.

The law they break: requests differ in work by three orders of magnitude. Counts of requests
(round robin, least request, shortest queue) do not see it; sums of tokens in flight do not see
what is already done; scraped queues are old when a burst comes.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from trimtab.sim.fleet import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from trimtab.sim.fleet import Fleet, Pod, Ticket

SCORER_SCRAPE_S = 0.05  # default refresh of the Gateway API Inference Extension


def least(pods: Sequence[Pod], cost: Callable[[Pod], float], rng: Random) -> Pod:
    """The cheapest pod; among equals one at random, or an idle fleet would fill its first pod."""
    start = rng.randrange(len(pods))
    return min((*pods[start:], *pods[:start]), key=cost)


class RandomChoice(Router):
    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        return self._rng.choice(self.fleet.ready)


class RoundRobin(Router):
    def __init__(self) -> None:
        self._turn = -1

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        self._turn += 1
        return self.fleet.ready[self._turn % len(self.fleet.ready)]


class LeastRequest(Router):
    """Envoy's LEAST_REQUEST, by its source (load_balancer_impl.cc).

    With equal weights: of two random hosts the one with fewer requests in flight. With unequal
    ones: earliest deadline first, each host's next deadline 1/share later, its share being
    weight/(in flight + 1) at the moment when it is picked. Every change of weights rebuilds the
    schedule and restarts it at the same offset.
    """

    OFFSET = 5  # a balancer draws it once; any value will do, as long as it stays

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._weights: Mapping[Pod, int] = {}
        self._schedule: list[tuple[float, int, Pod]] = []
        self._added = 0

    def publish(self, weights: Mapping[Pod, int]) -> None:
        """Follow other weights. Pods without one weigh 1."""
        self._weights = weights
        self._schedule = []
        pods = self.fleet.ready
        if len({weights.get(pod, 1) for pod in pods}) > 1:
            for pod in pods:
                self._add(pod, 0.0)
            for _ in range(self.OFFSET % len(pods)):
                self._next()

    def membership_changed(self) -> None:
        self.publish(self._weights)

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        if self._schedule:
            return self._next()
        pods = self.fleet.ready
        one, other = self._rng.choice(pods), self._rng.choice(pods)
        return other if len(other.in_flight) < len(one.in_flight) else one

    def _next(self) -> Pod:
        deadline, _, pod = heapq.heappop(self._schedule)
        self._add(pod, deadline)
        return pod

    def _add(self, pod: Pod, now: float) -> None:
        self._added += 1
        share = self._weights.get(pod, 1) / (len(pod.in_flight) + 1)
        heapq.heappush(self._schedule, (now + 1 / share, self._added, pod))


class ShortestQueue(Router):
    """Fewest requests in flight, of all pods and without delay."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        return least(self.fleet.ready, lambda pod: len(pod.in_flight), self._rng)


class TokenCount(Router):
    """Fewest prompt tokens in flight, done or not: the in-flight scorer of endpoint pickers."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._tokens: dict[Pod, int] = {}

    def route(self, ticket: Ticket) -> Pod:
        pod = least(self.fleet.ready, lambda pod: self._tokens.get(pod, 0), self._rng)
        self._tokens[pod] = self._tokens.get(pod, 0) + ticket.prompt_tokens
        return pod

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        self._tokens[pod] -= ticket.prompt_tokens


class QueueKvScorer(Router):
    """The default scorers of the Gateway API Inference Extension: waiting queue and KV use.

    Queue score 1 for the shortest queue, 0 for the longest; KV score 1 - usage; equal weights,
    the highest sum wins.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        self._seen = dict.fromkeys(fleet.pods, (0, 0.0))
        fleet.every(SCORER_SCRAPE_S, self._scrape)

    def route(self, ticket: Ticket) -> Pod:
        del ticket
        queues = [self._seen[pod][0] for pod in self.fleet.ready]
        longest, spread = max(queues), max(queues) - min(queues)

        def penalty(pod: Pod) -> float:
            waiting, kv_used_ratio = self._seen[pod]
            queue_score = (longest - waiting) / spread if spread else 1.0
            return kv_used_ratio - queue_score

        return least(self.fleet.ready, penalty, self._rng)

    def _scrape(self) -> None:
        for pod in self.fleet.pods:
            engine = pod.engine
            self._seen[pod] = len(engine.waiting), engine.kv_used_ratio
