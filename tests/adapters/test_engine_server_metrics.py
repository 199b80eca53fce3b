"""The simulated engine's metrics page against pages captured from a real vLLM 0.32.0."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from engines import MODEL, running, value_of
from trimtab.engine_sim.model import Coefficients, Engine, EngineSpec
from trimtab.engine_sim.pages import EngineMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = Path(__file__).parents[1] / "fixtures" / "metrics"
OWN_VALUES = {
    "block_size",
    "effective_attention_block_size",
    "kv_cache_max_concurrency",
    "kv_cache_size_tokens",
    "num_gpu_blocks",
    "num_gpu_blocks_override",
    "user_specified_block_size",
}
"""Labels of the cache's configuration, whose values differ from engine to engine."""
EVEN = EngineSpec(coefficients=Coefficients(a_s=0.01, b_s=0, c_s=0, d_s=0), batch_tokens=100)
"""Every iteration takes 10 ms, and computes at most 100 tokens."""


def shape(page: str) -> Iterator[tuple[object, ...]]:
    """Everything on a page but its values, in its order."""
    for family in text_string_to_metric_families(page):
        yield (family.name, family.type, family.documentation)
        for sample in family.samples:
            labels = {k: "" if k in OWN_VALUES else v for k, v in sample.labels.items()}
            yield (sample.name, labels)


def heads(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("#")]


async def test_an_idle_page_is_that_of_an_idle_vllm() -> None:
    captured = (PAGES / "vllm-0.32.0-idle.prom").read_text()
    async with running() as rig:
        page = await rig.page()

    assert list(shape(page)) == list(shape(captured))
    assert heads(page) == heads(captured)


async def test_a_used_page_is_that_of_a_used_vllm_without_its_optional_block_metrics() -> None:
    """The captured engine ran with --kv-cache-metrics; the idle page shows it is not default."""
    captured = (PAGES / "vllm-0.32.0-loaded.prom").read_text()
    kept = [line for line in captured.splitlines(keepends=True) if "vllm:kv_block_" not in line]
    async with running() as rig:
        await rig.events(prompt="Hi")
        page = await rig.page()

    assert list(shape(page)) == list(shape("".join(kept)))
    assert heads(page) == heads("".join(kept))


def test_numbers_are_written_as_the_original_writes_them() -> None:
    """The original's digits: 999999.0, but 1e+06; sums and wall times go the same way."""
    metrics = EngineMetrics(model=MODEL, spec=EVEN, max_model_len=1000)
    for tokens in (0, 7, 999_999, 1_000_000, 1_234_567):
        metrics.prefix_cache_queries_tokens = tokens
        [shown] = re.findall(
            r"^vllm:prefix_cache_queries_total\S* (.*)$", metrics.render(Engine()), re.MULTILINE
        )
        assert shown == {0: "0.0", 7: "7.0", 999_999: "999999.0", 1_000_000: "1e+06"}.get(
            tokens, "1.234567e+06"
        )


def test_a_bucket_holds_what_equals_its_bound() -> None:
    metrics = EngineMetrics(model=MODEL, spec=EVEN, max_model_len=1000)
    for value in (1.0, 1.5, 2.0, 1e9):
        metrics.observe("request_prompt_tokens", value)
    page = metrics.render(Engine())

    shown = [
        value_of(page, "vllm:request_prompt_tokens_bucket", le=bound)
        for bound in ("1.0", "2.0", "2000.0", "+Inf")
    ]
    assert shown == [1, 3, 3, 4]


async def test_a_model_name_is_escaped() -> None:
    async with running(model='a "b" \\ c') as rig:
        page = await rig.page()

    assert value_of(page, "vllm:num_requests_running", model_name='a "b" \\ c') == 0


async def test_the_cache_shows_its_size() -> None:
    spec = EngineSpec(kv_capacity_tokens=160_000)
    async with running(spec=spec) as rig:
        page = await rig.page()

    assert 'kv_cache_size_tokens="160000"' in page
    assert 'num_gpu_blocks="10000"' in page
    assert value_of(page, "vllm:cache_config_info", block_size="16") == 1


async def test_counters_follow_the_engine() -> None:
    async with running(spec=EVEN, speed=20.0) as rig:
        await rig.ask(prompt=[0] * 250, max_tokens=5, ignore_eos=True)
        await rig.ask(prompt=[0] * 10, max_tokens=400)
        page = await rig.page()

    drawn = value_of(page, "vllm:generation_tokens_total") - 5
    assert 0 < drawn < 400
    expected = {
        "vllm:prompt_tokens_total": 260,
        "vllm:request_success_total": 1,
        "vllm:iteration_tokens_total_count": 5 + drawn,  # not the two that computed prompt only
        "vllm:iteration_tokens_total_sum": 260 + 5 + drawn,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 4 + drawn - 1,
        "vllm:request_prompt_tokens_sum": 260,
        "vllm:request_generation_tokens_sum": 5 + drawn,
        "vllm:request_params_max_tokens_sum": 405,
        "vllm:request_params_n_sum": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:num_requests_running": 0,
    }
    labels = {"vllm:request_success_total": {"finished_reason": "length"}}
    shown = {name: value_of(page, name, **labels.get(name, {})) for name in expected}
    assert shown == expected
    assert value_of(page, "vllm:request_success_total", finished_reason="stop") == 1
    assert value_of(page, "vllm:prompt_tokens_by_source_total", source="local_compute") == 260
    assert value_of(page, "vllm:request_prompt_tokens_bucket", le="200.0") == 1
    assert value_of(page, "vllm:request_prompt_tokens_bucket", le="500.0") == 2
    assert value_of(page, "http_requests_total", status="2xx") == 2


async def test_the_prompt_counter_waits_for_the_first_token() -> None:
    async with running(speed=1e-6) as rig:
        answer = await rig.session.post("/v1/completions", json={"prompt": "Hi", "stream": True})
        page = await rig.page()
        answer.close()

    assert value_of(page, "vllm:num_requests_running") == 1
    assert value_of(page, "vllm:prompt_tokens_total") == 0
    assert value_of(page, "vllm:iteration_tokens_total_count") == 0


async def test_waiting_requests_are_counted_with_their_reason() -> None:
    """The first is in an iteration that does not end, so the others are not looked at."""
    async with running(speed=1e-6) as rig:
        body = {"prompt": "Hi", "stream": True}
        answers = [await rig.session.post("/v1/completions", json=body) for _ in range(5)]
        page = await rig.page()
        async with rig.session.get("/load") as response:
            assert await response.json() == {"server_load": 5}
        for answer in answers:
            answer.close()

    assert value_of(page, "vllm:num_requests_running") == 1
    assert value_of(page, "vllm:num_requests_waiting") == 4
    assert value_of(page, "vllm:num_requests_waiting_by_reason", reason="capacity") == 4
    assert value_of(page, "vllm:kv_cache_usage_perc") == 2 / 400_000


async def test_a_page_stays_whole_while_requests_run() -> None:
    async with running() as rig:
        streams = [rig.events(prompt="Hi", max_tokens=200, ignore_eos=True) for _ in range(20)]
        pages, _ = await asyncio.gather(
            asyncio.gather(*(rig.page() for _ in range(10))), asyncio.gather(*streams)
        )

    for page in pages:
        assert sum(1 for _ in text_string_to_metric_families(page)) > 80
        assert MODEL in page
