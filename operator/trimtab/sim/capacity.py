"""What one engine can do at most, so that load can be said as a share of it.

The law: a work-conserving engine under an endless backlog finishes requests at a rate that
depends on their lengths alone. A load of 0.85 is 85 % of that rate, times the engines.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from trimtab.engine_sim.model import Engine, EngineSpec, Sequence

if TYPE_CHECKING:
    from collections.abc import Collection

    from trimtab.workload import Request

WARM_UP_REQUESTS = 5000  # until outputs of thousands of tokens have their share of the batch
MIN_REQUESTS = 4000  # a batch holds 256: fewer, and its edge would weigh in the mean


def saturated_rate_per_s(
    requests: Collection[Request], *, spec: EngineSpec, speed: float = 1.0
) -> float:
    """Requests per second that one engine finishes when it never runs out of them.

    Lengths are used in their order, over and over until there are enough; times are ignored.
    """
    engine = Engine(spec=spec, speed=speed)
    count = len(requests) * -(-MIN_REQUESTS // len(requests))
    supply = cycle(requests)
    submitted = finished = warm = 0
    now_s = warm_s = 0.0
    while not warm or finished < warm + count:
        while len(engine.waiting) < spec.max_sequences:
            request = next(supply)
            engine.submit(
                Sequence(
                    id=submitted,
                    prompt_tokens=request.prompt_tokens,
                    output_tokens=request.output_tokens,
                )
            )
            submitted += 1
        now_s += engine.begin()
        finished += len(engine.end().finished)
        if not warm and finished >= WARM_UP_REQUESTS:
            warm, warm_s = finished, now_s
    return (finished - warm) / (now_s - warm_s)
