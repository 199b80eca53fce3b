"""Pages of every engine at hand, pages made up, and bytes that are no pages.

The oracle is prometheus_client's parser: it reads the whole page, and the dialect's table is then
looked up in what it found. Scanning, labels, numbers and adding up are thus checked by other code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from trimtab.core.exposition import AUTO, DIALECTS, LARGEST, Dialect, Product, Series, parse
from trimtab.core.model import Failure, FailureKind, Sample

PAGES = {
    path.stem: path
    for path in Path(__file__).parents[1].joinpath("fixtures/metrics").glob("*.prom")
}
EXPECTED = {
    "vllm-0.32.0-idle": Sample(
        running=0,
        waiting=0,
        kv_used_ratio=0,
        kv_capacity_tokens=2_097_152,
        steps_total=0,
        prompt_tokens_total=0,
        generation_tokens_total=0,
        finished_total=0,
        finished_prompt_tokens_total=0,
        finished_generation_tokens_total=0,
    ),
    "vllm-0.32.0-loaded": Sample(
        running=5,
        waiting=19,
        kv_used_ratio=0.9113924050632911,
        kv_capacity_tokens=2560,
        steps_total=228,
        prompt_tokens_total=8710,
        generation_tokens_total=778,
        finished_total=12,
        finished_prompt_tokens_total=6559,
        finished_generation_tokens_total=698,
    ),
    "llamacpp-b10434-idle": Sample(
        running=0, waiting=0, steps_total=0, prompt_tokens_total=0, generation_tokens_total=0
    ),
    "llamacpp-b10434-loaded": Sample(
        running=4, waiting=19, steps_total=75, prompt_tokens_total=1442, generation_tokens_total=75
    ),
    "dynamo-mocker-1.6.1-worker-idle": Sample(
        running=0, waiting=0, kv_used_ratio=0, finished_total=1
    ),
    "dynamo-mocker-1.6.1-worker-loaded": Sample(
        running=7, waiting=16, kv_used_ratio=0.546875, finished_total=4
    ),
    "dynamo-mocker-1.6.1-sglang-loaded": Sample(running=8, waiting=14, finished_total=8),
    "dynamo-mocker-1.6.1-trtllm-loaded": Sample(
        running=7, waiting=3, kv_used_ratio=0.0118408203125, finished_total=20
    ),
    "sglang-0.5.23-rendered": Sample(
        running=12,
        waiting=7,
        kv_used_ratio=0.64,
        kv_capacity_tokens=16384,
        prompt_tokens_total=1220 - 576,
        generation_tokens_total=230,
        finished_total=3,
        finished_prompt_tokens_total=1220,
        finished_generation_tokens_total=230,
    ),
    "sglang-0.5.23-v1-loads-rendered": Sample(
        running=12, waiting=7, kv_used_ratio=0.64, kv_capacity_tokens=16384
    ),
    "tgi-db931fcf-from-source": Sample(
        running=4,
        waiting=7,
        kv_used_ratio=6144 / 16384,
        kv_capacity_tokens=16384,
        steps_total=7330,
        prompt_tokens_total=1220,
        generation_tokens_total=230,
        finished_total=3,
        finished_prompt_tokens_total=1220,
        finished_generation_tokens_total=230,
    ),
    "triton-trtllm-0b9d7d5-from-source": Sample(
        running=14,
        waiting=9,
        kv_used_ratio=0.4875,
        kv_capacity_tokens=6239 * 64,
        steps_total=90211,
    ),
}
NOT_ENGINES = {
    "dcgm-exporter-d5e5f51-from-source",
    "dynamo-frontend-1.6.1-idle",
    "dynamo-frontend-1.6.1-loaded",
}

Found: TypeAlias = dict[str, list[tuple[dict[str, str], float]]]


def _oracle_lines(page: str) -> Found:
    found: Found = defaultdict(list)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name].append((dict(sample.labels), sample.value))
            if family.type == "counter" and sample.name.removesuffix("_total") != sample.name:
                # prometheus_client calls every counter ..._total, also those that the page does not
                found[sample.name.removesuffix("_total")].append((sample.labels, sample.value))
    return found


def _oracle_numbers(found: Found, series: Series) -> list[tuple[dict[str, str], float]]:
    numbers = []
    for labels, value in found.get(series.name, []):
        if series.where and labels.get(series.where[0]) != series.where[1]:
            continue
        text = labels.get(series.label, "None") if series.label else str(value)
        if text not in {"None", "auto"}:
            numbers.append((labels, float(text)))
    return numbers


def _oracle(page: str, dialect: Dialect) -> Sample:
    """The dialect's table looked up in all that prometheus_client finds."""
    found = _oracle_lines(page)
    values: dict[str, float] = {}
    for key, spellings in dialect.spellings.items():
        for spelling in spellings:
            if isinstance(spelling, Product):
                amounts, sizes = (_oracle_numbers(found, series) for series in spelling)
                numbers = [a[1] * s[1] for a, s in zip(amounts, sizes, strict=True)]
            else:
                numbers = [value for _, value in _oracle_numbers(found, spelling)]
            if numbers:
                values[key] = sum(numbers)
                if key == "kv_used_ratio":
                    values[key] /= len(numbers)
                break
    cached_tokens = values.pop("cached_tokens_total", 0)
    if "prompt_tokens_total" in values:
        values["prompt_tokens_total"] = max(0, values["prompt_tokens_total"] - cached_tokens)
    if "kv_used_tokens" in values:
        values["kv_used_ratio"] = values.pop("kv_used_tokens") / values["kv_capacity_tokens"]
    return Sample(**values)


def _complaint(page: bytes, engine: str = AUTO) -> str:
    outcome = parse(page, engine=engine)
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.UNPARSABLE
    return outcome.detail


def test_every_captured_page_is_accounted_for() -> None:
    assert PAGES.keys() == EXPECTED.keys() | NOT_ENGINES


def test_dialects_name_only_what_a_sample_has() -> None:
    known = {each.name for each in fields(Sample)} | {"kv_used_tokens", "cached_tokens_total"}
    for dialect in DIALECTS.values():
        assert {"running", "waiting"} <= dialect.spellings.keys() <= known


@pytest.mark.parametrize("name", EXPECTED)
def test_a_page_says_what_its_engine_does(name: str) -> None:
    assert parse(PAGES[name].read_bytes()) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_page_reads_as_prometheus_client_reads_it(name: str) -> None:
    text = PAGES[name].read_text()
    sample = parse(text.encode())
    assert sample in [_oracle(text, dialect) for dialect in _of_page(text)]


def _of_page(text: str) -> list[Dialect]:
    return [d for d in DIALECTS.values() if any(mark.decode() in text for mark in d.marks)]


@pytest.mark.parametrize("name", sorted(NOT_ENGINES))
def test_a_page_of_something_else_is_no_load_report(name: str) -> None:
    assert "no metrics of an engine" in _complaint(PAGES[name].read_bytes())


@pytest.mark.parametrize("engine", DIALECTS)
def test_the_engine_named_in_the_spec_is_the_one_that_is_read(engine: str) -> None:
    """A vLLM page behind a pool that says TGI is a mistake to be told, not to be guessed around."""
    page = PAGES["vllm-0.32.0-loaded"].read_bytes()
    if engine == "VLLM":
        assert parse(page, engine=engine) == EXPECTED["vllm-0.32.0-loaded"]
    else:
        assert "is missing" in _complaint(page, engine)


def test_an_engine_nobody_knows_is_told_with_those_that_are_known() -> None:
    assert "there is no engine 'MLX', only VLLM, SGLang" in _complaint(b"", "MLX")


@pytest.mark.parametrize(
    ("page", "missing"),
    [
        ("vllm-0.32.0-loaded", "vllm:num_requests_running"),
        ("vllm-0.32.0-loaded", "vllm:num_requests_waiting"),
        ("sglang-0.5.23-rendered", "sglang:num_queue_reqs"),
        ("llamacpp-b10434-loaded", "llamacpp:requests_deferred"),
        ("tgi-db931fcf-from-source", "tgi_queue_size"),
        ("dynamo-mocker-1.6.1-trtllm-loaded", "trtllm:num_requests_waiting"),
    ],
)
def test_a_renamed_gauge_is_missed_by_name_and_never_zero_load(page: str, missing: str) -> None:
    renamed = PAGES[page].read_bytes().replace(missing.encode() + b"{", b"new_name{")
    renamed = renamed.replace(missing.encode() + b" ", b"new_name ")
    told = _complaint(renamed)
    assert told == f"{missing} is missing".replace("trtllm:", "trtllm_")


def test_a_missing_label_value_is_told_with_the_label() -> None:
    page = (
        PAGES["triton-trtllm-0b9d7d5-from-source"].read_bytes().replace(b'"waiting"', b'"queued"')
    )
    assert _complaint(page) == 'nv_trt_llm_request_metrics{request_type="waiting"} is missing'


@pytest.mark.parametrize("bad", ["NaN", "-1", "+Inf", "-Inf", "1e17", "zero"])
@pytest.mark.parametrize(
    "name",
    ["vllm:num_requests_waiting", "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc"],
)
def test_a_number_that_cannot_be_spoils_the_page_by_name(name: str, bad: str) -> None:
    lines = PAGES["vllm-0.32.0-loaded"].read_text().splitlines(keepends=True)
    page = "".join(
        f"{line.rpartition(' ')[0]} {bad}\n" if line.startswith(name + "{") else line
        for line in lines
    )
    assert _complaint(page.encode()) == f"{name} is {bad}, which it cannot be"


def test_a_page_cut_inside_a_number_is_not_taken_for_a_smaller_number() -> None:
    page = PAGES["vllm-0.32.0-loaded"].read_bytes()
    end = page.index(b"vllm:prompt_tokens_total{")
    cut = page[: page.index(b"8710", end) + 2]
    assert _complaint(cut) == "the line of vllm:prompt_tokens_total is malformed or cut off"


def test_data_parallel_engines_behind_one_port_are_one_endpoint() -> None:
    """There is one series per engine; usage is a ratio, so it is averaged, and the rest added."""
    page = PAGES["vllm-0.32.0-loaded"].read_text()
    second = [line.replace('engine="0"', 'engine="1"') for line in page.splitlines(keepends=True)]
    sample = parse((page + "".join(second)).encode())
    one = EXPECTED["vllm-0.32.0-loaded"]
    assert isinstance(sample, Sample)
    for each in fields(Sample):
        value, single = getattr(sample, each.name), getattr(one, each.name)
        assert value == (single if each.name == "kv_used_ratio" else 2 * single)


def test_ranks_that_tell_the_same_gauge_count_once() -> None:
    """Every tensor-parallel rank of an SGLang engine may report; its dp_ranks are the engines."""
    lines = [
        f'sglang:{name}{{dp_rank="{dp}",tp_rank="{tp}"}} {value + dp - tp}\n'
        for name, value in (("num_running_reqs", 3), ("num_queue_reqs", 5))
        for dp in (0, 1)
        for tp in (0, 1)
    ]
    lines += [f'sglang:prompt_tokens_total{{is_streaming="{s}"}} 7\n' for s in ("true", "false")]
    expected = Sample(running=3 + 4, waiting=5 + 6, prompt_tokens_total=14)
    assert parse("".join(lines).encode()) == expected


def test_cache_size_falls_back_to_blocks() -> None:
    """Older vLLM has no kv_cache_size_tokens, and vLLM writes None for what it does not know."""
    page = PAGES["vllm-0.32.0-loaded"].read_bytes()
    page = page.replace(b'kv_cache_size_tokens="2560"', b'kv_cache_size_tokens="None"')
    sample = parse(page.replace(b'num_gpu_blocks="80"', b'num_gpu_blocks="70"'))
    assert isinstance(sample, Sample)
    assert sample.kv_capacity_tokens == 70 * 32


def test_usage_in_tokens_without_a_capacity_says_nothing() -> None:
    page = b"tgi_batch_current_size 1\ntgi_queue_size 2\ntgi_batch_current_max_tokens 10\n"
    assert parse(page) == Sample(running=1, waiting=2)


def test_a_name_in_a_label_of_another_engine_does_not_hide_the_engine() -> None:
    page = b'http{to="vllm:8000"} 1\ntgi_batch_current_size 1\ntgi_queue_size 2\n'
    assert parse(page) == Sample(running=1, waiting=2)


def test_of_several_engines_that_a_page_may_be_of_the_first_is_complained_about() -> None:
    page = b"tgi_queue_size 1\nvllm:num_requests_running 1\n"
    assert _complaint(page) == "vllm:num_requests_waiting is missing"


@pytest.mark.parametrize(
    "line",
    [
        'vllm:num_requests_running{engine="0",model_name="a"} 7',
        'vllm:num_requests_running{model_name="a",engine="0"} 7.0 1795370000000',
        'vllm:num_requests_running{model_name="a}b",engine="0",} 7',
        'vllm:num_requests_running{model_name="a\\"b\\\\",engine="0"} 7e0',
        'vllm:num_requests_running{engine="0"} 7 1795370000.123 # {trace_id="x y"} 0.5',
        'vllm:num_requests_running{engine="0"} 7 # {} 1',
        "vllm:num_requests_running 7",
        "  vllm:num_requests_running\t { }\t7 \r",
        "vllm:num_requests_running{} +7",
    ],
)
def test_every_legal_way_to_write_a_line_is_read(line: str) -> None:
    page = f"# TYPE x gauge\n{line}\nvllm:num_requests_waiting 2\n# EOF\n"
    assert parse(page.encode()) == Sample(running=7, waiting=2)


@pytest.mark.parametrize(
    "line",
    [
        'vllm:num_requests_running{engine="0" 7',
        'vllm:num_requests_running{engine="0} 7',
        "vllm:num_requests_running{engine} 7",
        "vllm:num_requests_running 7 running",
        "vllm:num_requests_running \x00",
        "vllm:num_requests_running ",
    ],
)
def test_a_malformed_line_is_not_half_understood(line: str) -> None:
    page = f"{line}\nvllm:num_requests_waiting 2\n"
    assert "vllm:num_requests_running is malformed" in _complaint(page.encode())


_label_values = st.text(st.sampled_from('abz09 _-.:/{}[]=,#"\\\té\N{SNOWMAN}'), max_size=12).map(
    lambda raw: raw.replace("\\", r"\\").replace('"', r"\"")
)
_numbers = st.one_of(
    st.integers(0, 10**15).map(str),
    st.floats(0, LARGEST, allow_nan=False).map(repr),
    st.floats(0, 1e6).map("{:e}".format),
    st.floats(0, 1e6).map("+{:.3f}".format),
)
_blank = st.sampled_from(["", " ", "\t", "  "])


@st.composite
def _label_texts(draw: st.DrawFn, names: tuple[str, ...]) -> str:
    chosen = draw(st.permutations(names))[: draw(st.integers(0, len(names)))]
    pairs = [f'{name}="{draw(_label_values)}"' for name in chosen]
    if not pairs:
        return draw(st.sampled_from(["", "{}"]))
    return "{" + ("," + draw(_blank)).join(pairs) + draw(st.sampled_from(["", ","])) + "}"


@st.composite
def _pages(draw: st.DrawFn) -> str:
    """Wanted lines in any order, several series each, among lines that look nearly like them."""
    wanted = draw(
        st.lists(
            st.sampled_from(
                [
                    *("vllm:num_requests_running", "vllm:num_requests_waiting") * 3,
                    "vllm:kv_cache_usage_perc",
                    "vllm:iteration_tokens_total_count",
                    "vllm:prompt_tokens_total",
                    "vllm:prompt_tokens_cached_total",
                    "vllm:e2e_request_latency_seconds_count",
                ]
            ),
            max_size=12,
        )
    )
    wanted += ["vllm:num_requests_running", "vllm:num_requests_waiting"]
    noise = ("vllm:num_requests_waiting_by_reason", "vllm:prompt_tokens_created", "up", "xvllm:a")
    lines = []
    for name in draw(
        st.permutations([*wanted, *draw(st.lists(st.sampled_from(noise), max_size=5))])
    ):
        labels = draw(_label_texts(("engine", "model_name", "le")))
        stamp = draw(st.sampled_from(["", " 1795370000000", " -5"]))
        end = draw(_blank)
        lines.append(f"{draw(_blank)}{name}{labels} {draw(_blank)}{draw(_numbers)}{stamp}{end}")
        lines += draw(st.sampled_from([[], [""], [f"# HELP {name} a b"], ["# a comment {"]]))
    return "\n".join(lines) + "\n"


@given(_pages())
def test_generated_pages_read_as_prometheus_client_reads_them(page: str) -> None:
    assert parse(page.encode()) == _oracle(page, DIALECTS["VLLM"])


_engines = st.sampled_from([AUTO, *DIALECTS])
_wanted_names = st.sampled_from(
    [
        name.encode()
        for name in ("vllm:num_requests_running", "tgi_queue_size", "sglang:token_usage")
    ]
)
_garbage = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.one_of(_wanted_names, st.binary(max_size=9), st.sampled_from([b"\n", b"{", b'"', b" 1"]))
    ).map(b"".join),
)


@given(_garbage, _engines)
def test_any_bytes_are_a_sample_or_a_failure_with_a_reason(page: bytes, engine: str) -> None:
    outcome = parse(page, engine=engine)
    if isinstance(outcome, Failure):
        assert outcome.detail
    else:
        _check_sane(outcome)


@given(st.sampled_from(sorted(PAGES)), st.data())
def test_a_damaged_page_never_gives_an_insane_number(name: str, data: st.DataObject) -> None:
    page = bytearray(PAGES[name].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(page)))
        length = data.draw(st.integers(0, 300))
        page[start : start + length] = data.draw(st.binary(max_size=30))
    outcome = parse(bytes(page))
    if isinstance(outcome, Sample):
        _check_sane(outcome)


def _check_sane(sample: Sample) -> None:
    for each in fields(Sample):
        value = getattr(sample, each.name)
        assert value is None or (math.isfinite(value) and value >= 0)


def test_a_hostile_page_takes_no_longer_than_its_size_explains() -> None:
    """Nested repetition in an expression may backtrack for ever; possessive ones cannot."""
    page = b"vllm:num_requests_running{" + b'a="\\",' * 200_000 + b"\n"
    assert "malformed" in _complaint(page)
    assert "malformed" in _complaint(b"vllm:num_requests_running{" + b'a="b",' * 200_000 + b"\n")
