"""The demo's figures: percentiles, which requests count, and the shape of the JSON."""

from __future__ import annotations

import json

import pytest

from trimtab.demo.load import COMPLETE, UNFINISHED, Record, judge, prepare
from trimtab.demo.summary import RigSummary, Side, percentile, report, summarize
from trimtab.workload import Request


def record(
    number: int, ttft_s: float | None, *, outcome: str = COMPLETE, prompt_tokens: int = 1000
) -> Record:
    return Record(
        side=0,
        number=number,
        due_s=float(number),
        prompt_tokens=prompt_tokens,
        lag_s=0.0,
        ttft_s=ttft_s,
        end_s=number + 9.0,
        outcome=outcome,
    )


@pytest.mark.parametrize(
    ("values", "ratio", "expected"),
    [
        ([], 0.5, None),
        ([3.0], 0.99, 3.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([0.0, 1.0], 0.25, 0.25),
        ([float(n) for n in range(101)], 0.99, 99.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_interpolate_between_ranks(
    values: list[float], ratio: float, expected: float | None
) -> None:
    assert percentile(values, ratio) == expected


def test_failed_requests_are_counted_and_have_no_say_in_ttft() -> None:
    summary = summarize([record(0, 1.0), record(1, 9.0, outcome="cut stream"), record(2, 3.0)])
    assert (summary.requests, summary.failed, summary.ttft_p50_s) == (3, 1, 2.0)


def test_a_request_still_waiting_at_the_end_counts_with_what_it_waited() -> None:
    """Leaving the slowest out would flatter whoever made them wait."""
    summary = summarize([record(0, 1.0), record(1, 60.0, outcome=UNFINISHED)])
    assert (summary.failed, summary.ttft_p50_s) == (0, 30.5)


def test_short_requests_have_a_figure_of_their_own() -> None:
    summary = summarize([record(0, 1.0, prompt_tokens=255), record(1, 9.0, prompt_tokens=256)])
    assert summary.short_ttft_p99_s == 1.0
    assert summarize([record(0, 1.0)]).short_ttft_p99_s is None


def test_the_newest_record_of_a_request_stands_and_warm_up_does_not_count() -> None:
    side = Side(name="weights", counted_from_s=5.0)
    for new in (record(4, 1.0), record(5, 1.0, outcome=""), record(5, 1.0, outcome="HTTP 503")):
        side.note(new)
    assert [r.outcome for r in side.counted] == ["HTTP 503"]


def test_the_json_object_has_exactly_the_documented_fields() -> None:
    summaries = {"round_robin": summarize([record(0, 1.0)]), "weights": summarize([])}
    told = report(summaries, RigSummary(schedule_lag_p99_s=0.001, cpu_ratio=0.5))
    figures = {"requests", "failed", "ttft_p50_s", "ttft_p99_s", "short_ttft_p99_s"}
    parsed = json.loads(json.dumps(told, allow_nan=False))
    assert {name: set(side) for name, side in parsed["policies"].items()} == {
        "round_robin": figures,
        "weights": figures,
    }
    assert parsed["policies"]["weights"] == dict.fromkeys(figures) | {"requests": 0, "failed": 0}
    assert parsed["rig"] == {"schedule_lag_p99_s": 0.001, "cpu_ratio": 0.5}


def test_a_body_asks_for_exact_lengths() -> None:
    body = json.loads(prepare('mo"del', Request(0.0, 3, 7)))
    assert (body["model"], len(body["prompt"])) == ('mo"del', 3)
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (7, True, True)
    assert len(json.loads(prepare("m", Request(0.0, 1, 1)))["prompt"]) == 1


@pytest.mark.parametrize(
    ("tail", "outcome"),
    [
        (b'data: {"usage":{"completion_tokens":7}}\n\ndata: [DONE]\n\n', COMPLETE),
        (b'data: {"usage":{"completion_tokens": 7}}\n\ndata: [DONE]\n\n', COMPLETE),
        (b'data: {"usage":{"completion_tokens":6}}\n\ndata: [DONE]\n\n', "wrong token count"),
        (b"data: {}\n\ndata: [DONE]\n\n", "wrong token count"),
        (b'data: {"usage":{"completion_tokens":7}}\n\n', "cut stream"),
        (b"", "cut stream"),
    ],
)
def test_the_end_of_a_stream_tells_whether_all_of_it_came(tail: bytes, outcome: str) -> None:
    assert judge(tail, expected_tokens=7) == outcome
