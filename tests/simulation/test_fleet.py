"""The fleet: schedules worked out by hand, conservation, and what faults do."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

import pytest

from trimtab.engine_sim.model import Coefficients, EngineSpec
from trimtab.sim.fleet import COLD_S, ClosedLoop, Ending, Fleet, OpenLoop, Router
from trimtab.sim.omniscient import Omniscient, forecast_s
from trimtab.sim.routers import RandomChoice, RoundRobin, ShortestQueue
from trimtab.workload import WORKLOADS, Request, draw

if TYPE_CHECKING:
    from trimtab.sim.fleet import Pod, Ticket

TEN_MS = EngineSpec(
    coefficients=Coefficients(a_s=0.01, b_s=0.0, c_s=0.0, d_s=0.0), batch_tokens=100
)
"""Every iteration takes 10 ms, whatever is in it, so that times can be counted on fingers."""
SMALL_KV = EngineSpec(kv_capacity_tokens=4000)


def _rng(seed: int) -> Random:
    return Random(seed)  # noqa: S311  # traffic, not secrets


def _requests(name: str, *, rate_per_s: float, count: int, seed: int = 1) -> list[Request]:
    return draw(WORKLOADS[name], rate_per_s=rate_per_s, count=count, rng=_rng(seed))


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    """250 tokens in batches of 100, of which a decode that runs takes one: 99 + 99 + 52."""
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    one, two = fleet.run(OpenLoop([Request(0.0, 50, 10), Request(0.005, 250, 2)]))
    assert one.first_s == pytest.approx(0.01)
    assert two.first_s == pytest.approx(0.04)
    assert two.end_s == pytest.approx(0.05)
    assert one.end_s == pytest.approx(0.10)
    assert (one.tpot_s, two.tpot_s) == pytest.approx((0.01, 0.01))


def test_a_pod_of_half_the_speed_takes_twice_as_long() -> None:
    fleet = Fleet([1.0, 0.5], router=RoundRobin(), spec=TEN_MS)
    fast, slow = fleet.run(OpenLoop([Request(0.0, 250, 3), Request(0.0, 250, 3)]))
    assert (fast.first_s, fast.end_s) == pytest.approx((0.03, 0.05))
    assert (slow.first_s, slow.end_s) == pytest.approx((0.06, 0.10))


def test_what_comes_within_an_iteration_waits_for_the_next() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    one, two = fleet.run(OpenLoop([Request(0.0, 10, 1), Request(0.001, 10, 1)]))
    assert one.ttft_s == pytest.approx(0.010)
    assert two.ttft_s == pytest.approx(0.019)


def test_nothing_is_lost_or_made_up() -> None:
    """Tokens emitted are those asked for, prefill is prompts and what preemption threw away."""
    requests = [Request(0.1 * i, 200 + 7 * (i % 50), 300 + 11 * (i % 40)) for i in range(300)]
    fleet = Fleet([1.0, 0.7], router=RandomChoice(_rng(1)), spec=SMALL_KV)
    tickets = fleet.run(OpenLoop(requests))
    counters = [pod.engine.counters for pod in fleet.pods]
    assert all(t.ending is Ending.FINISHED for t in tickets)
    assert sum(c.preemptions_total for c in counters) > 0
    outputs = sum(r.output_tokens for r in requests)
    assert sum(c.generation_tokens_total for c in counters) == outputs
    assert sum(c.prompt_tokens_total for c in counters) == sum(r.prompt_tokens for r in requests)
    recomputed = sum(c.computed_prefill_tokens_total - c.prompt_tokens_total for c in counters)
    assert recomputed > 0
    for pod in fleet.pods:
        assert pod.engine.idle
        assert not pod.in_flight
        assert (pod.engine.kv_reserved_tokens, pod.engine.kv_decoding_tokens) == (0, 0)
        assert (pod.owed_tokens, pod.engine.prefill_backlog_tokens) == (0, 0)


def test_the_true_backlog_is_what_is_left_to_do() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    seen: list[int] = []
    for when_s in (0.005, 0.015, 0.025):
        fleet.at(when_s, lambda: seen.append(fleet.pods[0].owed_tokens))
    fleet.run(OpenLoop([Request(0.0, 150, 3)]))
    assert seen == [153, 53, 2]


class Forecasting(Omniscient):
    """Omniscient, and remembers what it foresaw."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self.end_s = math.nan

    def route(self, ticket: Ticket) -> Pod:
        pod = super().route(ticket)
        self.end_s = forecast_s(pod, ticket, now_s=self.fleet.now_s)
        return pod


@pytest.mark.parametrize("spec", [EngineSpec(), SMALL_KV], ids=["roomy", "preempting"])
@pytest.mark.parametrize("count", range(20, 120, 20))
def test_the_omniscient_forecast_comes_true(spec: EngineSpec, count: int) -> None:
    """That of the last request, after which nothing comes that nobody could foresee."""
    requests = [r for r in _requests("chat", rate_per_s=25, count=count) if sum(r[1:]) < 3900]
    router = Forecasting(_rng(1))
    tickets = Fleet([1.0, 0.6, 1.3], router=router, spec=spec).run(OpenLoop(requests))
    assert tickets[-1].end_s == pytest.approx(router.end_s, abs=1e-9)


def test_the_omniscient_router_takes_the_pod_that_finishes_first() -> None:
    """The idle pod at a tenth of the speed loses to the busy one."""
    router = Omniscient(_rng(1))
    requests = [Request(0.0, 100, 5), Request(0.005, 100, 5)]
    tickets = Fleet([1.0, 0.1], router=router, spec=TEN_MS).run(OpenLoop(requests))
    assert [t.pod.index for t in tickets if t.pod] == [0, 0]


def test_a_crash_fails_streams_and_places_the_others_anew() -> None:
    fleet = Fleet([1.0, 1.0], router=RoundRobin(), spec=TEN_MS)
    fleet.at(0.025, lambda: fleet.crash(fleet.pods[0]))
    requests = [Request(0.0, 50, 10), Request(0.0, 50, 10), Request(0.001, 500, 2)]
    streaming, other, waiting = fleet.run(OpenLoop(requests))
    assert streaming.ending is Ending.FAILED
    assert other.ending is Ending.FINISHED
    assert (waiting.ending, waiting.placed) == (Ending.FINISHED, 2)
    assert waiting.pod is fleet.pods[1]
    assert waiting.ttft_s > 0.05


def test_without_any_pod_requests_fail() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    fleet.at(0.5, lambda: fleet.crash(fleet.pods[0]))
    tickets = fleet.run(OpenLoop([Request(0.0, 50, 5), Request(1.0, 50, 5)]))
    assert [t.ending for t in tickets] == [Ending.FINISHED, Ending.FAILED]


def test_a_pod_that_comes_back_is_empty_and_cold_at_first() -> None:
    fleet = Fleet([1.0, 1.0], router=ShortestQueue(_rng(1)), spec=TEN_MS)
    back = fleet.pods[0]
    fleet.at(0.0, lambda: fleet.crash(back))
    fleet.at(1.0, lambda: fleet.start(back))
    fleet.at(1.1, lambda: fleet.crash(fleet.pods[1]))
    cold_s = 1.0 + COLD_S
    requests = [Request(0.5, 50, 1), Request(2.0, 50, 1), Request(cold_s + 0.1, 50, 1)]
    tickets = fleet.run(OpenLoop(requests))
    assert [t.pod.index for t in tickets if t.pod] == [1, 0, 0]
    assert [t.ttft_s for t in tickets] == pytest.approx([0.01, 0.02, 0.01])


def test_a_pod_that_joins_later_is_not_there_before() -> None:
    fleet = Fleet([1.0, 1.0], router=RoundRobin(), spec=TEN_MS)
    fleet.leave_out(fleet.pods[1])
    fleet.at(1.0, lambda: fleet.start(fleet.pods[1]))
    requests = [Request(at, 50, 1) for at in (0.1, 0.2, 0.3, 1.1, 1.2)]
    tickets = fleet.run(OpenLoop(requests))
    assert [t.pod.index for t in tickets if t.pod] in ([0, 0, 0, 1, 0], [0, 0, 0, 0, 1])


def test_what_is_repeated_keeps_its_period() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    seen: list[float] = []
    fleet.every(0.3, lambda: seen.append(fleet.now_s), start_s=0.1)
    fleet.run(OpenLoop([Request(1.2, 10, 1)]))
    assert seen == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_a_slowed_pod_recovers() -> None:
    fleet = Fleet([2.0], router=RoundRobin(), spec=TEN_MS)
    fleet.at(1.0, lambda: fleet.set_pace(fleet.pods[0], 0.5))
    fleet.at(2.0, lambda: fleet.set_pace(fleet.pods[0], 1.0))
    tickets = fleet.run(OpenLoop([Request(at, 50, 1) for at in (0.5, 1.5, 2.5)]))
    assert [t.ttft_s for t in tickets] == pytest.approx([0.005, 0.01, 0.005])


def test_a_client_that_goes_away_frees_its_place() -> None:
    """Before its first output, and in the middle of the answer."""
    requests = [Request(0.0, 50, 100), Request(0.0, 500, 100), Request(0.0, 50, 3)]
    patience_s = {100: 0.035, 3: math.inf}
    traffic = OpenLoop(requests, patience_s=lambda r: patience_s[r.output_tokens])
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    streaming, waiting, patient = fleet.run(traffic)
    assert (streaming.ending, waiting.ending) == (Ending.ABORTED, Ending.ABORTED)
    assert streaming.end_s == pytest.approx(0.035)
    assert math.isnan(waiting.first_s)
    assert patient.ending is Ending.FINISHED
    assert fleet.pods[0].engine.kv_reserved_tokens == 0


def test_users_ask_again_only_after_an_answer() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=TEN_MS)
    most: list[int] = []
    fleet.every(0.01, lambda: most.append(len(fleet.pods[0].in_flight)))
    lengths = [Request(0.0, 50, 5)] * 30
    tickets = fleet.run(ClosedLoop(lengths, users=3, think_s=lambda: 0.1))
    assert len(tickets) == 30
    assert max(most) == 3
    assert tickets[3].at_s == pytest.approx(tickets[0].end_s + 0.1)


def test_a_request_longer_than_the_kv_cache_is_told() -> None:
    fleet = Fleet([1.0], router=RoundRobin(), spec=SMALL_KV)
    with pytest.raises(ValueError, match="5010 tokens do not fit a KV cache of 4000"):
        fleet.run(OpenLoop([Request(0.0, 5000, 10)]))


class Recorder(Router):
    """Told of every end exactly once."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}

    def route(self, ticket: Ticket) -> Pod:
        pod = self.fleet.ready[ticket.id % len(self.fleet.ready)]
        assert self.open.setdefault(ticket.id, pod.index) == pod.index
        return pod

    def ended(self, ticket: Ticket, pod: Pod) -> None:
        assert self.open.pop(ticket.id) == pod.index


def test_a_router_hears_of_every_end_once() -> None:
    """Also of those that crashes and clients bring about."""
    router = Recorder()
    fleet = Fleet([1.0] * 3, router=router, spec=EngineSpec())
    for at_s in (2.0, 4.0, 6.0):
        fleet.at(at_s, lambda: fleet.crash(fleet.pods[1]))
        fleet.at(at_s + 1, lambda: fleet.start(fleet.pods[1]))
    requests = _requests("chat", rate_per_s=25, count=250)
    traffic = OpenLoop(requests, patience_s=lambda r: 1.0 if r.output_tokens % 3 else math.inf)
    tickets = fleet.run(traffic)
    assert router.open == {}
    assert {t.ending for t in tickets} == set(Ending)
    assert not any(pod.in_flight for pod in fleet.pods)
