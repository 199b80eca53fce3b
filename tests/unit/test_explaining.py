"""Explanations: each sentence with the numbers of its rows, and total on any decision."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.explaining import Deeds, Explanation, duration, explain
from trimtab.core.model import Decision, Endpoint, EndpointReport, EndpointState, Snapshot
from trimtab.core.verdict import Evidence, Judgement, Verdict

NOW_S = 1000.0
IDLE = EndpointReport(
    state=EndpointState.SERVING,
    weight=1000,
    backlog_tokens=1500.0,
    drain_s=0.1,
    speed_ratio=1.0,
    age_s=0.4,
    running=3.0,
)
FULL = replace(IDLE, weight=20, backlog_tokens=10_500.0, drain_s=3.2, running=200.0, waiting=40.0)
STALE = replace(FULL, state=EndpointState.STALE, reason="never a sample; TimedOut", age_s=math.inf)
SLOW = replace(
    FULL,
    state=EndpointState.SLOW,
    speed_ratio=0.4,
    drain_s=8.0,
    reason="works at 0.40 of the pool's median speed",
)
DRAINING = replace(FULL, state=EndpointState.DRAINING, reason="its pod is asked to leave")
UNREACHABLE = replace(FULL, state=EndpointState.UNREACHABLE, weight=1, reason="nobody listens")
DONE = Deeds(decided_s=999.6, changed_s=988.0, published_s=999.6, envoys=2, following=1)


def explained(
    *reports: EndpointReport,
    verdict: Verdict = Verdict.IMBALANCED,
    since_s: float = NOW_S - 42,
    evidence: Evidence | None = None,
    deeds: Deeds = DONE,
) -> Explanation:
    """Explain a pool of llama-1, llama-2 and so on."""
    told = {Endpoint(f"llama-{n}", f"10.0.0.{n}", 8000): r for n, r in enumerate(reports, 1)}
    judgement = Judgement(
        verdict=verdict, since_s=since_s, evidence=evidence or Evidence(), sentence="so it is"
    )
    decision = Decision(
        snapshot=Snapshot({e: max(1, r.weight) for e, r in told.items()}),
        endpoints=told,
        judgement=judgement,
    )
    return explain("team/llama", decision, deeds, now_s=NOW_S)


def test_two_of_eight_that_hold_most_of_the_backlog_are_the_answer() -> None:
    """It is the question with which people come."""
    said = explained(IDLE, IDLE, FULL, IDLE, replace(FULL, drain_s=2.8), IDLE, IDLE, IDLE)
    assert said.answer == (
        "Short requests are slow because 2 of 8 endpoints hold 70 % of the backlog: a short "
        "request sent to llama-3:8000 or llama-5:8000 waits behind 2.8 to 3.2 s of work, at the "
        "emptiest, llama-1:8000, behind 0.1 s; of new work they get 1 %."
    )


def test_one_endpoint_that_keeps_requests_waiting_is_told_in_the_singular() -> None:
    said = explained(IDLE, FULL)
    assert "1 of 2 endpoints holds 88 % of the backlog" in said.answer
    assert "sent to llama-2:8000 waits behind 3.2 s of work" in said.answer
    assert "of new work it gets 2 %." in said.answer


def test_many_full_endpoints_are_counted_rather_than_named() -> None:
    said = explained(IDLE, *[FULL] * 5)
    assert "sent to llama-2:8000, llama-3:8000, llama-4:8000 or 2 more waits" in said.answer
    said = explained(IDLE, *[FULL] * 4)
    assert "sent to llama-2:8000, llama-3:8000, llama-4:8000 or 1 more waits" in said.answer


def test_a_difference_beyond_the_verdict_s_own_measure_is_told() -> None:
    """A quarter of the TTFT objective; what is within it is no reason (below)."""
    said = explained(IDLE, replace(FULL, drain_s=0.4))
    assert "waits behind 0.4 s of work" in said.answer


def test_a_pod_whose_name_is_its_address_is_named_once() -> None:
    told = {Endpoint(f"[::1]:{p}", "::1", p): r for p, r in ((8001, FULL), (8002, IDLE))}
    decision = Decision(snapshot=Snapshot({}), endpoints=told)
    said = explain("llama", decision, Deeds(), now_s=NOW_S)
    assert "sent to [::1]:8001 waits" in said.answer
    assert (said.rows[0].name, said.rows[0].address) == ("[::1]:8001", "[::1]:8001")


@pytest.mark.parametrize("verdict", [Verdict.BALANCED, Verdict.OVERSIZED])
def test_in_a_level_pool_a_full_endpoint_is_a_matter_of_the_moment(verdict: Verdict) -> None:
    """The verdict looks back over 30 s: the two must not seem to contradict each other."""
    said = explained(IDLE, FULL, verdict=verdict)
    assert said.answer.startswith("Just now 1 of 2 endpoints holds")
    assert said.answer.endswith(", and over 30 s it evens out.")


@pytest.mark.parametrize(
    "reports",
    [
        (),
        (IDLE, IDLE),
        (FULL, FULL),
        (replace(IDLE, waiting=1.0), replace(FULL, drain_s=0.35)),
        (IDLE, replace(FULL, waiting=0.0)),
        (STALE, STALE),
        (IDLE, STALE),
        (IDLE, DRAINING),
        (IDLE, UNREACHABLE),
    ],
    ids=[
        "empty",
        "all idle",
        "all full",
        "within what is allowed",
        "nobody waits",
        "nothing known",
        "one unknown",
        "one leaves",
        "one gone",
    ],
)
def test_nobody_is_accused_without_a_reason(reports: tuple[EndpointReport, ...]) -> None:
    for verdict in Verdict:
        assert explained(*reports, verdict=verdict).answer == ""


def test_a_slow_endpoint_is_accused_as_any_other() -> None:
    said = explained(IDLE, IDLE, SLOW, verdict=Verdict.SLOW_ENDPOINT)
    assert "1 of 3 endpoints holds" in said.answer
    assert said.rows[2].speed_percent == 40
    assert said.rows[2].reason == SLOW.reason


def test_each_row_has_the_line_from_the_page_to_the_share() -> None:
    said = explained(replace(IDLE, kv_used_ratio=0.25), FULL)
    first, second = said.rows
    assert asdict(first) == {
        "name": "llama-1:8000",
        "pod": "llama-1",
        "address": "10.0.0.1:8000",
        "running": 3,
        "waiting": 0,
        "kv_percent": 25,
        "speed_percent": 100,
        "age_s": pytest.approx(0.8),
        "backlog_tokens": 1500,
        "backlog_percent": 12.5,
        "drain_s": 0.1,
        "weight_percent": pytest.approx(100 / 1.02),
        "state": "Serving",
        "reason": "",
    }
    assert second.kv_percent is None


def test_who_gets_no_new_work_has_no_share_of_it() -> None:
    """An unreachable endpoint keeps a weight, which the data plane does not use."""
    said = explained(IDLE, UNREACHABLE, DRAINING, replace(STALE, weight=1000))
    assert [row.weight_percent for row in said.rows] == [50, 0, 0, 50]


@pytest.mark.parametrize("tokens", [math.nan, -5.0])
def test_a_backlog_that_is_no_quantity_does_not_spoil_the_shares_of_others(tokens: float) -> None:
    said = explained(replace(FULL, backlog_tokens=tokens), FULL)
    assert [row.backlog_percent for row in said.rows] == [0, 100]


def test_what_is_not_known_is_left_out() -> None:
    assert explained(STALE).rows[0].age_s is None
    assert explained(STALE, since_s=-math.inf).verdict_for_s is None
    said = explain("llama", None, Deeds(), now_s=NOW_S)
    assert (said.verdict, said.verdict_for_s, said.snapshot, said.rows) == ("Unknown", None, "", ())
    assert said.sentence == "nothing has been observed yet"
    assert said.deeds == ("Nothing has been published yet.",)


def test_a_verdict_comes_with_its_age_and_its_evidence() -> None:
    evidence = Evidence(
        endpoints=8,
        heard=7,
        settled_s=60.0,
        least_queue_s=0.1,
        most_queue_s=2.25,
        load_ratio=0.63,
        needed_endpoints=6.1,
    )
    said = explained(IDLE, evidence=evidence)
    assert (said.verdict, said.verdict_for_s, said.sentence) == ("Imbalanced", 42, "so it is")
    assert said.evidence == (
        "7 of 8 endpoints heard; queues of 0.10 to 2.25 s over 30 s; load 63 % over a minute; "
        "6.1 endpoints needed"
    )
    assert explained(evidence=replace(evidence, settled_s=0)).evidence == "7 of 8 endpoints heard"


def test_deeds_say_what_was_decided_published_and_followed() -> None:
    said = explained(IDLE)
    assert said.deeds == (
        f"Decided 0.4 s ago: snapshot {said.snapshot} since 12 s.",
        "Published 0.4 s ago; 1 of 2 connected Envoys follow it.",
    )


def test_deeds_say_what_went_wrong() -> None:
    deeds = Deeds(decided_s=990.0, published_s=700.0, refusal="Envoy e", complaint="OSError: no")
    said = explained(IDLE, deeds=deeds)
    assert said.deeds == (
        "The last tick failed, and the next one tries again: OSError: no",
        f"Decided 10 s ago: snapshot {said.snapshot}.",
        "Published 5 min ago, but no Envoy is connected.",
        "The last refusal: Envoy e",
    )


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (math.nan, "0.0 s"),
        (-1, "0.0 s"),
    ],
)
def test_durations_have_a_unit_that_fits(seconds: float, written: str) -> None:
    assert duration(seconds) == written


_numbers = st.floats()
_reports = st.builds(
    EndpointReport,
    state=st.sampled_from(EndpointState),
    weight=st.integers(0, 1000),
    backlog_tokens=_numbers,
    drain_s=_numbers,
    speed_ratio=_numbers,
    age_s=_numbers,
    running=_numbers,
    waiting=_numbers,
    kv_used_ratio=st.none() | _numbers,
)
_judgements = st.builds(
    Judgement,
    verdict=st.sampled_from(Verdict),
    since_s=_numbers,
    evidence=st.builds(
        Evidence,
        settled_s=_numbers,
        least_queue_s=_numbers,
        most_queue_s=_numbers,
        load_ratio=_numbers,
        needed_endpoints=_numbers,
    ),
)
_endpoints = st.builds(Endpoint, st.sampled_from("ab"), st.sampled_from("cd"), st.integers(1, 9))
_decisions = st.builds(
    Decision,
    snapshot=st.just(Snapshot({})),
    endpoints=st.dictionaries(_endpoints, _reports, max_size=6),
    judgement=st.none() | _judgements,
)
_times = st.none() | _numbers
_deeds = st.builds(Deeds, decided_s=_times, changed_s=_times, published_s=_times)


@given(st.none() | _decisions, _deeds, _numbers)
@settings(max_examples=100)
def test_whatever_was_decided_is_explained_in_finite_numbers(
    decision: Decision | None, deeds: Deeds, now_s: float
) -> None:
    said = explain("pool", decision, deeds, now_s=now_s)
    text = json.dumps(asdict(said), allow_nan=False)
    assert not re.search(r"\b(nan|inf|infinity)\b", text, re.IGNORECASE)
    for row in said.rows:
        assert 0 <= row.backlog_percent <= 100.001
        assert 0 <= row.weight_percent <= 100.001
    assert explain("pool", decision, deeds, now_s=now_s) == said
