"""Figures of a run, on tickets made by hand."""

from __future__ import annotations

import math

import pytest

from trimtab.engine_sim.model import EngineSpec
from trimtab.sim.fleet import Ending, Ticket
from trimtab.sim.report import Objective, Report, measured, quantile, report, summarize

SPEC = EngineSpec()


def _ticket(
    at_s: float,
    *,
    ttft_s: float = 0.1,
    prompt_tokens: int = 100,
    output_tokens: int = 11,
    tpot_s: float = 0.02,
    ending: Ending = Ending.FINISHED,
) -> Ticket:
    ticket = Ticket(0, at_s, prompt_tokens, output_tokens, ending=ending)
    if ending is Ending.FINISHED:
        ticket.first_s = at_s + ttft_s
        ticket.end_s = ticket.first_s + tpot_s * (output_tokens - 1)
    return ticket


def _report(*tickets: Ticket) -> Report:
    return report(tickets, spec=SPEC, objective=Objective())


def test_quantiles_lie_between_the_neighbours() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0
    assert math.isnan(quantile([], 0.5))


def test_the_warm_up_is_a_share_of_the_time_not_of_the_requests() -> None:
    tickets = [_ticket(at_s) for at_s in (0.0, 1.0, 14.0, 15.0, 100.0)]
    assert [t.at_s for t in measured(tickets)] == [15.0, 100.0]
    assert measured([]) == []


def test_short_requests_have_a_figure_of_their_own() -> None:
    one = _report(
        _ticket(0, ttft_s=0.2, prompt_tokens=255), _ticket(1, ttft_s=9, prompt_tokens=256)
    )
    assert one.short_ttft_p99_s == pytest.approx(0.2)
    assert one.ttft_p99_s == pytest.approx(9, rel=0.02)


def test_outputs_of_one_token_have_no_time_between_outputs() -> None:
    one = _report(_ticket(0, output_tokens=1), _ticket(0, output_tokens=3, tpot_s=0.03))
    assert one.tpot_p99_s == pytest.approx(0.03)
    assert one.slo_ratio == 1.0


def test_served_well_is_soon_and_fluent() -> None:
    """A long prompt has three times its own prefill; failures are not served, aborts no matter."""
    prefill_s = 20_000 * 48e-6 + 10 * 12.5e-3
    one = _report(
        _ticket(0),
        _ticket(0, ttft_s=1.01),
        _ticket(0, tpot_s=0.051),
        _ticket(0, ttft_s=2.9 * prefill_s, prompt_tokens=20_000),
        _ticket(0, ttft_s=3.1 * prefill_s, prompt_tokens=20_000),
        _ticket(0, ending=Ending.FAILED),
        _ticket(0, ending=Ending.ABORTED),
    )
    assert (one.requests, one.failed) == (6, 1)
    assert one.slo_ratio == pytest.approx(2 / 6)


def test_a_summary_has_the_mean_and_the_spread_of_seeds() -> None:
    reports = [_report(_ticket(0, ttft_s=ttft_s)) for ttft_s in (0.1, 0.3)]
    both = summarize(reports)
    assert both.mean["ttft_p50_s"] == pytest.approx(0.2)
    assert both.spread["ttft_p50_s"] == pytest.approx(math.sqrt(0.02))
    assert summarize(reports[:1]).spread["ttft_p50_s"] == 0.0
