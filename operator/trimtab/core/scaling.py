"""Verdicts over time to a replica count, and to the pod that leaves.

The law. Routing first: what another split of the load would mend never adds a pod at once.

    Saturated      as many pods as the measured shortage asks for; those that start count as there
    Imbalanced     one more, once, when it has lasted although routing moved
    SlowEndpoint   when it has lasted: one more, and when that serves, the slow one leaves
    Oversized      one less, when it has lasted and nothing else has changed meanwhile
    Unknown        nothing: neither up nor down on no knowledge, and a pod that leaves goes on to

Who leaves has the least work left to do, of pods that are down or slow first. A departure is
called off at once when load returns: the cheapest new pod is one that is still warm.

What is proposed stands until it is carried out or its verdict is gone, so it may be only shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from trimtab.core.model import EndpointState
from trimtab.core.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.core.model import Endpoint, EndpointReport
    from trimtab.core.verdict import Judgement

SETTLE_S = 60.0
"""A verdict looks back half a minute, and queues of a shortage that is mended need as long to go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """What a pool's spec asks of scaling."""

    min_replicas: int = 1
    max_replicas: int = 8
    persistent_imbalance_s: float = 120.0
    """How long routing has to remove an imbalance, and a slow endpoint to recover."""
    stabilization_s: float = 300.0
    """How long a pool must have been too large, and unchanged, before a pod leaves."""


_RANK = {EndpointState.DRAINING: 0, EndpointState.UNREACHABLE: 1, EndpointState.SLOW: 2}
_LAST = len(_RANK)
_AT_WORK = frozenset({EndpointState.SERVING, EndpointState.SLOW, EndpointState.STALE})


class Reason(StrEnum):
    """Why so many; the first group moves something, the second refuses to."""

    OUT_OF_BOUNDS = "OutOfBounds"
    SHORTAGE = "Shortage"
    PERSISTENT_IMBALANCE = "PersistentImbalance"
    REPLACEMENT = "Replacement"
    SURPLUS = "Surplus"
    LOAD_RETURNED = "LoadReturned"

    ENOUGH = "Enough"
    NOT_KNOWN = "NotKnown"
    NOT_PERSISTENT = "NotPersistent"
    STABILIZING = "Stabilizing"
    STARTING = "Starting"
    SETTLING = "Settling"
    ROUTING_LIMITED = "RoutingLimited"
    """One pod more has been tried against this imbalance, and has not mended it."""
    AT_MAXIMUM = "AtMaximum"
    AT_MINIMUM = "AtMinimum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    replicas: int
    reason: Reason
    victim: str | None = None
    """The pod that is to finish its work and leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that one call of `scale` hands to the next."""

    replicas: int = 0
    """As last seen, and since when."""
    changed_s: float = -math.inf
    open: Proposal | None = None
    """Not yet carried out."""
    verdict: Verdict = Verdict.UNKNOWN
    """What it follows from."""
    replacing: str | None = None
    """A slow pod whose successor was asked for."""
    answered_s: float | None = None
    """Beginning of the imbalance that has got its pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What a proposal is made from."""

    replicas: int
    serving: int
    """Pods."""
    lasted_s: float
    """How long the verdict has stood with the pool unchanged."""
    judgement: Judgement
    endpoints: Mapping[Endpoint, EndpointReport]
    policy: ScalingPolicy

    def stay(self, reason: Reason) -> Proposal:
        return Proposal(replicas=self.replicas, reason=reason)

    def move(self, pods: int, reason: Reason, *, victim: str | None = None) -> Proposal:
        return Proposal(replicas=self.replicas + pods, reason=reason, victim=victim)


def scale(
    plan: Plan,
    judgement: Judgement,
    endpoints: Mapping[Endpoint, EndpointReport],
    policy: ScalingPolicy,
    *,
    replicas: int,
    now_s: float,
) -> tuple[Plan, Proposal]:
    """Propose a replica count. `replicas` is what the target asks for now, started or not."""
    if replicas != plan.replicas:
        plan = replace(plan, replicas=replicas, changed_s=now_s)
    if plan.replacing not in {endpoint.pod for endpoint in endpoints}:
        plan = replace(plan, replacing=None)
    unknown = judgement.verdict is Verdict.UNKNOWN
    if replicas < policy.min_replicas:
        return plan, Proposal(replicas=policy.min_replicas, reason=Reason.OUT_OF_BOUNDS)
    if replicas > policy.max_replicas and not unknown:
        victim = victim_of(endpoints)
        return plan, Proposal(replicas=replicas - 1, reason=Reason.OUT_OF_BOUNDS, victim=victim)
    if unknown:
        victim = plan.open.victim if plan.open else None
        return plan, Proposal(replicas=replicas, reason=Reason.NOT_KNOWN, victim=victim)
    if plan.open is not None:
        proposal = _keep(plan, plan.open, judgement.verdict, endpoints)
        if proposal is not None and proposal.reason is not Reason.LOAD_RETURNED:
            return plan, proposal
        plan = replace(plan, open=None)
        if proposal is not None:  # or the same departure would be proposed again at once
            return replace(plan, changed_s=now_s), proposal
    view = _View(
        replicas=replicas,
        serving=len({endpoint.pod for endpoint, r in endpoints.items() if r.state in _AT_WORK}),
        lasted_s=now_s - max(judgement.since_s, plan.changed_s),
        judgement=judgement,
        endpoints=endpoints,
        policy=policy,
    )
    plan, proposal = _propose(plan, view)
    is_open = proposal.replicas != replicas
    return replace(plan, open=proposal if is_open else None, verdict=judgement.verdict), proposal


def victim_of(endpoints: Mapping[Endpoint, EndpointReport]) -> str | None:
    """The pod with the least work left; before all others who leaves already, is down or slow."""
    left: dict[str, tuple[int, float, float]] = {}
    for endpoint, report in endpoints.items():
        state, drain_s, requests = left.get(endpoint.pod, (_LAST, 0.0, 0.0))
        left[endpoint.pod] = (
            min(state, _RANK.get(report.state, _LAST)),
            drain_s + report.drain_s,
            requests + report.running + report.waiting,
        )
    return min(left, key=lambda pod: (left[pod], pod), default=None)


def _keep(
    plan: Plan, proposal: Proposal, verdict: Verdict, endpoints: Mapping[Endpoint, EndpointReport]
) -> Proposal | None:
    """Stand by what is open as long as its ground holds; None when it is done or void."""
    if proposal.victim is None:
        # A shortage is measured anew, all else stands as long as its verdict does.
        void = verdict is not plan.verdict or verdict is Verdict.SATURATED
        return None if void or proposal.replicas == plan.replicas else proposal
    if not any(endpoint.pod == proposal.victim for endpoint in endpoints):
        return None
    # Queues everywhere tell sooner than any verdict can.
    others = [r for e, r in endpoints.items() if e.pod != proposal.victim and r.state in _AT_WORK]
    if verdict is Verdict.SATURATED or all(report.waiting for report in others):
        return Proposal(replicas=plan.replicas, reason=Reason.LOAD_RETURNED)
    return proposal


def _propose(plan: Plan, view: _View) -> tuple[Plan, Proposal]:
    """Answer a verdict anew; the pool is known and within its bounds, and nothing is open."""
    verdict = view.judgement.verdict
    if verdict is Verdict.SATURATED:
        return plan, _add_what_is_short(view)
    if view.serving < view.replicas:
        return plan, view.stay(Reason.STARTING)
    if plan.replacing is not None:
        return replace(plan, replacing=None), _let_go(plan.replacing, view)
    if verdict in {Verdict.IMBALANCED, Verdict.SLOW_ENDPOINT}:
        return _add_one(plan, view)
    if verdict is Verdict.OVERSIZED:
        return plan, _take_one(view)
    return plan, view.stay(Reason.ENOUGH)


def _add_what_is_short(view: _View) -> Proposal:
    """Count in pods, of which each may be several endpoints."""
    pods = {endpoint.pod for endpoint in view.endpoints}
    per_pod = max(1.0, len(view.endpoints) / max(1, len(pods)))
    short = math.ceil(view.judgement.evidence.shortage_endpoints / per_pod)
    if short < 1 and view.lasted_s >= SETTLE_S:
        short = 1
    missing = view.serving + short - view.replicas
    if missing < 1:
        starting = view.serving < view.replicas
        return view.stay(Reason.STARTING if starting else Reason.SETTLING)
    room = view.policy.max_replicas - view.replicas
    return view.move(min(missing, room), Reason.SHORTAGE) if room else view.stay(Reason.AT_MAXIMUM)


def _add_one(plan: Plan, view: _View) -> tuple[Plan, Proposal]:
    """Against what routing could not mend in its time."""
    judgement = view.judgement
    imbalanced = judgement.verdict is Verdict.IMBALANCED
    if imbalanced and plan.answered_s == judgement.since_s:
        return plan, view.stay(Reason.ROUTING_LIMITED)
    if view.lasted_s < view.policy.persistent_imbalance_s:
        return plan, view.stay(Reason.NOT_PERSISTENT)
    if view.replicas == view.policy.max_replicas:
        return plan, view.stay(Reason.AT_MAXIMUM)
    if imbalanced:
        plan = replace(plan, answered_s=judgement.since_s)
        return plan, view.move(1, Reason.PERSISTENT_IMBALANCE)
    plan = replace(plan, replacing=judgement.evidence.slow[0].pod)
    return plan, view.move(1, Reason.REPLACEMENT)


def _let_go(pod: str, view: _View) -> Proposal:
    """Its successor serves, so the slow pod may leave, unless it has recovered."""
    still_slow = any(e.pod == pod for e in view.judgement.evidence.slow)
    if still_slow and view.replicas > view.policy.min_replicas:
        return view.move(-1, Reason.REPLACEMENT, victim=pod)
    return view.stay(Reason.ENOUGH)


def _take_one(view: _View) -> Proposal:
    if view.replicas == view.policy.min_replicas:
        return view.stay(Reason.AT_MINIMUM)
    if view.lasted_s < view.policy.stabilization_s:
        return view.stay(Reason.STABILIZING)
    return view.move(-1, Reason.SURPLUS, victim=victim_of(view.endpoints))
