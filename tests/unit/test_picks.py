"""The choices of all pools, with pages and time as they are given here."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from trimtab.core.model import (
    Endpoint,
    Failure,
    FailureKind,
    Observation,
    Reading,
    Sample,
    Snapshot,
)
from trimtab.envoy_config import PoolRoute
from trimtab.picks import LOGGED_DECISIONS, TRIES, Picks, TokenSize

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from trimtab.picks import PoolBooks

ROUTE = PoolRoute("pool", picked=True)
A, B, C = ENDPOINTS = [Endpoint(name, f"10.0.0.{n}", 8000) for n, name in enumerate("abc")]
IDLE = Sample(running=0, waiting=0, kv_used_ratio=0.0, kv_capacity_tokens=400_000)


@dataclass
class StillClock:
    """Time passes only while somebody sleeps."""

    time_s: float = 100.0

    def now_s(self) -> float:
        return self.time_s

    async def sleep_until_s(self, then_s: float) -> None:
        await asyncio.sleep(0)
        self.time_s = max(self.time_s, then_s)


@dataclass
class Pages:
    """A scraper that gives what it is told to give, and remembers when it was asked."""

    clock: StillClock
    outcome: dict[Endpoint, Sample | Failure] = field(default_factory=dict)
    asked: list[tuple[float, Endpoint]] = field(default_factory=list)
    broken: bool = False

    async def observe(self, endpoints: Collection[Endpoint]) -> Observation:
        if self.broken:
            raise ZeroDivisionError
        now_s = self.clock.now_s()
        self.asked += [(now_s, endpoint) for endpoint in endpoints]
        return Observation(
            {
                endpoint: Reading(
                    asked_s=now_s, answered_s=now_s, outcome=self.outcome.get(endpoint, IDLE)
                )
                for endpoint in endpoints
            }
        )


async def turn_until(holds: Callable[[], bool]) -> None:
    """Let the loop run: the clock of these tests goes on by that alone."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  # there is no event, and no time passes
            await asyncio.sleep(0)


@dataclass
class Rig:
    picks: Picks
    pages: Pages
    clock: StillClock
    routes: list[PoolRoute]

    @property
    def books(self) -> PoolBooks:
        return self.picks.pools["pool"]

    def follow(self, *endpoints: Endpoint, route: PoolRoute = ROUTE, **avoided: Any) -> None:
        sets = {name: frozenset(each) for name, each in avoided.items()}
        self.picks.follow({route.name: (route, Snapshot(dict.fromkeys(endpoints, 1), **sets))})

    def chosen(self, body_bytes: int | None = 4000) -> Endpoint | None:
        named = self.picks.choose("pool", body_bytes)
        return named[0] if named else None

    async def watch(self, rounds: int) -> None:
        """Let the pages be read until each endpoint was asked so often."""
        goal = len(self.pages.asked) + rounds * len(self.books.endpoints)
        async with self.watching():
            await turn_until(lambda: len(self.pages.asked) >= goal)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.picks.watch())
        yield
        task.cancel()
        await asyncio.wait([task])

    def read(self, endpoint: Endpoint, outcome: Sample | Failure) -> None:
        now_s = self.clock.now_s()
        self.books.take(endpoint, Reading(asked_s=now_s, answered_s=now_s, outcome=outcome))


@pytest.fixture
def rig() -> Rig:
    clock = StillClock()
    pages = Pages(clock)
    routes: list[PoolRoute] = []

    def make_scraper(route: PoolRoute) -> Pages:
        routes.append(route)
        return pages

    made = Rig(Picks(clock, make_scraper), pages, clock, routes)
    made.follow(A, B, C)
    return made


def test_before_anything_is_heard_it_is_of_no_use_to_ask() -> None:
    clock = StillClock()
    picks = Picks(clock, lambda _: Pages(clock))
    assert not picks.ready
    picks.follow({})
    assert picks.ready


def test_a_pool_that_is_not_known_is_left_to_the_weights(rig: Rig) -> None:
    assert rig.picks.choose("other", 100) == ()
    assert rig.picks.unknown_total == 1


def test_requests_at_one_moment_see_each_other(rig: Rig) -> None:
    assert {rig.chosen() for _ in range(3)} == {A, B, C}
    assert rig.books.picks_total == 3


def test_a_burst_of_mixed_requests_is_spread_by_tokens(rig: Rig) -> None:
    """800 at once over 8 idle endpoints: no one is booked 15 % more than the mean."""
    endpoints = [Endpoint(f"p{n}", "10.0.0.9", n) for n in range(8)]
    rig.follow(*endpoints)
    booked: Counter[Endpoint] = Counter()
    for number in range(800):
        size = 48_000 if number % 20 == 7 else 1_000 + 37 * (number % 11)
        chosen = rig.chosen(size)
        assert chosen is not None
        booked[chosen] += size
    assert max(booked.values()) / (sum(booked.values()) / 8) <= 1.15


def test_of_equals_each_has_its_turn(rig: Rig) -> None:
    chosen = []
    for _ in range(3):
        for endpoint in ENDPOINTS:
            rig.read(endpoint, IDLE)
        rig.clock.time_s += 10
        for endpoint in ENDPOINTS:
            rig.read(endpoint, IDLE)
        chosen.append(rig.chosen())
    assert set(chosen) == set(ENDPOINTS)


def test_the_next_best_are_named_too_each_once(rig: Rig) -> None:
    rig.follow(*(Endpoint(f"p{n}", "10.0.0.9", n) for n in range(8)))
    for _ in range(20):
        named = rig.picks.choose("pool", 4000)
        assert len(named) == len(set(named)) == TRIES
        costs = dict(rig.picks.decisions[-1].pick.costs_s)
        assert [costs[e] for e in named] == sorted(costs.values())[:TRIES]


def test_nobody_is_chosen_who_leaves_or_is_not_there(rig: Rig) -> None:
    rig.follow(A, B, C, unreachable=[A], draining=[B])
    assert {rig.chosen() for _ in range(5)} == {C}
    rig.read(C, Failure(FailureKind.REFUSED))
    assert rig.chosen() is None
    rig.follow(A, B, C)
    assert {rig.chosen() for _ in range(9)} == {A, B}


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind is not FailureKind.REFUSED])
def test_only_a_refused_connection_says_that_nobody_is_there(rig: Rig, kind: FailureKind) -> None:
    rig.read(A, Failure(kind))
    assert A in {rig.chosen() for _ in range(3)}


def test_an_endpoint_that_answers_again_is_chosen_again(rig: Rig) -> None:
    rig.read(A, Failure(FailureKind.REFUSED))
    assert A not in {rig.chosen() for _ in range(9)}
    rig.read(A, IDLE)
    assert rig.chosen() == A


def test_an_endpoint_that_left_and_came_back_is_not_taken_for_dead(rig: Rig) -> None:
    rig.read(A, Failure(FailureKind.REFUSED))
    rig.follow(B, C)
    rig.read(A, Failure(FailureKind.REFUSED))  # a page that was asked for before
    rig.follow(A, B, C)
    assert A in {rig.chosen() for _ in range(3)}


def test_what_is_known_outlives_a_change_of_the_pool(rig: Rig) -> None:
    busy = replace(IDLE, running=20, waiting=30)
    rig.read(A, busy)
    rig.follow(A, B)
    assert {rig.chosen() for _ in range(4)} == {B}
    rig.follow(A, B, route=replace(ROUTE, metrics_path="/elsewhere"))
    assert {rig.chosen() for _ in range(4)} == {B}
    assert [route.metrics_path for route in rig.routes] == ["/metrics", "/elsewhere"]


async def test_pages_are_read_evenly_over_the_period(rig: Rig) -> None:
    rig.follow(*(Endpoint(f"p{n}", "10.0.0.9", n) for n in range(10)))
    await rig.watch(3)
    times_s = [at_s for at_s, _ in rig.pages.asked]
    gaps_s = [after - before for before, after in pairwise(times_s)]
    assert max(gaps_s) == pytest.approx(0.05)
    assert min(gaps_s) == pytest.approx(0.05)
    assert len({endpoint for _, endpoint in rig.pages.asked[:10]}) == 10


async def test_of_many_endpoints_each_is_read_less_often(rig: Rig) -> None:
    rig.follow(*(Endpoint(f"p{n}", "10.0.0.9", n) for n in range(200)))
    await rig.watch(2)
    took_s = rig.pages.asked[-1][0] - rig.pages.asked[0][0]
    assert took_s / len(rig.pages.asked) == pytest.approx(0.01, rel=0.01)


async def test_a_slow_endpoint_gets_less(rig: Rig) -> None:
    """Its speed is found from the pages alone: nobody says it."""
    steps = 0.0
    for _ in range(40):
        steps += 20
        for endpoint, factor in ((A, 0.3), (B, 1.0), (C, 1.0)):
            rig.pages.outcome[endpoint] = Sample(
                running=5,
                waiting=0,
                kv_used_ratio=0.1,
                kv_capacity_tokens=400_000,
                steps_total=steps * factor,
                prompt_tokens_total=1000 * steps * factor,
                generation_tokens_total=5 * steps * factor,
            )
        await rig.watch(1)
    assert rig.books.memory.speed_of(A) < 0.5
    shares = Counter(rig.chosen() for _ in range(300))
    assert shares[A] < 0.6 * shares[B]


async def test_a_page_that_cannot_be_taken_in_ends_nothing(rig: Rig) -> None:
    rig.pages.broken = True
    async with rig.watching():
        await turn_until(lambda: rig.books.bugs_total >= 2)
        rig.pages.broken = False
        await turn_until(lambda: bool(rig.pages.asked))
    assert rig.chosen() is not None


async def test_without_a_pool_it_waits_for_one(rig: Rig) -> None:
    rig.picks.follow({})
    begun_s = rig.clock.now_s()
    async with rig.watching():
        await turn_until(lambda: rig.clock.now_s() > begun_s + 1)
        rig.follow(A)
        await turn_until(lambda: bool(rig.pages.asked))


def test_the_log_of_decisions_is_bounded(rig: Rig) -> None:
    for _ in range(LOGGED_DECISIONS + 5):
        rig.chosen()
    assert len(rig.picks.decisions) == LOGGED_DECISIONS
    assert rig.picks.decisions[0].number == 6


# From bytes to tokens


def served(requests: int, tokens_each: int) -> Sample:
    return replace(
        IDLE,
        prompt_tokens_total=float(requests * tokens_each),
        generation_tokens_total=0.0,
        finished_total=float(requests),
    )


def test_a_token_has_four_bytes_until_known_better() -> None:
    assert TokenSize().bytes_per_token == pytest.approx(4)


def test_bytes_of_our_picks_and_tokens_of_the_engines_give_the_size() -> None:
    size = TokenSize()
    for _ in range(1000):
        size.learn_sent(3000)
    assert size.bytes_per_token == pytest.approx(4)  # nothing has come of them yet
    size.learn_done(served(0, 500), served(1000, 500))
    assert size.bytes_per_token == pytest.approx(6, rel=0.02)


def test_bytes_count_as_requests_are_admitted_and_not_before() -> None:
    size = TokenSize()
    for _ in range(1000):
        size.learn_sent(9000)
    size.learn_done(served(0, 1500), served(10, 1500))
    assert size.bytes_per_token == pytest.approx((4000 + 9000) / (1000 + 1500), rel=0.01)


def test_requests_that_came_another_way_do_not_make_tokens_larger() -> None:
    size = TokenSize()
    for _ in range(700):
        size.learn_sent(2000)
    size.learn_done(served(0, 1000), served(1000, 1000))
    assert size.bytes_per_token == pytest.approx(2, rel=0.05)


def test_requests_that_never_came_do_not_pile_up() -> None:
    size = TokenSize()
    for _ in range(100_000):
        size.learn_sent(1 << 20)
    for _ in range(100_000):
        size.learn_sent(2000)
    size.learn_done(served(0, 1000), served(10_000, 1000))
    assert size.bytes_per_token == pytest.approx(2, rel=0.05)


def test_pages_that_do_not_count_say_nothing() -> None:
    size = TokenSize()
    size.learn_sent(9000)
    size.learn_done(IDLE, IDLE)
    size.learn_done(served(5, 10), served(1, 10))  # restarted
    assert size.bytes_per_token == pytest.approx(4)


def test_a_body_of_unknown_size_counts_as_the_mean(rig: Rig) -> None:
    rig.chosen(None)
    assert rig.picks.decisions[-1].tokens == pytest.approx(1000)
