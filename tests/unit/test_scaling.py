"""Scaling: verdicts to replicas and to who leaves, with a reason for whatever is not done."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.model import Endpoint, EndpointReport, EndpointState
from trimtab.core.scaling import (
    Plan,
    Proposal,
    Reason,
    ScalingPolicy,
    scale,
    victim_of,
)
from trimtab.core.verdict import Evidence, Judgement, Verdict

PODS = [Endpoint(f"pod-{i}", f"10.0.0.{i}", 8000) for i in range(12)]


def report(
    state: EndpointState = EndpointState.SERVING, *, drain_s: float = 1.0, waiting: float = 0.0
) -> EndpointReport:
    return EndpointReport(
        state=state,
        weight=1000,
        backlog_tokens=0.0,
        drain_s=drain_s,
        speed_ratio=1.0,
        age_s=0.0,
        waiting=waiting,
    )


@dataclass
class Target:
    """A pool whose target does at once what is proposed, unless it only listens."""

    policy: ScalingPolicy = field(default_factory=ScalingPolicy)
    replicas: int = 4
    obeys: bool = True
    starts: bool = True
    """Pods serve at once."""
    plan: Plan = field(default_factory=Plan)
    now_s: float = 0.0
    said: Judgement = field(default_factory=Judgement)
    endpoints: dict[Endpoint, EndpointReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.endpoints = {pod: report() for pod in PODS[: self.replicas]}

    def tick(
        self, verdict: Verdict, *, shortage: float = 0.0, slow: tuple[Endpoint, ...] = ()
    ) -> Proposal:
        self.now_s += 1
        since_s = self.said.since_s if self.said.verdict is verdict else self.now_s
        self.said = Judgement(
            verdict=verdict,
            since_s=since_s,
            evidence=Evidence(shortage_endpoints=shortage, slow=slow),
            sentence="because",
        )
        self.plan, proposal = scale(
            self.plan,
            self.said,
            self.endpoints,
            self.policy,
            replicas=self.replicas,
            now_s=self.now_s,
        )
        if self.obeys:
            self.obey(proposal)
        return proposal

    def obey(self, proposal: Proposal) -> None:
        """A victim has finished its work at once, too."""
        for endpoint in list(self.endpoints):
            if endpoint.pod == proposal.victim and proposal.replicas < self.replicas:
                del self.endpoints[endpoint]
        self.replicas = proposal.replicas
        if self.starts:
            new = [pod for pod in PODS if pod not in self.endpoints]
            for pod in new[: self.replicas - len(self.endpoints)]:
                self.endpoints[pod] = report()

    def hold(
        self,
        verdict: Verdict,
        seconds: int,
        *,
        shortage: float = 0.0,
        slow: tuple[Endpoint, ...] = (),
    ) -> list[Proposal]:
        return [self.tick(verdict, shortage=shortage, slow=slow) for _ in range(seconds)]


def reasons(proposals: list[Proposal]) -> list[Reason]:
    """Without repetitions."""
    return list(dict.fromkeys(proposal.reason for proposal in proposals))


def test_a_balanced_pool_stays_as_it_is() -> None:
    target = Target()
    assert reasons(target.hold(Verdict.BALANCED, 1000)) == [Reason.ENOUGH]
    assert target.replicas == 4


def test_a_shortage_is_met_at_once_and_whole() -> None:
    target = Target(starts=False)
    proposal = target.tick(Verdict.SATURATED, shortage=2.3)
    assert (proposal.replicas, proposal.reason) == (7, Reason.SHORTAGE)
    assert target.tick(Verdict.SATURATED, shortage=2.9).reason is Reason.STARTING
    assert target.tick(Verdict.SATURATED, shortage=3.1).replicas == 8
    assert target.tick(Verdict.SATURATED, shortage=9).reason is Reason.AT_MAXIMUM
    assert target.replicas == 8


def test_pods_of_several_endpoints_count_as_such() -> None:
    target = Target(replicas=2)
    target.endpoints = {
        Endpoint(f"pod-{i}", "10.0.0.1", 8000 + rank): report() for i in range(2) for rank in (0, 1)
    }
    assert target.tick(Verdict.SATURATED, shortage=3).replicas == 4


def test_saturation_without_a_measured_shortage_gets_one_more_when_it_has_lasted() -> None:
    target = Target()
    proposals = target.hold(Verdict.SATURATED, 61, shortage=-0.5)
    assert {p.reason for p in proposals[:60]} == {Reason.SETTLING}
    assert (proposals[60].replicas, proposals[60].reason) == (5, Reason.SHORTAGE)


def test_an_imbalance_adds_one_pod_after_its_time_and_only_one() -> None:
    target = Target()
    proposals = target.hold(Verdict.IMBALANCED, 600)
    assert reasons(proposals) == [
        Reason.NOT_PERSISTENT,
        Reason.PERSISTENT_IMBALANCE,
        Reason.ROUTING_LIMITED,
    ]
    assert {p.replicas for p in proposals[:120]} == {4}
    assert target.replicas == 5
    target.tick(Verdict.BALANCED)
    target.hold(Verdict.IMBALANCED, 121)
    assert target.replicas == 6


def test_an_imbalance_that_comes_and_goes_adds_nothing() -> None:
    target = Target()
    for _ in range(20):
        target.hold(Verdict.IMBALANCED, 119)
        target.tick(Verdict.BALANCED)
    assert target.replicas == 4


def test_a_slow_pod_gets_its_successor_before_it_leaves() -> None:
    target = Target(starts=False)
    slow = (PODS[2],)
    proposals = target.hold(Verdict.SLOW_ENDPOINT, 200, slow=slow)
    assert reasons(proposals) == [Reason.NOT_PERSISTENT, Reason.REPLACEMENT, Reason.STARTING]
    assert target.replicas == 5
    target.endpoints[PODS[4]] = report()
    target.obeys = False
    proposal = target.tick(Verdict.SLOW_ENDPOINT, slow=slow)
    assert proposal == Proposal(replicas=4, reason=Reason.REPLACEMENT, victim="pod-2")
    assert target.tick(Verdict.SLOW_ENDPOINT, slow=slow) == proposal
    target.obey(proposal)
    target.obeys = True
    assert target.tick(Verdict.BALANCED).reason is Reason.ENOUGH
    assert PODS[2] not in target.endpoints


@pytest.mark.parametrize("gone", [False, True], ids=["recovered", "gone by itself"])
def test_a_slow_pod_that_needs_no_replacement_any_more_is_left_alone(*, gone: bool) -> None:
    target = Target(starts=False)
    target.hold(Verdict.SLOW_ENDPOINT, 122, slow=(PODS[2],))
    target.endpoints[PODS[4]] = report()
    if gone:
        target.endpoints[PODS[5]] = target.endpoints.pop(PODS[2])
    assert target.tick(Verdict.BALANCED).reason is Reason.ENOUGH
    assert target.replicas == 5
    assert target.plan.replacing is None


def test_at_its_maximum_a_pool_gets_no_more() -> None:
    target = Target(policy=ScalingPolicy(max_replicas=4))
    for verdict in (Verdict.IMBALANCED, Verdict.SLOW_ENDPOINT):
        assert target.hold(verdict, 200, slow=(PODS[0],))[-1].reason is Reason.AT_MAXIMUM


def test_one_pod_less_when_there_have_long_been_too_many() -> None:
    target = Target()
    proposals = target.hold(Verdict.OVERSIZED, 700)
    assert [p.replicas for p in proposals].index(3) == 300
    assert target.replicas == 2
    target.hold(Verdict.OVERSIZED, 2000)
    assert target.replicas == 1
    assert target.tick(Verdict.OVERSIZED).reason is Reason.AT_MINIMUM


def test_every_change_of_size_starts_the_stabilization_anew() -> None:
    target = Target()
    target.hold(Verdict.OVERSIZED, 200)
    target.replicas = 5
    target.endpoints[PODS[4]] = report()
    assert reasons(target.hold(Verdict.OVERSIZED, 299)) == [Reason.STABILIZING]


def test_the_pod_with_the_least_work_leaves() -> None:
    endpoints = {pod: report(drain_s=i) for i, pod in zip((3, 1, 2), PODS, strict=False)}
    assert victim_of(endpoints) == "pod-1"
    endpoints[PODS[1]] = report(drain_s=1, waiting=2)
    endpoints[PODS[2]] = report(drain_s=1, waiting=1)
    assert victim_of(endpoints) == "pod-2"
    endpoints[PODS[0]] = report(EndpointState.SLOW, drain_s=9)
    assert victim_of(endpoints) == "pod-0"
    endpoints[PODS[3]] = report(EndpointState.UNREACHABLE, drain_s=9)
    assert victim_of(endpoints) == "pod-3"
    endpoints[PODS[2]] = report(EndpointState.DRAINING, drain_s=9)
    assert victim_of(endpoints) == "pod-2"
    assert victim_of({}) is None


def test_the_work_of_all_endpoints_of_a_pod_counts() -> None:
    assert (
        victim_of(
            {
                Endpoint("two", "10.0.0.1", 8000): report(drain_s=1),
                Endpoint("two", "10.0.0.1", 8001): report(drain_s=1),
                Endpoint("one", "10.0.0.2", 8000): report(drain_s=1.5),
            }
        )
        == "one"
    )


def leaving() -> tuple[Target, Proposal]:
    """A pool of which one pod drains."""
    target = Target()
    target.obeys = False
    proposal = target.hold(Verdict.OVERSIZED, 302)[-1]
    assert proposal == Proposal(replicas=3, reason=Reason.SURPLUS, victim="pod-0")
    target.endpoints[PODS[0]] = report(EndpointState.DRAINING, drain_s=99)
    return target, proposal


def test_a_departure_goes_on_though_the_verdict_changes() -> None:
    target, proposal = leaving()
    assert target.tick(Verdict.BALANCED) == proposal
    assert target.tick(Verdict.SLOW_ENDPOINT, slow=(PODS[1],)) == proposal
    target.replicas = 3
    assert target.tick(Verdict.BALANCED) == proposal
    del target.endpoints[PODS[0]]
    assert target.tick(Verdict.BALANCED).victim is None


def test_a_departure_is_called_off_when_requests_wait_everywhere() -> None:
    target, _ = leaving()
    for pod in PODS[1:3]:
        target.endpoints[pod] = report(waiting=1)
    assert target.tick(Verdict.OVERSIZED).reason is Reason.SURPLUS
    target.endpoints[PODS[3]] = report(EndpointState.UNREACHABLE)
    assert target.tick(Verdict.OVERSIZED) == Proposal(replicas=4, reason=Reason.LOAD_RETURNED)
    target.endpoints = {pod: report() for pod in PODS[:4]}
    assert reasons(target.hold(Verdict.OVERSIZED, 299)) == [Reason.STABILIZING]


def test_a_departure_is_called_off_by_saturation_and_answered_after() -> None:
    target, _ = leaving()
    assert target.tick(Verdict.SATURATED, shortage=2).reason is Reason.LOAD_RETURNED
    target.endpoints[PODS[0]] = report()
    assert target.tick(Verdict.SATURATED, shortage=2).replicas == 6


def test_without_knowledge_nothing_moves_and_who_leaves_still_does() -> None:
    target, _ = leaving()
    assert target.tick(Verdict.UNKNOWN) == Proposal(
        replicas=4, reason=Reason.NOT_KNOWN, victim="pod-0"
    )
    assert Target().tick(Verdict.UNKNOWN) == Proposal(replicas=4, reason=Reason.NOT_KNOWN)


def test_what_nobody_carries_out_stays_proposed_until_its_ground_is_gone() -> None:
    """An autoscaler may own the target and only read what is recommended."""
    target = Target(obeys=False)
    proposals = target.hold(Verdict.IMBALANCED, 300)
    assert {p.replicas for p in proposals[121:]} == {5}
    assert target.tick(Verdict.BALANCED).replicas == 4


def test_the_bounds_of_the_spec_hold_whatever_the_verdict() -> None:
    few = Target(policy=ScalingPolicy(min_replicas=6))
    assert few.tick(Verdict.UNKNOWN) == Proposal(replicas=6, reason=Reason.OUT_OF_BOUNDS)
    many = Target(policy=ScalingPolicy(max_replicas=2))
    assert many.tick(Verdict.UNKNOWN).replicas == 4
    assert many.tick(Verdict.BALANCED) == Proposal(
        replicas=3, reason=Reason.OUT_OF_BOUNDS, victim="pod-0"
    )


def test_a_pod_that_starts_is_waited_for() -> None:
    target = Target(starts=False, replicas=4)
    target.replicas = 5
    assert target.hold(Verdict.OVERSIZED, 1000)[-1].reason is Reason.STARTING


def test_a_proposal_in_the_making_is_dropped_when_its_target_has_got_there() -> None:
    target = Target(obeys=False)
    target.hold(Verdict.IMBALANCED, 130)
    target.replicas = 5
    target.endpoints[PODS[4]] = report()
    assert target.tick(Verdict.IMBALANCED).reason is Reason.ROUTING_LIMITED


histories = st.lists(
    st.tuples(
        st.sampled_from(Verdict),
        st.floats(-10, 50),
        st.integers(1, 400),
        st.lists(st.sampled_from(PODS[:6]), max_size=2, unique=True),
    ),
    max_size=12,
)


@given(histories, st.integers(0, 3), st.integers(3, 10), st.sampled_from([0, 1]))
@settings(max_examples=60)
def test_whatever_is_said_the_pool_stays_in_its_bounds_and_shrinks_by_one(
    history: list[tuple[Verdict, float, int, list[Endpoint]]], low: int, high: int, starts: int
) -> None:
    target = Target(
        policy=ScalingPolicy(min_replicas=low, max_replicas=high),
        replicas=3,
        starts=bool(starts),
    )
    for verdict, shortage, seconds, slow in history:
        if verdict is Verdict.SLOW_ENDPOINT and not slow:
            continue
        for _ in range(seconds):
            before = target.replicas
            proposal = target.tick(verdict, shortage=shortage, slow=tuple(slow))
            assert low <= proposal.replicas <= high
            assert proposal.replicas >= before - 1
            if proposal.replicas < before:
                assert proposal.victim is not None
            if verdict is Verdict.UNKNOWN:
                assert proposal.replicas == before
