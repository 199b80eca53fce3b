"""CPU time to read one vLLM page of 58 KB: ours, and prometheus_client's parser as the yardstick.

The page is the captured one that the tests use. CPU time and the best of several rounds, because
other work on the machine can only add.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from trimtab.core.exposition import parse
from trimtab.core.model import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[1] / "tests/fixtures/metrics/vllm-0.32.0-loaded.prom"
ROUNDS = 7


def run() -> dict[str, float]:
    """CPU microseconds per page of both parsers."""
    page = PAGE.read_bytes()
    if not isinstance(parse(page), Sample):
        raise SystemExit(f"{PAGE} could not be parsed")
    return {
        "parse_us": _cost_us(lambda: parse(page), times=200),
        "prometheus_client_us": _cost_us(
            lambda: list(text_string_to_metric_families(page.decode())), times=5
        ),
    }


def _cost_us(call: Callable[[], object], *, times: int) -> float:
    def once() -> float:
        start_s = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - start_s) / times * 1e6

    return min(once() for _ in range(ROUNDS))
