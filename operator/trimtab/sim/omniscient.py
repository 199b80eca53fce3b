"""The omniscient greedy router: what knowing everything but the future would reach.

The law: it knows the true state of every engine and the length of every output, tries a request
on the best engines by running copies of them ahead, and takes the one that finishes it first.
Greedy, so a reference and not a bound: it does not spare room for those who come later.
"""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING

from trimtab.engine_sim.model import Sequence
from trimtab.sim.fleet import Router

if TYPE_CHECKING:
    from random import Random

    from trimtab.engine_sim.model import Engine
    from trimtab.sim.fleet import Pod, Ticket

TRIED_PODS = 4  # the earliest finish is practically always among the four soonest first outputs
MIN_BUDGET_TOKENS = 64


def forecast_s(pod: Pod, ticket: Ticket, *, now_s: float, until_s: float = math.inf) -> float:
    """When `pod` would finish it if nothing else came; infinite if not before `until_s`."""
    engine: Engine = pickle.loads(pickle.dumps(pod.engine, -1))  # noqa: S301 - our own, a moment old
    sequence = Sequence(
        id=ticket.id, prompt_tokens=ticket.prompt_tokens, output_tokens=ticket.output_tokens
    )
    then_s = now_s
    if not engine.idle:
        then_s = pod.step_ends_s
        engine.submit(sequence)
        engine.end()
    else:
        engine.submit(sequence)
    while not sequence.done:
        if then_s >= until_s:
            return math.inf
        then_s += engine.begin()
        engine.end()
    return then_s


def predicted_ttft_s(pod: Pod, prompt_tokens: int) -> float:
    """Time for the prompt and all before it, by the engine's own formula and true state."""
    engine = pod.engine
    k, decodes = engine.spec.coefficients, len(engine.decoding)
    step_s = k.a_s + k.c_s * engine.kv_decoding_tokens + k.d_s * decodes
    budget_tokens = max(MIN_BUDGET_TOKENS, engine.spec.batch_tokens - decodes)
    backlog_tokens = engine.prefill_backlog_tokens + prompt_tokens
    return backlog_tokens * (k.b_s + step_s / budget_tokens) / engine.speed


class Omniscient(Router):
    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def route(self, ticket: Ticket) -> Pod:
        ranked = [
            (predicted_ttft_s(pod, ticket.prompt_tokens), self._rng.random(), pod)
            for pod in self.fleet.ready
        ]
        ranked.sort(key=lambda entry: entry[:2])
        best, best_s = ranked[0][2], math.inf
        for _, _, pod in ranked[:TRIED_PODS]:
            end_s = forecast_s(pod, ticket, now_s=self.fleet.now_s, until_s=best_s)
            if end_s < best_s:
                best, best_s = pod, end_s
        return best
