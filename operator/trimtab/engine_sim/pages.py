"""An engine's metrics page: the page that a real vLLM 0.32.0 sent, with this engine's values.

The captured page (vllm-0.32.0.prom beside this module) is the template, so every family, label,
bucket and help text is there in the real order, and a scraper cannot tell one from the other.
What an engine without a model cannot have (garbage collections, memory) keeps the captured
value. Counters mean what they mean in vLLM: prompt tokens jump by the whole prompt when the
first token comes out, the iteration histogram sees only iterations that emit, requests whose
client went away appear in no request histogram.

`prometheus_client` takes 2 ms of CPU for a page of this size, this module a tenth: a fleet of a
hundred engines that is scraped every second would spend a fifth of a core on it.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.utils import floatToGoString

from trimtab.engine_sim.model import Engine

if TYPE_CHECKING:
    from trimtab.engine_sim.clocked import Generation
    from trimtab.engine_sim.model import EngineSpec

TEMPLATE = (resources.files(__package__) / "vllm-0.32.0.prom").read_text()
FIRST_EXPONENT = 1_000_000  # numbers from here on are shown as 1e+06
BLOCK_TOKENS = 16  # vLLM's default on GPUs
SAMPLE = re.compile(r"([\w:]+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')
HTTP_FAMILIES: dict[str, tuple[float, ...]] = {
    "http_requests_total": (),
    "http_request_size_bytes": (),
    "http_response_size_bytes": (),
    "http_request_duration_seconds": (0.1, 0.5, 1.0, math.inf),
}
"""Families of which the captured page of an idle engine has only the head, and their buckets."""


@dataclass(slots=True)
class Histogram:
    """One histogram without its own labels: what it counted, and its lines on the page."""

    bounds: list[float] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    """Of the lines of the buckets, then of count and sum."""
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    _text: str | None = None

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times
        self._text = None

    def render(self) -> str:
        """The lines of the page, kept until the next observation: half of a page never moves."""
        if self._text is None:
            numbers = [_number(n) for n in accumulate(self.counts)]
            numbers += (numbers[-1], _number(self.total))
            self._text = "".join(f"{p} {n}\n" for p, n in zip(self.prefixes, numbers, strict=True))
        return self._text


@dataclass(slots=True)
class HttpFamily:
    """One family of the web server's own metrics: it shows a label set once that was seen."""

    name: str
    help_text: str
    kind: str
    bounds: tuple[float, ...] = ()
    children: dict[tuple[str, ...], tuple[float, list[float]]] = field(default_factory=dict)
    """By labels: when created; the number of observations, their sum, then those <= bound."""

    def observe(self, *labels: str, value: float = 0.0) -> None:
        if labels not in self.children:
            created_s = time.time()  # noqa: TID251  # the page shows wall time
            self.children[labels] = (created_s, [0.0] * (2 + len(self.bounds)))
        numbers = self.children[labels][1]
        numbers[0] += 1
        numbers[1] += value
        for i, bound in enumerate(self.bounds):
            numbers[2 + i] += value <= bound

    def render(self) -> str:
        if not self.children:
            return ""
        lines, created = [], []
        stem = self.name.removesuffix("_total")
        for labels, (created_s, numbers) in self.children.items():
            shown = ",".join(labels)
            created.append(f"{stem}_created{{{shown}}} {_number(created_s)}\n")
            if self.kind == "counter":
                lines.append(f"{self.name}{{{shown}}} {_number(numbers[0])}\n")
                continue
            for bound, n in zip(self.bounds, numbers[2:], strict=True):
                # Labels are sorted: the bound comes after the handler, before the method.
                bucket = ",".join([labels[0], f'le="{_number(bound)}"', *labels[1:]])
                lines.append(f"{self.name}_bucket{{{bucket}}} {_number(n)}\n")
            lines.append(f"{self.name}_count{{{shown}}} {_number(numbers[0])}\n")
            lines.append(f"{self.name}_sum{{{shown}}} {_number(numbers[1])}\n")
        lines.append(f"# HELP {stem}_created {self.help_text}\n# TYPE {stem}_created gauge\n")
        return "".join(lines + created)


class EngineMetrics:
    """What an engine has counted since its start, and the page that shows it."""

    def __init__(self, *, model: str, spec: EngineSpec, max_model_len: int) -> None:
        self.started_s = time.time()  # noqa: TID251  # the page shows wall time
        self._started_cpu_s = time.process_time()
        self.prefix_cache_queries_tokens = 0
        self.finished = {"stop": 0, "length": 0}
        self.rejections = {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}
        self._histograms: dict[str, Histogram] = {}
        self._http: dict[str, HttpFamily] = {}
        self._parts: list[str | Histogram | HttpFamily | tuple[str, str]] = []
        """The page in order: fixed text, blocks that render themselves, and the beginnings of
        sample lines with the key of the value that ends them."""
        self._compile(model=model, spec=spec, max_model_len=max_model_len)

    def observe(self, name: str, value: float, *, times: int = 1) -> None:
        """Count in a `vllm:` histogram, named without that prefix."""
        self._histograms["vllm:" + name].observe(value, times)

    def observe_finished(self, generation: Generation, *, finished_s: float) -> None:
        """Count a request whose last token is out."""
        sequence, observe = generation.sequence, self.observe
        at_limit = sequence.output_tokens == generation.max_tokens
        self.finished["length" if at_limit else "stop"] += 1
        decode_s = finished_s - generation.first_s
        prefill_s = generation.first_s - generation.admitted_s
        observe("request_prompt_tokens", sequence.prompt_tokens)
        observe("request_generation_tokens", sequence.output_tokens)
        observe("request_max_num_generation_tokens", sequence.output_tokens)
        observe("request_params_n", 1)
        observe("request_params_max_tokens", generation.max_tokens)
        observe("e2e_request_latency_seconds", finished_s - generation.arrived_s)
        observe(
            "request_queue_time_seconds", max(0.0, generation.admitted_s - generation.arrived_s)
        )
        observe("request_inference_time_seconds", finished_s - generation.admitted_s)
        observe("request_prefill_time_seconds", prefill_s)
        observe("request_decode_time_seconds", decode_s)
        observe(
            "request_time_per_output_token_seconds", decode_s / max(1, sequence.output_tokens - 1)
        )
        observe("request_num_preemptions", sequence.preemptions)
        observe("request_prefill_kv_computed_tokens", sequence.prompt_tokens)

    def observe_http(
        self, *, method: str, handler: str, status: int, sizes: tuple[int, int], duration_s: float
    ) -> None:
        """Count an HTTP request; `sizes` are the content lengths of request and response."""
        http, where, how = self._http, f'handler="{handler}"', f'method="{method}"'
        http["http_requests_total"].observe(where, how, f'status="{status // 100}xx"')
        http["http_request_size_bytes"].observe(where, value=sizes[0])
        http["http_response_size_bytes"].observe(where, value=sizes[1])
        http["http_request_duration_seconds"].observe(where, how, value=duration_s)
        self._histograms["http_request_duration_highr_seconds"].observe(duration_s)

    def render(self, engine: Engine) -> str:
        """The page as of now."""
        values = self._values(engine)
        return "".join(
            part
            if isinstance(part, str)
            else part[0] + _number(values[part[1]])
            if isinstance(part, tuple)
            else part.render()
            for part in self._parts
        )

    def _values(self, engine: Engine) -> dict[str, float]:
        """By name, and the values of the labels that are not the same on the whole page."""
        counters, waiting = engine.counters, len(engine.waiting)
        return {
            "process_start_time_seconds": self.started_s,
            "process_cpu_seconds_total": time.process_time() - self._started_cpu_s,
            "vllm:num_requests_running": engine.running,
            "vllm:num_requests_waiting": waiting,
            "vllm:num_requests_waiting_by_reason capacity": waiting,
            "vllm:kv_cache_usage_perc": engine.kv_used_ratio,
            "vllm:prefix_cache_queries_total": self.prefix_cache_queries_tokens,
            "vllm:num_preemptions_total": counters.preemptions_total,
            "vllm:prompt_tokens_total": counters.prompt_tokens_total,
            "vllm:prompt_tokens_by_source_total local_compute": counters.prompt_tokens_total,
            "vllm:generation_tokens_total": counters.generation_tokens_total,
            "vllm:request_success_total stop": self.finished["stop"],
            "vllm:request_success_total length": self.finished["length"],
        } | {f"vllm:admission_rejections_total {r}": n for r, n in self.rejections.items()}

    def _compile(self, *, model: str, spec: EngineSpec, max_model_len: int) -> None:
        """Take the captured page apart: what is fixed, and where which value goes."""
        created = _number(self.started_s)
        moving = self._values(Engine(spec=spec)).keys()
        escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        help_text = ""
        for line in TEMPLATE.splitlines(keepends=True):
            if line.startswith("#"):
                self._parts.append(line)
                _, word, name, rest = line.rstrip("\n").split(" ", 3)
                if word == "HELP":
                    help_text = rest
                elif name in HTTP_FAMILIES:
                    family = HttpFamily(name, help_text, rest, HTTP_FAMILIES[name])
                    self._http[name] = family
                    self._parts.append(family)
                continue
            if not (sample := SAMPLE.match(line)):
                continue
            name, labels = sample[1], dict(LABEL.findall(sample[2] or ""))
            text = line.rpartition(" ")[0].replace('model_name="tiny"', f'model_name="{escaped}"')
            stem = re.sub("_(bucket|count|sum)$", "", name)
            key = " ".join(
                [name, *(v for k, v in labels.items() if k not in {"engine", "model_name"})]
            )
            if stem != name:
                self._histogram_line(stem, text, bound=labels.get("le"))
            elif name == "vllm:cache_config_info":
                self._parts.append(_cache_config(text, spec, max_model_len) + " 1.0\n")
            elif name.endswith("_created"):
                self._parts.append(f"{text} {created}\n")
            elif key in moving:
                self._parts += ((text + " ", key), "\n")
            else:
                self._parts.append(line.replace('model_name="tiny"', f'model_name="{escaped}"'))

    def _histogram_line(self, stem: str, text: str, *, bound: str | None) -> None:
        if stem not in self._histograms:
            self._histograms[stem] = Histogram()
            self._parts.append(self._histograms[stem])
        histogram = self._histograms[stem]
        histogram.prefixes.append(text)
        if bound is not None:
            histogram.bounds.append(float(bound))
            histogram.counts.append(0)


def _number(value: float) -> str:
    if isinstance(value, int) and value < FIRST_EXPONENT:
        return f"{value}.0"  # the same text, at a fifth of the price
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]  # the library has no hints there


def _cache_config(text: str, spec: EngineSpec, max_model_len: int) -> str:
    """Write this engine's cache into the labels of the captured `cache_config_info`."""
    shown = {
        "block_size": BLOCK_TOKENS,
        "effective_attention_block_size": BLOCK_TOKENS,
        "kv_cache_size_tokens": spec.kv_capacity_tokens,
        "num_gpu_blocks": spec.kv_capacity_tokens // BLOCK_TOKENS,
        "kv_cache_max_concurrency": spec.kv_capacity_tokens / max_model_len,
    }
    return LABEL.sub(lambda m: f'{m[1]}="{shown.get(m[1], m[2])}"', text)
