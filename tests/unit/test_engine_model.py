"""The engine model against schedules computed by hand.

With coefficients this large the durations can be followed in the head: an iteration takes 1 s,
10 ms per prefill token, 1 ms per token of context that a decode reads, 100 ms per decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.engine_sim.model import Coefficients, Engine, EngineSpec, Sequence

if TYPE_CHECKING:
    from trimtab.engine_sim.model import Outcome

ROUND = Coefficients(a_s=1.0, b_s=0.01, c_s=0.001, d_s=0.1)


def engine(
    *,
    batch_tokens: int = 100,
    kv_capacity_tokens: int = 10_000,
    max_sequences: int = 8,
    coefficients: Coefficients = ROUND,
) -> Engine:
    return Engine(
        spec=EngineSpec(
            coefficients=coefficients,
            batch_tokens=batch_tokens,
            max_sequences=max_sequences,
            kv_capacity_tokens=kv_capacity_tokens,
        )
    )


def submit(to: Engine, *lengths: tuple[int, int]) -> list[Sequence]:
    sequences = [Sequence(i, prompt, output) for i, (prompt, output) in enumerate(lengths)]
    for sequence in sequences:
        to.submit(sequence)
    return sequences


def step(of: Engine) -> tuple[float, Outcome]:
    duration_s = of.begin()
    return duration_s, of.end()


def drain(of: Engine, *, at_most: int = 10_000) -> list[tuple[float, Outcome]]:
    steps = []
    while duration_s := of.begin():
        steps.append((duration_s, of.end()))
        assert len(steps) < at_most
    return steps


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    subject = engine()
    [a] = submit(subject, (250, 2))

    durations_s, outcomes = zip(*drain(subject), strict=True)

    # 100, 100 and 50 tokens of prompt, then one decode that reads 251 tokens.
    assert durations_s == pytest.approx([2.0, 2.0, 1.5, 1.0 + 0.251 + 0.1])
    assert [o.first for o in outcomes] == [(), (), (a,), ()]
    assert [o.finished for o in outcomes] == [(), (), (), (a,)]
    assert [o.tokens for o in outcomes] == [0, 0, 1, 1]
    assert (subject.counters.steps_total, subject.counters.idle_steps_total) == (2, 2)


def test_the_prompt_counter_jumps_by_the_whole_prompt_at_the_first_token() -> None:
    subject = engine()
    submit(subject, (250, 2))

    seen = [(subject.counters.prompt_tokens_total, step(subject))[0] for _ in range(4)]

    assert seen == [0, 0, 0, 250]


def test_a_decode_takes_one_token_of_the_budget_that_prefill_then_lacks() -> None:
    subject = engine()
    [a] = submit(subject, (10, 10))
    assert step(subject)[0] == pytest.approx(1.1)
    b = Sequence(1, 150, 1)
    subject.submit(b)

    first_s, first = step(subject)
    second_s, second = step(subject)

    assert first_s == pytest.approx(1 + 0.01 * 99 + 0.001 * 11 + 0.1)
    assert second_s == pytest.approx(1 + 0.01 * 51 + 0.001 * 12 + 0.1)
    assert (first.tokens, second.tokens) == (1, 2)
    assert second.first == second.finished == (b,)
    assert subject.generated_tokens(a) == 3


def test_prefills_share_an_iteration_first_come_first_served() -> None:
    subject = engine()
    a, b, c = submit(subject, (60, 5), (60, 5), (30, 5))

    first, second = step(subject)[1], step(subject)[1]

    assert first.first == (a,)  # 60 for a, 40 for b
    assert second.first == (b, c)  # one decode, 20 for b, 30 for c: 51 of 100


def test_attention_costs_a_chunk_its_product_with_the_context_before_it() -> None:
    subject = engine(coefficients=Coefficients(a_s=1.0, b_s=0, c_s=0, d_s=0, e_s=0.001))
    submit(subject, (150, 1))

    durations_s = [seconds for seconds, _ in drain(subject)]

    assert durations_s == pytest.approx([1 + 0.001 * 100 * 50, 1 + 0.001 * 50 * (100 + 25)])


def test_an_engine_of_half_speed_takes_twice_as_long_for_the_same_iterations() -> None:
    whole, half = engine(), engine()
    half.speed = 0.5
    for subject in (whole, half):
        submit(subject, (250, 20), (30, 40), (70, 3))

    whole_s, half_s = ([seconds for seconds, _ in drain(e)] for e in (whole, half))

    assert half_s == pytest.approx([2 * seconds for seconds in whole_s])


def test_no_more_sequences_run_than_the_engine_has_slots() -> None:
    subject = engine(max_sequences=2)
    submit(subject, (10, 3), (10, 3), (10, 3))

    step(subject)

    assert (subject.running, len(subject.waiting)) == (2, 1)


def test_without_room_for_growth_the_last_admitted_is_preempted_and_recomputed() -> None:
    subject = engine(kv_capacity_tokens=100)
    a, b = submit(subject, (40, 30), (40, 30))

    steps = drain(subject)

    # Iteration 1 leaves 41 tokens of each; nine more fill the cache. Then b goes, with 10 tokens
    # generated, and waits for the end of a (iteration 30), because a prompt of 50 and what a
    # grows do not fit. Iteration 31 computes those 50 again and brings the 11th token.
    assert [i for i, (_, o) in enumerate(steps, 1) if o.first] == [1]
    assert [(i, o.finished) for i, (_, o) in enumerate(steps, 1) if o.finished] == [
        (30, (a,)),
        (50, (b,)),
    ]
    assert steps[10][0] == pytest.approx(1 + 0.001 * 50 + 0.1)
    assert steps[30][0] == pytest.approx(1 + 0.01 * 50)
    assert (a.preemptions, b.preemptions) == (0, 1)
    counters = subject.counters
    assert counters.preemptions_total == 1
    assert counters.computed_prefill_tokens_total == 40 + 40 + 50
    assert counters.prompt_tokens_total == 80
    assert counters.generation_tokens_total == 60


def test_a_preempted_request_waits_in_front_of_those_that_never_ran() -> None:
    subject = engine(kv_capacity_tokens=100)
    _, b, c = submit(subject, (40, 30), (40, 30), (40, 5))

    while not b.preemptions:
        step(subject)

    assert list(subject.waiting) == [b, c]


def test_the_cache_is_never_more_than_full() -> None:
    """Both prompts fit; both and their first tokens do not."""
    subject = engine(kv_capacity_tokens=100)
    submit(subject, (49, 2), (50, 2))

    step(subject)

    assert subject.kv_used_ratio <= 1
    assert (subject.running, len(subject.waiting)) == (1, 1)


def test_an_aborted_request_frees_what_it_holds_in_every_phase() -> None:
    subject = engine(max_sequences=3)
    decoding, prefilling, late, waiting = submit(subject, (20, 50), (300, 5), (20, 5), (20, 5))
    step(subject)
    subject.begin()
    assert [subject.running, len(subject.waiting)] == [2, 2]

    for sequence in (decoding, waiting, prefilling):  # in the middle of an iteration
        subject.abort(sequence)
        subject.abort(sequence)  # a second time changes nothing
    outcome = subject.end()

    assert outcome.tokens == 0
    assert subject.kv_decoding_tokens == subject.kv_reserved_tokens == 0
    assert subject.counters.aborted_total == 3
    assert [o.finished for _, o in drain(subject)][-1] == (late,)
    assert subject.idle


def test_an_aborted_request_frees_what_it_holds_while_preempted() -> None:
    subject = engine(kv_capacity_tokens=100)
    a, b = submit(subject, (40, 30), (40, 30))
    while not b.preemptions:
        step(subject)

    subject.abort(b)
    drain(subject)

    assert a.done
    assert subject.counters.generation_tokens_total == 30 + 10
    assert subject.kv_reserved_tokens == subject.kv_decoding_tokens == 0


def test_a_finished_request_cannot_be_aborted() -> None:
    subject = engine()
    [a] = submit(subject, (10, 1))
    drain(subject)

    subject.abort(a)

    assert (subject.counters.aborted_total, subject.counters.finished_total) == (0, 1)


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (9_000, 1_001)])
def test_a_request_that_could_never_run_is_refused(lengths: tuple[int, int]) -> None:
    subject = engine()

    with pytest.raises(ValueError, match="token"):
        submit(subject, lengths)

    assert subject.begin() == 0


LENGTHS = st.tuples(st.integers(1, 120), st.integers(1, 40))


@settings(max_examples=60)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 30), LENGTHS), min_size=1, max_size=25),
    aborts=st.dictionaries(st.integers(0, 24), st.integers(0, 60), max_size=8),
    batch_tokens=st.integers(9, 200),
)
def test_tokens_are_conserved_and_the_cache_is_what_its_sequences_hold(
    arrivals: list[tuple[int, tuple[int, int]]], aborts: dict[int, int], batch_tokens: int
) -> None:
    """Under pressure: the cache holds one or a few sequences, so most runs preempt."""
    subject = engine(kv_capacity_tokens=170, batch_tokens=batch_tokens)
    sequences = [Sequence(i, *lengths) for i, (_, lengths) in enumerate(arrivals)]
    emitted = recomputed_tokens = 0
    turn = 0
    while turn <= 60 or not subject.idle:
        for (arrives, _), sequence in zip(arrivals, sequences, strict=True):
            if arrives == turn:
                subject.submit(sequence)
        computed = {s.id: s.prefilled_tokens for s in subject.prefilling} | {
            s.id: s.prompt_tokens + subject.generated_tokens(s) for s in subject.decoding.values()
        }
        before = {s.id: s.preemptions for s in sequences}
        if subject.begin():
            recomputed_tokens += sum(
                computed[s.id] for s in sequences if s.preemptions > before[s.id]
            )
            for i, at in aborts.items():
                if at == turn and i < len(sequences) and arrivals[i][0] <= turn:
                    subject.abort(sequences[i])
            emitted += subject.end().tokens
        assert 0 <= subject.kv_reserved_tokens <= subject.spec.kv_capacity_tokens
        assert subject.kv_reserved_tokens == sum(
            s.to_prefill_tokens + 1 for s in subject.prefilling
        ) + sum(s.prompt_tokens + subject.generated_tokens(s) for s in subject.decoding.values())
        turn += 1
        assert turn < 20_000
    counters = subject.counters
    finished = [s for s in sequences if s.generated_tokens == s.output_tokens]
    assert counters.finished_total + counters.aborted_total == len(sequences)
    assert counters.finished_generation_tokens_total == sum(s.output_tokens for s in finished)
    assert emitted == counters.generation_tokens_total == sum(s.generated_tokens for s in sequences)
    assert subject.kv_reserved_tokens == subject.kv_decoding_tokens == 0
    if not counters.aborted_total:
        prompts_tokens = sum(s.prompt_tokens for s in sequences)
        assert counters.computed_prefill_tokens_total == prompts_tokens + recomputed_tokens
