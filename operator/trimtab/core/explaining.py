"""One pool's straight line with its numbers: page -> backlog -> weight -> state, verdict, deeds.

The law. A decision and a few times give an explanation, always the same, of sentences and rows.
What is not known is left out, and no sentence claims more than the rows below it show.

Why are short requests slow while GPUs idle? Because they wait behind long ones at some endpoints,
although others are free. That is said where it is so: where requests wait at an endpoint, and what
they wait for exceeds what the emptiest endpoint owes by more than an Imbalanced pool's would.
Endpoints without fresh data, and those that get no new work, are not accused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.core.model import EndpointState, Objective
from trimtab.core.verdict import QUEUE_RATIO, Judgement, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trimtab.core.model import Decision, Endpoint, EndpointReport

MAX_NAMED = 3  # pods in a sentence: enough to start looking, and it can still be read aloud
UNEVEN_S = QUEUE_RATIO * Objective().ttft_s  # the verdict's own measure, or the two would differ
MIN = 60.0
_MOST = 2.0**53  # beyond it JSON readers round

_FRESH = frozenset({EndpointState.SERVING, EndpointState.SLOW})
_TAKING = _FRESH | {EndpointState.STALE}
_LEVEL = frozenset({Verdict.BALANCED, Verdict.OVERSIZED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Deeds:
    """What was done lately. Times are of the clock that the decision has; None: never."""

    decided_s: float | None = None
    changed_s: float | None = None
    """When the snapshot last became another one."""
    published_s: float | None = None
    """When the data plane last took a snapshot, new or not."""
    envoys: int = 0
    """Connected here."""
    following: int = 0
    """Of them, those that have acknowledged this pool's snapshot."""
    refusal: str = ""
    """The last one of any Envoy, of whatever resource."""
    complaint: str = ""
    """Why the last tick failed; empty if it did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One endpoint's line, left to right; None where something is not known."""

    name: str
    """Pod and port, as sentences call it; a pod may serve on several ports."""
    pod: str
    address: str
    running: float
    waiting: float
    kv_percent: float | None
    speed_percent: float
    age_s: float | None
    backlog_tokens: float
    backlog_percent: float
    """Of what the whole pool owes."""
    drain_s: float
    weight_percent: float
    """Of new work."""
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `trimtab explain` prints, and /debug/pools/NAME answers."""

    pool: str
    verdict: str
    verdict_for_s: float | None
    """How long it has been so; None if it never was otherwise."""
    sentence: str
    """What the verdict says."""
    evidence: str
    """The numbers of the last check, whatever the verdict."""
    answer: str
    """Why short requests are slow; empty where no endpoint keeps them waiting alone."""
    deeds: tuple[str, ...]
    snapshot: str
    """Version of the table that the data plane is to have; empty before the first tick."""
    rows: tuple[Row, ...]


def explain(pool: str, decision: Decision | None, deeds: Deeds, *, now_s: float) -> Explanation:
    """Explain a pool by its last decision; None before the first tick. Total."""
    reports = decision.endpoints if decision else {}
    judgement = (decision.judgement if decision else None) or Judgement()
    snapshot = decision.snapshot.version if decision else ""
    late_s = _finite(now_s - deeds.decided_s) if deeds.decided_s is not None else 0.0
    rows = _rows(reports, late_s=late_s)
    return Explanation(
        pool=pool,
        verdict=str(judgement.verdict),
        verdict_for_s=_known(now_s - judgement.since_s),
        sentence=judgement.sentence,
        evidence=_evidence(judgement),
        answer=_answer(rows, judgement),
        deeds=tuple(_deeds(deeds, snapshot, now_s=now_s)),
        snapshot=snapshot,
        rows=tuple(rows.values()),
    )


def duration(seconds: float) -> str:
    """Write 0.4 s, 95 s, 12 min or 3 h."""
    seconds = _finite(seconds)
    if seconds < 2 * MIN:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004  # digits
    return f"{seconds / MIN:.0f} min" if seconds < 120 * MIN else f"{seconds / MIN / 60:.0f} h"


def _rows(reports: Mapping[Endpoint, EndpointReport], *, late_s: float) -> dict[Endpoint, Row]:
    owed_tokens = sum(_finite(report.backlog_tokens) for report in reports.values())
    weights = sum(report.weight for report in reports.values() if report.state in _TAKING)
    return {
        endpoint: Row(
            name=_name(endpoint),
            pod=endpoint.pod,
            address=endpoint.where,
            running=_finite(report.running),
            waiting=_finite(report.waiting),
            kv_percent=None if report.kv_used_ratio is None else _known(100 * report.kv_used_ratio),
            speed_percent=_finite(100 * report.speed_ratio),
            age_s=_known(report.age_s + late_s),
            backlog_tokens=_finite(report.backlog_tokens),
            backlog_percent=_percent(report.backlog_tokens, owed_tokens),
            drain_s=_finite(report.drain_s),
            weight_percent=_percent(report.weight, weights) if report.state in _TAKING else 0.0,
            state=str(report.state),
            reason=report.reason,
        )
        for endpoint, report in sorted(reports.items())
    }


def _answer(rows: Mapping[Endpoint, Row], judgement: Judgement) -> str:
    fresh = [row for row in rows.values() if row.state in _FRESH]
    emptiest = min(fresh, key=lambda row: row.drain_s, default=None)
    if emptiest is None:
        return ""
    full = [row for row in fresh if row.waiting and row.drain_s - emptiest.drain_s > UNEVEN_S]
    if not full:
        return ""
    full.sort(key=lambda row: row.drain_s, reverse=True)
    level = judgement.verdict in _LEVEL
    why = "Just now" if level else "Short requests are slow because"
    hold = "hold" if len(full) > 1 else "holds"
    least_s, most_s = f"{full[-1].drain_s:.1f}", f"{full[0].drain_s:.1f}"
    behind = most_s if least_s == most_s else f"{least_s} to {most_s}"
    return (
        f"{why} {len(full)} of {len(rows)} endpoints {hold} "
        f"{sum(row.backlog_percent for row in full):.0f} % of the backlog: a short request sent to "
        f"{_named([row.name for row in full])} waits behind {behind} s of work, at the emptiest, "
        f"{emptiest.name}, behind {emptiest.drain_s:.1f} s; of new work "
        f"{'they get' if len(full) > 1 else 'it gets'} "
        f"{sum(row.weight_percent for row in full):.0f} %"
        + (", and over 30 s it evens out." if level else ".")
    )


def _evidence(judgement: Judgement) -> str:
    evidence = judgement.evidence
    heard = f"{evidence.heard} of {evidence.endpoints} endpoints heard"
    if not evidence.settled_s > 0:
        return heard
    return (
        f"{heard}; queues of {_finite(evidence.least_queue_s):.2f} to "
        f"{_finite(evidence.most_queue_s):.2f} s over 30 s; load "
        f"{100 * _finite(evidence.load_ratio):.0f} % over a minute; "
        f"{_finite(evidence.needed_endpoints):.1f} endpoints needed"
    )


def _deeds(deeds: Deeds, snapshot: str, *, now_s: float) -> Iterable[str]:
    if deeds.complaint:
        yield f"The last tick failed, and the next one tries again: {deeds.complaint}"
    if deeds.decided_s is not None:
        changed = ""
        if deeds.changed_s is not None:
            changed = f" since {duration(now_s - deeds.changed_s)}"
        yield f"Decided {duration(now_s - deeds.decided_s)} ago: snapshot {snapshot}{changed}."
    if deeds.published_s is None:
        yield "Nothing has been published yet."
    elif not deeds.envoys:
        yield f"Published {duration(now_s - deeds.published_s)} ago, but no Envoy is connected."
    else:
        yield (
            f"Published {duration(now_s - deeds.published_s)} ago; "
            f"{deeds.following} of {deeds.envoys} connected Envoys follow it."
        )
    if deeds.refusal:
        yield f"The last refusal: {deeds.refusal}"


# Words and numbers.


def _name(endpoint: Endpoint) -> str:
    """On plain hosts a pod is called by its address, port and all."""
    address = endpoint.where
    return address if endpoint.pod == address else f"{endpoint.pod}:{endpoint.port}"


def _named(names: list[str]) -> str:
    """Write A; A or B; A, B or C; A, B, C or 4 more."""
    more = len(names) - MAX_NAMED
    listed = [*names[:MAX_NAMED], f"{more} more"] if more > 0 else names
    return " or ".join(filter(None, (", ".join(listed[:-1]), listed[-1])))


def _finite(number: float) -> float:
    return min(max(number, 0.0), _MOST) if number == number else 0.0  # noqa: PLR0124  # not NaN


def _known(number: float) -> float | None:
    """Leave out what is infinite or no number at all."""
    return _finite(number) if math.isfinite(number) else None


def _percent(part: float, whole: float) -> float:
    return 100 * _finite(part) / whole if whole > 0 else 0.0
