"""The fleet against queueing theory: an engine that does one prompt at a time is a single server."""

from __future__ import annotations

import heapq
import math
import statistics
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import pytest

from trimtab.engine_sim.model import Coefficients, EngineSpec
from trimtab.sim.fleet import Fleet, OpenLoop
from trimtab.sim.routers import RandomChoice, RoundRobin
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trimtab.sim.fleet import Router, Ticket

# 1 ms per prompt token and nothing else; one sequence at a time, and its first output ends it.
SERVER = EngineSpec(
    coefficients=Coefficients(a_s=0.0, b_s=1e-3, c_s=0.0, d_s=0.0),
    batch_tokens=100_000,
    max_sequences=1,
)


def _rng(seed: int) -> Random:
    return Random(seed)  # noqa: S311  # traffic, not secrets


def _poisson(rate_per_s: float, prompts: Sequence[int], *, seed: int) -> Iterator[Request]:
    rng = _rng(seed)
    at_s = 0.0
    for prompt_tokens in prompts:
        at_s += rng.expovariate(rate_per_s)
        yield Request(at_s, prompt_tokens, 1)


def _run(requests: Sequence[Request], router: Router, *, pods: int = 1) -> list[Ticket]:
    return Fleet([1.0] * pods, router=router, spec=SERVER).run(OpenLoop(requests))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_equal_prompts_wait_as_in_md1(load: float) -> None:
    """Mean wait of M/D/1: load/(2*(1 - load)) services."""
    requests = list(_poisson(load, [1000] * 250_000, seed=1))
    wait_s = statistics.fmean(t.ttft_s for t in _run(requests, RoundRobin())) - 1
    assert wait_s == pytest.approx(load / (2 * (1 - load)), rel=0.02)


def test_unequal_prompts_wait_as_in_mg1() -> None:
    """Pollaczek and Khinchine: rate*E[S²]/(2*(1 - load)); one prompt in five is six times as long."""
    rng = _rng(2)
    prompts = [3000 if rng.random() < 0.2 else 500 for _ in range(250_000)]
    load = 0.5
    square_s2 = statistics.fmean((p / 1000) ** 2 for p in prompts)
    rate_per_s = load * 1000 / statistics.fmean(prompts)
    tickets = _run(list(_poisson(rate_per_s, prompts, seed=3)), RoundRobin())
    wait_s = statistics.fmean(t.ttft_s - t.prompt_tokens / 1000 for t in tickets)
    assert wait_s == pytest.approx(rate_per_s * square_s2 / (2 * (1 - load)), rel=0.02)


def test_random_routing_makes_pods_independent_queues() -> None:
    """A Poisson stream split at random is Poisson at each of four pods."""
    load = 0.6
    requests = list(_poisson(4 * load, [1000] * 250_000, seed=4))
    tickets = _run(requests, RandomChoice(_rng(5)), pods=4)
    wait_s = statistics.fmean(t.ttft_s for t in tickets) - 1
    assert wait_s == pytest.approx(load / (2 * (1 - load)), rel=0.02)


def test_taking_turns_with_equal_prompts_is_one_queue_with_four_servers() -> None:
    """Equal services end in the order in which they began, so nobody overtakes: M/D/4 exactly."""
    requests = list(_poisson(3.4, [1000] * 20_000, seed=6))
    free_s = [0.0] * 4
    ends_s = []
    for request in requests:
        start_s = max(request.at_s, heapq.heappop(free_s))
        ends_s.append(start_s + 1)
        heapq.heappush(free_s, start_s + 1)
    tickets = _run(requests, RoundRobin(), pods=4)
    assert [t.end_s for t in tickets] == pytest.approx(ends_s, abs=1e-6)


def test_the_number_inside_is_the_rate_times_the_time_inside() -> None:
    """Little's law, the number being sampled and not summed up from the times."""
    requests = list(_poisson(2.5, [500, 1500] * 10_000, seed=7))
    fleet = Fleet([1.0] * 4, router=RoundRobin(), spec=SERVER)
    inside: list[int] = []
    fleet.every(0.1, lambda: inside.append(sum(len(pod.in_flight) for pod in fleet.pods)))
    tickets = fleet.run(OpenLoop(requests))
    rate_per_s = len(tickets) / fleet.now_s
    sojourn_s = statistics.fmean(t.end_s - t.at_s for t in tickets)
    assert statistics.fmean(inside) == pytest.approx(rate_per_s * sojourn_s, rel=0.005)


def test_first_come_is_first_served() -> None:
    tickets = _run(list(_poisson(0.9, [1000] * 2000, seed=8)), RoundRobin())
    assert all(one.first_s < after.first_s for one, after in pairwise(tickets))
    assert all(math.isclose(t.first_s, t.end_s) for t in tickets)
