"""Workloads: the descriptions agree with their traces, and traces are read as they are."""

from __future__ import annotations

import itertools
import statistics
from random import Random

import pytest

from trimtab.workload import WORKLOADS, Request, draw, parse_trace, retime

TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"
)


def _rng(seed: int) -> Random:
    return Random(seed)  # noqa: S311 - traffic, not secrets


def _quantile(values: list[int], level: float) -> int:
    return sorted(values)[int(level * len(values))]


@pytest.mark.parametrize(
    ("name", "prompts", "outputs", "short_ratio"),
    [
        ("conversation", (1155, 1020, 4142), (211, 129, 601), 0.134),
        ("code", (2048, 1469, 7436), (28, 13, 252), 0.161),
    ],
)
def test_a_description_has_the_lengths_of_its_trace(
    name: str, prompts: tuple[int, ...], outputs: tuple[int, ...], short_ratio: float
) -> None:
    """Mean, median, p99 as published with the traces; 6 %: what quantiles and a draw leave."""
    requests = draw(WORKLOADS[name], rate_per_s=10, count=40_000, rng=_rng(1))
    for values, expected in (
        ([r.prompt_tokens for r in requests], prompts),
        ([r.output_tokens for r in requests], outputs),
    ):
        seen = statistics.fmean(values), _quantile(values, 0.5), _quantile(values, 0.99)
        assert seen == pytest.approx(expected, rel=0.06)
    short = sum(r.prompt_tokens < 256 for r in requests) / len(requests)
    assert short == pytest.approx(short_ratio, abs=0.01)


def test_conversations_with_a_medium_prompt_answer_longest() -> None:
    """The dependence that one coefficient of correlation cannot say."""
    requests = draw(WORKLOADS["chat"], rate_per_s=10, count=20_000, rng=_rng(1))
    medium = [r.output_tokens for r in requests if 1020 <= r.prompt_tokens < 1130]
    long = [r.output_tokens for r in requests if r.prompt_tokens > 2000]
    assert statistics.fmean(medium) > 3 * statistics.fmean(long)


def test_mixed_has_one_long_prompt_and_one_long_output_in_twenty() -> None:
    requests = draw(WORKLOADS["mixed"], rate_per_s=10, count=20_000, rng=_rng(1))
    long = [r for r in requests if r.prompt_tokens >= 8000]
    assert len(long) / len(requests) == pytest.approx(0.05, abs=0.005)
    assert max(r.prompt_tokens for r in requests) <= 12_000
    assert max(r.prompt_tokens for r in requests if r not in long) <= 2048
    assert sum(r.output_tokens >= 600 for r in requests) / len(requests) > 0.05


@pytest.mark.parametrize("name", WORKLOADS)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(name: str) -> None:
    workload = WORKLOADS[name]
    requests = draw(workload, rate_per_s=20, seconds=1000, rng=_rng(2))
    times = [r.at_s for r in requests]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(requests) == pytest.approx(20_000, rel=0.05)
    assert statistics.stdev(gaps) * 20 == pytest.approx(workload.cv, rel=0.06)
    assert all(0 <= r.at_s < 1000 for r in requests)
    assert min(min(r.prompt_tokens, r.output_tokens) for r in requests) >= 1


def test_a_draw_ends_at_whichever_limit_comes_first() -> None:
    assert len(draw(WORKLOADS["code"], rate_per_s=5, seconds=1e6, count=7, rng=_rng(1))) == 7
    with pytest.raises(ValueError, match="give seconds, count or both"):
        draw(WORKLOADS["code"], rate_per_s=5, rng=_rng(1))


def test_equal_seeds_draw_equal_requests() -> None:
    twice = [draw(WORKLOADS["mixed"], rate_per_s=5, count=50, rng=_rng(3)) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0] != draw(WORKLOADS["mixed"], rate_per_s=5, count=50, rng=_rng(4))


def test_a_trace_is_read_as_published() -> None:
    """CRLF, seven digits after the point, no line end after the last line."""
    requests = parse_trace(TRACE)
    assert [r[1:] for r in requests] == [(374, 44), (396, 109), (879, 55)]
    assert [r.at_s for r in requests] == pytest.approx([0.0, 4.314579, 4.541877])
    assert parse_trace(TRACE + "\r\n") == parse_trace(TRACE.replace("\r", ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("a,b\n1,2", "line 1: expected"),
        (TRACE.splitlines()[0], "line 2: a trace has at least one request"),
        (TRACE.replace("396", "many"), "line 3: invalid literal"),
        (TRACE.replace(",396,109", ",396"), "line 3: not enough values"),
        (TRACE.replace("2023-11-16 18:15:51", "yesterday"), "line 4: Invalid isoformat"),
        (TRACE.replace("50.9951690", "50.9951690Z"), "line 3: can't subtract"),
        (TRACE.replace("18:15:51", "18:15:11"), "line 4: earlier than the line before"),
        (TRACE.replace(",55", ",0"), "line 4: prompt and output have at least one token"),
    ],
)
def test_a_bad_trace_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_trace(text)


def test_a_retimed_trace_keeps_its_lengths_in_order_and_starts_over() -> None:
    trace = parse_trace(TRACE)
    requests = retime(trace, rate_per_s=2, cv=1.1, rng=_rng(1), count=7)
    prompts = [r.prompt_tokens for r in requests]
    start = [374, 396, 879].index(prompts[0])
    assert prompts == [[374, 396, 879][(start + i) % 3] for i in range(7)]
    times = [r.at_s for r in requests]
    assert times == sorted(times)


def test_recorded_gaps_are_scaled_to_the_rate() -> None:
    trace = [Request(float(at), 1 + at, 1) for at in (0, 1, 5, 6)]
    requests = retime(trace, rate_per_s=5, cv=None, rng=_rng(1))
    gaps = {r.prompt_tokens: r.at_s for r in requests}
    assert max(gaps.values()) == pytest.approx(4 / 5)
    assert gaps[7] - gaps[6] == pytest.approx((gaps[6] - gaps[2]) / 4)
