"""A metrics page to a Sample: Prometheus text, read only where it matters.

The idea. A vLLM page is 60 KB, of which some fifteen lines are wanted and histogram buckets are
the rest, so the page is not parsed but searched: one expression per engine finds the wanted names
at line starts, a second one reads each such line strictly. What an engine calls things is a table.

A page that cannot be understood is a Failure that says which metric is missing or bad. It is never
zero load: an engine after a renaming release must not look like the emptiest of the pool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from trimtab.core.model import Failure, FailureKind, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTO = "Auto"
LARGEST = 2.0**53
"""Beyond it a float no longer counts by ones; the bound also keeps later arithmetic finite."""


class Series(NamedTuple):
    """Where a number stands: a name and perhaps a label that must match.

    With `label`, the number is not the sample's value but that label's, as in `..._info` metrics.
    """

    name: str
    where: tuple[str, str] | None = None
    label: str | None = None

    def __str__(self) -> str:
        return f'{self.name}{{{self.where[0]}="{self.where[1]}"}}' if self.where else self.name


class Product(NamedTuple):
    """How many there are of something times its size: blocks and the tokens of each."""

    amount: Series
    size: Series


Spellings: TypeAlias = tuple[Series | Product, ...]
"""The ways in which releases of an engine write one number, the one to prefer first."""


def _named(*names: str) -> Spellings:
    return tuple(Series(name) for name in names)


# Keys of these tables are fields of Sample, and two that are turned into such: kv_used_tokens, for
# engines that tell no ratio, and cached_tokens_total, the part of prompt_tokens_total that came
# out of a cache, which is no work done and therefore taken off.

# vLLM 0.32, then older releases and Dynamo's mocker. Requests are counted by the histogram that
# has their tokens, too, so that means of the two are consistent. `iteration_tokens_total` is a
# histogram of tokens per iteration, despite its name; its count is one of iterations.
_VLLM: dict[str, Spellings] = {
    "running": _named("vllm:num_requests_running"),
    "waiting": _named("vllm:num_requests_waiting"),
    "kv_used_ratio": _named("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "kv_capacity_tokens": (
        Series("vllm:cache_config_info", label="kv_cache_size_tokens"),
        Product(
            Series("vllm:cache_config_info", label="num_gpu_blocks"),
            Series("vllm:cache_config_info", label="block_size"),
        ),
    ),
    "steps_total": _named("vllm:iteration_tokens_total_count"),
    "prompt_tokens_total": _named("vllm:prompt_tokens_total"),
    "cached_tokens_total": _named("vllm:prompt_tokens_cached_total"),
    "generation_tokens_total": _named("vllm:generation_tokens_total"),
    "finished_total": _named(
        "vllm:request_prompt_tokens_count", "vllm:e2e_request_latency_seconds_count"
    ),
    "finished_prompt_tokens_total": _named("vllm:request_prompt_tokens_sum"),
    "finished_generation_tokens_total": _named("vllm:request_generation_tokens_sum"),
}

# The second spelling is that of /v1/loads?format=prometheus.
_SGLANG: dict[str, Spellings] = {
    "running": _named("sglang:num_running_reqs", "sglang_num_running_reqs"),
    "waiting": _named("sglang:num_queue_reqs", "sglang_num_waiting_reqs"),
    "kv_used_ratio": _named("sglang:token_usage", "sglang_token_usage"),
    "kv_capacity_tokens": _named("sglang:max_total_num_tokens", "sglang_max_total_num_tokens"),
    "prompt_tokens_total": _named("sglang:prompt_tokens_total"),
    "cached_tokens_total": (Series("sglang:cached_tokens_total", ("cache_source", "total")),),
    "generation_tokens_total": _named("sglang:generation_tokens_total"),
    "finished_total": _named(
        "sglang:prompt_tokens_histogram_count", "sglang:e2e_request_latency_seconds_count"
    ),
    "finished_prompt_tokens_total": _named("sglang:prompt_tokens_histogram_sum"),
    "finished_generation_tokens_total": _named("sglang:generation_tokens_histogram_sum"),
}

# Its prompt tokens are without the cached ones, says its HELP line.
_LLAMA_CPP: dict[str, Spellings] = {
    "running": _named("llamacpp:requests_processing"),
    "waiting": _named("llamacpp:requests_deferred"),
    "steps_total": _named("llamacpp:n_decode_total"),
    "prompt_tokens_total": _named("llamacpp:prompt_tokens_total"),
    "generation_tokens_total": _named("llamacpp:tokens_predicted_total"),
}

_TGI: dict[str, Spellings] = {
    "running": _named("tgi_batch_current_size"),
    "waiting": _named("tgi_queue_size"),
    "kv_used_tokens": _named("tgi_batch_current_max_tokens"),
    "kv_capacity_tokens": _named("tgi_batch_max_total_tokens"),
    "steps_total": _named("tgi_batch_inference_success"),
    "prompt_tokens_total": _named("tgi_request_input_length_sum"),
    "generation_tokens_total": _named("tgi_request_generated_tokens_sum"),
    "finished_total": _named("tgi_request_generated_tokens_count"),
    "finished_prompt_tokens_total": _named("tgi_request_input_length_sum"),
    "finished_generation_tokens_total": _named("tgi_request_generated_tokens_sum"),
}

_REQUESTS = "nv_trt_llm_request_metrics"
_BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
_TRITON: dict[str, Spellings] = {
    "running": (Series(_REQUESTS, ("request_type", "scheduled")),),
    "waiting": (Series(_REQUESTS, ("request_type", "waiting")),),
    "kv_used_ratio": (Series(_BLOCKS, ("kv_cache_block_type", "fraction")),),
    "kv_capacity_tokens": (
        Product(
            Series(_BLOCKS, ("kv_cache_block_type", "max")),
            Series(_BLOCKS, ("kv_cache_block_type", "tokens_per")),
        ),
    ),
    "steps_total": (Series("nv_trt_llm_general_metrics", ("general_type", "iteration_counter")),),
}

# trtllm-serve; `trtllm:` is what Dynamo makes of it.
_TENSORRT_LLM: dict[str, Spellings] = {
    "running": _named("trtllm_num_requests_running", "trtllm:num_requests_running"),
    "waiting": _named("trtllm_num_requests_waiting", "trtllm:num_requests_waiting"),
    "kv_used_ratio": _named("trtllm_kv_cache_utilization", "trtllm:kv_cache_usage_perc"),
    "kv_capacity_tokens": (
        Product(Series("trtllm_kv_cache_max_blocks"), Series("trtllm_kv_cache_tokens_per_block")),
    ),
    "prompt_tokens_total": _named("trtllm_prompt_tokens_total"),
    "cached_tokens_total": _named("trtllm_prompt_cached_tokens_total"),
    "generation_tokens_total": _named("trtllm_generation_tokens_total"),
    "finished_total": _named(
        "trtllm_e2e_request_latency_seconds_count", "trtllm:e2e_request_latency_seconds_count"
    ),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """One engine's way to write its page."""

    marks: tuple[bytes, ...]
    """A page with one of these in it is worth a try."""
    spellings: Mapping[str, Spellings]
    rank_label: bytes | None = None
    """Gauges that agree in this label are one thing told by several of its ranks."""
    wanted: re.Pattern[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = {
            series.name
            for spellings in self.spellings.values()
            for spelling in spellings
            for series in (spelling if isinstance(spelling, Product) else (spelling,))
        }
        alternatives = "|".join(sorted(map(re.escape, names))).encode()
        object.__setattr__(self, "wanted", re.compile(rb"\n[ \t]*(%b)(?=[{ \t])" % alternatives))


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "VLLM": Dialect((b"vllm:",), _VLLM),
        "SGLang": Dialect((b"sglang:", b"sglang_num_"), _SGLANG, rank_label=b"dp_rank"),
        "LlamaCpp": Dialect((b"llamacpp:",), _LLAMA_CPP),
        "TGI": Dialect((b"tgi_",), _TGI),
        "Triton": Dialect((b"nv_trt_llm_",), _TRITON),
        "TensorRTLLM": Dialect((b"trtllm",), _TENSORRT_LLM),
    }
)
"""By the names of engines in a pool's spec."""

_GAUGES = frozenset({"running", "waiting", "kv_used_ratio", "kv_used_tokens", "kv_capacity_tokens"})
_LABEL = rb'[a-zA-Z_]\w*+[ \t]*+=[ \t]*+"(?:[^"\\\n]|\\[^\n])*+"[ \t]*+'
_LINE = re.compile(
    rb"[ \t]*+(?:\{[ \t]*+((?:" + _LABEL + rb"(?:,[ \t]*+|(?=\})))*+)\})?+"
    rb"[ \t]*+([0-9A-Za-z.+-]++)"  # the value
    rb"(?:[ \t]++[0-9eE.+-]++)?+"  # a timestamp
    rb"(?:[ \t]++\#[^\n]*+)?+"  # an exemplar, in OpenMetrics
    rb"[ \t\r]*+\n"  # a line without its end may have lost digits
)
_LABELS = re.compile(rb'(\w+)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"')

_Lines: TypeAlias = dict[str, list[tuple[bytes, float]]]
"""By name: the text of the labels and the value, in the order of the page."""


def parse(page: bytes, *, engine: str = AUTO) -> Sample | Failure:
    """Read one page of the given engine, or of whichever engine wrote it.

    Several series of one name (data-parallel engines behind one port) are added up, usage ratios
    averaged. Total: whatever the bytes, the answer is a Sample or a Failure(UNPARSABLE).
    """
    if engine == AUTO:
        dialects = [d for d in DIALECTS.values() if any(mark in page for mark in d.marks)]
    elif engine in DIALECTS:
        dialects = [DIALECTS[engine]]
    else:
        return _unparsable(f"there is no engine {engine!r}, only {', '.join(DIALECTS)}")
    complaints: list[str] = []
    for dialect in dialects:
        lines = _search(page, dialect)
        outcome = lines if isinstance(lines, str) else _sample(lines, dialect)
        if isinstance(outcome, Sample):
            return outcome
        complaints.append(outcome)
    return _unparsable(complaints[0] if complaints else "no metrics of an engine that is known")


def _unparsable(reason: str) -> Failure:
    return Failure(FailureKind.UNPARSABLE, reason)


def _search(page: bytes, dialect: Dialect) -> _Lines | str:
    """All wanted lines, or what is wrong with one of them."""
    lines: _Lines = {}
    page = b"\n" + page
    for match in dialect.wanted.finditer(page):
        name = match[1].decode()
        line = _LINE.match(page, match.end())
        if line is None:
            return f"the line of {name} is malformed or cut off"
        value = _number(line[2])
        if value is None or not 0 <= value <= LARGEST:  # NaN is not, either
            return f"{name} is {line[2].decode()}, which it cannot be"
        lines.setdefault(name, []).append((line[1] or b"", value))
    return lines


def _sample(lines: _Lines, dialect: Dialect) -> Sample | str:
    """What the lines say, or which indispensable one is missing."""
    values: dict[str, float] = {}
    for key, spellings in dialect.spellings.items():
        rank_label = dialect.rank_label if key in _GAUGES else None
        for spelling in spellings:
            if numbers := _numbers(lines, spelling, rank_label):
                values[key] = sum(numbers) / (len(numbers) if key == "kv_used_ratio" else 1)
                break
    for key in ("running", "waiting"):
        if key not in values:
            return f"{dialect.spellings[key][0]} is missing"
    cached_tokens = values.pop("cached_tokens_total", 0.0)
    if "prompt_tokens_total" in values:
        values["prompt_tokens_total"] = max(0.0, values["prompt_tokens_total"] - cached_tokens)
    used_tokens = values.pop("kv_used_tokens", None)
    if used_tokens is not None and (capacity_tokens := values.get("kv_capacity_tokens")):
        values["kv_used_ratio"] = used_tokens / capacity_tokens
    return Sample(**values)


def _numbers(lines: _Lines, spelling: Series | Product, rank_label: bytes | None) -> list[float]:
    """One number per series that matches; of the ranks that tell the same thing only one."""
    if isinstance(spelling, Product):
        amounts = _numbers(lines, spelling.amount, rank_label)
        sizes = _numbers(lines, spelling.size, rank_label)
        return [amount * size for amount, size in zip(amounts, sizes, strict=False)]
    found = lines.get(spelling.name, [])
    if spelling.where is None and spelling.label is None and rank_label is None:
        return [value for _, value in found]
    numbers: dict[bytes, float] = {}
    for labels_text, value in found:
        labels = dict(_LABELS.findall(labels_text))
        if spelling.where and labels.get(spelling.where[0].encode()) != spelling.where[1].encode():
            continue
        number = _number(labels.get(spelling.label.encode(), b"")) if spelling.label else value
        if number is not None and 0 <= number <= LARGEST:
            rank = labels_text if rank_label is None else labels.get(rank_label, b"")
            numbers[rank] = max(number, numbers.get(rank, 0.0))
    return list(numbers.values())


def _number(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
