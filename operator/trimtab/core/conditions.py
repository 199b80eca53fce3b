"""What a pool's status says: conditions first, each with a reason out of a table.

The law. The same facts give the same status, byte by byte, whoever computes it: numbers are rounded
to what people can use, lists are sorted, and the time of a transition is taken over from the status
before unless the condition has flipped. So a status that says nothing new is seen to be the same,
and is not written. docs/conditions.md lists the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trimtab.core.model import EndpointState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from trimtab.core.model import Decision, Endpoint, EndpointReport
    from trimtab.core.verdict import Judgement

MAX_ENDPOINTS = 256  # some 70 KB: an object above 1.5 MB is refused, and every watcher pays
MAX_NAMED = 3  # pods in a message: enough to start looking, and it still fits a line
MAX_TEXT = 1024
QUIET_S = 30.0  # between two writes that tell of no flip: status is not a metric
DIGITS = 2  # of backlog and drain time: more would differ at every look
S, MIN = 1000, 60_000  # in milliseconds
_MOST = 2**53  # beyond it JSON readers round
_MOST_INT32 = 2**31 - 1

_FRESH = frozenset({EndpointState.SERVING, EndpointState.SLOW})
_TAKING = _FRESH | {EndpointState.STALE}
"""States in which an endpoint takes new work: missing data is no reason to stop it."""


class Type(StrEnum):
    READY = "Ready"
    METRICS_AVAILABLE = "MetricsAvailable"
    PUBLISHED = "Published"
    BALANCED = "Balanced"


class Reason(StrEnum):
    SERVING = "Serving"
    STARTING = "Starting"
    INVALID_SPEC = "InvalidSpec"
    NO_PODS = "NoPods"
    NO_READY_PODS = "NoReadyPods"
    UNREACHABLE = "Unreachable"
    NOT_PUBLISHED = "NotPublished"

    ALL_FRESH = "AllFresh"
    SOME_STALE = "SomeStale"
    ALL_STALE = "AllStale"
    NO_ENDPOINTS = "NoEndpoints"

    ACCEPTED = "Accepted"
    PENDING = "Pending"
    REFUSED = "Refused"
    NO_GATEWAY = "NoGateway"

    BALANCED = "Balanced"
    OVERSIZED = "Oversized"
    IMBALANCED = "Imbalanced"
    SLOW_ENDPOINT = "SlowEndpoint"
    SATURATED = "Saturated"
    UNKNOWN = "Unknown"


STATUS = {
    Type.READY: {
        Reason.SERVING: "True",
        Reason.STARTING: "Unknown",
        Reason.INVALID_SPEC: "False",
        Reason.NO_PODS: "False",
        Reason.NO_READY_PODS: "False",
        Reason.UNREACHABLE: "False",
        Reason.NOT_PUBLISHED: "False",
    },
    Type.METRICS_AVAILABLE: {
        Reason.ALL_FRESH: "True",
        Reason.SOME_STALE: "True",
        Reason.ALL_STALE: "False",
        Reason.NO_ENDPOINTS: "Unknown",
    },
    Type.PUBLISHED: {
        Reason.ACCEPTED: "True",
        Reason.PENDING: "Unknown",
        Reason.REFUSED: "False",
        Reason.NO_GATEWAY: "Unknown",
    },
    Type.BALANCED: {
        Reason.BALANCED: "True",
        Reason.OVERSIZED: "True",
        Reason.IMBALANCED: "False",
        Reason.SLOW_ENDPOINT: "False",
        Reason.SATURATED: "False",
        Reason.UNKNOWN: "Unknown",
    },
}
"""A reason settles the status of its condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a pool beside its last decision."""

    generation: int
    """Of the spec that all of this is said of."""
    complaint: str = ""
    """Why that spec cannot be carried out; empty where it can."""
    pods: int = 0
    """That the selector matches, ready or not."""
    unready: Collection[str] = ()
    """Names of those that are not ready."""
    nodes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Where pods run, by their names."""
    refused: Collection[Endpoint] = ()
    """Where nobody listened, when last heard (`State.refused`)."""
    gateways: int = 0
    """Envoys connected here; others may be with another replica."""
    accepted: bool = False
    """Whether each of them has taken a snapshot of this pool, this one or one before."""
    refusal: str = ""
    """What an Envoy said when it refused what is offered now."""


_Said = tuple[Reason, str]
"""A reason, and the same in a sentence with names and numbers."""


def status(
    decision: Decision | None, facts: Facts, previous: Mapping[str, Any], *, wall_s: float
) -> dict[str, Any]:
    """Say what became of a pool, as the `status` of its custom resource.

    Total: whatever stands in `previous`, the status that the API server has, is taken for what it
    is worth.

    Args:
        decision: The last one; None before the first tick.
        facts: What else is known.
        previous: The status before; empty if there is none.
        wall_s: The time of day, in seconds since 1970.
    """
    reports = decision.endpoints if decision else {}
    judgement = decision.judgement if decision else None
    said = {
        Type.READY: _ready(decision, facts),
        Type.METRICS_AVAILABLE: _metrics_available(reports),
        Type.PUBLISHED: _published(facts),
        Type.BALANCED: _balanced(judgement),
    }
    before = _by_type(previous)
    told: dict[str, Any] = {
        "observedGeneration": facts.generation,
        "conditions": [
            _condition(type_, *said[type_], facts, before.get(type_, {}), wall_s=wall_s)
            for type_ in Type
        ],
        "summary": _summary(reports),
        "replicas": facts.pods,
        "endpoints": _endpoints(reports, facts.nodes),
    }
    if judgement is not None:
        told["verdict"] = _verdict(judgement, _map(previous, "verdict"), wall_s=wall_s)
    return told


def flips(previous: Mapping[str, Any], following: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conditions that say something else than before: what an Event is worth."""
    before = _by_type(previous)
    return [
        condition
        for name, condition in _by_type(following).items()
        if any(condition.get(k) != before.get(name, {}).get(k) for k in ("status", "reason"))
    ]


def worth_writing(
    previous: Mapping[str, Any], following: Mapping[str, Any], *, since_s: float
) -> bool:
    """Whether a status is to replace the one before, which was written `since_s` ago."""
    generation = "observedGeneration"
    if flips(previous, following) or previous.get(generation) != following.get(generation):
        return True
    return since_s >= QUIET_S and _content(previous) != _content(following)


def _content(status: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what grows by itself."""
    endpoints = [
        {name: value for name, value in endpoint.items() if name != "dataAgeSeconds"}
        for endpoint in _maps(status.get("endpoints"))
    ]
    return {**status, "endpoints": endpoints}


# The conditions.


def _ready(decision: Decision | None, facts: Facts) -> _Said:
    if facts.complaint:
        return Reason.INVALID_SPEC, facts.complaint
    if facts.pods == 0:
        return Reason.NO_PODS, "No pod of this namespace matches spec.selector."
    if decision is None:
        return Reason.STARTING, "Nothing has been observed yet."
    staying = _staying(decision.endpoints)
    taking = {e for e, report in staying.items() if report.state in _TAKING}
    refused = {e for e in staying if e in facts.refused}
    but = f" Pods not ready: {_named(facts.unready)}." if facts.unready else ""
    if refused:
        but = f" Nobody listens at {_named(f'{e.pod}:{e.port}' for e in refused)}.{but}"
    return _serving(taking, refused, facts, of=len(staying), but=but)


def _serving(
    taking: set[Endpoint], refused: set[Endpoint], facts: Facts, *, of: int, but: str
) -> _Said:
    if not taking:
        return Reason.NO_READY_PODS, f"None of {facts.pods} matching pods takes new work.{but}"
    if taking <= refused:
        return Reason.UNREACHABLE, f"Are spec.targetPorts right?{but}"
    if facts.refusal and not facts.accepted:
        return Reason.NOT_PUBLISHED, f"No gateway serves this pool yet: {facts.refusal}"
    return Reason.SERVING, f"{len(taking)} of {of} endpoints take new work.{but}"


def _metrics_available(reports: Mapping[Endpoint, EndpointReport]) -> _Said:
    staying = _staying(reports)
    stale = sorted(e for e, report in staying.items() if report.state not in _FRESH)
    if not staying:
        return Reason.NO_ENDPOINTS, "There is no endpoint to ask for metrics."
    if not stale:
        return Reason.ALL_FRESH, f"All {len(staying)} endpoints have fresh data."
    reason = Reason.SOME_STALE if len(stale) < len(staying) else Reason.ALL_STALE
    named = _named(f"{e.pod}:{e.port}" for e in stale)
    told = f"{len(stale)} of {len(staying)} endpoints have no fresh data: {named}."
    return reason, f"{told} The first: {_why(reports[stale[0]])}."


def _published(facts: Facts) -> _Said:
    if facts.refusal:
        told = "A gateway refused what it was told, and goes on with what it has"
        return Reason.REFUSED, f"{told}: {facts.refusal}"
    if facts.gateways == 0:
        return Reason.NO_GATEWAY, "No gateway is connected to the replica that writes this."
    if not facts.accepted:
        return Reason.PENDING, "Not every gateway has answered yet."
    return Reason.ACCEPTED, f"All gateways follow; connected to this replica: {facts.gateways}."


def _balanced(judgement: Judgement | None) -> _Said:
    if judgement is None:
        return Reason.UNKNOWN, "The pool has not been judged yet."
    return Reason(judgement.verdict), judgement.sentence


def _condition(
    type_: Type,
    reason: Reason,
    message: str,
    facts: Facts,
    before: Mapping[str, Any],
    *,
    wall_s: float,
) -> dict[str, Any]:
    state = STATUS[type_][reason]
    since = before.get("lastTransitionTime") if before.get("status") == state else None
    return {
        "type": str(type_),
        "status": state,
        "observedGeneration": facts.generation,
        "lastTransitionTime": since if isinstance(since, str) else _time(wall_s),
        "reason": str(reason),
        "message": _text(message),
    }


# The rest of the status.


def _staying(reports: Mapping[Endpoint, EndpointReport]) -> dict[Endpoint, EndpointReport]:
    return {e: r for e, r in reports.items() if r.state is not EndpointState.DRAINING}


def _summary(reports: Mapping[Endpoint, EndpointReport]) -> dict[str, str]:
    taking = sum(report.state in _TAKING for report in reports.values())
    fullest_s = max((_finite(report.drain_s) for report in reports.values()), default=0.0)
    return {"endpoints": f"{taking}/{len(_staying(reports))}", "backlog": _duration(fullest_s)}


def _endpoints(
    reports: Mapping[Endpoint, EndpointReport], nodes: Mapping[str, str]
) -> list[dict[str, Any]]:
    # Two of one address and port would make the API server refuse the whole status.
    different = {(e.address, e.port): e for e in sorted(reports, reverse=True)}.values()
    chosen = sorted(different, key=lambda e: (reports[e].state is EndpointState.SERVING, e))
    total = sum(report.weight for report in reports.values() if report.state in _TAKING)
    takers = sum(report.state in _TAKING for report in reports.values())
    return [
        _endpoint(e, reports[e], node=nodes.get(e.pod, ""), fair_weight=total / max(1, takers))
        for e in sorted(chosen[:MAX_ENDPOINTS])
    ]


def _endpoint(
    endpoint: Endpoint, report: EndpointReport, *, node: str, fair_weight: float
) -> dict[str, Any]:
    takes = report.state in _TAKING and fair_weight > 0
    told = {
        "pod": endpoint.pod,
        "address": endpoint.address,
        "port": endpoint.port,
        "weightPercent": _whole(100 * report.weight / fair_weight) if takes else 0,
        "backlogTokens": _rounded(report.backlog_tokens),
        "drainMilliseconds": _rounded(report.drain_s * 1000),
        "speedPercent": _whole(report.speed_ratio * 100),
        "state": str(report.state),
    }
    if node:
        told["node"] = node
    if math.isfinite(report.age_s):
        told["dataAgeSeconds"] = _whole(report.age_s)
    if report.reason:
        told["reason"] = _text(_why(report))
    return told


def _verdict(judgement: Judgement, before: Mapping[str, Any], *, wall_s: float) -> dict[str, Any]:
    name, since, evidence = str(judgement.verdict), before.get("since"), judgement.evidence
    kept = before.get("name") == name and isinstance(since, str)
    return {
        "name": name,
        "since": since if kept else _time(wall_s),
        "evidence": {
            "heardEndpoints": evidence.heard,
            "leastQueueMilliseconds": _rounded(evidence.least_queue_s * 1000),
            "mostQueueMilliseconds": _rounded(evidence.most_queue_s * 1000),
            "loadPercent": _whole(evidence.load_ratio * 100),
        },
        "message": _text(judgement.sentence),
    }


# Words and numbers.


def _why(report: EndpointReport) -> str:
    """Leave out the age in front, with which each look would differ."""
    age, found, why = report.reason.partition("; ")
    return why if found else age


def _text(words: str) -> str:
    """On one line, and short enough."""
    return " ".join(words.split())[:MAX_TEXT]


def _named(names: Iterable[str]) -> str:
    every = sorted(set(names))
    more = f" and {len(every) - MAX_NAMED} more" if len(every) > MAX_NAMED else ""
    return ", ".join(every[:MAX_NAMED]) + more


def _finite(number: float) -> float:
    return min(max(number, 0.0), float(_MOST)) if number == number else 0.0  # noqa: PLR0124  # not NaN


def _whole(number: float, *, most: int = _MOST_INT32) -> int:
    return min(round(_finite(number)), most)


def _rounded(number: float) -> int:
    """To DIGITS significant ones."""
    whole = _whole(number, most=_MOST)
    return int(round(whole, DIGITS - len(str(whole)))) if whole else 0


def _duration(seconds: float) -> str:
    """Write 85ms, 1.8s, 45s or 12m."""
    milliseconds = _rounded(seconds * 1000)
    if 0 < milliseconds < S:
        return f"{milliseconds}ms"
    if milliseconds < 2 * MIN:
        return f"{milliseconds / S:g}s"
    return f"{milliseconds / MIN:.0f}m"


def _time(wall_s: float) -> str:
    return datetime.fromtimestamp(math.floor(wall_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# Status as the API server has it, which others may have written.


def _map(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = status.get(name)
    return value if isinstance(value, Mapping) else {}


def _maps(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _by_type(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(each.get("type")): each for each in _maps(status.get("conditions"))}
