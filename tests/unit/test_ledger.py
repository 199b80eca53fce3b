"""The ledger: true to its law, to the recorded runs, and total on whatever it is told."""

from __future__ import annotations

import gzip
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger_oracle import MODEL, TOKENS_PER_S, Pod, Pool
from trimtab.core import ledger as rules
from trimtab.core.ledger import Basis, EngineModel, Ledger
from trimtab.core.model import Endpoint, Failure, FailureKind, Reading, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDED = Path(__file__).parents[1] / "fixtures" / "ledger"
A, B, C, D = ENDPOINTS = tuple(Endpoint(f"pod-{i}", "10.0.0.1", 8000 + i) for i in range(4))


def reading(
    t0: float, t1: float, *, waiting: float = 0, running: float = 0, kv: float | None = 0.0
) -> Reading:
    ratio = None if kv is None else kv / MODEL.kv_capacity_tokens
    sample = Sample(waiting=waiting, running=running, kv_used_ratio=ratio)
    return Reading(asked_s=t0, answered_s=t1, outcome=sample)


def fresh(*endpoints: Endpoint) -> Ledger:
    ledger = Ledger(model=MODEL, tokens_per_s=TOKENS_PER_S)
    ledger.follow(endpoints)
    return ledger


def state(ledger: Ledger, endpoint: Endpoint, now_s: float) -> tuple[float, ...]:
    """P, K, n, u and the length of q."""
    account = next(a for a in ledger.accounts if a.endpoint == endpoint)
    estimate = ledger.estimate(endpoint, now_s=now_s)
    assert estimate is not None
    return (
        estimate.prefill_tokens,
        estimate.context_tokens,
        estimate.requests,
        account.pace_ratio,
        len(account.owed),
    )


def lines(name: str) -> Iterator[tuple[str, list[str]]]:
    with gzip.open(RECORDED / f"signals-{name}.txt.gz", "rt") as file:
        for line in file:
            kind, *words = line.split()
            yield kind, words


@pytest.mark.parametrize(("name", "states"), [("conv", 5270), ("mix", 4883)])
def test_recorded_signals_give_the_recorded_states(name: str, states: int) -> None:
    ledger, seen, flowed_s, pod = fresh(*ENDPOINTS), 0, 0.0, A
    for kind, words in lines(name):
        if kind == "=":
            expected = tuple(map(float, words))
            assert state(ledger, pod, flowed_s) == pytest.approx(expected, rel=1e-6, abs=1e-6)
            seen += 1
            continue
        pod = ENDPOINTS[int(words[0])]
        if kind == "F":
            flowed_s = float(words[1])
            ledger.flow(flowed_s)
        elif kind == "A":
            tokens, at_s, now_s = map(float, words[2:])
            ledger.add(words[1], pod, tokens=tokens, at_s=at_s, now_s=now_s)
        elif kind == "E":
            at_s, now_s = map(float, words[3:])
            ledger.end(words[1], pod, answered=words[2] == "1", at_s=at_s, now_s=now_s)
        else:
            t0, t1, waiting, running, kv = map(float, words[1:])
            ledger.scrape(pod, reading(t0, t1, waiting=waiting, running=running, kv=kv))
    assert seen == states


@pytest.mark.parametrize("name", ["conv", "mix"])
def test_the_oracle_gives_the_recorded_states(name: str) -> None:
    pool = Pool()
    pods = [Pod(pool) for _ in ENDPOINTS]
    pod = pods[0]
    for kind, words in lines(name):
        if kind == "=":
            got = (pod.p, pod.k, pod.n, pod.u, len(pod.q))
            assert got == pytest.approx(tuple(map(float, words)), rel=1e-6, abs=1e-6)
            continue
        pod = pods[int(words[0])]
        if kind == "F":
            pod.flow(float(words[1]))
        elif kind == "A":
            pod.add(words[1], *map(float, words[2:]))
        elif kind == "E":
            pod.end(words[1], answered=words[2] == "1", at=float(words[3]), now=float(words[4]))
        else:
            t0, t1, waiting, running, kv = map(float, words[1:])
            pod.scrape(t0, t1, int(waiting), int(running), kv)


signals = st.lists(
    st.tuples(
        st.sampled_from("FAAAEECC"),
        st.integers(0, 1),  # pod
        st.integers(0, 15),  # request
        st.floats(0, 0.4),  # time since the last signal
        st.floats(0, 0.3),  # how late it is told
        st.integers(1, 5000),  # tokens
        st.booleans(),  # answered
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 399_999)),
    ),
    max_size=40,
)


@given(signals)
@settings(max_examples=100)
def test_any_signals_give_the_oracles_states(
    told: list[tuple[str, int, int, float, float, int, bool, tuple[int, int, int]]],
) -> None:
    ledger, pool = fresh(A, B), Pool()
    pods = [Pod(pool), Pod(pool)]
    now_s = flowed_s = 1.0
    for kind, index, number, later_s, late_s, tokens, answered, gauges in told:
        pod, endpoint, request = pods[index], ENDPOINTS[index], str(number)
        now_s += later_s
        at_s = now_s - late_s
        if kind == "F":
            flowed_s = now_s
            ledger.flow(now_s)
            for each in pods:
                each.flow(now_s)
        elif kind == "A":
            pods[1 - index].end(request, answered=False, at=at_s, now=now_s)
            pod.add(request, tokens, at_s, now_s)
            ledger.add(request, endpoint, tokens=tokens, at_s=at_s, now_s=now_s)
        elif kind == "E":
            pod.end(request, answered=answered, at=at_s, now=now_s)
            ledger.end(request, endpoint, answered=answered, at_s=at_s, now_s=now_s)
        elif (at_s + now_s) / 2 >= pod.t:
            waiting, running, kv = gauges
            pod.scrape(at_s, now_s, waiting, running, kv)
            ledger.scrape(endpoint, reading(at_s, now_s, waiting=waiting, running=running, kv=kv))
        for each, known in zip(pods, (A, B), strict=True):
            got, until_s = state(ledger, known, flowed_s), max(flowed_s, each.t_p)
            left = max(0.0, each.p - each.rate() * (until_s - each.t_p))
            assert got == pytest.approx((left, each.k, each.n, each.u, len(each.q)))


def test_a_prompt_runs_down_at_the_rate_of_the_engine_formula() -> None:
    ledger = fresh(A)
    ledger.add("r", A, tokens=10_000, at_s=0.0, now_s=0.0)
    step = MODEL.a_tokens + MODEL.c_tokens * 10_000 + MODEL.d_tokens
    rate = TOKENS_PER_S / (1 + step / (2048 - 1))
    assert state(ledger, A, 0.1)[0] == pytest.approx(10_000 - 0.1 * rate)
    assert state(ledger, A, 60.0)[0] == 0


def test_a_slow_endpoint_runs_down_in_proportion() -> None:
    ledger = fresh(A, B)
    ledger.learn({B: 0.5}, tokens_per_s=10_000, mean_output_tokens=200)
    for endpoint in (A, B):
        ledger.add(endpoint, endpoint, tokens=10_000, at_s=0.0, now_s=0.0)
    done_a, done_b = (10_000 - state(ledger, e, 0.1)[0] for e in (A, B))
    assert done_b == pytest.approx(done_a / 2)


def test_what_was_not_measured_changes_nothing() -> None:
    ledger = fresh(A)
    ledger.learn({A: 0.0}, tokens_per_s=math.nan, mean_output_tokens=0)
    assert ledger.tokens_per_s == TOKENS_PER_S
    assert ledger.accounts[0].speed_ratio == 1
    assert ledger.mean_output_tokens == 1


def test_a_full_kv_cache_stops_the_run_down_of_prompts_that_wait() -> None:
    ledger = fresh(A)
    ledger.scrape(A, reading(0.0, 0.0, running=5, waiting=1, kv=0.94 * MODEL.kv_capacity_tokens))
    assert state(ledger, A, 100.0)[0] == 1000


def test_of_an_engine_with_a_full_cache_the_time_lost_does_not_count() -> None:
    """The pace must not learn from a rate of nothing."""
    ledger = fresh(A)
    for now_s in (0.0, 1.0):
        ledger.scrape(A, reading(now_s, now_s, running=5, waiting=1 + now_s, kv=0.94 * 400_000))
    assert ledger.accounts[0].pace_ratio == 1


def test_an_event_told_twice_counts_once() -> None:
    ledger = fresh(A)
    for _ in range(2):
        ledger.add("r", A, tokens=500, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[:3] == (500, 500, 1)
    for _ in range(2):
        ledger.end("r", A, answered=False, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[:3] == (0, 0, 0)


def test_of_requests_without_a_name_each_counts() -> None:
    ledger = fresh(A, B)
    for endpoint in (A, A, B):
        ledger.add(None, endpoint, tokens=100, at_s=1.0, now_s=1.0)
    assert [state(ledger, endpoint, 1.0)[2] for endpoint in (A, B)] == [2, 1]
    ledger.end(None, A, answered=True, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[2] == 2


def test_a_request_that_started_elsewhere_moves_there() -> None:
    """A retry, or a proxy that did not follow the pick."""
    ledger = fresh(A, B)
    ledger.add("r", A, tokens=500, at_s=1.0, now_s=1.0)
    ledger.add("r", B, tokens=400, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[:3] == (0, 0, 0)
    assert state(ledger, B, 1.0)[:3] == (400, 400, 1)
    ledger.end("r", A, answered=True, at_s=1.0, now_s=1.0)
    assert state(ledger, B, 1.0)[2] == 1


def test_an_answered_request_takes_only_its_place_with_it() -> None:
    """It was prefilled, so its prompt has already run down, or others' have."""
    ledger = fresh(A)
    ledger.add("r", A, tokens=500, at_s=1.0, now_s=1.0)
    ledger.end("r", A, answered=True, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[:3] == (500, 0, 0)


def test_a_live_stream_is_never_forgotten() -> None:
    ledger = fresh(A)
    ledger.add("r", A, tokens=500, at_s=0.0, now_s=0.0)
    for second in range(1, 3600):
        ledger.scrape(A, reading(second, second, running=1, kv=500 + 20 * second))
    assert state(ledger, A, 3600.0)[2] == 1
    ledger.end("r", A, answered=True, at_s=3600.0, now_s=3600.0)
    assert state(ledger, A, 3600.0)[2] == 0


def test_a_restarted_engine_owes_nothing() -> None:
    ledger = fresh(A)
    for number in range(50):
        ledger.add(number, A, tokens=2000, at_s=number / 100, now_s=number / 100)
    ledger.scrape(A, reading(1.0, 1.0))
    assert state(ledger, A, 1.0)[:3] == (0, 0, 0)
    assert state(ledger, A, 1.0)[4] == 0


def test_a_restarted_picker_starts_from_the_gauges() -> None:
    ledger = fresh(A)
    ledger.scrape(A, reading(1.0, 1.0, waiting=7, running=3, kv=9000))
    assert state(ledger, A, 1.0)[:3] == (7000, 16_000, 10)


def test_without_a_kv_gauge_the_context_is_counted_by_requests() -> None:
    ledger = fresh(A)
    ledger.scrape(A, reading(1.0, 1.0, running=10, kv=None))
    assert state(ledger, A, 1.0)[1] == 10 * (1000 + 200 / 2)


def test_the_engines_own_capacity_counts() -> None:
    ledger = fresh(A)
    sample = Sample(waiting=0, running=1, kv_used_ratio=0.5, kv_capacity_tokens=10_000)
    ledger.scrape(A, Reading(asked_s=0.0, answered_s=0.0, outcome=sample))
    assert state(ledger, A, 0.0)[1] == 5000


@pytest.mark.parametrize(
    "bad",
    [
        Reading(asked_s=2, answered_s=2, outcome=Failure(FailureKind.TIMED_OUT)),
        reading(2, 2, waiting=math.nan),
        reading(2, 2, running=math.inf),
        reading(2, 2, waiting=-1),
        reading(2, 2, kv=math.nan),
        reading(0.5, 0.5, waiting=9),
    ],
    ids=["failed", "nan", "infinite", "negative", "nan KV", "older than the last"],
)
def test_a_page_without_sense_changes_nothing(bad: Reading) -> None:
    ledger = fresh(A)
    ledger.scrape(A, reading(1, 1, waiting=2, running=3, kv=4000))
    before = state(ledger, A, 1.0)
    ledger.scrape(A, bad)
    assert state(ledger, A, 1.0) == before


def test_strangers_are_ignored() -> None:
    ledger = fresh(A)
    ledger.add("r", B, tokens=500, at_s=1.0, now_s=1.0)
    ledger.end("r", B, answered=True, at_s=1.0, now_s=1.0)
    ledger.scrape(B, reading(1, 1, waiting=2))
    assert ledger.estimate(B, now_s=1.0) is None
    assert state(ledger, A, 1.0)[:3] == (0, 0, 0)


def test_an_endpoint_that_comes_back_starts_with_a_clean_page() -> None:
    ledger = fresh(A, B)
    ledger.add("r", A, tokens=500, at_s=1.0, now_s=1.0)
    ledger.add("s", B, tokens=500, at_s=1.0, now_s=1.0)
    ledger.follow([B])
    ledger.follow([A, B])
    ledger.end("r", A, answered=False, at_s=2.0, now_s=2.0)
    assert state(ledger, A, 1.0)[:3] == (0, 0, 0)
    assert state(ledger, B, 1.0)[:3] == (500, 500, 1)


@pytest.mark.parametrize(
    ("tokens", "booked"), [(math.nan, 1), (-5, 1), (math.inf, 400_000), (10**18, 400_000)]
)
def test_a_length_without_sense_is_bounded(tokens: float, booked: float) -> None:
    ledger = fresh(A)
    ledger.add("r", A, tokens=tokens, at_s=1.0, now_s=1.0)
    assert state(ledger, A, 1.0)[0] == booked


def test_an_event_from_the_future_happens_now() -> None:
    """Or it would stay owed until its time has come, if ever."""
    ledger = fresh(A)
    ledger.add("r", A, tokens=500, at_s=1e9, now_s=1.0)
    ledger.scrape(A, reading(2, 2))
    assert state(ledger, A, 2.0)[:3] == (0, 0, 0)


def test_estimates_say_their_age_and_what_they_rest_on() -> None:
    ledger = fresh(A)

    def told(now_s: float) -> tuple[float, Basis]:
        estimate = ledger.estimate(A, now_s=now_s)
        assert estimate is not None
        return estimate.age_s, estimate.basis

    assert told(5.0) == (math.inf, Basis.NOTHING)
    ledger.add("r", A, tokens=500, at_s=1.0, now_s=1.0)
    assert told(5.0) == (math.inf, Basis.RECKONING)
    ledger.scrape(A, reading(2, 3, running=1))
    assert told(5.0) == (2.5, Basis.GAUGES)
    assert told(15.0) == (12.5, Basis.RECKONING)


def test_memory_is_bounded_when_nothing_ever_ends() -> None:
    ledger = fresh(*ENDPOINTS)
    for number in range(rules.MAX_KNOWN + 1):
        endpoint = ENDPOINTS[number % 8 % 4]
        ledger.add(number, endpoint, tokens=1, at_s=number, now_s=number)
    assert [len(account.owed) for account in ledger.accounts] == [rules.MAX_OWED] * 4
    assert len(ledger._known) == rules.MAX_KNOWN
    ledger.end(0, A, answered=True, at_s=1e6, now_s=1e6)
    assert state(ledger, A, 1e6)[2] == rules.MAX_KNOWN / 4 + 1
    ledger.scrape(A, reading(2e6, 2e6, waiting=1_000_000))
    assert len(ledger.accounts[0].owed) == rules.MAX_OWED


def test_the_pace_never_leaves_its_range() -> None:
    ledger = fresh(A)
    paces = []
    for second in range(1, 60):
        ledger.add(second, A, tokens=30_000, at_s=second - 0.9, now_s=second - 0.9)
        ledger.scrape(A, reading(second, second, waiting=second, running=1))
        paces.append(ledger.accounts[0].pace_ratio)
    assert all(later <= earlier for earlier, later in pairwise(paces))
    assert paces[-1] == rules.PACE_RANGE[0] == 0.5


def test_an_engine_that_is_faster_than_reckoned_is_reckoned_faster_up_to_twice() -> None:
    ledger = fresh(A)
    for second in range(1, 60):
        ledger.add(second, A, tokens=100_000, at_s=second - 0.5, now_s=second - 0.5)
        ledger.scrape(A, reading(second, second, running=1))
    assert ledger.accounts[0].pace_ratio == rules.PACE_RANGE[1] == 2


def test_the_default_costs_are_near_those_of_a_measured_engine() -> None:
    default = EngineModel()
    assert default.a_tokens == pytest.approx(MODEL.a_tokens, rel=0.5)
    assert default.c_tokens == pytest.approx(MODEL.c_tokens, rel=0.5)
    assert default.d_tokens == pytest.approx(MODEL.d_tokens, rel=0.5)
