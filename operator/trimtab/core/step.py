"""One tick of a pool as one function: what was seen goes in, what is to be done comes out.

The line: readings -> memory (backlog.py) -> levels -> weights (weights.py) -> snapshot and report,
and beside it memory -> verdict (verdict.py).
All that outlives a tick is in the State that the caller hands back at the next one.

Fail static. Without data weights grow flatter with the age of what is known, then stay; nothing
here stops traffic to an endpoint because its metrics are gone. The one exception is a refused
connection: nobody listens there, so it gets no new work until something answers, unless that is so
everywhere, which says more about the way there than about the endpoints. Who is asked to leave
gets no new work either, and is watched until it is gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from trimtab.core.backlog import (
    PUSH_S,
    Memory,
    Track,
    arriving_tokens,
    estimate,
    levels,
)
from trimtab.core.model import (
    Decision,
    EndpointReport,
    EndpointState,
    Failure,
    FailureKind,
    Snapshot,
)
from trimtab.core.verdict import Watch, judge
from trimtab.core.weights import settle, weigh

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trimtab.core.model import Endpoint, Observation, Policy, Reading

SLOW_RATIO = 0.75  # slower than that, an endpoint spoils the pool's tail

_UNDECIDED = frozenset({FailureKind.TIMED_OUT, FailureKind.DISCONNECTED})
"""Failures that do not say whether somebody listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that one tick hands to the next."""

    memory: Memory = field(default_factory=Memory)
    snapshot: Snapshot = field(default_factory=lambda: Snapshot(MappingProxyType({})))
    refused: frozenset[Endpoint] = frozenset()
    """Where nobody listened, when last heard."""
    states: Mapping[Endpoint, EndpointState] = field(default_factory=lambda: MappingProxyType({}))
    watch: Watch = field(default_factory=Watch)


def step(
    state: State, observation: Observation, policy: Policy, *, now_s: float
) -> tuple[State, Decision]:
    """Decide what follows from this observation. Total, and blind to the order of endpoints."""
    endpoints = sorted(observation.readings)
    memory = estimate(
        state.memory, observation, policy, now_s=now_s, weights=state.snapshot.weights
    )
    staying = [e for e in endpoints if e not in observation.draining]
    draining = frozenset(endpoints).difference(staying)
    refused = frozenset(
        e for e in staying if _refuses(observation.readings[e], was=e in state.refused)
    )
    unreachable = refused if len(refused) < len(staying) else frozenset()
    reachable = [e for e in staying if e not in unreachable]

    level_tokens, news_age_s = levels(memory, reachable, policy)
    proposed = weigh(
        level_tokens,
        {e: memory.speed_of(e) for e in reachable},
        arriving_tokens=arriving_tokens(
            memory, reachable, horizon_s=policy.interval_s + news_age_s + PUSH_S
        ),
        minimum_weight_ratio=policy.minimum_weight_ratio,
    )
    snapshot = _snapshot(state.snapshot, proposed, unreachable, draining)

    mean_tokens = sum(level_tokens.values()) / max(1, len(level_tokens))
    level_tokens |= levels(memory, draining, policy).level_tokens
    reports: dict[Endpoint, EndpointReport] = {}
    changes: list[str] = []
    for endpoint in endpoints:
        track = memory.tracks.get(endpoint)
        speed_ratio = memory.speed_of(endpoint)
        tokens = level_tokens.get(endpoint, mean_tokens)
        now, reason = _judge(
            observation.readings[endpoint],
            track,
            speed_ratio,
            unreachable=endpoint in unreachable,
            draining=endpoint in draining,
            stale_after_s=policy.stale_after_s,
        )
        reports[endpoint] = EndpointReport(
            state=now,
            weight=snapshot.weights.get(endpoint, 0),
            backlog_tokens=tokens * speed_ratio,
            drain_s=tokens / memory.rate_tokens_per_s,
            speed_ratio=speed_ratio,
            age_s=track.news_age_s if track else math.inf,
            running=track.sample.running if track else 0.0,
            waiting=track.sample.waiting if track else 0.0,
            kv_used_ratio=track.sample.kv_used_ratio if track else None,
            reason=reason,
        )
        before = state.states.get(endpoint, EndpointState.SERVING)
        if now != before:
            changes.append(_change(endpoint, before, now, reason))
    watch, judgement = judge(state.watch, memory, reachable, policy)
    after = State(
        memory=memory,
        snapshot=snapshot,
        refused=refused,
        states={e: report.state for e, report in reports.items()},
        watch=watch,
    )
    return after, Decision(
        snapshot=snapshot, endpoints=reports, changes=tuple(changes), judgement=judgement
    )


def restrict(
    state: State, endpoints: Collection[Endpoint], draining: Collection[Endpoint]
) -> State:
    """Take out of the snapshot who has left since, without waiting for the next observation.

    Whoever is new waits for it: nothing is known of him yet.
    """
    before = state.snapshot
    weights = {e: weight for e, weight in before.weights.items() if e in endpoints}
    leaving = frozenset(e for e in {*before.weights, *before.draining} if e in draining)
    if len(weights) == len(before.weights) and leaving == before.draining:
        return state
    snapshot = Snapshot(
        MappingProxyType(weights),
        unreachable=before.unreachable.intersection(weights),
        draining=leaving,
    )
    return replace(state, snapshot=snapshot)


def _refuses(reading: Reading, *, was: bool) -> bool:
    """Whether nobody listens; an answer of any kind says that somebody does."""
    if not isinstance(reading.outcome, Failure):
        return False
    if reading.outcome.kind in _UNDECIDED:
        return was
    return reading.outcome.kind is FailureKind.REFUSED


def _snapshot(
    before: Snapshot,
    proposed: Mapping[Endpoint, int],
    unreachable: frozenset[Endpoint],
    draining: frozenset[Endpoint],
) -> Snapshot:
    """The next snapshot, or the one before itself where nothing worth a push has changed."""
    weights = dict(sorted({**proposed, **dict.fromkeys(unreachable, 1)}.items()))
    if (unreachable, draining) == (before.unreachable, before.draining):
        settled = settle(before.weights, weights)
        if settled is before.weights:
            return before
    return Snapshot(MappingProxyType(weights), unreachable=unreachable, draining=draining)


def _judge(
    reading: Reading,
    track: Track | None,
    speed_ratio: float,
    *,
    unreachable: bool,
    draining: bool,
    stale_after_s: float,
) -> tuple[EndpointState, str]:
    """The state of an endpoint, and why it is not Serving."""
    failure = reading.outcome if isinstance(reading.outcome, Failure) else None
    if draining:
        return EndpointState.DRAINING, "its pod is asked to leave"
    if unreachable:
        return EndpointState.UNREACHABLE, "connection refused: nobody listens"
    if track is None or track.news_age_s > stale_after_s:
        if failure:
            why = f"{failure.kind}: {failure.detail}" if failure.detail else str(failure.kind)
        else:
            why = "its page stands still although there is work"
        since = f"nothing new for {track.news_age_s:.1f} s" if track else "never a sample"
        return EndpointState.STALE, f"{since}; {why}"
    if speed_ratio < SLOW_RATIO:
        return EndpointState.SLOW, f"works at {speed_ratio:.2f} of the pool's median speed"
    return EndpointState.SERVING, ""


def _change(endpoint: Endpoint, before: EndpointState, now: EndpointState, reason: str) -> str:
    address = endpoint.where
    where = address if endpoint.pod == address else f"{endpoint.pod} ({address})"
    return f"{where} was {before}, is {now}" + (f": {reason}" if reason else "")
