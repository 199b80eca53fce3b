"""What is wrong with a pool, if anything: one verdict, with the numbers that it rests on.

The law. Every 5 s, over the last 10 s and from stock gauges and counters, per endpoint

    rate  = work done / time busy      and its ratio to the median of the pool: the speed r
    step  = time busy / iterations     what a request waits for each output token
    queue = waiting * mean prompt / (median rate * max(0.2, r))       seconds, looked at every tick

    Saturated      over 30 s even the emptiest endpoint queues longer than a quarter of the TTFT
                   objective, or in 3 windows even the fastest step exceeds the TPOT objective
    SlowEndpoint   r < 0.75 in 3 windows; at least 3 endpoints must have been measured
    Imbalanced     over 30 s the fullest endpoint queues longer than the emptiest by more than a
                   quarter of the TTFT objective
    Oversized      the load of the last minute would meet the objective with one endpoint less
    Unknown        half of the endpoints cannot be heard, or have not been heard for 30 s
    Balanced       otherwise

The first that holds, in this order (Unknown for want of endpoints before all): shortage is mended
by the same act as slowness, and sooner needed; a slow endpoint makes an imbalance.

The load that an iteration adds to its fixed cost is the same however many endpoints share it: with
rho = load / (median rate * speeds), a step takes a / (1 - rho). Hence what is needed for an
objective, and what a step would take on fewer endpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from operator import sub
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from trimtab.core.backlog import (
    DECODE_TOKENS,
    KV_TOKENS,
    STEP_TOKENS,
    comparable,
    work_between,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from trimtab.core.backlog import Lengths, Memory, Track
    from trimtab.core.model import Endpoint, Objective, Policy, Sample

CHECK_S = 5.0
MIN_CHECK_S = 1.0  # of whatever period: a check needs two pages
STREAK_CHECKS = 3
WINDOW_CHECKS = 4  # 20 s: in shorter windows single long prompts look like slowness
SETTLED_S = 30.0  # bursts and the bad luck of a few requests are over by then
SPARE_S = 60.0  # ... and the peaks of a quiet pool have been seen
SLOW_RATIO = 0.75  # 0.9 would find 0.85, too, with a tenth of false alarms on bursty traffic
BACK_RATIO = 0.85  # ... and is not cleared before; one that is at the limit must not flap
MIN_BUSY_S = 12.0  # of a window, to have shown a speed
MIN_RUNNING = 3.0  # per second between looks: with fewer, idle times unseen look like slowness
MIN_MEASURED = 3  # of two that differ nobody can say which is wrong
MIN_STEPS_TO_WAIT = 5  # an endpoint that did fewer was free to take more
MIN_SPEED_RATIO = 0.2  # a speed measured too low must not turn a short queue into a long one
QUEUE_RATIO = 0.25  # of the TTFT objective: the rest is for prefill and for bad luck
HEARD_RATIO = 0.5
CATCH_UP_S = 60.0  # in which what has piled up is to be done beside what arrives
MIN_LOAD_RATIO = 0.1  # an objective that no number of endpoints meets must not ask for millions
MAX_LOAD_RATIO = 0.8  # beyond it queues grow out of bounds whatever the step takes
SPARE_LOAD_RATIO = 0.6
SPARE_RATIO = 0.8  # of the objectives that fewer endpoints may use: what is not seen needs room
SPARE_KV_RATIO = 0.7


class Verdict(StrEnum):
    BALANCED = "Balanced"
    IMBALANCED = "Imbalanced"
    SLOW_ENDPOINT = "SlowEndpoint"
    SATURATED = "Saturated"
    OVERSIZED = "Oversized"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The numbers of the last check, whatever the verdict."""

    endpoints: int = 0
    heard: int = 0
    """Of them, with fresh data."""
    settled_s: float = 0.0
    """How long there has been enough data without a break."""
    least_queue_s: float = 0.0
    most_queue_s: float = 0.0
    """Of the emptiest and the fullest endpoint, means over 30 s."""
    least_step_s: float = 0.0
    """Of the endpoint with the fastest iterations."""
    speed_ratio: Mapping[Endpoint, float] = field(default_factory=lambda: MappingProxyType({}))
    """Of the endpoints that were busy enough to be measured."""
    slow: tuple[Endpoint, ...] = ()
    load_ratio: float = 0.0
    """Of what the endpoints could do if iterations cost nothing, over the last minute."""
    needed_endpoints: float = 0.0
    """Of median speed: for what arrives, and for what has piled up, within the objective."""
    shortage_endpoints: float = 0.0
    """Needed, less those there are by their speeds; negative if there are more."""
    spare_load_ratio: float = math.inf
    spare_step_s: float = math.inf
    """With one endpoint less; infinite if that cannot be said, or would be too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    verdict: Verdict = Verdict.UNKNOWN
    since_s: float = -math.inf
    evidence: Evidence = Evidence()
    sentence: str = "nothing has been observed yet"


class Totals(NamedTuple):
    """Sums since an endpoint is known; only differences mean anything."""

    busy_s: float
    running_s: float
    """Of all requests together."""
    steps: float
    work_tokens: float
    load_tokens: float
    """Work without the fixed cost of iterations, and that of unclear times too."""


_NONE = Totals(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What is remembered of one endpoint."""

    sample: Sample
    at_s: float
    base: Sample
    """The page at which the open interval began, and its time."""
    base_at_s: float
    totals: Totals = _NONE
    marks: tuple[Totals, ...] = (_NONE,)
    """At the last checks, the oldest first."""
    window: Totals = _NONE
    """At the last check."""
    speed_ratio: float | None = None
    is_slow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What the time between two checks was like; queues and KV are integrals over it."""

    seconds: float = 0.0
    least_queue: float = 0.0
    most_queue: float = 0.0
    waiting: float = 0.0
    load_tokens: float = 0.0
    kv_ratio: float = 0.0
    least_step_s: float = 0.0
    mean_step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """All that one call of `judge` hands to the next."""

    now_s: float = -math.inf
    vitals: Mapping[Endpoint, Vitals] = field(default_factory=lambda: MappingProxyType({}))
    blocks: tuple[Block, ...] = ()
    """The last minute, the latest last."""
    open: Block = Block()
    judgement: Judgement = Judgement()


def judge(
    watch: Watch, memory: Memory, endpoints: Collection[Endpoint], policy: Policy
) -> tuple[Watch, Judgement]:
    """Judge a pool once `memory` holds a tick's readings.

    `endpoints` are those that should serve: what refuses connections, or leaves, says nothing
    about the others.
    """
    now_s = memory.now_s
    longest_s = 3 * policy.interval_s + 5
    elapsed_s = min(longest_s, max(0.0, now_s - watch.now_s)) if watch.vitals else 0.0
    vitals = {
        endpoint: _follow(
            watch.vitals.get(endpoint),
            track,
            at_s=now_s - track.page_age_s,
            longest_s=longest_s,
            lengths=memory.lengths,
        )
        for endpoint in sorted(endpoints)
        if (track := memory.tracks.get(endpoint))
    }
    heard = [e for e in vitals if memory.tracks[e].news_age_s <= policy.stale_after_s]
    if len(heard) <= HEARD_RATIO * len(endpoints):
        evidence = Evidence(endpoints=len(endpoints), heard=len(heard))
        judgement = _conclude(watch.judgement, Verdict.UNKNOWN, evidence, policy, now_s=now_s)
        return Watch(now_s=now_s, vitals=vitals, judgement=judgement), judgement
    block = _extend(watch.open, memory, heard, elapsed_s=elapsed_s)
    if block.seconds < max(MIN_CHECK_S, CHECK_S - policy.interval_s / 2):
        watch = replace(watch, now_s=now_s, vitals=vitals, open=block)
        return watch, watch.judgement

    vitals = _measure(vitals, interval_s=policy.interval_s)
    blocks = _last((*watch.blocks, _close(block, vitals, heard)), SPARE_S + CHECK_S)
    evidence = _weigh(
        blocks, vitals, memory, heard=heard, endpoints=len(endpoints), objective=policy.objective
    )
    verdict = _decide(blocks, evidence, policy.objective)
    judgement = _conclude(watch.judgement, verdict, evidence, policy, now_s=now_s)
    watch = Watch(now_s=now_s, vitals=vitals, blocks=blocks, judgement=judgement)
    return watch, judgement


def _follow(
    before: Vitals | None, track: Track, *, at_s: float, longest_s: float, lengths: Lengths
) -> Vitals:
    """Add what happened since the last page."""
    sample = track.sample
    if before is None:
        return Vitals(sample=sample, at_s=at_s, base=sample, base_at_s=at_s)
    if at_s <= before.at_s:
        return before
    fresh = replace(before, sample=sample, at_s=at_s, base=sample, base_at_s=at_s)
    base, open_s = before.base, at_s - before.base_at_s
    if open_s > longest_s or not comparable(base, sample):
        return fresh
    busy = base.running > 0 and sample.running > 0
    if busy and sample.steps_total is not None and sample.steps_total == base.steps_total:
        # A long prompt, whose work shows at its end.
        return replace(before, sample=sample, at_s=at_s)
    work = work_between(base, sample, lengths)
    if work is None:
        return fresh
    then = before.totals
    totals = Totals(
        busy_s=then.busy_s + busy * open_s,
        running_s=then.running_s + open_s * (base.running + sample.running) / 2,
        steps=then.steps + busy * work.steps,
        work_tokens=then.work_tokens + busy * work.tokens,
        load_tokens=then.load_tokens + work.tokens - STEP_TOKENS * work.steps,
    )
    return replace(fresh, totals=totals)


def _extend(block: Block, memory: Memory, heard: list[Endpoint], *, elapsed_s: float) -> Block:
    """Let the present count for the time since the last tick."""
    prompt_s = memory.lengths.mean_input_tokens / memory.rate_tokens_per_s
    samples = {e: memory.tracks[e].sample for e in heard}
    queues_s = [
        sample.waiting * prompt_s / max(MIN_SPEED_RATIO, memory.speed_of(endpoint))
        for endpoint, sample in samples.items()
    ]
    kv_ratio = sum(sample.kv_used_ratio or 0.0 for sample in samples.values())
    return replace(
        block,
        seconds=block.seconds + elapsed_s,
        least_queue=block.least_queue + elapsed_s * min(queues_s),
        most_queue=block.most_queue + elapsed_s * max(queues_s),
        waiting=sum(sample.waiting for sample in samples.values()),
        kv_ratio=block.kv_ratio + elapsed_s * kv_ratio,
    )


def _measure(vitals: Mapping[Endpoint, Vitals], *, interval_s: float) -> dict[Endpoint, Vitals]:
    """Close a window: compare the endpoints that were busy in it."""
    min_running_s = MIN_RUNNING * max(1.0, interval_s) * CHECK_S * WINDOW_CHECKS
    windows = {e: Totals(*map(sub, v.totals, v.marks[0])) for e, v in vitals.items()}
    rates = {
        e: window.work_tokens / window.busy_s
        for e, window in windows.items()
        if window.busy_s >= MIN_BUSY_S and window.running_s >= min_running_s
    }
    middle = median(rates.values()) if len(rates) >= MIN_MEASURED else 0.0
    measured: dict[Endpoint, Vitals] = {}
    for endpoint, before in vitals.items():
        speed_ratio = rates[endpoint] / middle if endpoint in rates and middle else None
        is_slow = before.is_slow
        if speed_ratio is not None:
            is_slow = speed_ratio < (BACK_RATIO if is_slow else SLOW_RATIO)
        measured[endpoint] = replace(
            before,
            window=windows[endpoint],
            marks=(*before.marks, before.totals)[-WINDOW_CHECKS:],
            speed_ratio=speed_ratio,
            is_slow=is_slow,
        )
    return measured


def _close(block: Block, vitals: Mapping[Endpoint, Vitals], heard: list[Endpoint]) -> Block:
    steps_s = [
        w.busy_s / w.steps if w.steps > MIN_STEPS_TO_WAIT else 0.0
        for w in (vitals[e].window for e in heard)
    ]
    load_tokens = sum(v.marks[-1].load_tokens - v.marks[-2].load_tokens for v in vitals.values())
    return replace(
        block,
        load_tokens=load_tokens,
        least_step_s=min(steps_s),
        mean_step_s=sum(steps_s) / len(steps_s),
    )


def _last(blocks: tuple[Block, ...], seconds: float) -> tuple[Block, ...]:
    """The latest blocks, as many as fit, but the latest itself always."""
    total_s = 0.0
    for count, block in enumerate(reversed(blocks)):
        total_s += block.seconds
        if count and total_s > seconds:
            return blocks[-count:]
    return blocks


def _weigh(
    blocks: tuple[Block, ...],
    vitals: Mapping[Endpoint, Vitals],
    memory: Memory,
    *,
    heard: list[Endpoint],
    endpoints: int,
    objective: Objective,
) -> Evidence:
    recent = _last(blocks, SETTLED_S + CHECK_S / 2)
    recent_s = sum(block.seconds for block in recent)
    total_s = sum(block.seconds for block in blocks)
    rate, lengths = memory.rate_tokens_per_s, memory.lengths
    speeds = sum(memory.speed_of(e) for e in heard)
    capacity = rate * speeds
    load_ratio = sum(block.load_tokens for block in blocks) / (capacity * total_s)

    # What is needed for what arrives (done, or piling up), and to work off what waits.
    output_tokens = lengths.mean_output_tokens
    held_tokens = lengths.mean_input_tokens + output_tokens / 2
    request_tokens = lengths.mean_input_tokens + output_tokens * (
        KV_TOKENS * held_tokens + DECODE_TOKENS
    )
    waiting = recent[-1].waiting
    piled = max(0.0, waiting - recent[0].waiting) / recent_s + waiting / CATCH_UP_S
    demand = sum(block.load_tokens for block in recent) / recent_s + piled * request_tokens
    bearable_ratio = 1 - STEP_TOKENS / (rate * objective.tpot_s)
    bearable_ratio = min(MAX_LOAD_RATIO, max(MIN_LOAD_RATIO, bearable_ratio))
    needed = demand / (rate * bearable_ratio)

    spare_load_ratio = spare_step_s = math.inf
    others = 1 - 1 / endpoints
    counted = all(memory.tracks[e].sample.prompt_tokens_total is not None for e in heard)
    if others and counted and len(heard) == endpoints and load_ratio < others:
        peak = max(map(_load_rate, pairwise(blocks)), default=math.inf)
        spare_load_ratio = peak / (capacity * others)
        slower = (1 - load_ratio) / (1 - load_ratio / others)
        spare_step_s = slower * sum(b.mean_step_s * b.seconds for b in blocks) / total_s
        kv_ratio = sum(block.kv_ratio for block in blocks) / total_s
        if slower * kv_ratio / (others * endpoints) > SPARE_KV_RATIO:
            spare_step_s = math.inf
    return Evidence(
        endpoints=endpoints,
        heard=len(heard),
        settled_s=total_s,
        least_queue_s=sum(block.least_queue for block in recent) / recent_s,
        most_queue_s=sum(block.most_queue for block in recent) / recent_s,
        least_step_s=blocks[-1].least_step_s,
        speed_ratio={e: v.speed_ratio for e, v in vitals.items() if v.speed_ratio is not None},
        slow=tuple(e for e, v in vitals.items() if v.is_slow),
        load_ratio=load_ratio,
        needed_endpoints=needed,
        shortage_endpoints=needed - speeds,
        spare_load_ratio=spare_load_ratio,
        spare_step_s=spare_step_s,
    )


def _load_rate(pair: tuple[Block, Block]) -> float:
    return (pair[0].load_tokens + pair[1].load_tokens) / (pair[0].seconds + pair[1].seconds)


def _decide(blocks: tuple[Block, ...], evidence: Evidence, objective: Objective) -> Verdict:
    allowed_s = QUEUE_RATIO * objective.ttft_s
    settled = evidence.settled_s > SETTLED_S - CHECK_S / 2
    streak = [block.least_step_s > objective.tpot_s for block in blocks[-STREAK_CHECKS:]]
    if (settled and evidence.least_queue_s > allowed_s) or sum(streak) == STREAK_CHECKS:
        return Verdict.SATURATED
    if evidence.slow:
        return Verdict.SLOW_ENDPOINT
    if not settled:
        return Verdict.UNKNOWN
    if evidence.most_queue_s - evidence.least_queue_s > allowed_s:
        return Verdict.IMBALANCED
    if (
        evidence.settled_s > SPARE_S - CHECK_S / 2
        and evidence.spare_load_ratio < SPARE_LOAD_RATIO
        and evidence.spare_step_s < SPARE_RATIO * objective.tpot_s
        and evidence.most_queue_s < allowed_s / 2
    ):
        return Verdict.OVERSIZED
    return Verdict.BALANCED


def _conclude(
    before: Judgement, verdict: Verdict, evidence: Evidence, policy: Policy, *, now_s: float
) -> Judgement:
    return Judgement(
        verdict=verdict,
        since_s=before.since_s if before.verdict is verdict else now_s,
        evidence=evidence,
        sentence=_SENTENCES[verdict](evidence, policy.objective),
    )


def _unknown(evidence: Evidence, _: Objective) -> str:
    if evidence.settled_s:
        return f"a verdict takes {SETTLED_S:.0f} s of data; there are {evidence.settled_s:.0f} s"
    return f"{evidence.heard} of {evidence.endpoints} endpoints have fresh data: too few to judge"


def _saturated(evidence: Evidence, objective: Objective) -> str:
    return (
        f"even the emptiest of {evidence.endpoints} endpoints queues {evidence.least_queue_s:.2f} s"
        f" of work, and the fastest takes {1000 * evidence.least_step_s:.0f} ms per output token "
        f"({QUEUE_RATIO * objective.ttft_s:.2f} s and {1000 * objective.tpot_s:.0f} ms are "
        f"allowed): the load asks for {evidence.needed_endpoints:.1f} endpoints"
    )


def _slow(evidence: Evidence, _: Objective) -> str:
    named = ", ".join(
        f"{e.pod} ({100 * evidence.speed_ratio[e]:.0f} %)" if e in evidence.speed_ratio else e.pod
        for e in evidence.slow
    )
    return f"works at less than {100 * SLOW_RATIO:.0f} % of the median speed: {named}"


def _imbalanced(evidence: Evidence, _: Objective) -> str:
    return (
        f"the fullest endpoint queues {evidence.most_queue_s:.2f} s of work, the emptiest "
        f"{evidence.least_queue_s:.2f} s: others could take what waits"
    )


def _oversized(evidence: Evidence, objective: Objective) -> str:
    return (
        f"with one endpoint less the others would be loaded to "
        f"{100 * evidence.spare_load_ratio:.0f} % at the peak and take "
        f"{1000 * evidence.spare_step_s:.0f} ms per output token ("
        f"{1000 * objective.tpot_s:.0f} ms are allowed)"
    )


def _balanced(evidence: Evidence, _: Objective) -> str:
    return (
        f"queues of {evidence.least_queue_s:.2f} to {evidence.most_queue_s:.2f} s over "
        f"{evidence.endpoints} endpoints: nothing to gain"
    )


_SENTENCES: Mapping[Verdict, Callable[[Evidence, Objective], str]] = MappingProxyType(
    {
        Verdict.UNKNOWN: _unknown,
        Verdict.SATURATED: _saturated,
        Verdict.SLOW_ENDPOINT: _slow,
        Verdict.IMBALANCED: _imbalanced,
        Verdict.OVERSIZED: _oversized,
        Verdict.BALANCED: _balanced,
    }
)
