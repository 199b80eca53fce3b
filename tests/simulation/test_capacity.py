"""Saturated throughput, against arithmetic."""

from __future__ import annotations

import pytest

from trimtab.engine_sim.model import A100, EngineSpec
from trimtab.sim.capacity import saturated_rate_per_s
from trimtab.workload import Request


def test_full_prefill_batches_set_the_rate() -> None:
    """Eight prompts of 256 tokens fill a batch of 2048; their only output ends them."""
    batch_s = A100.a_s + 2048 * A100.b_s
    rate_per_s = saturated_rate_per_s([Request(0.0, 256, 1)], spec=EngineSpec())
    assert rate_per_s == pytest.approx(8 / batch_s, rel=0.002)


def test_batch_slots_set_the_rate_of_long_outputs() -> None:
    """Equal requests fill 256 slots together: one prefill step, 99 decode steps, all end."""
    rate_per_s = saturated_rate_per_s([Request(0.0, 1, 100)], spec=EngineSpec())
    k = A100
    prefill_s = k.a_s + 256 * k.b_s
    decodes_s = sum(k.a_s + 256 * (k.d_s + k.c_s * (step + 1)) for step in range(1, 100))
    assert rate_per_s == pytest.approx(256 / (prefill_s + decodes_s), rel=1e-9)


def test_half_the_speed_is_half_the_rate() -> None:
    requests = [Request(0.0, 500, 20), Request(0.0, 3000, 5)]
    full, half = (saturated_rate_per_s(requests, spec=EngineSpec(), speed=v) for v in (1.0, 0.5))
    assert half == pytest.approx(full / 2)
