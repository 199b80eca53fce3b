"""The policies Trimtab is compared with do what their authors say."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import pytest

from trimtab.engine_sim.model import Coefficients, EngineSpec
from trimtab.sim.fleet import ClosedLoop, Fleet, OpenLoop
from trimtab.sim.routers import (
    LeastRequest,
    QueueKvScorer,
    RandomChoice,
    RoundRobin,
    ShortestQueue,
    TokenCount,
)
from trimtab.workload import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.sim.fleet import Router, Ticket

INSTANT = EngineSpec(coefficients=Coefficients(a_s=1e-6, b_s=0.0, c_s=0.0, d_s=0.0))
TEN_MS = EngineSpec(
    coefficients=Coefficients(a_s=0.01, b_s=0.0, c_s=0.0, d_s=0.0), batch_tokens=10_000
)


def _rng(seed: int = 1) -> Random:
    return Random(seed)  # noqa: S311  # traffic, not secrets


def _counts(tickets: Sequence[Ticket]) -> Counter[int]:
    return Counter(ticket.pod.index for ticket in tickets if ticket.pod)


def _one_by_one(router: Router, *, pods: int, count: int) -> Counter[int]:
    fleet = Fleet([1.0] * pods, router=router, spec=INSTANT)
    return _counts(fleet.run(OpenLoop([Request(0.1 * i, 10, 1) for i in range(count)])))


class Weighing(LeastRequest):
    """Fixed weights, published once."""

    def __init__(self, rng: Random, weights: Sequence[int]) -> None:
        super().__init__(rng)
        self._fixed = weights

    def join(self, fleet: Fleet) -> None:
        super().join(fleet)
        self.publish(dict(zip(fleet.pods, self._fixed, strict=True)))


def test_an_earliest_deadline_schedule_follows_the_weights_exactly() -> None:
    """3:1 of requests that never overlap."""
    assert _one_by_one(Weighing(_rng(), [3, 1]), pods=2, count=400) == {0: 300, 1: 100}


def test_under_load_the_schedule_flattens_weights_as_envoys_does() -> None:
    """Weights 1 to 8 with 48 requests in flight, against Envoy 1.40.

    Measured there: 2.07, 1.52, 1.25, 1.10, 1.00, 0.91, 0.85, 0.80 of the share asked for.
    """
    fleet = Fleet([1.0] * 8, router=Weighing(_rng(), range(1, 9)), spec=TEN_MS)
    lengths = [Request(0.0, 10, 10)] * 20_000
    rng = _rng(2)
    users = ClosedLoop(lengths, users=48, think_s=lambda: rng.uniform(0, 0.001))
    counts = _counts(fleet.run(users))
    got = [counts[i] / 20_000 / ((i + 1) / 36) for i in range(8)]
    assert got == pytest.approx([2.07, 1.52, 1.25, 1.10, 1.00, 0.91, 0.85, 0.80], rel=0.1)


def test_publishing_often_restarts_the_schedule_and_distorts_it() -> None:
    """Fewer requests between two pushes than pods: those late in the schedule get nothing."""
    router = Weighing(_rng(), [4, 4, 4, 1])
    fleet = Fleet([1.0] * 4, router=router, spec=INSTANT)
    fleet.every(0.15, lambda: router.publish(dict(zip(fleet.pods, [4, 4, 4, 1], strict=True))))
    counts = _counts(fleet.run(OpenLoop([Request(0.1 * i, 10, 1) for i in range(400)])))
    assert counts[3] == 0


def test_a_new_schedule_starts_at_its_offset() -> None:
    """The heavier of two comes first in the schedule; an odd offset skips it."""
    fleet = Fleet([1.0] * 2, router=Weighing(_rng(), [3, 2]), spec=INSTANT)
    [ticket] = fleet.run(OpenLoop([Request(0.0, 10, 1)]))
    assert ticket.pod is fleet.pods[1]


def test_equal_weights_take_the_emptier_of_two_random_pods() -> None:
    """Alone, a busy pod is chosen only if both draws name it: a quarter of the time."""
    fleet = Fleet([1.0, 1.0], router=LeastRequest(_rng()), spec=TEN_MS)
    rounds = 400
    requests = [r for i in range(rounds) for r in (Request(i, 10, 2), Request(i + 0.001, 10, 2))]
    tickets = fleet.run(OpenLoop(requests))
    same = sum(a.pod is b.pod for a, b in zip(tickets[::2], tickets[1::2], strict=True))
    assert same / rounds == pytest.approx(0.25, abs=0.06)


def test_turns_are_taken_in_order() -> None:
    assert _one_by_one(RoundRobin(), pods=4, count=8) == dict.fromkeys(range(4), 2)


def test_random_choice_is_even_and_repeatable() -> None:
    counts = _one_by_one(RandomChoice(_rng()), pods=4, count=2000)
    assert all(counts[i] == pytest.approx(500, abs=80) for i in range(4))
    assert counts == _one_by_one(RandomChoice(_rng()), pods=4, count=2000)


def test_the_shortest_queue_wins_and_ties_are_broken_at_random() -> None:
    fleet = Fleet([1.0] * 3, router=ShortestQueue(_rng()), spec=TEN_MS)
    tickets = fleet.run(OpenLoop([Request(0.0, 10, 50)] * 3))
    assert _counts(tickets) == {0: 1, 1: 1, 2: 1}
    alone = _one_by_one(ShortestQueue(_rng()), pods=3, count=300)
    assert min(alone[i] for i in range(3)) > 70


def test_tokens_in_flight_decide_and_are_returned_at_the_end() -> None:
    fleet = Fleet([1.0] * 2, router=TokenCount(_rng()), spec=TEN_MS)
    requests = [Request(0.0, 5000, 20), *[Request(0.001 * i, 100, 30) for i in range(1, 6)]]
    tickets = fleet.run(OpenLoop(requests))
    assert tickets[0].pod is not None
    assert _counts(tickets)[tickets[0].pod.index] == 1
    fleet = Fleet([1.0] * 2, router=TokenCount(_rng()), spec=TEN_MS)
    long, *later = fleet.run(OpenLoop([Request(0.0, 9000, 1), *[Request(1.0, 10, 1)] * 100]))
    assert sum(ticket.pod is long.pod for ticket in later) == 50


def test_the_scorer_prefers_the_shorter_queue_until_the_next_scrape() -> None:
    """A burst between two scrapes herds: all of it goes where the queue was short."""
    one_slot = EngineSpec(coefficients=TEN_MS.coefficients, max_sequences=1)
    fleet = Fleet([1.0] * 2, router=QueueKvScorer(_rng()), spec=one_slot)
    fleet.leave_out(fleet.pods[1])
    fleet.at(0.01, lambda: fleet.start(fleet.pods[1]))
    waiting, burst, late = [Request(0.0, 10, 500)] * 3, [Request(0.06, 10, 500)] * 6, 0.11
    tickets = fleet.run(OpenLoop([*waiting, *burst, Request(late, 10, 5)]))
    assert [t.pod.index for t in tickets if t.pod] == [0, 0, 0, *[1] * 6, 0]
