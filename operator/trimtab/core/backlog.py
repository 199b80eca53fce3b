"""Samples over time to what each endpoint owes, how fast it works, and how old the news is.

Work is counted in tokens of prefill; everything else an engine does costs as many as takes it as
long. An iteration with p prompt tokens, n decodes and K tokens of KV cache to read costs

    300 + p + K/500 + n/3        (within a factor 2 of every engine measured; 4x wrong is harmless)

Backlog. Stock engines do not tell how much prefill is queued, so waiting requests count as mean
prompts, and what decodes still cost is weighed lightly (PHI), as it delays nobody's first token:

    m_in*waiting + PHI*m_out*((KV + m_in*waiting)/500 + (running + waiting)/3)

Speed. Work done over wall time with requests running, both remembered for 10 s of such time, over
the pool's median, held back by a prior of 5 s at speed 1; within 20 % of 1 it is 1, or wrong
constants would make emptier endpoints look slow and, sent less, look slower.

Age. Information is as old as the last page that said something new: a page that stands still while
requests run, or while many should have come, is an old page, whenever it was fetched. An endpoint
whose news is older than the others' is believed less and less: see `levels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from trimtab.core.model import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trimtab.core.model import Endpoint, Observation, Policy

STEP_TOKENS = 300.0  # a; when in doubt too large: too small, idle endpoints would look slow
KV_TOKENS = 1 / 500  # c, per KV token read
DECODE_TOKENS = 1 / 3  # d, per output token
PHI = 0.1  # without the KV term, KV-bound pools are as bad as round robin
RATE_TOKENS_PER_S = 1 / 48e-6  # prefill of an 8B model on an A100, until the pool has shown its own

SPEED_MEMORY_S = 10.0  # a fall to 0.4 shows in 5 s
SPEED_PRIOR_S = 5.0  # busy time without which nothing is said about speed
FORGIVE_S = 60.0  # an endpoint called slow gets no traffic to prove otherwise: try it again
MIN_BUSY_S = 2.0  # to count for the median
MIN_MEASURED = 2  # endpoints: one alone has nobody to be compared with
SPEED_BAND_RATIO = 0.2
SPEED_RANGE = (0.1, 4.0)
MIN_INTERVAL_S = 1e-3  # between two pages; less is the same page, or a clock that stepped back

PRIOR_REQUESTS = 10.0
PRIOR_INPUT_TOKENS = 1000.0
PRIOR_OUTPUT_TOKENS = 200.0
LENGTH_MEMORY_REQUESTS = 5000.0  # enough for heavy tails; forgets by requests, not overnight
TYPICAL_REQUEST_S = 10.0  # 200 tokens at 50 ms, for engines that count neither requests nor tokens

SLOW_S, FAST_S = 10.0, 1.0  # two averages of arrivals: without the fast one, bursts herd
PUSH_S = 0.02  # from a decision to traffic that follows it
MEMORY_S = 1.0
"""How fast one endpoint's news becomes worthless beside fresher ones: queues of engines near their
limit change in about a second."""
SILENT_REQUESTS = 10.0
"""An endpoint that should have got so many and shows none has a frozen page: by chance alone this
happens once in exp(10) = 22 000 times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long this pool's requests are: sums over the finished ones, and a prior worth ten."""

    requests: float = PRIOR_REQUESTS
    input_tokens: float = PRIOR_REQUESTS * PRIOR_INPUT_TOKENS
    output_tokens: float = PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS

    @property
    def mean_input_tokens(self) -> float:
        return max(1.0, self.input_tokens / self.requests)

    @property
    def mean_output_tokens(self) -> float:
        return max(1.0, self.output_tokens / self.requests)

    def learn(self, before: Sample, sample: Sample) -> Lengths:
        """Take in what finished between two comparable pages, if they tell all three."""
        if None in _finished(sample):
            return self
        requests = _grown(before.finished_total, sample.finished_total)
        input_tokens = _grown(
            before.finished_prompt_tokens_total, sample.finished_prompt_tokens_total
        )
        output_tokens = _grown(
            before.finished_generation_tokens_total, sample.finished_generation_tokens_total
        )
        keep = math.exp(-requests / LENGTH_MEMORY_REQUESTS)
        return Lengths(
            requests=keep * self.requests + requests,
            input_tokens=keep * self.input_tokens + input_tokens,
            output_tokens=keep * self.output_tokens + output_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What is remembered of one endpoint. Ages, not times: a clock that steps cannot spoil them."""

    sample: Sample
    page_age_s: float = 0.0
    """Age of the last page, new or not."""
    news_age_s: float = 0.0
    """Age of the last page that said something new."""
    base: Sample
    """The page at which the open interval of the speed measurement began, and its age."""
    base_age_s: float = 0.0
    done_tokens: float = 0.0
    """Work done in `busy_s`, both fading."""
    busy_s: float = 0.0
    prior_s: float = SPEED_PRIOR_S
    arrivals: float = 0.0
    """Requests that came since the page before, and their averaged rates."""
    slow_arrivals_per_s: float = 0.0
    fast_arrivals_per_s: float = 0.0
    silent_requests: float = 0.0
    """Requests that should have come since the page last showed any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of a pool."""

    now_s: float = -math.inf
    tracks: Mapping[Endpoint, Track] = field(default_factory=lambda: MappingProxyType({}))
    speed_ratio: Mapping[Endpoint, float] = field(default_factory=lambda: MappingProxyType({}))
    lengths: Lengths = field(default_factory=Lengths)
    rate_tokens_per_s: float = RATE_TOKENS_PER_S
    """Work that the pool's median endpoint does in a second."""

    def speed_of(self, endpoint: Endpoint) -> float:
        return self.speed_ratio.get(endpoint, 1.0)


class Levels(NamedTuple):
    """What a tick believes: how full each endpoint is, and on how fresh news that rests."""

    level_tokens: dict[Endpoint, float]
    """Backlog over speed, so that equal levels are emptied in equal time."""
    news_age_s: float


class Work(NamedTuple):
    """What an engine did: tokens of prefill that it was worth, and iterations."""

    tokens: float
    steps: float


_finished = attrgetter(
    "finished_total", "finished_prompt_tokens_total", "finished_generation_tokens_total"
)
_counters = attrgetter(
    "steps_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "finished_total",
    "finished_prompt_tokens_total",
    "finished_generation_tokens_total",
)


def estimate(
    memory: Memory,
    observation: Observation,
    policy: Policy,
    *,
    now_s: float,
    weights: Mapping[Endpoint, int],
) -> Memory:
    """Take one tick's readings into the memory. `weights` is how traffic was split since the last.

    A reading that failed leaves what is known as it is, only older. Endpoints that the observation
    does not name are forgotten.
    """
    elapsed_s = max(0.0, now_s - memory.now_s)
    longest_s = 3 * policy.interval_s + 5
    came = math.fsum(track.arrivals for track in memory.tracks.values())
    total_weight = sum(weights.values())
    lengths = memory.lengths
    tracks: dict[Endpoint, Track] = {}
    for endpoint, reading in sorted(observation.readings.items()):
        track = memory.tracks.get(endpoint)
        sample = reading.outcome
        if not isinstance(sample, Sample):
            if track is not None:
                tracks[endpoint] = _older(track, elapsed_s)
            continue
        page_age_s = max(0.0, now_s - (reading.asked_s + reading.answered_s) / 2)
        if track is None:
            tracks[endpoint] = _afresh(Track(sample=sample, base=sample), sample, page_age_s)
            continue
        interval_s = track.page_age_s + elapsed_s - page_age_s
        if interval_s < MIN_INTERVAL_S:
            tracks[endpoint] = _older(track, elapsed_s)
        elif interval_s > longest_s or not comparable(track.sample, sample):
            tracks[endpoint] = _afresh(track, sample, page_age_s)
        else:
            others_weight = total_weight - weights.get(endpoint, 0)
            expected = came * weights.get(endpoint, 0) / others_weight if others_weight else 0.0
            tracks[endpoint] = _follow(
                track,
                sample,
                elapsed_s=elapsed_s,
                page_age_s=page_age_s,
                longest_s=longest_s,
                expected=expected,
                lengths=memory.lengths,
            )
            lengths = lengths.learn(track.sample, sample)
    speed_ratio, rate_tokens_per_s = _speeds(memory, tracks, policy.stale_after_s)
    return Memory(
        now_s=now_s,
        tracks=tracks,
        speed_ratio=speed_ratio,
        lengths=lengths,
        rate_tokens_per_s=rate_tokens_per_s,
    )


def backlog_tokens(sample: Sample, lengths: Lengths) -> float:
    """What an engine with such a page still owes, in tokens of prefill."""
    queued_tokens = lengths.mean_input_tokens * sample.waiting
    held_tokens = _kv_tokens(sample, lengths) + queued_tokens
    decodes = sample.running + sample.waiting
    decoding_tokens = KV_TOKENS * held_tokens + DECODE_TOKENS * decodes
    return queued_tokens + PHI * lengths.mean_output_tokens * decoding_tokens


def levels(memory: Memory, endpoints: Iterable[Endpoint], policy: Policy) -> Levels:
    """How full each of the endpoints is believed to be.

    News that is older than the pool's freshest fades: after one period more it begins to give way
    to the mean of the others, with e^-1 per second, and after `stale_after_s` it is void. The mean
    is the best guess of an endpoint not seen: weights aim at one common level, so what was empty
    has been filled since and what was full has been spared. Thus a frozen "empty" cannot attract
    the pool's traffic for long, and a frozen "full" is not starved. An endpoint never heard from is
    such a one, too. Where all news is equally old nothing fades: then the horizon grows
    (`arriving_tokens`) and flattens the weights.
    """
    ordered = sorted(endpoints)
    tracks = {e: memory.tracks[e] for e in ordered if e in memory.tracks}
    freshest_s = min((track.news_age_s for track in tracks.values()), default=0.0)
    own_tokens: dict[Endpoint, float] = {}
    trust: dict[Endpoint, float] = {}
    for endpoint, track in tracks.items():
        owed_tokens = backlog_tokens(track.sample, memory.lengths)
        own_tokens[endpoint] = owed_tokens / memory.speed_of(endpoint)
        late_s = track.news_age_s - freshest_s - policy.interval_s
        is_void = track.news_age_s > policy.stale_after_s
        trust[endpoint] = 0.0 if is_void else math.exp(-max(0.0, late_s) / MEMORY_S)
    if total := sum(trust.values()):
        mean_tokens = sum(trust[e] * own for e, own in own_tokens.items()) / total
    else:
        mean_tokens = sum(own_tokens.values()) / max(1, len(own_tokens))
    level_tokens = dict.fromkeys(ordered, mean_tokens)
    for endpoint, own in own_tokens.items():
        level_tokens[endpoint] += trust[endpoint] * (own - mean_tokens)
    return Levels(level_tokens, min(freshest_s, policy.stale_after_s))


def arriving_tokens(memory: Memory, endpoints: Iterable[Endpoint], *, horizon_s: float) -> float:
    """Work that will arrive within the horizon: the period, and the age of what is known.

    The faster of two averages counts, so that a burst flattens the weights at once.
    """
    tracks = [track for e in sorted(endpoints) if (track := memory.tracks.get(e))]
    slow = sum(track.slow_arrivals_per_s for track in tracks)
    fast = sum(track.fast_arrivals_per_s for track in tracks)
    input_tokens = memory.lengths.mean_input_tokens
    output_tokens = memory.lengths.mean_output_tokens
    held_tokens = input_tokens + output_tokens / 2
    request_tokens = input_tokens + PHI * output_tokens * (KV_TOKENS * held_tokens + DECODE_TOKENS)
    return horizon_s * max(slow, fast) * request_tokens


def _older(track: Track, elapsed_s: float) -> Track:
    return replace(
        track,
        page_age_s=track.page_age_s + elapsed_s,
        news_age_s=track.news_age_s + elapsed_s,
        base_age_s=track.base_age_s + elapsed_s,
        arrivals=0.0,
    )


def _afresh(track: Track, sample: Sample, page_age_s: float) -> Track:
    """Start over from this page: it is the first, or nothing can be said of the time before it.

    That is so after a long silence and after a restart. Averages go on from where they stood.
    """
    return replace(
        track,
        sample=sample,
        page_age_s=page_age_s,
        news_age_s=page_age_s,
        base=sample,
        base_age_s=page_age_s,
        arrivals=0.0,
        silent_requests=0.0,
    )


def comparable(before: Sample, sample: Sample) -> bool:
    """Whether the same counters are there and none went back."""
    return all(
        then is None if now is None else then is not None and then <= now
        for then, now in zip(_counters(before), _counters(sample), strict=True)
    )


def _follow(
    track: Track,
    sample: Sample,
    *,
    elapsed_s: float,
    page_age_s: float,
    longest_s: float,
    expected: float,
    lengths: Lengths,
) -> Track:
    """One comparable page more."""
    before = track.sample
    interval_s = track.page_age_s + elapsed_s - page_age_s
    arrivals = _arrivals(before, sample, interval_s, lengths)
    per_s = arrivals / interval_s
    slow_per_s, fast_per_s = track.slow_arrivals_per_s, track.fast_arrivals_per_s

    # Old news: nothing moved although iterations should have, or although requests should have
    # come. vLLM's counters move only when a token comes out, so a long prompt alone in the batch
    # looks like that for a second or two; being believed a little less meanwhile does no harm.
    # Engines that do not count iterations may stand still for as long as a request takes.
    silent_requests = track.silent_requests + expected if sample == before else 0.0
    iterates = sample.running > 0 and sample.steps_total is not None
    is_old = sample == before and (iterates or silent_requests > SILENT_REQUESTS)

    base, base_age_s = sample, page_age_s
    done_tokens, busy_s, prior_s = track.done_tokens, track.busy_s, track.prior_s
    open_s = track.base_age_s + elapsed_s - page_age_s
    if not (sample.running and track.base.running):
        keep = math.exp(-open_s / FORGIVE_S)
        done_tokens, busy_s = keep * done_tokens, keep * busy_s
        prior_s = SPEED_PRIOR_S + keep * (prior_s - SPEED_PRIOR_S)
    elif sample.steps_total is not None and sample.steps_total == track.base.steps_total:
        # Either a long prompt, whose work shows at its end, or an old page, which shows nothing.
        base, base_age_s = track.base, track.base_age_s + elapsed_s
    elif open_s <= longest_s and (work := work_between(track.base, sample, lengths)):
        keep = math.exp(-open_s / SPEED_MEMORY_S)
        done_tokens, busy_s = keep * done_tokens + work.tokens, keep * busy_s + open_s
        prior_s *= keep

    return Track(
        sample=sample,
        page_age_s=page_age_s,
        news_age_s=track.news_age_s + elapsed_s if is_old else page_age_s,
        base=base,
        base_age_s=base_age_s,
        done_tokens=done_tokens,
        busy_s=busy_s,
        prior_s=prior_s,
        arrivals=arrivals,
        slow_arrivals_per_s=slow_per_s - math.expm1(-interval_s / SLOW_S) * (per_s - slow_per_s),
        fast_arrivals_per_s=fast_per_s - math.expm1(-interval_s / FAST_S) * (per_s - fast_per_s),
        silent_requests=silent_requests,
    )


def _arrivals(before: Sample, sample: Sample, interval_s: float, lengths: Lengths) -> float:
    """Requests that came between two pages, never negative.

    By tokens where an engine does not count requests, by a usual duration where it counts neither.
    """
    came = sample.waiting - before.waiting
    if sample.finished_total is not None:
        came += (
            sample.running - before.running + _grown(before.finished_total, sample.finished_total)
        )
    elif sample.prompt_tokens_total is not None:
        prompt_tokens = _grown(before.prompt_tokens_total, sample.prompt_tokens_total)
        came += prompt_tokens / lengths.mean_input_tokens
    else:
        came += sample.running - before.running + sample.running * interval_s / TYPICAL_REQUEST_S
    return max(0.0, came)


def _grown(before: float | None, now: float | None) -> float:
    return 0.0 if before is None or now is None else now - before


def _kv_tokens(sample: Sample, lengths: Lengths) -> float:
    if sample.kv_used_ratio is None or sample.kv_capacity_tokens is None:
        return sample.running * (lengths.mean_input_tokens + lengths.mean_output_tokens / 2)
    return sample.kv_used_ratio * sample.kv_capacity_tokens


def work_between(before: Sample, sample: Sample, lengths: Lengths) -> Work | None:
    """What an engine did between two comparable pages; None if it was not counted."""
    if sample.prompt_tokens_total is None or sample.generation_tokens_total is None:
        return None
    output_tokens = _grown(before.generation_tokens_total, sample.generation_tokens_total)
    if sample.steps_total is None:
        steps = output_tokens / max(1.0, (before.running + sample.running) / 2)
    else:
        steps = _grown(before.steps_total, sample.steps_total)
    kv_tokens = (_kv_tokens(before, lengths) + _kv_tokens(sample, lengths)) / 2
    tokens = (
        (STEP_TOKENS + KV_TOKENS * kv_tokens) * steps
        + _grown(before.prompt_tokens_total, sample.prompt_tokens_total)
        + DECODE_TOKENS * output_tokens
    )
    return Work(tokens, steps)


def _speeds(
    memory: Memory, tracks: Mapping[Endpoint, Track], stale_after_s: float
) -> tuple[Mapping[Endpoint, float], float]:
    """The speeds, and the work per second of the median endpoint; both as before if unmeasured."""
    fresh = {e: track for e, track in tracks.items() if track.news_age_s <= stale_after_s}
    rates = sorted(t.done_tokens / t.busy_s for t in fresh.values() if t.busy_s > MIN_BUSY_S)
    median = rates[len(rates) // 2] if rates else 0.0
    speed_ratio = {e: memory.speed_of(e) for e in tracks}
    if median <= 0:
        return speed_ratio, memory.rate_tokens_per_s
    if len(rates) < MIN_MEASURED:
        return speed_ratio, median
    for endpoint, track in fresh.items():
        measured = (track.done_tokens / median + track.prior_s) / (track.busy_s + track.prior_s)
        off = abs(measured - 1) >= SPEED_BAND_RATIO
        speed_ratio[endpoint] = min(max(measured, SPEED_RANGE[0]), SPEED_RANGE[1]) if off else 1.0
    return speed_ratio, median
