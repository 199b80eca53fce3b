"""The status of a pool: each condition by its reason, and when a status is worth a write."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.api import InferencePoolStatus
from trimtab.core.conditions import (
    MAX_ENDPOINTS,
    QUIET_S,
    STATUS,
    Facts,
    Reason,
    Type,
    flips,
    status,
    worth_writing,
)
from trimtab.core.model import Decision, Endpoint, EndpointReport, EndpointState, Snapshot
from trimtab.core.verdict import Evidence, Judgement, Verdict

T0_S = 1_700_000_000.0
SERVING = EndpointReport(
    state=EndpointState.SERVING,
    weight=1000,
    backlog_tokens=1234.0,
    drain_s=0.567,
    speed_ratio=1.0,
    age_s=0.4,
)
STALE = replace(SERVING, state=EndpointState.STALE, reason="nothing new for 12.3 s; TimedOut")
UNREACHABLE = replace(SERVING, state=EndpointState.UNREACHABLE, weight=1, reason="refused")
DRAINING = replace(SERVING, state=EndpointState.DRAINING, weight=0, reason="asked to leave")
PUBLISHED = Facts(generation=3, pods=2, gateways=1, accepted=True)


def endpoint(number: int) -> Endpoint:
    return Endpoint(f"llama-{number}", f"10.0.0.{number}", 8000)


A, B = endpoint(1), endpoint(2)


def decision(*reports: EndpointReport) -> Decision:
    told = {endpoint(number): report for number, report in enumerate(reports, start=1)}
    return Decision(
        snapshot=Snapshot({e: max(1, r.weight) for e, r in told.items()}), endpoints=told
    )


def said(what: Decision | None, facts: Facts, condition: Type) -> tuple[str, str, str]:
    """Return status, reason and message of one condition."""
    every = {c["type"]: c for c in status(what, facts, {}, wall_s=T0_S)["conditions"]}
    return (every[condition]["status"], every[condition]["reason"], every[condition]["message"])


@pytest.mark.parametrize(
    ("what", "facts", "expected", "word"),
    [
        (decision(SERVING, SERVING), PUBLISHED, ("True", "Serving"), "2 of 2"),
        (decision(SERVING, UNREACHABLE), PUBLISHED, ("True", "Serving"), "1 of 2"),
        (decision(STALE, STALE), PUBLISHED, ("True", "Serving"), "2 of 2"),
        (decision(SERVING, DRAINING), PUBLISHED, ("True", "Serving"), "1 of 1"),
        (
            decision(SERVING),
            replace(PUBLISHED, unready=("llama-9", "llama-8")),
            ("True", "Serving"),
            "Pods not ready: llama-8, llama-9.",
        ),
        (
            decision(SERVING, UNREACHABLE),
            replace(PUBLISHED, refused={B}),
            ("True", "Serving"),
            "Nobody listens at llama-2:8000.",
        ),
        (
            decision(SERVING, SERVING),
            replace(PUBLISHED, refused={A}),
            ("True", "Serving"),
            "Nobody listens at llama-1:8000.",
        ),
        (
            decision(STALE, STALE),
            replace(PUBLISHED, refused={A, B}),
            ("False", "Unreachable"),
            "spec.targetPorts",
        ),
        (
            decision(SERVING),
            replace(PUBLISHED, complaint="spec.engine: x"),
            ("False", "InvalidSpec"),
            "spec.engine: x",
        ),
        (decision(), Facts(generation=1), ("False", "NoPods"), "spec.selector"),
        (None, PUBLISHED, ("Unknown", "Starting"), "observed"),
        (
            decision(DRAINING),
            replace(PUBLISHED, unready=("llama-7",)),
            ("False", "NoReadyPods"),
            "llama-7",
        ),
        (
            decision(SERVING),
            replace(PUBLISHED, accepted=False, refusal="bad route"),
            ("False", "NotPublished"),
            "bad route",
        ),
        (decision(SERVING), replace(PUBLISHED, refusal="bad route"), ("True", "Serving"), "1 of 1"),
        (
            decision(SERVING),
            replace(PUBLISHED, gateways=0, accepted=False),
            ("True", "Serving"),
            "1 of 1",
        ),
    ],
)
def test_ready_says_whether_requests_are_answered_or_why_not(
    what: Decision | None, facts: Facts, expected: tuple[str, str], word: str
) -> None:
    state, reason, message = said(what, facts, Type.READY)
    assert (state, reason) == expected
    assert word in message


@pytest.mark.parametrize(
    ("what", "expected", "word"),
    [
        (decision(SERVING, SERVING), ("True", "AllFresh"), "All 2"),
        (decision(SERVING, DRAINING), ("True", "AllFresh"), "All 1"),
        (decision(SERVING, STALE), ("True", "SomeStale"), "llama-2:8000. The first: TimedOut."),
        (decision(STALE, UNREACHABLE), ("False", "AllStale"), "2 of 2"),
        (decision(DRAINING), ("Unknown", "NoEndpoints"), "no endpoint"),
        (None, ("Unknown", "NoEndpoints"), "no endpoint"),
    ],
)
def test_metrics_are_available_while_one_endpoint_has_fresh_data(
    what: Decision | None, expected: tuple[str, str], word: str
) -> None:
    state, reason, message = said(what, PUBLISHED, Type.METRICS_AVAILABLE)
    assert (state, reason) == expected
    assert word in message


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (PUBLISHED, ("True", "Accepted")),
        (replace(PUBLISHED, accepted=False), ("Unknown", "Pending")),
        (replace(PUBLISHED, gateways=0, accepted=False), ("Unknown", "NoGateway")),
        (replace(PUBLISHED, refusal="no"), ("False", "Refused")),
    ],
)
def test_published_says_what_the_gateways_answered(facts: Facts, expected: tuple[str, str]) -> None:
    assert said(decision(SERVING), facts, Type.PUBLISHED)[:2] == expected


def test_a_long_message_of_many_lines_becomes_a_short_one_of_one() -> None:
    facts = replace(PUBLISHED, refusal="line\n" * 2000)
    message = said(decision(SERVING), facts, Type.PUBLISHED)[2]
    assert "\n" not in message
    assert len(message) == 1024


def test_balanced_is_unknown_until_the_pool_is_judged() -> None:
    assert said(decision(SERVING), PUBLISHED, Type.BALANCED)[:2] == ("Unknown", "Unknown")
    assert "verdict" not in status(decision(SERVING), PUBLISHED, {}, wall_s=T0_S)


def judged(verdict: Verdict, **evidence: Any) -> Decision:
    judgement = Judgement(verdict=verdict, evidence=Evidence(**evidence), sentence="so it is")
    return replace(decision(SERVING), judgement=judgement)


@pytest.mark.parametrize("verdict", Verdict)
def test_balanced_has_the_verdict_for_its_reason(verdict: Verdict) -> None:
    state, reason, message = said(judged(verdict), PUBLISHED, Type.BALANCED)
    assert (reason, message) == (verdict, "so it is")
    assert state == STATUS[Type.BALANCED][Reason(verdict)]


def test_the_verdict_tells_its_evidence_and_since_when_it_holds() -> None:
    what = judged(
        Verdict.IMBALANCED, heard=2, least_queue_s=0.0, most_queue_s=1.234, load_ratio=0.567
    )
    told = status(what, PUBLISHED, {}, wall_s=T0_S)
    assert told["verdict"] == {
        "name": "Imbalanced",
        "since": "2023-11-14T22:13:20Z",
        "evidence": {
            "heardEndpoints": 2,
            "leastQueueMilliseconds": 0,
            "mostQueueMilliseconds": 1200,
            "loadPercent": 57,
        },
        "message": "so it is",
    }
    assert status(what, PUBLISHED, told, wall_s=T0_S + 9)["verdict"] == told["verdict"]
    other = status(judged(Verdict.BALANCED), PUBLISHED, told, wall_s=T0_S + 9)
    assert other["verdict"]["since"] == "2023-11-14T22:13:29Z"


def test_every_reason_is_of_one_condition_and_documented_with_its_status() -> None:
    rows = re.findall(
        r"^\| (\w+) \| (True|False|Unknown) \| (\w+) \|",
        Path("docs/conditions.md").read_text(),
        re.MULTILINE,
    )
    table = [
        (str(t), state, str(r)) for t, reasons in STATUS.items() for r, state in reasons.items()
    ]
    assert sorted(rows) == sorted(table)
    assert {r for reasons in STATUS.values() for r in reasons} == set(Reason)


def test_numbers_are_rounded_to_what_people_can_use() -> None:
    half = replace(SERVING, weight=500, backlog_tokens=98_765, drain_s=12.345, speed_ratio=0.66)
    told = status(decision(SERVING, half), PUBLISHED, {}, wall_s=T0_S)
    assert told["endpoints"][1] == {
        "pod": "llama-2",
        "address": "10.0.0.2",
        "port": 8000,
        "weightPercent": 67,
        "backlogTokens": 99_000,
        "drainMilliseconds": 12_000,
        "speedPercent": 66,
        "state": "Serving",
        "dataAgeSeconds": 0,
    }
    assert told["endpoints"][0]["weightPercent"] == 133
    assert told["summary"] == {"endpoints": "2/2", "backlog": "12s"}
    assert told["replicas"] == 2


@pytest.mark.parametrize(
    ("drain_s", "backlog"),
    [(0, "0s"), (0.0004, "0s"), (0.0851, "85ms"), (1.84, "1.8s"), (1.0, "1s"), (114, "110s"),
     (119, "2m"), (700, "12m"), (math.inf, "150000000000m"), (math.nan, "0s"), (-1, "0s")],
)  # fmt: skip
def test_the_backlog_is_told_in_words_of_time(drain_s: float, backlog: str) -> None:
    told = status(decision(replace(SERVING, drain_s=drain_s)), PUBLISHED, {}, wall_s=T0_S)
    assert told["summary"]["backlog"] == backlog


def test_who_takes_no_new_work_has_no_share() -> None:
    told = status(decision(SERVING, UNREACHABLE, DRAINING), PUBLISHED, {}, wall_s=T0_S)
    assert [e["weightPercent"] for e in told["endpoints"]] == [100, 0, 0]


def test_of_too_many_endpoints_those_that_do_not_serve_are_told_first() -> None:
    reports = [SERVING] * 300
    reports[290] = STALE
    told = status(decision(*reports), PUBLISHED, {}, wall_s=T0_S)["endpoints"]
    assert len(told) == MAX_ENDPOINTS
    assert [e["pod"] for e in told if e["state"] == "Stale"] == ["llama-291"]
    assert told == sorted(told, key=lambda e: e["pod"])


def test_two_pods_of_one_address_are_one_endpoint() -> None:
    """The API server would refuse the whole list; it happens while an address changes hands."""
    twins = {Endpoint("old", "10.0.0.1", 80): SERVING, Endpoint("new", "10.0.0.1", 80): SERVING}
    both = Decision(snapshot=Snapshot(dict.fromkeys(twins, 1)), endpoints=twins)
    assert len(status(both, PUBLISHED, {}, wall_s=T0_S)["endpoints"]) == 1


def test_the_time_of_a_transition_moves_only_with_the_status() -> None:
    first = status(decision(SERVING, SERVING), PUBLISHED, {}, wall_s=T0_S)
    more = status(decision(SERVING, STALE), PUBLISHED, first, wall_s=T0_S + 60)
    times = [c["lastTransitionTime"] for c in more["conditions"]]
    assert times == ["2023-11-14T22:13:20Z"] * 4  # SomeStale: another reason, the same status
    gone = status(decision(STALE, STALE), PUBLISHED, more, wall_s=T0_S + 61)
    moved = {c["type"] for c in gone["conditions"] if c["lastTransitionTime"] != times[0]}
    assert moved == {"MetricsAvailable"}


def test_observed_generation_is_on_the_status_and_on_every_condition() -> None:
    told = status(decision(SERVING), PUBLISHED, {}, wall_s=T0_S)
    assert {told["observedGeneration"], *(c["observedGeneration"] for c in told["conditions"])} == {
        3
    }


def test_flips_are_what_an_event_is_worth() -> None:
    first = status(decision(SERVING), PUBLISHED, {}, wall_s=T0_S)
    assert [c["type"] for c in flips({}, first)] == list(Type)
    assert flips(first, status(decision(SERVING), PUBLISHED, first, wall_s=T0_S + 1)) == []
    for reports, reason in (((STALE,), "AllStale"), ((SERVING, STALE), "SomeStale")):
        stale = status(decision(*reports), PUBLISHED, first, wall_s=T0_S + 1)
        assert [(c["type"], c["reason"]) for c in flips(first, stale)] == [
            ("MetricsAvailable", reason)
        ]


@pytest.mark.parametrize(
    ("report", "facts", "at_once", "later"),
    [
        (SERVING, PUBLISHED, False, False),
        (replace(SERVING, age_s=3.0), PUBLISHED, False, False),
        (replace(SERVING, drain_s=0.5671), PUBLISHED, False, False),
        (replace(SERVING, drain_s=0.7), PUBLISHED, False, True),
        (SERVING, replace(PUBLISHED, pods=3), False, True),
        (STALE, PUBLISHED, True, True),
        (SERVING, replace(PUBLISHED, generation=4), True, True),
        (SERVING, replace(PUBLISHED, gateways=0, accepted=False), True, True),
    ],
)
def test_a_flip_is_written_at_once_news_after_a_while_and_the_same_never(
    report: EndpointReport, facts: Facts, *, at_once: bool, later: bool
) -> None:
    before = status(decision(SERVING), PUBLISHED, {}, wall_s=T0_S)
    after = status(decision(report), facts, before, wall_s=T0_S + 1)
    assert worth_writing(before, after, since_s=0.0) is at_once
    assert worth_writing(before, after, since_s=QUIET_S) is later


def test_a_first_status_is_worth_writing() -> None:
    assert worth_writing({}, status(None, PUBLISHED, {}, wall_s=T0_S), since_s=0.0)


# Whatever comes in

numbers = st.floats(allow_nan=True, allow_infinity=True)
reports = st.builds(
    EndpointReport,
    state=st.sampled_from(EndpointState),
    weight=st.integers(0, 1000),
    backlog_tokens=numbers,
    drain_s=numbers,
    speed_ratio=numbers,
    age_s=numbers,
    reason=st.text(max_size=20),
)
endpoints = st.builds(
    Endpoint,
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["10.0.0.1", "10.0.0.2", "::1"]),
    st.integers(1, 3),
)
judgements = st.builds(
    Judgement,
    verdict=st.sampled_from(Verdict),
    evidence=st.builds(Evidence, heard=st.integers(0, 9), most_queue_s=numbers, load_ratio=numbers),
    sentence=st.text(max_size=20),
)
decisions = st.builds(
    Decision,
    snapshot=st.just(Snapshot(MappingProxyType({}))),
    endpoints=st.dictionaries(endpoints, reports, max_size=6),
    judgement=st.none() | judgements,
)
facts = st.builds(
    Facts,
    generation=st.integers(0, 10),
    complaint=st.sampled_from(["", "spec.engine: bad"]),
    pods=st.integers(0, 3),
    unready=st.lists(st.sampled_from(["a", "b"])),
    refused=st.frozensets(endpoints),
    gateways=st.integers(0, 2),
    accepted=st.booleans(),
    refusal=st.sampled_from(["", "no"]),
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["conditions", "type", "status", "verdict", "endpoints", "Ready"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
previous = st.dictionaries(
    st.sampled_from(["conditions", "verdict", "endpoints", "observedGeneration"]), junk, max_size=3
)


@settings(max_examples=100, deadline=None)
@given(decisions | st.none(), facts, previous)
def test_any_status_fits_the_schema_and_same_input_gives_same_bytes(
    what: Decision | None, known: Facts, before: dict[str, Any]
) -> None:
    kept = deepcopy(before)
    told = status(what, known, before, wall_s=T0_S)
    again = status(what, known, before, wall_s=T0_S)
    assert json.dumps(told, allow_nan=False) == json.dumps(again)
    assert before == kept
    InferencePoolStatus.model_validate_json(json.dumps(told))
    worth_writing(before, told, since_s=0.0)


@settings(max_examples=50, deadline=None)
@given(decisions, facts)
def test_the_order_of_endpoints_says_nothing(what: Decision, known: Facts) -> None:
    other = replace(what, endpoints=dict(reversed(list(what.endpoints.items()))))
    assert status(what, known, {}, wall_s=T0_S) == status(other, known, {}, wall_s=T0_S)


@settings(max_examples=50, deadline=None)
@given(decisions, facts, st.floats(0, 1e6))
def test_what_was_written_is_not_written_again(
    what: Decision, known: Facts, later_s: float
) -> None:
    """Facts that stay give one status for ever: an idle pool costs no write."""
    told = status(what, known, {}, wall_s=T0_S)
    stored = json.loads(json.dumps(told))
    again = status(what, known, stored, wall_s=T0_S + later_s)
    assert again == told
    assert not worth_writing(stored, again, since_s=math.inf)
