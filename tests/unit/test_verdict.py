"""Verdicts: each from the numbers that define it, none from too few, and total on any page."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from trimtab.core.backlog import RATE_TOKENS_PER_S, STEP_TOKENS, Memory, estimate
from trimtab.core.model import Failure, FailureKind, Objective, Policy, Sample
from trimtab.core.verdict import Evidence, Judgement, Verdict, Watch, judge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.core.model import Endpoint

POOL = strategies.endpoints(4)
A, B, C, D = POOL
SILENT = Failure(FailureKind.TIMED_OUT)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What one second adds to an engine's page; busy all the time, unless nothing runs."""

    speed: float = 1.0
    steps: float = 30.0
    output_tokens: float = 300.0
    running: float = 10.0
    waiting: float = 0.0
    kv_ratio: float = 0.0
    counts: bool = True

    @property
    def prompt_tokens(self) -> float:
        """As many as it takes to be busy for a second, everything else done."""
        if not self.running:
            return 0.0
        rest = STEP_TOKENS * self.steps + self.output_tokens / 3
        return self.speed * RATE_TOKENS_PER_S - rest - self.kv_ratio * 400_000 * self.steps / 500

    def page(self, second: float) -> Sample:
        page = Sample(
            running=self.running,
            waiting=self.waiting,
            kv_used_ratio=self.kv_ratio,
            kv_capacity_tokens=400_000,
        )
        if not self.counts:
            return page
        busy_s = second if self.running else 0.0
        return replace(
            page,
            steps_total=self.steps * busy_s,
            prompt_tokens_total=self.prompt_tokens * busy_s,
            generation_tokens_total=self.output_tokens * busy_s,
        )


IDLE = Engine(running=0.0)


class Pool:
    """Endpoints that are looked at once per period."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.now_s = 0.0
        self.memory, self.watch = Memory(), Watch()
        self.judgement = Judgement()

    def look(self, pages: Mapping[Endpoint, Sample | Failure]) -> Judgement:
        self.now_s += self.policy.interval_s
        self.memory = estimate(
            self.memory,
            strategies.observe(pages, at_s=self.now_s),
            self.policy,
            now_s=self.now_s,
            weights={},
        )
        self.watch, self.judgement = judge(self.watch, self.memory, list(pages), self.policy)
        return self.judgement

    def run(self, seconds: float, **engines: Engine | None) -> list[Verdict]:
        """Named A to D; None does not answer, and who is not named is not there."""
        verdicts = []
        for _ in range(round(seconds / self.policy.interval_s)):
            at_s = self.now_s + self.policy.interval_s
            pages = {
                POOL["ABCD".index(name)]: engine.page(at_s) if engine else SILENT
                for name, engine in engines.items()
            }
            verdicts.append(self.look(pages).verdict)
        return verdicts


def alike(engine: Engine, **others: Engine | None) -> dict[str, Engine | None]:
    return dict.fromkeys("ABCD", engine) | others


BUSY = Engine()
"""Loaded to about half: neither too much, nor so little that one could go."""


@pytest.mark.parametrize("interval_s", [0.1, 1.0, 5.0, 12.0])
def test_a_pool_without_trouble_is_balanced_after_half_a_minute(interval_s: float) -> None:
    pool = Pool(Policy(interval_s=interval_s))
    verdicts = pool.run(120, **alike(BUSY))
    known = [verdict for verdict in verdicts if verdict is not Verdict.UNKNOWN]
    assert set(known) == {Verdict.BALANCED}
    assert 25 <= (len(verdicts) - len(known)) * interval_s <= 40 + interval_s
    assert pool.judgement.evidence.settled_s >= 60


def test_half_a_minute_of_queues_everywhere_is_saturation() -> None:
    pool = Pool()
    pool.run(60, **alike(BUSY))
    verdicts = pool.run(40, **alike(replace(BUSY, waiting=20)))
    assert verdicts[-1] is Verdict.SATURATED
    assert Verdict.SATURATED not in verdicts[:8]
    evidence = pool.judgement.evidence
    assert evidence.least_queue_s == pytest.approx(20 * 1000 / RATE_TOKENS_PER_S, rel=0.01)
    assert "queues 0.96 s" in pool.judgement.sentence


def test_one_endpoint_without_a_queue_is_no_saturation() -> None:
    pool = Pool()
    verdicts = pool.run(120, **alike(replace(BUSY, waiting=50), D=BUSY))
    assert Verdict.SATURATED not in verdicts
    assert verdicts[-1] is Verdict.IMBALANCED
    assert "fullest endpoint queues 2.40 s" in pool.judgement.sentence


def test_steps_that_are_too_slow_everywhere_are_saturation_without_any_queue() -> None:
    """Decoding fills batches long before a queue shows."""
    pool = Pool()
    assert pool.run(60, **alike(Engine(steps=18)))[-1] is Verdict.SATURATED
    assert Pool().run(60, **alike(Engine(steps=18), D=Engine(steps=25)))[-1] is Verdict.BALANCED
    slower = Policy(objective=Objective(tpot_s=0.1))
    assert Pool(slower).run(60, **alike(Engine(steps=18)))[-1] is Verdict.BALANCED


def test_an_endpoint_that_hardly_iterates_could_take_more() -> None:
    pool = Pool()
    verdicts = pool.run(60, **alike(Engine(steps=18), D=Engine(steps=0.2)))
    assert Verdict.SATURATED not in verdicts


@pytest.mark.parametrize(("speed", "within_s"), [(0.3, 15), (0.5, 20), (0.7, 25)])
def test_a_slow_endpoint_is_named_in_time(speed: float, within_s: int) -> None:
    pool = Pool()
    pool.run(60, **alike(BUSY))
    before = pool.memory.tracks[C].sample
    for second in range(1, within_s + 1):
        slow = Engine(speed=speed, steps=speed * 30, output_tokens=speed * 300)
        page = slow.page(second)
        pages = dict.fromkeys(POOL, BUSY.page(60 + second)) | {
            C: replace(
                page,
                steps_total=(before.steps_total or 0) + (page.steps_total or 0),
                prompt_tokens_total=(before.prompt_tokens_total or 0)
                + (page.prompt_tokens_total or 0),
                generation_tokens_total=(before.generation_tokens_total or 0)
                + (page.generation_tokens_total or 0),
            )
        }
        pool.look(pages)
    assert pool.judgement.verdict is Verdict.SLOW_ENDPOINT
    assert pool.judgement.evidence.slow == (C,)
    assert f"{C.pod} (" in pool.judgement.sentence


def test_a_slow_endpoint_stays_so_until_it_is_clearly_faster() -> None:
    def verdict_after(*speeds: float) -> Verdict:
        pool, page = Pool(), Engine().page(0)
        for speed in speeds:
            for _ in range(60):
                more = Engine(speed=speed).page(1)
                page = replace(
                    page,
                    steps_total=(page.steps_total or 0) + (more.steps_total or 0),
                    prompt_tokens_total=(page.prompt_tokens_total or 0)
                    + (more.prompt_tokens_total or 0),
                    generation_tokens_total=(page.generation_tokens_total or 0)
                    + (more.generation_tokens_total or 0),
                )
                pool.look(dict.fromkeys(POOL, BUSY.page(pool.now_s + 1)) | {D: page})
        return pool.judgement.verdict

    assert verdict_after(0.8) is Verdict.BALANCED
    assert verdict_after(0.6) is Verdict.SLOW_ENDPOINT
    assert verdict_after(0.6, 0.8) is Verdict.SLOW_ENDPOINT
    assert verdict_after(0.6, 0.9) is Verdict.BALANCED


def test_a_slow_endpoint_that_gets_no_work_is_still_slow() -> None:
    pool = Pool()
    slow = Engine(speed=0.5, steps=15)
    pool.run(60, **alike(BUSY, D=slow))
    rested = replace(slow.page(60), running=0.0)
    for _ in range(60):
        pool.look(dict.fromkeys(POOL, BUSY.page(pool.now_s + 1)) | {D: rested})
    assert pool.judgement.verdict is Verdict.SLOW_ENDPOINT
    assert pool.judgement.sentence.endswith(D.pod)


def test_of_two_that_differ_neither_is_called_slow() -> None:
    assert Verdict.SLOW_ENDPOINT not in Pool().run(120, A=BUSY, B=Engine(speed=0.4))


def test_an_endpoint_with_few_requests_is_not_measured() -> None:
    """It is idle between two looks, which looks like slowness."""
    idle_at_times = Engine(speed=0.4, running=1.0)
    assert Verdict.SLOW_ENDPOINT not in Pool().run(120, **alike(BUSY, D=idle_at_times))


def test_shortage_comes_before_slowness() -> None:
    pool = Pool()
    pool.run(60, **alike(replace(BUSY, waiting=30), D=Engine(speed=0.5, waiting=30)))
    assert pool.judgement.verdict is Verdict.SATURATED
    assert pool.judgement.evidence.slow == (D,)


def test_what_piles_up_is_needed_beside_what_is_done() -> None:
    steady, growing = Pool(), Pool()
    full = replace(BUSY, waiting=20)
    steady.run(60, **alike(full))
    for second in range(60):
        growing.run(1, **alike(replace(full, waiting=20 + second)))
    needs = [pool.judgement.evidence.needed_endpoints for pool in (steady, growing)]
    assert needs[0] < needs[1]
    assert growing.judgement.evidence.shortage_endpoints == pytest.approx(needs[1] - 4)


def test_the_need_is_what_arrives_over_what_an_endpoint_may_do() -> None:
    """The cost of iterations apart: it is the same however little they bring."""
    request_tokens = 1000 + 200 * ((1000 + 200 / 2) / 500 + 1 / 3)
    load_tokens = 4 * (RATE_TOKENS_PER_S - 30 * STEP_TOKENS)
    bearable = RATE_TOKENS_PER_S - STEP_TOKENS / 0.05
    pool = Pool()
    pool.run(60, **alike(replace(BUSY, waiting=20)))
    evidence = pool.judgement.evidence
    catching_up = 80 * request_tokens / 60
    assert evidence.needed_endpoints == pytest.approx((load_tokens + catching_up) / bearable)
    assert evidence.load_ratio == pytest.approx(load_tokens / (4 * RATE_TOKENS_PER_S))
    patient = Pool(Policy(objective=Objective(tpot_s=1.0)))
    patient.run(60, **alike(BUSY))
    assert patient.judgement.evidence.needed_endpoints == pytest.approx(
        load_tokens / (0.8 * RATE_TOKENS_PER_S)
    )


def test_an_objective_that_cannot_be_met_does_not_ask_for_millions() -> None:
    pool = Pool(Policy(objective=Objective(ttft_s=1e-6, tpot_s=1e-6)))
    assert pool.run(60, **alike(replace(BUSY, waiting=1)))[-1] is Verdict.SATURATED
    assert pool.judgement.evidence.needed_endpoints < 50


LIGHT = Engine(steps=60, output_tokens=300)


def test_a_minute_of_little_work_is_more_than_enough() -> None:
    pool = Pool()
    verdicts = pool.run(90, **alike(LIGHT))
    assert verdicts[-1] is Verdict.OVERSIZED
    assert Verdict.OVERSIZED not in verdicts[:57]
    assert pool.judgement.evidence.spare_step_s == pytest.approx(
        pool.judgement.evidence.least_step_s, rel=0.2
    )
    assert "with one endpoint less" in pool.judgement.sentence


def test_an_idle_pool_is_oversized() -> None:
    assert Pool().run(90, **alike(IDLE))[-1] is Verdict.OVERSIZED


@pytest.mark.parametrize(
    "engines",
    [
        {"A": LIGHT},
        alike(LIGHT, D=None),
        alike(replace(LIGHT, counts=False)),
        alike(replace(LIGHT, kv_ratio=0.6)),
        alike(replace(LIGHT, waiting=3)),
        alike(LIGHT, D=Engine(steps=1)),
    ],
    ids=["the last", "not heard", "not counted", "KV", "queues", "all loaded"],
)
def test_who_might_be_needed_is_not_spared(engines: dict[str, Engine | None]) -> None:
    assert Verdict.OVERSIZED not in Pool().run(120, **engines)


def test_work_in_bursts_counts_by_its_peaks() -> None:
    pool = Pool()
    page, verdicts = IDLE.page(0), []
    for second in range(300):
        engine = Engine(steps=20) if second % 50 < 12 else LIGHT
        more = engine.page(1)
        page = replace(
            more,
            steps_total=(page.steps_total or 0) + (more.steps_total or 0),
            prompt_tokens_total=(page.prompt_tokens_total or 0) + (more.prompt_tokens_total or 0),
            generation_tokens_total=(page.generation_tokens_total or 0)
            + (more.generation_tokens_total or 0),
        )
        verdicts.append(pool.look(dict.fromkeys(POOL, page)).verdict)
    assert Verdict.OVERSIZED not in verdicts


def test_with_half_of_the_endpoints_unheard_nothing_is_known() -> None:
    pool = Pool()
    pool.run(60, **alike(replace(BUSY, waiting=30)))
    assert pool.judgement.verdict is Verdict.SATURATED
    since_s = pool.judgement.since_s
    assert pool.run(5, **alike(replace(BUSY, waiting=30), C=None, D=None))[-1] is Verdict.SATURATED
    assert pool.judgement.since_s == since_s
    verdicts = pool.run(10, **alike(replace(BUSY, waiting=30), C=None, D=None))
    assert verdicts[-1] is Verdict.UNKNOWN
    assert "2 of 4 endpoints have fresh data" in pool.judgement.sentence
    verdicts = pool.run(30, **alike(BUSY))
    assert verdicts[-1] is Verdict.BALANCED
    assert Verdict.SATURATED not in verdicts


def test_one_of_four_may_be_silent() -> None:
    assert Pool().run(60, **alike(BUSY, D=None))[-1] is Verdict.BALANCED


def test_between_rare_looks_more_must_run_for_a_speed_to_be_believed() -> None:
    slow = alike(BUSY, D=Engine(speed=0.5))
    assert Pool().run(120, **slow)[-1] is Verdict.SLOW_ENDPOINT
    rare = Pool(Policy(interval_s=5.0))
    assert Verdict.SLOW_ENDPOINT not in rare.run(120, **slow)


@pytest.mark.parametrize(
    ("engines", "sentence"),
    [
        (
            alike(replace(BUSY, waiting=10)),
            (
                "even the emptiest of 4 endpoints queues 0.48 s of work, and the fastest takes 33 ms "
                "per output token (0.25 s and 50 ms are allowed): the load asks for 3.3 endpoints"
            ),
        ),
        (
            alike(BUSY, D=Engine(speed=0.6)),
            "works at less than 75 % of the median speed: engine-3 (60 %)",
        ),
        (
            alike(BUSY, D=replace(BUSY, waiting=10)),
            (
                "the fullest endpoint queues 0.48 s of work, the emptiest 0.00 s: others could take "
                "what waits"
            ),
        ),
        (
            alike(replace(BUSY, waiting=1)),
            "queues of 0.05 to 0.05 s over 4 endpoints: nothing to gain",
        ),
        (
            alike(LIGHT),
            (
                "with one endpoint less the others would be loaded to 18 % at the peak and take 18 ms "
                "per output token (50 ms are allowed)"
            ),
        ),
    ],
    ids=["saturated", "slow", "imbalanced", "balanced", "oversized"],
)
def test_the_sentence_tells_the_numbers(engines: dict[str, Engine | None], sentence: str) -> None:
    pool = Pool()
    pool.run(90, **engines)
    assert pool.judgement.sentence == sentence


def test_of_nobody_nothing_is_known() -> None:
    pool = Pool()
    assert pool.run(60) == [Verdict.UNKNOWN] * 60


def test_until_there_is_enough_data_the_sentence_says_how_much() -> None:
    pool = Pool()
    pool.run(12, **alike(BUSY))
    assert pool.judgement.sentence == "a verdict takes 30 s of data; there are 10 s"


def test_pages_that_stand_still_while_a_long_prompt_is_computed_are_no_slowness() -> None:
    """Engines count a prompt when its first token comes out."""
    pool, verdicts = Pool(), []
    for second in range(1, 120):
        late = Engine().page(second - second % 4)
        verdicts.append(pool.look(dict.fromkeys(POOL, BUSY.page(second)) | {D: late}).verdict)
    assert Verdict.SLOW_ENDPOINT not in verdicts
    assert pool.judgement.evidence.speed_ratio[D] == pytest.approx(1, abs=0.2)


def test_a_restart_and_a_page_told_twice_are_left_out() -> None:
    pool = Pool()
    pool.run(60, **alike(BUSY))
    at_s = pool.now_s
    pool.look(dict.fromkeys(POOL, BUSY.page(at_s)))
    for second in range(1, 31):
        pool.look(dict.fromkeys(POOL, BUSY.page(second)))
    assert pool.judgement.verdict is Verdict.BALANCED
    assert pool.judgement.evidence.load_ratio == pytest.approx(0.55, abs=0.05)


def test_a_clock_that_steps_back_or_a_loop_that_hung_does_no_harm() -> None:
    pool = Pool()
    pool.run(60, **alike(BUSY))
    for jump_s in (-30.0, 3600.0):
        pool.now_s += jump_s
        pool.run(40, **alike(BUSY))
        assert pool.judgement.verdict is Verdict.BALANCED


def test_endpoints_that_left_are_forgotten() -> None:
    pool = Pool()
    pool.run(60, **alike(BUSY))
    pool.run(10, A=BUSY, B=BUSY)
    assert set(pool.watch.vitals) == {A, B}


@given(
    st.lists(
        st.fixed_dictionaries(dict.fromkeys(POOL, strategies.samples | strategies.failures)),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    st.permutations(POOL),
)
@settings(max_examples=60)
def test_any_pages_get_a_verdict_that_follows_from_its_evidence_in_any_order(
    pages: list[dict[Endpoint, Sample | Failure]], interval_s: float, order: list[Endpoint]
) -> None:
    pool, other = Pool(Policy(interval_s=interval_s)), Pool(Policy(interval_s=interval_s))
    for seen in pages:
        told = pool.look(seen)
        assert other.look({endpoint: seen[endpoint] for endpoint in order}) == told
        evidence = told.evidence
        assert told.sentence
        assert evidence.heard <= evidence.endpoints <= len(POOL)
        assert 0 <= evidence.least_queue_s <= evidence.most_queue_s
        assert not math.isnan(evidence.needed_endpoints)
        if told.verdict is Verdict.SLOW_ENDPOINT:
            assert evidence.slow
        if told.verdict is Verdict.OVERSIZED:
            assert evidence.spare_load_ratio < 1


def test_a_judgement_of_nothing_is_unknown() -> None:
    assert Judgement().verdict is Verdict.UNKNOWN
    assert Evidence().endpoints == 0
