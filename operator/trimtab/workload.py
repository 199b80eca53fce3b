"""Requests to balance: when they arrive, and how many tokens they bring and want.

The law: a workload is a joint distribution of two lengths and a Gamma distribution of the gaps
between arrivals. Gaps with a coefficient of variation (CV) of 1 are Poisson; real traffic is
burstier. Lengths alone decide how much work there is, gaps how unevenly it comes; so a recorded
trace may keep its lengths and be driven at any load.

`conversation` and `code` describe the Azure LLM inference traces 2023 (CC-BY 4.0; Patel et al.,
"Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024) by quantiles:
of the prompts, and of the outputs within bands of the prompts, because conversations with a
medium prompt answer four times as long as those with a short or a long one, which no single
coefficient of correlation can say. What they leave out: in the traces the mean work of a request
drifts by a fifth over minutes, so a trace at 0.85 of the capacity is at times above it, while
drawn requests are independent and milder (TTFT p99 of round robin 0.6 s instead of 1.0 s).
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

TRACE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


class Request(NamedTuple):
    at_s: float
    """Arrival, from the start of the traffic."""
    prompt_tokens: int
    output_tokens: int


class Lengths(Protocol):
    def draw(self, rng: Random) -> tuple[int, int]:
        """Prompt and output tokens of one request, each at least 1."""


@dataclass(frozen=True, slots=True)
class Workload:
    """How long requests are, and how unevenly they arrive (CV of the gaps)."""

    lengths: Lengths
    cv: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution known at some levels, uniform between them."""

    levels: tuple[float, ...]
    tokens: tuple[int, ...]

    def at(self, level: float) -> int:
        """Tokens that a share `level` (0…1) of the requests does not exceed."""
        right = min(bisect_right(self.levels, level), len(self.levels) - 1)
        low, high = self.levels[right - 1], self.levels[right]
        start, end = self.tokens[right - 1], self.tokens[right]
        return round(start + (end - start) * (level - low) / (high - low))


@dataclass(frozen=True, slots=True)
class Banded:
    """Outputs drawn by the band of the prompt's own level."""

    prompt: Quantiles
    outputs: tuple[tuple[float, Quantiles], ...]
    """Each with the level at which its band ends; the last ends at 1."""

    def draw(self, rng: Random) -> tuple[int, int]:
        level = rng.random()
        output = next(quantiles for end, quantiles in self.outputs if level < end)
        return self.prompt.at(level), output.at(rng.random())


@dataclass(frozen=True, slots=True)
class LogNormal:
    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: Random) -> int:
        tokens = self.median * math.exp(self.sigma * rng.gauss(0.0, 1.0))
        return round(min(self.high, max(self.low, tokens)))


@dataclass(frozen=True, slots=True)
class LogUniform:
    low: int
    high: int

    def draw(self, rng: Random) -> int:
        return round(self.low * math.pow(self.high / self.low, rng.random()))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Common requests, among them some with a long prompt and some with a long output."""

    prompt: LogNormal
    output: LogNormal
    long_prompt: LogUniform = LogUniform(1, 1)
    long_output: LogUniform = LogUniform(1, 1)
    long_ratio: float = 0.0
    """Share of requests with a long prompt; as many others have a long output."""

    def draw(self, rng: Random) -> tuple[int, int]:
        prompt_tokens, output_tokens = self.prompt.draw(rng), self.output.draw(rng)
        kind = rng.random()
        if kind < self.long_ratio:
            prompt_tokens = self.long_prompt.draw(rng)
        elif kind < 2 * self.long_ratio:
            output_tokens = self.long_output.draw(rng)
        return prompt_tokens, output_tokens


# fmt: off
_PROMPT_LEVELS = (0, .005, .01, .025, .05, .1, .134, .15, .2, .25, .3, .4, .5, .6, .7, .75, .8,
                  .85, .9, .95, .975, .99, .995, .999, 1)
_OUTPUT_LEVELS = (0, .05, .1, .25, .5, .75, .9, .95, .99, 1)
_CONVERSATION = Banded(
    Quantiles(_PROMPT_LEVELS,
              (2, 17, 29, 120, 181, 207, 253, 372, 387, 396, 403, 703, 1020, 1071, 1130, 1189, 1315,
               1876, 2734, 4083, 4092, 4142, 4831, 6179, 14050)),
    ((.1, Quantiles(_OUTPUT_LEVELS, (11, 16, 66, 112, 161, 189, 217, 217, 295, 1000))),
     (.4, Quantiles(_OUTPUT_LEVELS, (7, 43, 59, 80, 93, 109, 139, 162, 217, 739))),
     (.5, Quantiles(_OUTPUT_LEVELS, (10, 57, 82, 121, 395, 415, 446, 505, 609, 921))),
     (.7, Quantiles(_OUTPUT_LEVELS, (28, 365, 377, 394, 407, 429, 493, 559, 666, 1000))),
     (.8, Quantiles(_OUTPUT_LEVELS, (26, 60, 92, 181, 396, 418, 456, 523, 643, 992))),
     (1., Quantiles(_OUTPUT_LEVELS, (15, 34, 39, 50, 77, 115, 162, 200, 408, 918)))))
_CODE = Banded(
    Quantiles(_PROMPT_LEVELS,
              (3, 12, 17, 44, 75, 147, 197, 232, 386, 578, 770, 1075, 1469, 1909, 2433, 2744, 3192,
               3920, 5188, 7303, 7435, 7436, 7436, 7437, 7437)),
    ((1., Quantiles((0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .975, .99, .995, .9975,
                     .999, .9995, 1),
                    (6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 145, 251, 359, 599, 825, 885,
                     1899))),))
# fmt: on
_CHAT_PROMPT = LogNormal(200, 0.9, 16, 2048)
_CHAT_OUTPUT = LogNormal(150, 0.8, 8, 1024)

WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "conversation": (_conversation := Workload(_CONVERSATION, cv=1.1)),  # CV of the trace
        "chat": _conversation,
        # The trace's own CV is 13: one service's bursts. 3 is what a pool shared by many sees.
        "code": Workload(_CODE, cv=3.0),
        # 90 % short chat, 5 % documents, 5 % essays: few requests, most of the work.
        "mixed": Workload(
            Mixture(
                _CHAT_PROMPT, _CHAT_OUTPUT, LogUniform(8000, 12_000), LogUniform(600, 1000), 0.05
            ),
            cv=1.0,
        ),
        # The same with documents up to 32k and outputs up to 6k, in bursts.
        "mixed-long": Workload(
            Mixture(
                _CHAT_PROMPT, _CHAT_OUTPUT, LogUniform(8192, 32_768), LogUniform(1500, 6000), 0.05
            ),
            cv=2.0,
        ),
        # Long thoughts: pools full of KV, not of prompts.
        "reasoning": Workload(
            Mixture(LogNormal(400, 1.0, 16, 16_384), LogNormal(1200, 1.0, 50, 16_000)), cv=2.0
        ),
    }
)


def draw(
    workload: Workload,
    *,
    rate_per_s: float,
    rng: Random,
    seconds: float = math.inf,
    count: float = math.inf,
) -> list[Request]:
    """Make up requests until either limit is met; at least one limit must be given."""
    if math.isinf(seconds) and math.isinf(count):
        raise ValueError("give seconds, count or both")
    requests: list[Request] = []
    at_s = 0.0
    while len(requests) < count:
        at_s += _gap_s(rate_per_s, cv=workload.cv, rng=rng)
        if at_s >= seconds:
            break
        requests.append(Request(at_s, *workload.lengths.draw(rng)))
    return requests


def retime(
    trace: Sequence[Request],
    *,
    rate_per_s: float,
    cv: float | None,
    rng: Random,
    count: int | None = None,
) -> list[Request]:
    """Drive a trace at another rate: lengths in their order, from a place that `rng` picks.

    Gaps come from a Gamma distribution with the given CV; with None they are the recorded ones,
    scaled. Past its end the trace starts over, until `count` requests (default: its length).
    """
    mean_gap_s = (trace[-1].at_s - trace[0].at_s) / max(1, len(trace) - 1)
    start = rng.randrange(len(trace))
    requests: list[Request] = []
    at_s = 0.0
    for number in range(start, start + (len(trace) if count is None else count)):
        index = number % len(trace)
        if cv is not None:
            at_s += _gap_s(rate_per_s, cv=cv, rng=rng)
        else:
            gap_s = trace[index].at_s - trace[index - 1].at_s if index else mean_gap_s
            at_s += gap_s / (mean_gap_s * rate_per_s)
        requests.append(trace[index]._replace(at_s=at_s))
    return requests


def parse_trace(text: str) -> list[Request]:
    """Read the CSV of the Azure LLM inference traces 2023; the first request arrives at 0.

    Raises:
        ValueError: names the line, and what is wrong with it.
    """
    rows = csv.reader(StringIO(text, newline=""))
    if next(rows, None) != TRACE_HEADER:
        raise ValueError(f"line 1: expected the columns {','.join(TRACE_HEADER)}")
    requests: list[Request] = []
    first: datetime | None = None
    latest_s = 0.0
    for row in rows:
        try:
            stamp, prompt, output = row
            at = datetime.fromisoformat(stamp)
            first = first or at
            request = Request((at - first).total_seconds(), int(prompt), int(output))
        except (TypeError, ValueError) as error:  # TypeError: stamps with and without a time zone
            raise ValueError(f"line {rows.line_num}: {error}") from error
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"line {rows.line_num}: prompt and output have at least one token")
        if request.at_s < latest_s:
            raise ValueError(f"line {rows.line_num}: earlier than the line before")
        latest_s = request.at_s
        requests.append(request)
    if not requests:
        raise ValueError("line 2: a trace has at least one request")
    return requests


def _gap_s(rate_per_s: float, *, cv: float, rng: Random) -> float:
    return rng.gammavariate(1 / cv**2, cv**2 / rate_per_s)
