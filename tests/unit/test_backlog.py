"""From pages over time to what endpoints owe, how fast they are, and how old the news is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from strategies import endpoints, observe
from trimtab.core.backlog import (
    RATE_TOKENS_PER_S,
    Lengths,
    Memory,
    arriving_tokens,
    backlog_tokens,
    estimate,
    levels,
)
from trimtab.core.model import Failure, FailureKind, Observation, Policy, Reading, Sample
from trimtab.engine_sim.model import Engine, Sequence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.core.model import Endpoint

A, B, C, D = endpoints(4)
POLICY = Policy()
LOST = Failure(FailureKind.TIMED_OUT)
IDLE = Sample(
    running=0,
    waiting=0,
    kv_used_ratio=0,
    kv_capacity_tokens=400_000,
    steps_total=100,
    prompt_tokens_total=10_000,
    generation_tokens_total=2000,
    finished_total=10,
    finished_prompt_tokens_total=10_000,
    finished_generation_tokens_total=2000,
)
BUSY = replace(IDLE, running=4, waiting=2, kv_used_ratio=0.01)


def _take(
    memory: Memory,
    outcomes: Mapping[Endpoint, Sample | Failure],
    *,
    at_s: float,
    weights: Mapping[Endpoint, int] | None = None,
) -> Memory:
    return estimate(
        memory,
        observe(outcomes, at_s=at_s),
        POLICY,
        now_s=at_s,
        weights=weights or dict.fromkeys(outcomes, 1000),
    )


def _worked(
    sample: Sample, *, steps: float, prompt: float = 0, output: float = 0, finished: float = 0
) -> Sample:
    """The page later: so many iterations, tokens and finished requests of the usual length."""

    def plus(before: float | None, more: float) -> float | None:
        return None if before is None else before + more

    return replace(
        sample,
        steps_total=plus(sample.steps_total, steps),
        prompt_tokens_total=plus(sample.prompt_tokens_total, prompt),
        generation_tokens_total=plus(sample.generation_tokens_total, output),
        finished_total=plus(sample.finished_total, finished),
        finished_prompt_tokens_total=plus(sample.finished_prompt_tokens_total, 1000 * finished),
        finished_generation_tokens_total=plus(
            sample.finished_generation_tokens_total, 200 * finished
        ),
    )


def _run(
    speeds: Mapping[Endpoint, float],
    seconds: int,
    *,
    start: Sample = BUSY,
    memory: Memory | None = None,
    from_s: float = 0.0,
) -> Memory:
    """Endpoints busy at these speeds: 20 iterations a second at speed 1, all counters moving."""
    memory = memory or Memory()
    samples = dict.fromkeys(speeds, start)
    for tick in range(seconds + 1):
        memory = _take(memory, samples, at_s=from_s + tick)
        samples = {
            e: _worked(samples[e], steps=20 * s, prompt=10_000 * s, output=80 * s)
            for e, s in speeds.items()
        }
    return memory


def test_backlog_is_queued_prompts_and_a_little_of_the_decoding_to_come() -> None:
    sample = Sample(running=3, waiting=2, kv_used_ratio=0.5, kv_capacity_tokens=8000)
    prior = Lengths()
    expected = 1000 * 2 + 0.1 * 200 * ((4000 + 1000 * 2) / 500 + (3 + 2) / 3)
    assert backlog_tokens(sample, prior) == pytest.approx(expected)


def test_an_engine_without_a_cache_gauge_holds_mean_requests() -> None:
    told = Sample(running=3, waiting=2, kv_used_ratio=0.5, kv_capacity_tokens=2 * 3 * 1100)
    assert backlog_tokens(Sample(running=3, waiting=2), Lengths()) == pytest.approx(
        backlog_tokens(told, Lengths())
    )


def test_lengths_are_learned_from_what_finished_against_a_prior_of_ten_requests() -> None:
    later = replace(
        BUSY,
        finished_total=20,
        finished_prompt_tokens_total=10_000 + 10 * 3000,
        finished_generation_tokens_total=2000 + 10 * 400,
    )
    memory = _take(_take(Memory(), {A: BUSY}, at_s=0), {A: later}, at_s=1)
    assert memory.lengths.mean_input_tokens == pytest.approx(2000, rel=1e-3)
    assert memory.lengths.mean_output_tokens == pytest.approx(300, rel=1e-3)


def test_lengths_follow_the_traffic() -> None:
    """A mean over all time would be deaf to a new kind of request after a busy week."""
    lengths, page = Lengths(), BUSY
    for tokens in (3000,) * 200 + (500,) * 200:
        more = replace(
            page,
            finished_total=(page.finished_total or 0) + 100,
            finished_prompt_tokens_total=(page.finished_prompt_tokens_total or 0) + 100 * tokens,
        )
        lengths, page = lengths.learn(page, more), more
    assert lengths.mean_input_tokens == pytest.approx(500 + 2500 * math.exp(-4), rel=0.01)


def test_lengths_stay_usable_when_an_engine_counts_requests_without_tokens() -> None:
    lengths = Lengths()
    for _ in range(20):
        lengths = lengths.learn(BUSY, replace(BUSY, finished_total=100_000))
    assert lengths.mean_input_tokens == lengths.mean_output_tokens == 1.0
    assert Lengths().learn(BUSY, replace(BUSY, finished_prompt_tokens_total=None)) == Lengths()


def test_speed_is_work_over_busy_time_against_the_median() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.4, D: 2.0}, 60)
    assert memory.speed_ratio == pytest.approx({A: 1.0, B: 1.0, C: 0.4, D: 2.0}, rel=0.01)
    kv_tokens = 4000
    expected = 20 * (300 + kv_tokens / 500) + 10_000 + 80 / 3
    assert memory.rate_tokens_per_s == pytest.approx(expected)


def test_a_fall_to_0_4_is_seen_within_five_seconds() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 1.0}, 60)
    last = memory.tracks[C].sample
    memory = _run({A: 1.0, B: 1.0, C: 0.4}, 5, start=last, memory=memory, from_s=60)
    assert memory.speed_of(C) < 0.8
    assert memory.speed_of(A) == memory.speed_of(B) == 1.0


def test_within_a_fifth_of_the_median_speed_is_one() -> None:
    """Without the dead band, wrong constants make an emptier endpoint look slow, and then slower."""
    memory = _run({A: 1.0, B: 0.85, C: 1.15}, 60)
    assert memory.speed_ratio == {A: 1.0, B: 1.0, C: 1.0}


def test_speed_is_bounded() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.001, D: 50.0}, 200)
    assert memory.speed_of(C) == 0.1
    assert memory.speed_of(D) == 4.0


def test_one_endpoint_alone_has_no_speed_but_a_rate() -> None:
    memory = _run({A: 0.4}, 30)
    assert memory.speed_ratio == {A: 1.0}
    assert memory.rate_tokens_per_s != RATE_TOKENS_PER_S


def test_an_endpoint_left_alone_keeps_its_speed() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.4}, 60)
    page = _worked(memory.tracks[C].sample, steps=8, prompt=4000, output=32)
    assert _take(memory, {C: page}, at_s=61).speed_ratio == {C: memory.speed_of(C)}


def test_a_second_of_work_does_not_count_for_the_median() -> None:
    """One odd interval of a newcomer must not make everybody else look slow."""
    memory = _run({A: 1.0}, 30)
    pages = {A: memory.tracks[A].sample, B: BUSY}
    for tick in (31, 32):
        pages[A] = _worked(pages[A], steps=20, prompt=10_000, output=80)
        memory = _take(memory, pages, at_s=tick)
        pages[B] = _worked(pages[B], steps=100, prompt=50_000, output=400)
    assert memory.speed_ratio == {A: 1.0, B: 1.0}


def test_an_endpoint_called_slow_is_forgiven_while_it_is_idle() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.4}, 60)
    samples = {e: track.sample for e, track in memory.tracks.items()}
    slow_s = 0
    while memory.speed_of(C) < 1 and slow_s < 600:
        slow_s += 1
        samples = {e: _worked(samples[e], steps=20, prompt=10_000, output=80) for e in (A, B)}
        samples[C] = replace(memory.tracks[C].sample, running=0, waiting=0)
        memory = _take(memory, samples, at_s=60 + slow_s)
    assert 10 < slow_s < 200


def test_iterations_are_worked_out_where_an_engine_counts_only_tokens() -> None:
    """Two endpoints, the second half as fast; neither tells its iterations."""
    start = replace(BUSY, steps_total=None)
    memory = _run({A: 1.0, B: 1.0, C: 0.5}, 60, start=start)
    assert memory.speed_of(C) == pytest.approx(0.5, rel=0.01)


def test_an_engine_that_counts_no_tokens_has_speed_one() -> None:
    start = replace(BUSY, prompt_tokens_total=None)
    assert _run({A: 1.0, B: 0.3}, 30, start=start).speed_ratio == {A: 1.0, B: 1.0}


def test_engines_that_do_no_work_have_no_rate() -> None:
    start = replace(BUSY, steps_total=None)
    memory = Memory()
    for tick in range(10):
        memory = _take(memory, {A: start, B: start}, at_s=tick)
    assert memory.rate_tokens_per_s == RATE_TOKENS_PER_S
    assert memory.speed_ratio == {A: 1.0, B: 1.0}


def test_a_long_prompt_alone_in_the_batch_does_not_look_slow() -> None:
    """No token comes out for 4 s, then all the work shows at once: the interval stays open."""
    memory = _run({A: 1.0, B: 1.0, C: 1.0}, 60)
    samples = {e: track.sample for e, track in memory.tracks.items()}
    for tick in range(1, 5):
        samples |= {e: _worked(samples[e], steps=20, prompt=10_000, output=80) for e in (A, B)}
        memory = _take(memory, samples, at_s=60 + tick)
        assert memory.speed_of(C) == 1.0
    samples |= {e: _worked(samples[e], steps=20, prompt=10_000, output=80) for e in (A, B)}
    samples[C] = _worked(samples[C], steps=1, prompt=75_000, output=1)
    memory = _take(memory, samples, at_s=65)
    assert memory.speed_of(C) == 1.0
    assert memory.tracks[C].busy_s == pytest.approx(memory.tracks[A].busy_s, rel=0.1)


def test_a_page_that_thaws_after_a_long_time_says_nothing_about_speed() -> None:
    memory = _run({A: 1.0, B: 1.0}, 20)
    samples = {e: track.sample for e, track in memory.tracks.items()}
    for tick in range(1, 15):
        samples[A] = _worked(samples[A], steps=20, prompt=10_000, output=80)
        memory = _take(memory, samples, at_s=20 + tick)
    before = memory.tracks[B]
    samples[B] = _worked(samples[B], steps=1)
    memory = _take(memory, samples, at_s=35)
    assert memory.tracks[B].busy_s == before.busy_s
    assert memory.tracks[B].base == samples[B]


@pytest.mark.parametrize("slow", [0.4, 0.6])
def test_speed_of_simulated_engines_is_found(slow: float) -> None:
    """The real scheduler, with constants that are wrong for it by up to a third."""
    engines = {e: Engine(speed=slow if e == D else 1.0) for e in (A, B, C, D)}
    memory, number = Memory(), 0
    ends = dict.fromkeys(engines, 0.0)
    for tick in range(1, 41):
        for endpoint, engine in engines.items():
            for _ in range(max(1, round(6 * engine.speed))):
                number += 1
                engine.submit(Sequence(number, 300 + 700 * (number % 3), 50 + 100 * (number % 2)))
            while ends[endpoint] < tick:
                ends[endpoint] += engine.begin() or tick - ends[endpoint]
                if not engine.idle:
                    engine.end()
        memory = _take(memory, {e: _page_of(engine) for e, engine in engines.items()}, at_s=tick)
    assert memory.speed_of(D) == pytest.approx(slow, rel=0.15)
    assert [memory.speed_of(e) for e in (A, B, C)] == [1.0, 1.0, 1.0]


def _page_of(engine: Engine) -> Sample:
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


def _arrivals(before: Sample, after: Sample, *, after_s: float = 1.0) -> float:
    memory = _take(_take(Memory(), {A: before}, at_s=0), {A: after}, at_s=after_s)
    return memory.tracks[A].arrivals


def test_arrivals_are_what_finished_and_what_more_is_in_flight() -> None:
    after = replace(_worked(BUSY, steps=20, finished=5), running=6, waiting=3)
    assert _arrivals(BUSY, after) == 5 + 2 + 1


def test_aborted_requests_do_not_make_negative_arrivals() -> None:
    assert _arrivals(BUSY, replace(_worked(BUSY, steps=20), running=0, waiting=0)) == 0


def test_without_finished_requests_arrivals_are_counted_in_mean_prompts() -> None:
    before = replace(BUSY, finished_total=None)
    after = replace(_worked(before, steps=20, prompt=3500), waiting=4)
    assert _arrivals(before, after) == pytest.approx(3.5 + 2)


def test_without_any_counter_requests_are_taken_to_last_ten_seconds() -> None:
    before = Sample(running=4, waiting=1)
    assert _arrivals(before, Sample(running=5, waiting=3), after_s=2.0) == pytest.approx(1 + 2 + 1)


def test_the_faster_average_of_arrivals_counts() -> None:
    """8 requests/s for 60 s after idling, then a burst, then nothing: flat at once, sharp later."""
    memory, sample = Memory(), BUSY
    seen: list[float] = []
    for tick in range(90):
        memory = _take(memory, {A: sample}, at_s=tick)
        seen.append(arriving_tokens(memory, [A], horizon_s=1.0))
        arrivals = 8 if tick < 60 else 40 if tick < 62 else 0
        sample = _worked(sample, steps=20, finished=arrivals)
    request_tokens = 1000 + 0.1 * 200 * (1100 / 500 + 1 / 3)
    assert seen[60] == pytest.approx(8 * request_tokens, rel=0.01)
    assert seen[62] > 30 * request_tokens
    assert seen[66] == pytest.approx(10 * request_tokens, rel=0.1)  # the slow one, after the fast


def test_the_horizon_scales_what_will_arrive() -> None:
    memory = _run({A: 1.0}, 3)
    memory = _take(memory, {A: _worked(memory.tracks[A].sample, steps=1, finished=9)}, at_s=4)
    assert arriving_tokens(memory, [A, B], horizon_s=3.0) == pytest.approx(
        3 * arriving_tokens(memory, [A], horizon_s=1.0)
    )


def test_a_lost_page_ages_what_is_known_and_loses_no_arrivals() -> None:
    memory = _take(Memory(), {A: BUSY}, at_s=0)
    memory = _take(memory, {A: LOST}, at_s=1)
    assert memory.tracks[A].news_age_s == 1
    memory = _take(memory, {A: _worked(BUSY, steps=40, finished=6)}, at_s=2)
    assert memory.tracks[A].arrivals == 6
    assert memory.tracks[A].news_age_s == 0


def test_an_endpoint_that_was_never_heard_from_is_not_remembered() -> None:
    assert _take(Memory(), {A: LOST}, at_s=0).tracks == {}


def test_an_endpoint_that_left_is_forgotten() -> None:
    memory = _take(_run({A: 1.0, B: 1.0}, 10), {A: BUSY}, at_s=11)
    assert memory.tracks.keys() == memory.speed_ratio.keys() == {A}


def test_the_age_of_a_page_is_from_the_middle_of_its_request() -> None:
    reading = Reading(asked_s=9.0, answered_s=9.4, outcome=BUSY)
    memory = estimate(Memory(), Observation({A: reading}), POLICY, now_s=10.0, weights={})
    assert memory.tracks[A].news_age_s == pytest.approx(0.8)


@pytest.mark.parametrize(
    "counter",
    [
        "steps_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "finished_total",
        "finished_prompt_tokens_total",
        "finished_generation_tokens_total",
    ],
)
def test_a_restarted_engine_starts_over_and_keeps_its_averages(counter: str) -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.5}, 30)
    before = memory.tracks[C]
    reset = replace(_worked(before.sample, steps=20), **{counter: 0.0})
    memory = _take(memory, {A: LOST, B: LOST, C: reset}, at_s=31)
    after = memory.tracks[C]
    assert (after.sample, after.base, after.arrivals) == (reset, reset, 0)
    assert (after.done_tokens, after.busy_s) == (before.done_tokens, before.busy_s)
    assert after.slow_arrivals_per_s == before.slow_arrivals_per_s


def test_counters_that_appear_or_vanish_are_not_compared() -> None:
    bare = replace(BUSY, generation_tokens_total=None)
    for before, after in ((BUSY, bare), (bare, BUSY)):
        assert _arrivals(before, replace(after, finished_total=500)) == 0


def test_a_long_silence_says_nothing_about_the_time_between() -> None:
    memory = _run({A: 1.0, B: 1.0}, 10)
    later = _worked(memory.tracks[A].sample, steps=1, finished=5000)
    after = _take(memory, {A: later}, at_s=10 + 8.5).tracks[A]
    assert after.arrivals == 0
    assert after.busy_s == memory.tracks[A].busy_s


def test_the_same_page_twice_is_one_page() -> None:
    once = _take(_run({A: 1.0, B: 1.0}, 10), {A: BUSY, B: BUSY}, at_s=10.5)
    again = _take(once, {A: BUSY, B: BUSY}, at_s=10.5)
    assert {e: replace(t, arrivals=0.0) for e, t in once.tracks.items()} == again.tracks


def test_a_clock_that_steps_back_costs_one_page_and_nothing_else() -> None:
    memory = _run({A: 1.0, B: 1.0}, 10)
    sample = memory.tracks[A].sample
    for tick in range(1, 4):
        sample = _worked(sample, steps=20, prompt=10_000, output=80, finished=3)
        memory = _take(memory, {A: sample, B: LOST}, at_s=-5000 + tick)
    assert memory.tracks[A].news_age_s == 0
    assert memory.tracks[A].arrivals == 3
    assert memory.tracks[B].news_age_s == 2  # the step itself counts as no time


def test_a_page_that_stands_still_while_requests_run_is_as_old_as_its_last_move() -> None:
    memory = _run({A: 1.0, B: 1.0}, 10)
    frozen = memory.tracks[A].sample
    for tick in range(1, 6):
        memory = _take(memory, {A: frozen}, at_s=10 + tick)
        assert memory.tracks[A].news_age_s == tick
    moved = replace(frozen, waiting=frozen.waiting + 1)
    assert _take(memory, {A: moved}, at_s=16).tracks[A].news_age_s == 0


def test_an_engine_that_does_not_count_iterations_may_stand_still() -> None:
    still = replace(BUSY, steps_total=None)
    memory = Memory()
    for tick in range(30):
        memory = _take(memory, {A: still}, at_s=tick)
    assert memory.tracks[A].news_age_s == 0


def _beside_traffic(page: Sample, seconds: int) -> Memory:
    """A page that never moves, beside an endpoint of equal weight that gets 4 requests/s."""
    memory, other = Memory(), BUSY
    for tick in range(seconds + 1):
        memory = _take(memory, {A: page, B: other}, at_s=tick)
        other = _worked(other, steps=20, prompt=4000, output=80, finished=4)
    return memory


@pytest.mark.parametrize("page", [IDLE, replace(BUSY, steps_total=None)])
def test_a_page_without_the_requests_that_must_have_come_is_old(page: Sample) -> None:
    """A frozen "empty" would otherwise look fresh for ever and draw the whole pool's traffic."""
    assert _beside_traffic(page, 3).tracks[A].news_age_s == 0
    assert _beside_traffic(page, 6).tracks[A].news_age_s == pytest.approx(3)


def test_an_idle_page_in_an_idle_pool_is_news() -> None:
    memory = Memory()
    for tick in range(60):
        memory = _take(memory, {A: IDLE, B: IDLE}, at_s=tick)
    assert memory.tracks[A].news_age_s == 0


def test_an_idle_endpoint_alone_is_never_suspected() -> None:
    memory = Memory()
    for tick in range(60):
        memory = _take(memory, {A: IDLE}, at_s=tick, weights={A: 1000})
    assert memory.tracks[A].news_age_s == 0


FULL = replace(BUSY, waiting=40)


def _aged(tick: int, page: Sample) -> Memory:
    """A's last page was `page`, `tick` seconds ago; B and C are fresh."""
    memory, others = Memory(), BUSY
    for now in range(tick + 1):
        memory = _take(memory, {A: LOST if now else page, B: others, C: others}, at_s=now)
        others = _worked(others, steps=20)
    return memory


def _level_of_a(memory: Memory) -> tuple[float, float]:
    """A's level, and that of the others."""
    level_tokens = levels(memory, [A, B, C], POLICY).level_tokens
    return level_tokens[A], level_tokens[B]


@pytest.mark.parametrize("page", [IDLE, FULL])
def test_news_of_one_endpoint_fades_to_the_mean_of_the_others(page: Sample) -> None:
    """Whether it was empty or full: neither may draw or lose the pool's traffic for long."""
    own, others = _level_of_a(_aged(0, page))
    for tick, kept in ((1, 1.0), (2, math.exp(-1)), (4, math.exp(-3))):
        level, mean = _level_of_a(_aged(tick, page))
        # the mean counts A itself as far as it is believed
        mean = (2 * mean + kept * own) / (2 + kept)
        assert level == pytest.approx(mean + kept * (own - mean), rel=1e-6)
        assert (level - others) * (own - others) > 0
    assert _level_of_a(_aged(12, page))[0] == pytest.approx(others)


def test_an_endpoint_never_heard_from_stands_at_the_mean() -> None:
    memory = _take(Memory(), {A: IDLE, B: FULL, C: LOST}, at_s=0)
    level_tokens = levels(memory, [A, B, C], POLICY).level_tokens
    assert level_tokens[C] == pytest.approx((level_tokens[A] + level_tokens[B]) / 2)
    assert level_tokens[A] < level_tokens[C] < level_tokens[B]


def test_when_all_news_is_equally_old_nothing_fades_but_the_age_is_told() -> None:
    memory = _take(Memory(), {A: IDLE, B: FULL}, at_s=0)
    before = levels(memory, [A, B], POLICY)
    memory = _take(memory, {A: LOST, B: LOST}, at_s=5)
    after = levels(memory, [A, B], POLICY)
    assert after.level_tokens == before.level_tokens
    assert (before.news_age_s, after.news_age_s) == (0, 5)


def test_when_all_news_is_void_all_levels_are_equal() -> None:
    memory = _take(Memory(), {A: IDLE, B: FULL}, at_s=0)
    memory = _take(memory, {A: LOST, B: LOST}, at_s=500)
    void = levels(memory, [A, B], POLICY)
    assert void.level_tokens[A] == void.level_tokens[B] > 0
    assert void.news_age_s == POLICY.stale_after_s


def test_sums_do_not_depend_on_the_order_of_endpoints() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1; replicas must agree to the last bit."""
    first: dict[Endpoint, Sample | Failure] = {
        A: BUSY,
        B: replace(BUSY, waiting=0.1),
        C: replace(BUSY, waiting=0.3),
        D: LOST,
    }
    more = {
        e: _worked(p, steps=1, finished=0.1 + i / 7)
        for i, (e, p) in enumerate(first.items())
        if isinstance(p, Sample)
    }
    orders = [list(first), list(reversed(first)), [C, A, B, D]]
    memories = []
    for order in orders:
        memory = _take(Memory(), {e: first[e] for e in order}, at_s=0)
        memories.append(_take(memory, {e: more.get(e, LOST) for e in order}, at_s=1))
    assert memories[0] == memories[1] == memories[2]
    found = [levels(m, order, POLICY) for m, order in zip(memories, orders, strict=True)]
    assert found[0] == found[1] == found[2]


def test_a_pool_without_endpoints_has_no_levels() -> None:
    assert levels(Memory(), [], POLICY) == ({}, 0.0)
    assert levels(Memory(), [A], POLICY) == ({A: 0.0}, 0.0)


def test_a_level_is_backlog_over_speed() -> None:
    memory = _run({A: 1.0, B: 1.0, C: 0.5}, 60)
    level_tokens = levels(memory, [A, B, C], POLICY).level_tokens
    assert level_tokens[C] == pytest.approx(level_tokens[A] / memory.speed_of(C))
