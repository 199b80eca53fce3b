"""The pick: least predicted first token, booked at once."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.ledger import EngineModel, Ledger
from trimtab.core.model import Endpoint, Reading, Sample
from trimtab.core.picking import pick

if TYPE_CHECKING:
    from collections.abc import Iterable

ENDPOINTS = tuple(Endpoint(f"pod-{i}", "10.0.0.1", 8000 + i) for i in range(8))
A, B, C, *_ = ENDPOINTS
MODEL = EngineModel()


def fleet(*samples: Sample) -> Ledger:
    """A ledger of as many endpoints as there are samples, all read at time 0."""
    ledger = Ledger()
    ledger.follow(ENDPOINTS[: len(samples)])
    for endpoint, sample in zip(ENDPOINTS, samples, strict=False):
        ledger.scrape(endpoint, Reading(asked_s=0.0, answered_s=0.0, outcome=sample))
    return ledger


def sample(waiting: float = 0, running: float = 0, kv: float = 0.0) -> Sample:
    return Sample(waiting=waiting, running=running, kv_used_ratio=kv)


def by_hand(  # the law once more, as plainly as it goes
    load: Sample, tokens: float, *, hit: float = 0.0, speed: float = 1.0
) -> float:
    """Cost of an endpoint in tokens."""
    waiting_tokens = 1000 * load.waiting
    n = load.waiting + load.running
    k = (load.kv_used_ratio or 0) * 400_000 + waiting_tokens
    step = MODEL.a_tokens + MODEL.c_tokens * k + MODEL.d_tokens * n
    cost = (waiting_tokens + tokens - 2 * hit) * (1 + step / max(64, 2048 - n))
    cost += max(0, k + tokens - 0.95 * 400_000) * 100 * step / max(1, k)
    cost += max(0, n + 1 - 256) * 100 * step / max(1, n)
    return cost / speed


loads = st.builds(
    sample, waiting=st.integers(0, 40), running=st.integers(0, 300), kv=st.floats(0, 1)
)
fleets = st.lists(loads, min_size=1, max_size=8)
prompts = st.integers(1, 100_000)


@given(fleets, prompts, st.integers(0, 100))
@settings(max_examples=100)
def test_the_cheapest_by_the_law_is_picked_wherever_the_search_begins(
    samples: list[Sample], tokens: int, start: int
) -> None:
    made = pick(fleet(*samples), "r", tokens=tokens, now_s=0.0, start=start)
    assert made is not None
    expected = [by_hand(load, tokens) for load in samples]
    costs_s = dict(made.costs_s)
    rate = Ledger().tokens_per_s
    for endpoint, cost in zip(ENDPOINTS, expected, strict=False):
        assert costs_s[endpoint] == pytest.approx(cost / rate)
    assert made.ttft_s == costs_s[made.endpoint] == min(costs_s.values())


@given(loads, prompts, st.floats(0.1, 0.99), st.sampled_from([0, 1]))
def test_of_two_alike_the_slower_is_never_picked(
    load: Sample, tokens: int, speed: float, cached: int
) -> None:
    ledger = fleet(load, load)
    ledger.learn({A: speed}, tokens_per_s=20_000, mean_output_tokens=200)
    hits = dict.fromkeys((A, B), float(cached * tokens))
    made = pick(ledger, "r", tokens=tokens, now_s=0.0, hit_tokens=hits)
    assert made is not None
    assert made.endpoint == B


@given(loads, st.integers(1, 50), prompts)
def test_more_waiting_never_makes_an_endpoint_cheaper(load: Sample, more: int, tokens: int) -> None:
    longer = sample(load.waiting + more, load.running, load.kv_used_ratio or 0)
    made = pick(fleet(load, longer), "r", tokens=tokens, now_s=0.0, start=1)
    assert made is not None
    assert dict(made.costs_s)[A] < dict(made.costs_s)[B]


def test_the_pick_is_booked_in_the_same_step() -> None:
    ledger = fleet(sample(), sample())
    picked = [pick(ledger, number, tokens=700, now_s=0.0) for number in range(2)]
    assert [made.endpoint for made in picked if made] == [A, B]
    estimate = ledger.estimate(A, now_s=0.0)
    assert estimate is not None
    assert (estimate.prefill_tokens, estimate.requests) == (700, 1)


@pytest.mark.parametrize("start", range(11))
def test_ties_go_to_the_first_met(start: int) -> None:
    made = pick(fleet(*[sample()] * 8), "r", tokens=100, now_s=0.0, start=start)
    assert made is not None
    assert made.endpoint == ENDPOINTS[start % 8]


def test_the_excluded_are_not_picked_and_not_candidates() -> None:
    ledger = fleet(sample(), sample(), sample())
    made = pick(ledger, "r", tokens=100, now_s=0.0, excluded={A, C})
    assert made is not None
    assert [endpoint for endpoint, _ in made.costs_s] == [B]
    assert pick(ledger, "s", tokens=100, now_s=0.0, excluded={A, B, C}) is None


def test_a_pool_without_endpoints_has_no_pick() -> None:
    assert pick(Ledger(), "r", tokens=100, now_s=0.0) is None


def test_the_next_best_come_in_order() -> None:
    made = pick(fleet(sample(3), sample(1), sample(2)), "r", tokens=100, now_s=0.0)
    assert made is not None
    assert [endpoint for endpoint, _ in made.best(2)] == [B, C]


def test_work_runs_down_until_the_pick() -> None:
    ledger = fleet(sample(waiting=2), sample(running=200, kv=0.5))
    first = pick(ledger, "r", tokens=100, now_s=0.0)
    then = pick(ledger, "s", tokens=100, now_s=1.0)
    assert first is not None
    assert then is not None
    assert (first.endpoint, then.endpoint) == (B, A)


def test_run_down_is_counted_from_the_last_look() -> None:
    ledger = Ledger()
    ledger.follow([A])
    late = Reading(asked_s=5.0, answered_s=5.0, outcome=sample(waiting=2))
    ledger.scrape(A, late)
    made = pick(ledger, "r", tokens=100, now_s=5.0)
    assert made is not None
    assert made.ttft_s == pytest.approx(by_hand(sample(waiting=2), 100) / ledger.tokens_per_s)


def test_a_cached_prefix_draws_until_the_queue_costs_more() -> None:
    hits = {B: 3000.0}
    near = pick(fleet(sample(), sample(waiting=5)), "r", tokens=4000, now_s=0, hit_tokens=hits)
    far = pick(fleet(sample(), sample(waiting=7)), "r", tokens=4000, now_s=0, hit_tokens=hits)
    assert near is not None
    assert far is not None
    assert (near.endpoint, far.endpoint) == (B, A)
    rate = Ledger().tokens_per_s
    assert dict(near.costs_s)[A] == pytest.approx(by_hand(sample(), 4000) / rate)
    assert dict(near.costs_s)[B] == pytest.approx(by_hand(sample(waiting=5), 4000, hit=3000) / rate)


def test_a_hit_is_predicted_and_booked_once_though_it_weighs_double() -> None:
    ledger = fleet(sample())
    made = pick(ledger, "r", tokens=4000, now_s=0.0, hit_tokens={A: 3000.0})
    assert made is not None
    assert made.ttft_s == pytest.approx(by_hand(sample(), 1000) / ledger.tokens_per_s)
    estimate = ledger.estimate(A, now_s=0.0)
    assert estimate is not None
    assert estimate.prefill_tokens == 1000


def test_a_hit_neither_helps_others_nor_makes_room() -> None:
    """A prompt whose prefix is cached elsewhere costs all of it; here it waits for KV like any."""
    full = sample(running=10, kv=0.95)
    ledger = fleet(full, sample(waiting=500))
    made = pick(ledger, "r", tokens=4000, now_s=0.0, hit_tokens={A: 3000.0})
    assert made is not None
    assert made.endpoint == A
    rate = ledger.tokens_per_s
    prefill = 1000 * (1 + (300 + 380_000 / 500 + 10 / 3) / (2048 - 10))
    wait = 4000 / 380_000 * 100 * (300 + 380_000 / 500 + 10 / 3)
    assert made.ttft_s == pytest.approx((prefill + wait) / rate)
    assert dict(made.costs_s)[B] == pytest.approx(by_hand(sample(waiting=500), 4000) / rate)


def test_a_prompt_cached_whole_costs_less_than_nothing_but_takes_no_negative_time() -> None:
    ledger = fleet(sample(), sample())
    made = pick(ledger, "r", tokens=4000, now_s=0.0, hit_tokens={B: 4000.0})
    assert made is not None
    assert made.endpoint == B
    assert made.ttft_s == 0
    assert dict(made.costs_s)[B] < 0
    estimate = ledger.estimate(B, now_s=0.0)
    assert estimate is not None
    assert estimate.prefill_tokens == 1


def test_a_prompt_without_length_is_picked_for_all_the_same() -> None:
    made = pick(fleet(sample()), "r", tokens=float("nan"), now_s=0.0)
    assert made is not None
    assert made.ttft_s > 0


def mixed(rng: Random) -> Iterable[int]:
    """Prompts: 95 % short chat, 5 % of 8 to 32 thousand tokens."""
    while True:
        if rng.random() < 0.05:
            yield int(8192 * 4.0 ** rng.uniform(0, 1))
        else:
            yield max(16, min(2048, int(rng.lognormvariate(5.3, 0.9))))


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_spread_evenly(seed: int) -> None:
    """800 at one moment over 8 idle endpoints: the books, not the gauges, must spread them."""
    rng = Random(seed)  # noqa: S311  # traffic, not secrets
    ledger = fleet(*[sample()] * 8)
    for number, tokens in zip(range(800), mixed(rng), strict=False):
        pick(ledger, number, tokens=tokens, now_s=0.0, start=rng.randrange(8))
    owed = [account.prefill_tokens for account in ledger.accounts]
    assert max(owed) / (sum(owed) / 8) <= 1.15
