"""One simulated engine, pure: continuous batching, after vLLM's V1 scheduler.

The law. An iteration takes

    t = (a + b*prefill_tokens + c*KV_tokens_of_decodes + d*decodes + e*sum(chunk*context)) / speed

with coefficients fitted to real engines (defaults: A100-80G, Llama-3-8B, from the published
regression of the BLIS simulator). Each decode takes one token of the batch budget, then partial
prefills in FIFO order, then first-come-first-served admissions. Admission reserves the KV of the
whole prompt; when KV runs out, the sequence admitted last is preempted and later recomputed.

Decodes advance in lockstep, one token an iteration, so a sequence's last iteration is known when
its first token comes out. That makes an iteration cost O(changes), not O(batch): it is what lets
the simulator replay hours of traffic in seconds.

`begin` plans an iteration and says how long it takes; `end` carries it out. The caller owns the
time between: the simulator an event queue, the server a real clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """Seconds per iteration (a), prefill token (b), KV token read (c) and decode (d).

    And per product of chunk and context tokens (e, quadratic attention).
    """

    a_s: float = 12.5e-3
    b_s: float = 48e-6
    c_s: float = 0.08e-6
    d_s: float = 15e-6
    e_s: float = 0.0


A100 = Coefficients()
H100 = Coefficients(a_s=7.0e-3, b_s=17.3e-6, c_s=0.045e-6, d_s=6e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    coefficients: Coefficients = A100
    batch_tokens: int = 2048
    max_sequences: int = 256
    kv_capacity_tokens: int = 400_000


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside an engine. `generated_tokens` is exact only when it is not decoding."""

    id: int
    prompt_tokens: int
    output_tokens: int
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    to_prefill_tokens: int = 0
    """Prompt, plus what had been generated before a preemption."""
    first_step: int = -1
    """Iteration whose token was this sequence's latest first one since (re)admission."""
    admitted: bool = False
    done: bool = False
    preemptions: int = 0

    @property
    def remaining_tokens(self) -> int:
        return self.output_tokens - self.generated_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one iteration brought: first outputs (of fresh prompts), endings, tokens emitted."""

    first: tuple[Sequence, ...]
    finished: tuple[Sequence, ...]
    tokens: int


@dataclass(slots=True)
class Counters:
    """As an engine's metrics page has them; never reset but by a restart."""

    steps_total: int = 0
    idle_steps_total: int = 0
    """Iterations that emitted nothing; vLLM's step counter does not see them."""
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    computed_prefill_tokens_total: int = 0
    preemptions_total: int = 0
    finished_total: int = 0
    aborted_total: int = 0
    finished_prompt_tokens_total: int = 0
    finished_generation_tokens_total: int = 0
    first_tokens_total: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class Engine:
    """An engine between two iterations, or inside one (`begin` called, `end` not yet)."""

    spec: EngineSpec = field(default_factory=EngineSpec)
    speed: float = 1.0
    waiting: deque[Sequence] = field(default_factory=deque)
    prefilling: list[Sequence] = field(default_factory=list)
    decoding: dict[int, Sequence] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    kv_reserved_tokens: int = 0
    """KV held by admitted sequences: what the engine's usage gauge shows."""
    kv_decoding_tokens: int = 0
    """Context of the decodes: what an iteration reads."""
    _step: int = 0
    _chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    _duration_s: float = 0.0
    _in_step: bool = False
    _finish: list[tuple[int, int, Sequence]] = field(default_factory=list)
    _admissions: list[Sequence] = field(default_factory=list)

    @property
    def running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        return not (self._in_step or self.waiting or self.prefilling or self.decoding)

    @property
    def kv_used_ratio(self) -> float:
        return self.kv_reserved_tokens / self.spec.kv_capacity_tokens

    @property
    def prefill_backlog_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed: what no stock engine exports."""
        waiting = sum(s.prompt_tokens + s.generated_tokens for s in self.waiting)
        return waiting + sum(s.to_prefill_tokens - s.prefilled_tokens for s in self.prefilling)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request. Its KV need must fit an empty engine, or it would wait for ever.

        Raises:
            ValueError: the sequence cannot fit, or asks for no output.
        """
        need_tokens = sequence.prompt_tokens + sequence.output_tokens
        if need_tokens > self.spec.kv_capacity_tokens:
            raise ValueError(
                f"{need_tokens} tokens do not fit a KV cache of {self.spec.kv_capacity_tokens}"
            )
        if sequence.output_tokens < 1 or sequence.prompt_tokens < 1:
            raise ValueError("a sequence has at least one prompt and one output token")
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence whose client went away; its slot and KV are free at once."""
        if sequence.done:
            return
        sequence.done = True
        self.counters.aborted_total += 1
        if not sequence.admitted:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)

    def generated_tokens(self, sequence: Sequence) -> int:
        """Tokens emitted so far, decodes included."""
        if sequence.id in self.decoding:
            return sequence.generated_tokens + self._step - sequence.first_step
        return sequence.generated_tokens

    def begin(self) -> float:
        """Plan the next iteration and return its duration in seconds; 0 means nothing to do."""
        self._make_room()
        decodes = len(self.decoding)
        budget_tokens = self.spec.batch_tokens - decodes
        chunks = self._chunks = []
        for sequence in self.prefilling:
            if budget_tokens <= 0:
                break
            chunk_tokens = min(
                budget_tokens, sequence.to_prefill_tokens - sequence.prefilled_tokens
            )
            chunks.append((sequence, chunk_tokens))
            budget_tokens -= chunk_tokens
        while self.waiting and budget_tokens > 0 and self._admits(self.waiting[0]):
            sequence = self._admit()
            chunk_tokens = min(budget_tokens, sequence.to_prefill_tokens)
            chunks.append((sequence, chunk_tokens))
            budget_tokens -= chunk_tokens
        if not chunks and not decodes:
            return 0.0
        k = self.spec.coefficients
        prefill_tokens = self.spec.batch_tokens - decodes - budget_tokens
        seconds = k.a_s + k.b_s * prefill_tokens + k.c_s * self.kv_decoding_tokens + k.d_s * decodes
        if k.e_s:
            seconds += k.e_s * sum(n * (s.prefilled_tokens + n / 2) for s, n in chunks)
        self._in_step = True
        self._duration_s = seconds / self.speed
        return self._duration_s

    def end(self) -> Outcome:
        """Carry out the iteration that `begin` planned."""
        self._in_step = False
        self._step += 1
        counters = self.counters
        counters.busy_s += self._duration_s
        decodes = len(self.decoding)
        self.kv_decoding_tokens += decodes
        self.kv_reserved_tokens += decodes
        finished = self._finish_decodes()
        first: list[Sequence] = []
        outputs = decodes
        for sequence, chunk_tokens in self._chunks:
            if sequence.done:
                continue
            sequence.prefilled_tokens += chunk_tokens
            counters.computed_prefill_tokens_total += chunk_tokens
            if sequence.prefilled_tokens < sequence.to_prefill_tokens:
                continue
            outputs += 1
            self.prefilling.remove(sequence)
            if not sequence.generated_tokens:
                first.append(sequence)
                counters.first_tokens_total += 1
                counters.prompt_tokens_total += sequence.prompt_tokens
            self._start_decoding(sequence, finished)
        self._chunks = []
        counters.generation_tokens_total += outputs
        if outputs:
            counters.steps_total += 1
        else:
            counters.idle_steps_total += 1
        for sequence in finished:
            counters.finished_total += 1
            counters.finished_prompt_tokens_total += sequence.prompt_tokens
            counters.finished_generation_tokens_total += sequence.output_tokens
        return Outcome(tuple(first), tuple(finished), outputs)

    def _admits(self, sequence: Sequence) -> bool:
        """Is there room for the prompt, and for one more token of every decode?

        Without the latter an admission would cause a preemption at once.
        """
        if self.running >= self.spec.max_sequences:
            return False
        need_tokens = sequence.prompt_tokens + sequence.generated_tokens + 1
        free_tokens = self.spec.kv_capacity_tokens - self.kv_reserved_tokens - len(self.decoding)
        return need_tokens <= free_tokens

    def _admit(self) -> Sequence:
        sequence = self.waiting.popleft()
        sequence.admitted = True
        sequence.prefilled_tokens = 0
        sequence.to_prefill_tokens = sequence.prompt_tokens + sequence.generated_tokens
        # With the first output's token, so that a prefill that ends cannot overfill the cache.
        self.kv_reserved_tokens += sequence.to_prefill_tokens + 1
        self.prefilling.append(sequence)
        self._admissions.append(sequence)
        return sequence

    def _start_decoding(self, sequence: Sequence, finished: list[Sequence]) -> None:
        sequence.generated_tokens += 1
        sequence.first_step = self._step
        if not sequence.remaining_tokens:
            sequence.done = True
            sequence.admitted = False
            self.kv_reserved_tokens -= sequence.to_prefill_tokens + 1
            finished.append(sequence)
            return
        self.decoding[sequence.id] = sequence
        self.kv_decoding_tokens += sequence.to_prefill_tokens + 1
        last_step = self._step + sequence.remaining_tokens
        heapq.heappush(self._finish, (last_step, sequence.id, sequence))

    def _finish_decodes(self) -> list[Sequence]:
        finished: list[Sequence] = []
        while self._finish and self._finish[0][0] <= self._step:
            last_step, _, sequence = heapq.heappop(self._finish)
            # An aborted or preempted sequence leaves its old entry behind.
            if self.decoding.get(sequence.id) is not sequence or self._last(sequence) != last_step:
                continue
            self._release(sequence)
            sequence.done = True
            finished.append(sequence)
        return finished

    def _last(self, sequence: Sequence) -> int:
        return sequence.first_step + sequence.remaining_tokens

    def _context_tokens(self, sequence: Sequence) -> int:
        return sequence.to_prefill_tokens + 1 + self._step - sequence.first_step

    def _release(self, sequence: Sequence) -> None:
        """Take an admitted sequence out of the batch; what it generated is made exact."""
        if self.decoding.pop(sequence.id, None) is not None:
            context_tokens = self._context_tokens(sequence)
            self.kv_decoding_tokens -= context_tokens
            self.kv_reserved_tokens -= context_tokens
            sequence.generated_tokens += self._step - sequence.first_step
        else:
            self.prefilling.remove(sequence)
            self.kv_reserved_tokens -= sequence.to_prefill_tokens + 1
        sequence.admitted = False

    def _make_room(self) -> None:
        """Preempt the latest admitted until every decode can grow by one token."""
        capacity_tokens = self.spec.kv_capacity_tokens
        while self.kv_reserved_tokens + len(self.decoding) > capacity_tokens:
            sequence = self._admissions.pop()
            if sequence.done or not sequence.admitted:
                continue
            self._release(sequence)
            sequence.preemptions += 1
            self.counters.preemptions_total += 1
            self.waiting.appendleft(sequence)
        if len(self._admissions) > 4 * self.spec.max_sequences:
            self._admissions = [s for s in self._admissions if s.admitted and not s.done]
