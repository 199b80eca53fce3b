"""The whole tick: states, their reasons, and what must hold whatever is observed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import endpoints, failures, observe, samples
from trimtab.core.model import (
    Decision,
    Endpoint,
    EndpointState,
    Failure,
    FailureKind,
    Observation,
    Policy,
    Reading,
    Sample,
    Snapshot,
)
from trimtab.core.step import State, restrict, step

if TYPE_CHECKING:
    from collections.abc import Mapping

A, B, C, D = POOL = endpoints(4)
POLICY = Policy()
LOST = Failure(FailureKind.TIMED_OUT, "500 ms")
REFUSED = Failure(FailureKind.REFUSED)
UNPARSABLE = Failure(FailureKind.UNPARSABLE, "vllm:num_requests_running is missing")


def _page(tick: float, *, speed: float = 1.0, waiting: float = 0.0, running: float = 4) -> Sample:
    """An engine that has worked at this speed since tick 0, with 4 requests/s."""
    return Sample(
        running=running,
        waiting=waiting,
        kv_used_ratio=0.01,
        kv_capacity_tokens=400_000,
        steps_total=1000 + 20 * speed * tick,
        prompt_tokens_total=10_000 * speed * tick,
        generation_tokens_total=80 * speed * tick,
        finished_total=4 * tick,
        finished_prompt_tokens_total=4000 * tick,
        finished_generation_tokens_total=800 * tick,
    )


def _tick(
    state: State, outcomes: Mapping[Endpoint, Sample | Failure], *, at_s: float
) -> tuple[State, Decision]:
    return step(state, observe(outcomes, at_s=at_s), POLICY, now_s=at_s)


def _healthy(seconds: int, speeds: tuple[float, ...] = (1, 1, 1, 1)) -> tuple[State, Decision]:
    """A pool after some time; the state of its last tick, and its decision."""
    state, decision = step(State(), Observation({}), POLICY, now_s=-1.0)
    for tick in range(seconds + 1):
        outcomes = {e: _page(tick, speed=s) for e, s in zip(POOL, speeds, strict=True)}
        state, decision = _tick(state, outcomes, at_s=tick)
    return state, decision


def _states(decision: Decision) -> list[EndpointState]:
    return [decision.endpoints[e].state for e in sorted(decision.endpoints)]


def test_an_empty_pool_has_an_empty_snapshot() -> None:
    state, decision = step(State(), Observation({}), POLICY, now_s=0.0)
    assert decision == Decision(snapshot=state.snapshot, judgement=decision.judgement)
    assert decision.snapshot.weights == {}
    assert decision.judgement is not None
    assert decision.judgement.verdict == "Unknown"


def test_a_healthy_pool_serves_with_equal_weights_and_says_nothing() -> None:
    _, decision = _healthy(20)
    assert decision.snapshot.weights == dict.fromkeys(POOL, 1000)
    assert _states(decision) == [EndpointState.SERVING] * 4
    assert decision.changes == ()


def test_the_report_is_the_straight_line_of_each_endpoint() -> None:
    state, _ = _healthy(20)
    pages = {e: _page(21, waiting=3 if e == A else 0) for e in POOL}
    state, decision = _tick(state, pages, at_s=21)
    report = decision.endpoints[A]
    assert (report.state, report.reason, report.age_s) == (EndpointState.SERVING, "", 0)
    assert (report.running, report.waiting, report.speed_ratio) == (4, 3, 1.0)
    assert report.weight == decision.snapshot.weights[A] < decision.snapshot.weights[B] == 1000
    assert report.backlog_tokens > 3000
    assert report.drain_s == pytest.approx(
        report.backlog_tokens / state.memory.rate_tokens_per_s / report.speed_ratio
    )


def test_a_slow_endpoint_gets_less_and_is_called_so() -> None:
    state, decision = _healthy(8)
    for tick in range(9, 60):
        outcomes = {e: _page(tick) for e in POOL} | {D: _page(tick, speed=0.4)}
        # its counters start lower than the healthy ones left off; that is one restart
        state, decision = _tick(state, outcomes, at_s=tick)
        if decision.changes:
            break
    assert decision.changes == (
        f"engine-3 (10.0.0.4:8000) was Serving, is Slow: {decision.endpoints[D].reason}",
    )
    assert decision.endpoints[D].reason.endswith("of the pool's median speed")
    assert decision.endpoints[D].speed_ratio < 0.75
    assert decision.snapshot.weights[D] < 800


def test_one_lost_page_changes_no_state() -> None:
    state, _ = _healthy(20)
    _, decision = _tick(state, {e: _page(21) for e in POOL} | {A: LOST}, at_s=21)
    assert decision.endpoints[A].state is EndpointState.SERVING
    assert decision.changes == ()


def test_an_endpoint_without_fresh_data_is_stale_at_the_mean_with_the_reason() -> None:
    state, decision = _healthy(20, (1, 1, 1, 0.5))
    for tick in range(21, 32):
        pages = {e: _page(tick, waiting=5) for e in POOL} | {D: UNPARSABLE}
        state, decision = _tick(state, pages, at_s=tick)
    report = decision.endpoints[D]
    assert report.state is EndpointState.STALE
    assert report.reason == (
        "nothing new for 11.0 s; Unparsable: vllm:num_requests_running is missing"
    )
    assert report.drain_s == pytest.approx(decision.endpoints[A].drain_s)
    assert report.backlog_tokens == pytest.approx(
        report.speed_ratio * decision.endpoints[A].backlog_tokens
    )
    assert report.speed_ratio == pytest.approx(0.5, rel=0.2)
    assert decision.changes == (f"engine-3 (10.0.0.4:8000) was Slow, is Stale: {report.reason}",)
    _, decision = _tick(state, {e: _page(32, waiting=5) for e in POOL}, at_s=32)
    assert decision.endpoints[D].state is not EndpointState.STALE


def test_a_page_that_stands_still_at_work_is_stale_although_it_is_fetched() -> None:
    state, decision = _healthy(20)
    for tick in range(21, 32):
        state, decision = _tick(state, {e: _page(tick) for e in POOL} | {A: _page(20)}, at_s=tick)
    assert decision.endpoints[A].state is EndpointState.STALE
    assert "stands still" in decision.endpoints[A].reason


def test_a_newcomer_starts_at_the_mean_and_is_told_stale_until_its_first_page() -> None:
    """An empty newcomer wins every count until it is swamped; one unseen must not look empty."""
    state, _ = _healthy(20)
    pages: dict[Endpoint, Sample | Failure] = {e: _page(21, waiting=50) for e in POOL}
    new = Endpoint("new", "10.0.0.9", 8000)
    _, decision = _tick(state, pages | {new: Failure(FailureKind.DISCONNECTED)}, at_s=21)
    report = decision.endpoints[new]
    assert (report.state, report.speed_ratio, report.age_s) == (EndpointState.STALE, 1.0, math.inf)
    assert report.reason == "never a sample; Disconnected"
    assert report.weight == decision.snapshot.weights[A]


def test_an_endpoint_where_nobody_listens_gets_no_new_work_until_it_answers() -> None:
    state, _ = _healthy(20)
    pages = {e: _page(21) for e in POOL}
    state, decision = _tick(state, pages | {A: REFUSED}, at_s=21)
    assert decision.snapshot.unreachable == {A}
    assert decision.endpoints[A].state is EndpointState.UNREACHABLE
    assert "Unreachable: connection refused" in decision.changes[0]
    state, decision = _tick(state, pages | {A: LOST}, at_s=22)
    assert decision.snapshot.unreachable == {A}, "a time-out does not say that somebody listens"
    _, decision = _tick(state, pages | {A: UNPARSABLE}, at_s=23)
    assert decision.snapshot.unreachable == frozenset(), "an answer does, even a bad one"
    state, decision = _tick(state, {e: _page(24) for e in POOL}, at_s=24)
    assert decision.snapshot.unreachable == frozenset()
    assert decision.changes == ("engine-0 (10.0.0.1:8000) was Unreachable, is Serving",)


def test_work_is_split_among_those_that_listen() -> None:
    state, _ = _healthy(20)
    pages = {B: _page(21), C: _page(21, waiting=40), D: _page(21)}
    _, decision = _tick(state, pages | {A: REFUSED}, at_s=21)
    weights = decision.snapshot.weights
    assert weights[A] == 1
    assert weights[C] < weights[B] == weights[D] == 1000


def test_an_endpoint_that_had_hardly_any_weight_still_leaves_when_nobody_listens() -> None:
    """Its share moves by less than the dead band, but who may get traffic has changed."""
    state, _ = _healthy(20)
    pages = {e: _page(21) for e in POOL}
    state, decision = _tick(state, pages | {A: _page(21, waiting=5000)}, at_s=21)
    assert decision.snapshot.weights[A] < 16
    _, decision = _tick(state, pages | {A: REFUSED}, at_s=21.5)
    assert decision.snapshot.unreachable == {A}


def test_if_nobody_listens_anywhere_nothing_changes() -> None:
    """Refused by all at once is more likely a firewall or a wrong port than the whole pool gone."""
    state, before = _healthy(20)
    state, decision = _tick(state, dict.fromkeys(POOL, REFUSED), at_s=21)
    assert decision.snapshot is before.snapshot
    assert _states(decision) == [EndpointState.SERVING] * 4
    _, decision = _tick(state, {A: _page(22)} | dict.fromkeys((B, C, D), REFUSED), at_s=22)
    assert decision.snapshot.unreachable == {B, C, D}


def test_all_metrics_lost_flattens_the_weights_and_then_holds_them() -> None:
    state, _ = _healthy(30, (1, 1, 1, 0.5))
    pages = {e: _page(31, waiting=40 if e == A else 0) for e in POOL}
    pages[D] = _page(31, speed=0.5)
    state, decision = _tick(state, pages, at_s=31)
    sharp = [decision.snapshot.weights[A]]
    for tick in range(32, 60):
        state, decision = _tick(state, dict.fromkeys(POOL, LOST), at_s=tick)
        sharp.append(decision.snapshot.weights[A])
    assert sharp == sorted(sharp)
    assert sharp[0] < 500 < sharp[5] < sharp[-1]
    assert decision.snapshot.weights == {A: 1000, B: 1000, C: 1000, D: pytest.approx(500, rel=0.1)}
    assert _states(decision) == [EndpointState.STALE] * 4
    held = decision.snapshot
    _, decision = _tick(state, dict.fromkeys(POOL, LOST), at_s=100_000)
    assert decision.snapshot is held


def test_one_frozen_empty_page_does_not_attract_the_pool() -> None:
    """Its page says idle for ever; the others are busy. It must not keep most of the traffic."""
    state, _ = _healthy(10)
    idle = replace(_page(10), running=0, waiting=0, kv_used_ratio=0)
    shares = []
    for tick in range(11, 40):
        pages = {e: _page(tick, waiting=30) for e in POOL} | {A: idle}
        state, decision = _tick(state, pages, at_s=tick)
        weights = decision.snapshot.weights
        shares.append(weights[A] / sum(weights.values()))
    assert max(shares) > 0.5
    assert sum(share > 0.3 for share in shares) <= 5
    assert shares[-1] == pytest.approx(0.25, abs=0.01)


def test_a_hardly_different_table_is_the_snapshot_before() -> None:
    state, before = _healthy(20)
    pages = {e: _page(21) for e in POOL} | {A: replace(_page(21), running=5)}
    _, decision = _tick(state, pages, at_s=21)
    assert decision.snapshot is before.snapshot


def test_equal_tables_have_equal_versions_wherever_they_were_made() -> None:
    """Replicas must not push each other's Envoys back and forth."""
    one, other = Snapshot({A: 1, B: 2}), Snapshot({B: 2, A: 1})
    assert one.version == other.version != Snapshot({A: 2, B: 1}).version
    assert one.version != Snapshot({A: 1, B: 2}, unreachable=frozenset({A})).version


def test_an_endpoint_that_left_is_in_nothing() -> None:
    state, _ = _healthy(20)
    state, decision = _tick(state, {e: _page(21) for e in (A, B)}, at_s=21)
    assert decision.snapshot.weights.keys() == decision.endpoints.keys() == {A, B}
    assert state.memory.tracks.keys() == state.states.keys() == {A, B}


_outcomes = st.one_of(samples, failures)
Ticks: TypeAlias = list[tuple[dict[Endpoint, Sample | Failure], float, float]]
"""What each endpoint answers, seconds since the tick before, age of the answers."""
_ticks = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(POOL), _outcomes),
        st.one_of(st.floats(0, 30), st.sampled_from([0.0, 1.0, -100.0, 1e6])),
        st.floats(0, 2),
    ),
    min_size=1,
    max_size=6,
)


def _replay(ticks: Ticks) -> list[Decision]:
    state, now_s, decisions = State(), 0.0, []
    for outcomes, later_s, age_s in ticks:
        now_s += later_s
        state, decision = _at(state, outcomes, now_s=now_s, age_s=age_s)
        decisions.append(decision)
    return decisions


def _at(
    state: State,
    outcomes: Mapping[Endpoint, Sample | Failure],
    *,
    now_s: float,
    age_s: float = 0.0,
) -> tuple[State, Decision]:
    readings = {
        e: Reading(asked_s=now_s - age_s, answered_s=now_s, outcome=o) for e, o in outcomes.items()
    }
    return step(state, Observation(readings), POLICY, now_s=now_s)


@given(_ticks)
def test_whatever_is_observed_weights_are_bounded_and_numbers_are_numbers(ticks: Ticks) -> None:
    """Counters may go anywhere, clocks too: no NaN, no negative or infinite backlog, no zero."""
    for (outcomes, _, _), decision in zip(ticks, _replay(ticks), strict=True):
        weights = decision.snapshot.weights
        assert weights.keys() == decision.endpoints.keys() == outcomes.keys()
        assert all(1 <= weight <= 1000 for weight in weights.values())
        assert not weights or max(weights.values()) == 1000
        assert decision.snapshot.unreachable <= weights.keys()
        assert not weights or decision.snapshot.unreachable != weights.keys()
        for endpoint, report in decision.endpoints.items():
            assert report.weight == weights[endpoint]
            for number in (report.backlog_tokens, report.drain_s):
                assert math.isfinite(number)
                assert number >= 0
            assert 0.1 <= report.speed_ratio <= 4
            assert report.age_s >= 0
            assert bool(report.reason) == (report.state is not EndpointState.SERVING)


@given(_ticks)
def test_the_order_of_endpoints_in_an_observation_does_not_matter(ticks: Ticks) -> None:
    backwards = [(dict(reversed(outcomes.items())), dt, age) for outcomes, dt, age in ticks]
    assert _replay(backwards) == _replay(ticks)


@given(_ticks)
def test_the_same_observation_again_changes_nothing(ticks: Ticks) -> None:
    state, now_s = State(), 0.0
    for outcomes, later_s, age_s in ticks:
        now_s += later_s
        state, decision = _at(state, outcomes, now_s=now_s, age_s=age_s)
        state, again = _at(state, outcomes, now_s=now_s, age_s=age_s)
        assert again == replace(decision, changes=())
        assert again.snapshot is decision.snapshot


@given(_ticks, st.sampled_from(FailureKind))
def test_with_age_every_pool_comes_down_to_its_speeds(ticks: Ticks, kind: FailureKind) -> None:
    state, now_s = State(), 0.0
    for outcomes, later_s, age_s in ticks:
        now_s += later_s
        state, _ = _at(state, outcomes, now_s=now_s, age_s=age_s)
    lost = {e: Failure(kind) for e in ticks[-1][0]}
    state, decision = _at(state, lost, now_s=now_s + 3600)
    speeds = {e: report.speed_ratio for e, report in decision.endpoints.items()}
    listening = speeds.keys() - decision.snapshot.unreachable
    best = max((speeds[e] for e in listening), default=1.0)
    total = sum(decision.snapshot.weights[e] for e in listening)
    for endpoint in listening:
        share = decision.snapshot.weights[endpoint] / total
        fair = speeds[endpoint] / best / sum(speeds[e] / best for e in listening)
        assert share == pytest.approx(fair, abs=0.03 / len(listening))


@given(st.lists(samples, min_size=2, max_size=4), st.floats(1, 1e6))
def test_more_waiting_never_earns_more_weight(pages: list[Sample], more: float) -> None:
    """Of two endpoints alike but for the queue, the longer queue never has the larger weight."""
    pool = endpoints(len(pages) + 1)
    longer = replace(pages[0], waiting=pages[0].waiting + more)
    outcomes = dict(zip(pool, [*pages, longer], strict=True))
    _, decision = _tick(State(), outcomes, at_s=0)
    assert decision.snapshot.weights[pool[-1]] <= decision.snapshot.weights[pool[0]]


# Who is asked to leave


def _draining(
    state: State, outcomes: Mapping[Endpoint, Sample | Failure], leaving: set[Endpoint], at_s: float
) -> tuple[State, Decision]:
    seen = replace(observe(outcomes, at_s=at_s), draining=frozenset(leaving))
    return step(state, seen, POLICY, now_s=at_s)


def test_who_is_asked_to_leave_gets_no_new_work_and_is_still_watched() -> None:
    state, _ = _healthy(5)
    pages = {e: _page(6, waiting=9 if e == D else 0) for e in POOL}
    _, decision = _draining(state, pages, {D}, at_s=6)
    assert decision.snapshot.weights.keys() == {A, B, C}
    assert decision.snapshot.draining == {D}
    report = decision.endpoints[D]
    assert (report.state, report.weight, report.waiting) == (EndpointState.DRAINING, 0, 9)
    assert report.backlog_tokens > 10 * decision.endpoints[A].backlog_tokens
    assert "asked to leave" in decision.changes[0]


def test_who_drained_and_is_gone_is_forgotten() -> None:
    state, _ = _healthy(5)
    state, before = _draining(state, {e: _page(6) for e in POOL}, {D}, at_s=6)
    _, after = _tick(state, {e: _page(7) for e in (A, B, C)}, at_s=7)
    assert after.snapshot == replace(before.snapshot, draining=frozenset())


def test_the_backlog_of_who_leaves_does_not_move_the_others_weights() -> None:
    state, _ = _healthy(5)
    calm, busy = (
        _draining(state, {e: _page(6, waiting=w if e == D else 0) for e in POOL}, {D}, at_s=6)[1]
        for w in (0, 500)
    )
    assert calm.snapshot.weights == busy.snapshot.weights


def test_who_leaves_and_listens_no_more_does_not_make_the_others_unreachable() -> None:
    state, _ = _healthy(5)
    outcomes: dict[Endpoint, Sample | Failure] = {**dict.fromkeys(POOL, REFUSED), B: _page(6)}
    _, decision = _draining(state, outcomes, {C, D}, at_s=6)
    assert decision.snapshot.unreachable == {A}
    _, decision = _draining(state, {A: REFUSED, D: _page(6)}, {D}, at_s=6)
    assert decision.snapshot.unreachable == set()


def test_a_pool_of_which_all_leave_serves_nobody_new() -> None:
    state, _ = _healthy(5)
    _, decision = _draining(state, {e: _page(6) for e in POOL}, set(POOL), at_s=6)
    assert decision.snapshot == Snapshot({}, draining=frozenset(POOL))


def test_who_left_is_taken_out_between_two_ticks() -> None:
    state, decision = _healthy(5)
    after = restrict(state, {A, B}, {C}).snapshot
    assert after.weights == {e: decision.snapshot.weights[e] for e in (A, B)}
    assert after.draining == {C}
    again = restrict(restrict(state, {A, B}, {C}), {A}, set()).snapshot
    assert set(again.weights) == {A}
    assert again.draining == frozenset()


def test_who_is_new_waits_for_the_next_tick() -> None:
    state, _ = _healthy(5)
    new = Endpoint("new", "10.0.0.9", 8000)
    assert restrict(state, {*POOL, new}, set()) is state
    assert restrict(State(), POOL, {new}) == State()


def test_an_unreachable_endpoint_that_left_is_not_kept() -> None:
    state, _ = _healthy(5)
    state, decision = _tick(state, {**{e: _page(6) for e in POOL}, D: REFUSED}, at_s=6)
    assert decision.snapshot.unreachable == {D}
    assert restrict(state, {A, B, C}, set()).snapshot.unreachable == set()
