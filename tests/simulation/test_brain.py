"""Trimtab's own policies get what production would give them: pages, gaps, ends and restarts."""

from __future__ import annotations

import math
from functools import partial
from random import Random
from typing import TYPE_CHECKING, TypeVar

import pytest

from trimtab.core.backlog import RATE_TOKENS_PER_S
from trimtab.core.ledger import Basis
from trimtab.engine_sim.model import EngineSpec
from trimtab.sim.brain import Picker, Signals, Weighted
from trimtab.sim.fleet import Fleet, OpenLoop
from trimtab.workload import WORKLOADS, Request, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trimtab.core.ledger import Account

_Seen = TypeVar("_Seen")


def _rng(seed: int = 1) -> Random:
    return Random(seed)  # noqa: S311  # traffic, not secrets


def _chat(rate_per_s: float, count: int) -> OpenLoop:
    return OpenLoop(draw(WORKLOADS["chat"], rate_per_s=rate_per_s, count=count, rng=_rng()))


def _look(fleet: Fleet, when_s: float, see: Callable[[], _Seen]) -> list[_Seen]:
    """Collect what is seen at a moment of the run."""
    seen: list[_Seen] = []
    fleet.at(when_s, lambda: seen.append(see()))
    return seen


def _prefill_tokens(accounts: Iterable[Account]) -> float:
    return sum(account.prefill_tokens for account in accounts)


def test_a_crashed_pod_refuses_and_one_that_has_not_joined_is_not_asked() -> None:
    router = Weighted(_rng())
    fleet = Fleet([1.0] * 4, router=router, spec=EngineSpec())
    crashed, absent = fleet.pods[1], fleet.pods[3]
    fleet.leave_out(absent)
    fleet.at(3.5, partial(fleet.crash, crashed))
    fleet.at(6.5, partial(fleet.start, absent))
    before = _look(fleet, 3.4, lambda: (router.state.refused, set(router.state.snapshot.weights)))
    during = _look(fleet, 5.4, lambda: (router.state.refused, set(router.state.snapshot.weights)))
    after = _look(fleet, 8.4, lambda: set(router.state.snapshot.weights))
    fleet.run(_chat(20, 250))
    present = {pod.endpoint for pod in fleet.pods} - {absent.endpoint}
    assert before == [(frozenset(), present)]
    assert during == [(frozenset({crashed.endpoint}), present)]
    assert after == [present | {absent.endpoint}]


def test_weights_reach_the_proxy_one_push_after_the_decision() -> None:
    """The pages of second 1 are half a second old when they are read."""
    router = Weighted(_rng(), metrics_age_s=0.5)
    fleet = Fleet([1.0, 1.0], router=router, spec=EngineSpec())
    pushes: list[float] = []
    fleet.every(0.01, lambda: pushes.append(fleet.now_s) if router._schedule else None)
    fleet.run(OpenLoop([Request(0.9, 8000, 50), *[Request(1.0 + i, 10, 1) for i in range(5)]]))
    assert pushes[0] == pytest.approx(1.53, abs=0.011)


def test_the_ledger_hears_the_gauges_and_learns_from_the_weights_memory() -> None:
    router = Picker(_rng(), signals=Signals(scrape_s=0.2))
    fleet = Fleet([1.0, 1.0, 0.4, 1.0], router=router, spec=EngineSpec())

    def see() -> tuple[Basis, float, float]:
        ledger = router.ledgers[0]
        said = ledger.estimate(fleet.pods[0].endpoint, now_s=fleet.now_s)
        assert said is not None
        return said.basis, said.age_s, ledger.accounts[2].speed_ratio

    seen = _look(fleet, 25.1, see)
    rates = _look(fleet, 25.1, lambda: router.ledgers[0].tokens_per_s)
    fleet.run(_chat(25, 800))
    [(basis, age_s, speed_ratio)] = seen
    assert basis is Basis.GAUGES
    assert age_s == pytest.approx(0.1, abs=0.01)
    assert speed_ratio < 0.6
    assert rates != [RATE_TOKENS_PER_S]


def test_only_ready_pods_are_picked() -> None:
    router = Picker(_rng())
    fleet = Fleet([1.0] * 3, router=router, spec=EngineSpec())
    fleet.at(1.0, partial(fleet.crash, fleet.pods[0]))
    placed = _look(fleet, 3.0, lambda: len(fleet.pods[0].in_flight))
    endpoints = _look(fleet, 3.0, lambda: {a.endpoint for a in router.ledgers[0].accounts})
    fleet.run(_chat(25, 150))
    assert placed == [0]
    assert endpoints == [{pod.endpoint for pod in fleet.pods[1:]}]


@pytest.mark.parametrize(
    "router",
    [
        Picker(_rng(), signals=Signals(restart_s=2.0)),
        Picker(_rng(), outage_s=(1.5, 2.0)),
    ],
    ids=["restart", "outage"],
)
def test_a_picker_that_starts_anew_knows_nothing(router: Picker) -> None:
    fleet = Fleet([1.0] * 3, router=router, spec=EngineSpec())
    before = _look(fleet, 1.9, lambda: router.ledgers[0])
    after = _look(fleet, 2.1, lambda: router.ledgers[0])
    fleet.run(_chat(25, 100))
    assert before[0] is not after[0]


def test_lost_events_leave_ends_untold_and_perfect_ones_do_not() -> None:
    """After the last end and before the next scrape, a ledger that was told owes nothing."""
    owed = []
    for lost_ratio in (0.0, 1.0):
        router = Picker(_rng(), signals=Signals(scrape_s=100.0, lost_events_ratio=lost_ratio))
        fleet = Fleet([1.0, 1.0], router=router, spec=EngineSpec())
        fleet.run(_chat(10, 50))
        owed.append(sum(account.requests for account in router.ledgers[0].accounts))
    assert owed == [0, 50]


def test_late_events_come_late() -> None:
    router = Picker(_rng(), signals=Signals(scrape_s=100.0, event_delay_s=10.0))
    fleet = Fleet([1.0], router=router, spec=EngineSpec())
    fleet.run(OpenLoop([Request(0.1, 100, 5), Request(2.0, 100, 5)]))
    assert math.isclose(router.ledgers[0].accounts[0].requests, 2, abs_tol=1)
    assert router.ledgers[0].accounts[0].requests > 0


def test_requests_of_others_are_announced_only_if_seen() -> None:
    owed = []
    for signals in (Signals(unseen_ratio=1.0), Signals(seen_ratio=1.0)):
        router = Picker(_rng(), signals=signals)
        fleet = Fleet([1.0, 1.0], router=router, spec=EngineSpec())
        accounts = router.ledgers[0].accounts
        booked = _look(fleet, 0.11, partial(_prefill_tokens, accounts))
        fleet.run(OpenLoop([Request(0.1, 5000, 5)]))
        owed += booked
    assert owed[0] == 0
    assert owed[1] == 5000


def test_misplaced_requests_are_booked_where_they_went() -> None:
    router = Picker(_rng(), signals=Signals(misplaced_ratio=1.0, scrape_s=100.0))
    fleet = Fleet([1.0] * 4, router=router, spec=EngineSpec())
    counts = _look(
        fleet,
        0.5,
        lambda: [
            (account.requests, len(pod.in_flight))
            for account, pod in zip(router.ledgers[0].accounts, fleet.pods, strict=True)
        ],
    )
    fleet.run(OpenLoop([Request(0.1 + i / 100, 5000, 50) for i in range(10)]))
    [pairs] = counts
    assert sum(told for told, _ in pairs) == 10
    assert all(told == true for told, true in pairs)
