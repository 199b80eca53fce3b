"""What users say of a pool, in the units of the core."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.adapters.files import Fleet, FleetPool
from trimtab.core.exposition import DIALECTS
from trimtab.core.model import Policy


def pool(**fields: Any) -> FleetPool:
    return Fleet.model_validate(
        {"pools": [{"name": "llama", "endpoints": ["10.0.0.1:8000"], **fields}]}
    ).pools[0]


def test_the_defaults_of_a_spec_are_those_of_the_core() -> None:
    assert pool().policy() == Policy()


def test_a_spec_is_said_in_the_units_of_the_core() -> None:
    metrics = {"intervalMilliseconds": 250, "timeoutMilliseconds": 250, "staleAfterSeconds": 3}
    policy = pool(metrics=metrics, routing={"minimumWeightPercent": 50}).policy()
    assert policy == Policy(interval_s=0.25, stale_after_s=3.0, minimum_weight_ratio=0.5)


def test_all_engines_whose_pages_are_understood_can_be_named() -> None:
    assert {pool(engine=engine).engine for engine in DIALECTS} == set(DIALECTS)
    assert pool().engine == "Auto"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({}, "/metrics"),
        ({"engine": "TensorRTLLM"}, "/prometheus/metrics"),
        ({"engine": "TensorRTLLM", "metrics": {"path": "/m"}}, "/m"),
    ],
)
def test_the_path_is_the_one_that_is_named_or_that_the_engine_uses(
    spec: dict[str, Any], path: str
) -> None:
    assert pool(**spec).metrics_path == path
