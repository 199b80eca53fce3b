"""Values to make tests with: endpoints, samples, observations, and strategies for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from trimtab.core.model import Endpoint, Failure, FailureKind, Observation, Reading, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping


def endpoints(count: int) -> list[Endpoint]:
    return [Endpoint(f"engine-{i}", f"10.0.0.{i + 1}", 8000) for i in range(count)]


def observe(outcomes: Mapping[Endpoint, Sample | Failure], *, at_s: float) -> Observation:
    """Everybody asked and answered at the same moment."""
    return Observation(
        {e: Reading(asked_s=at_s, answered_s=at_s, outcome=o) for e, o in outcomes.items()}
    )


levels_tokens = st.floats(0, 1e6)
speed_ratios = st.floats(0.1, 4.0)
_counts = st.one_of(st.integers(0, 300).map(float), st.floats(0, 2.0**53))
_counters = st.none() | st.floats(0, 2.0**53) | st.integers(0, 10_000).map(float)

samples = st.builds(
    Sample,
    running=_counts,
    waiting=_counts,
    kv_used_ratio=st.none() | st.floats(0, 1.5),
    kv_capacity_tokens=st.none() | st.floats(0, 2.0**53),
    steps_total=_counters,
    prompt_tokens_total=_counters,
    generation_tokens_total=_counters,
    finished_total=_counters,
    finished_prompt_tokens_total=_counters,
    finished_generation_tokens_total=_counters,
)
"""Anything a parser may give, sensible or not."""

failures = st.builds(Failure, st.sampled_from(FailureKind), st.sampled_from(["", "why"]))
