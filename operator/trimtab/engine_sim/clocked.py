"""The engine model against a real clock.

Each iteration starts when the one before was due to end, not when the timer fired: a timer that
is late by a millisecond makes one token late by a millisecond, and no later one. Only after a
stall of the whole process does the schedule start anew, instead of running a burst of iterations
that no engine could run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from trimtab.engine_sim.model import Engine, EngineSpec, Sequence

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from trimtab.engine_sim.pages import EngineMetrics

STALL_S = 0.5  # more lateness than timers and a busy loop explain: the process was stopped


class Deliver(Protocol):
    def __call__(self, tokens: int, *, last: bool) -> None:
        """Send on so many new tokens. Must not fail: nobody could be told."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request inside the engine, and where its tokens go."""

    sequence: Sequence
    max_tokens: int
    deliver: Deliver
    stream: bool
    arrived_s: float
    admitted_s: float = 0.0
    first_s: float = 0.0
    delivered_tokens: int = 0


@dataclass(slots=True, eq=False)
class ClockedEngine:
    """Steps one engine by the loop's timers and hands out its tokens."""

    loop: asyncio.AbstractEventLoop
    metrics: EngineMetrics
    spec: EngineSpec
    stream_interval: int = 1
    """The first token goes out at once, then every so many: vLLM's --stream-interval."""
    now_s: Callable[[], float] = time.monotonic
    engine: Engine = field(init=False)
    queued_tokens: int = 0
    """Prompt tokens of requests without a first token, whole prompts: what vLLM's admission
    limit looks at."""
    _generations: dict[int, Generation] = field(default_factory=dict)
    _due: defaultdict[int, list[Generation]] = field(default_factory=lambda: defaultdict(list))
    """By iteration: the streams to which its end brings an event."""
    _timer: asyncio.TimerHandle | None = None
    _due_s: float = 0.0
    _step: int = 0
    _next_id: int = 0

    def __post_init__(self) -> None:
        self.engine = Engine(spec=self.spec)

    @property
    def in_flight(self) -> int:
        return len(self._generations)

    def submit(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        max_tokens: int,
        deliver: Deliver,
        stream: bool,
    ) -> Generation:
        """Queue a request; an idle engine starts on it at once."""
        self._next_id += 1
        generation = Generation(
            sequence=Sequence(self._next_id, prompt_tokens, output_tokens),
            max_tokens=max_tokens,
            deliver=deliver,
            stream=stream,
            arrived_s=self.now_s(),
        )
        self.engine.submit(generation.sequence)
        self._generations[self._next_id] = generation
        self.queued_tokens += prompt_tokens
        if self._timer is None:
            self._begin(generation.arrived_s)
        return generation

    def abort(self, generation: Generation) -> None:
        """Free the slot of a request whose client went away. Safe after its end."""
        if self._generations.pop(generation.sequence.id, None) is None:
            return
        if not generation.first_s:
            self.queued_tokens -= generation.sequence.prompt_tokens
        self.engine.abort(generation.sequence)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, start_s: float) -> None:
        duration_s = self.engine.begin()
        if not duration_s:
            self._timer = None
            return
        for sequence in reversed(self.engine.prefilling):
            if sequence.prefilled_tokens:
                break  # admitted before; those of this iteration are the last of the list
            generation = self._generations[sequence.id]
            if not generation.admitted_s:
                generation.admitted_s = start_s
                self.metrics.prefix_cache_queries_tokens += sequence.prompt_tokens
        self._due_s = start_s + duration_s
        self._timer = self.loop.call_later(
            max(0.0, self._due_s - self.now_s()), self._end, duration_s
        )

    def _end(self, duration_s: float) -> None:
        due_s = self._due_s
        outcome = self.engine.end()
        self._step += 1
        metrics = self.metrics
        if outcome.tokens:
            prompts_tokens = sum(sequence.prompt_tokens for sequence in outcome.first)
            metrics.observe("iteration_tokens_total", prompts_tokens + outcome.tokens)
            if later := outcome.tokens - len(outcome.first):
                metrics.observe("inter_token_latency_seconds", duration_s, times=later)
        for sequence in outcome.first:
            generation = self._generations[sequence.id]
            generation.first_s = due_s
            self.queued_tokens -= sequence.prompt_tokens
            metrics.observe("time_to_first_token_seconds", due_s - generation.arrived_s)
            if generation.stream and not sequence.done:
                generation.delivered_tokens = 1
                self._due[self._step + self.stream_interval].append(generation)
                generation.deliver(1, last=False)
        for sequence in outcome.finished:
            generation = self._generations.pop(sequence.id)
            metrics.observe_finished(generation, finished_s=due_s)
            generation.deliver(sequence.output_tokens - generation.delivered_tokens, last=True)
        for generation in self._due.pop(self._step, ()):
            if generation.sequence.done:
                continue
            generated_tokens = self.engine.generated_tokens(generation.sequence)
            if new_tokens := generated_tokens - generation.delivered_tokens:
                generation.deliver(new_tokens, last=False)
                generation.delivered_tokens = generated_tokens
            self._due[self._step + self.stream_interval].append(generation)
        now_s = self.now_s()
        self._begin(due_s if now_s - due_s < STALL_S else now_s)
