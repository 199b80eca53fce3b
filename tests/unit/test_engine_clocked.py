"""The engine against a clock that the test moves, and a loop that keeps its timers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest

from engines import value_of
from trimtab.engine_sim.clocked import ClockedEngine
from trimtab.engine_sim.model import Coefficients, EngineSpec
from trimtab.engine_sim.pages import EngineMetrics

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

EVEN = EngineSpec(coefficients=Coefficients(a_s=1.0, b_s=0, c_s=0, d_s=0), batch_tokens=100)
"""Every iteration takes a second, and computes at most 100 tokens."""


@dataclass
class Timers:
    """The part of a loop that the engine uses, and its clock."""

    now_s: float = 1000.0
    due_s: list[float] = field(default_factory=list)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> object:
        self.due_s.append(self.now_s + delay_s)
        self._callbacks.append(lambda: callback(*args))
        return object()

    def fire(self, *, late_s: float = 0.0) -> None:
        """Go to the next timer's time, or past it, and run it."""
        self.now_s = max(self.now_s, self.due_s.pop(0) + late_s)
        self._callbacks.pop(0)()


@dataclass
class Rig:
    timers: Timers = field(default_factory=Timers)
    stream_interval: int = 1
    received: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clocked = ClockedEngine(
            cast("asyncio.AbstractEventLoop", self.timers),
            EngineMetrics(model="tiny", spec=EVEN, max_model_len=1000),
            EVEN,
            self.stream_interval,
            now_s=lambda: self.timers.now_s,
        )

    def submit(self, name: str, prompt_tokens: int, output_tokens: int, **how: bool) -> Any:
        received = self.received.setdefault(name, [])

        def deliver(tokens: int, *, last: bool) -> None:
            received.append((tokens, last))

        return self.clocked.submit(
            prompt_tokens,
            output_tokens,
            max_tokens=output_tokens,
            deliver=deliver,
            stream=how.get("stream", True),
        )


def test_a_late_timer_delays_no_later_iteration() -> None:
    rig = Rig()
    rig.submit("a", 10, 5)

    for late_s in (0.1, 0.3, 0.2, 0.4):
        rig.timers.fire(late_s=late_s)

    assert rig.timers.due_s == [pytest.approx(1005.0)]


def test_an_iteration_that_is_due_already_ends_at_once() -> None:
    fast = Rig()
    fast.clocked.engine.speed = 10.0
    fast.submit("a", 10, 5)

    fast.timers.fire(late_s=0.25)

    assert fast.timers.due_s == [pytest.approx(fast.timers.now_s)]


def test_after_a_stall_the_schedule_starts_anew() -> None:
    rig = Rig()
    rig.submit("a", 10, 5)

    rig.timers.fire(late_s=60.0)

    assert rig.timers.due_s == [pytest.approx(1062.0)]


def test_an_idle_engine_has_no_timer_and_starts_with_the_next_request() -> None:
    rig = Rig()
    rig.submit("a", 10, 1)
    rig.timers.fire()
    assert rig.timers.due_s == []

    rig.timers.now_s = 2000.0
    rig.submit("b", 10, 1)

    assert rig.timers.due_s == [2001.0]


def test_a_request_that_comes_during_an_iteration_waits_for_its_end() -> None:
    rig = Rig()
    rig.submit("a", 10, 3)
    rig.submit("b", 10, 3)

    rig.timers.fire()
    assert (len(rig.received["a"]), len(rig.received["b"])) == (1, 0)
    rig.timers.fire()
    assert (len(rig.received["a"]), len(rig.received["b"])) == (2, 1)


@pytest.mark.parametrize(
    ("interval", "output_tokens", "received"),
    [
        (1, 3, [(1, False), (1, False), (1, True)]),
        (3, 8, [(1, False), (3, False), (3, False), (1, True)]),
        (3, 7, [(1, False), (3, False), (3, True)]),
        (3, 1, [(1, True)]),
    ],
)
def test_a_stream_gets_its_first_token_at_once_and_then_every_so_many(
    interval: int, output_tokens: int, received: list[tuple[int, bool]]
) -> None:
    rig = Rig(stream_interval=interval)
    rig.submit("a", 250, output_tokens)

    while rig.timers.due_s:
        rig.timers.fire()

    assert rig.received["a"] == received


def test_a_whole_answer_is_delivered_once() -> None:
    rig = Rig()
    rig.submit("a", 10, 8, stream=False)

    while rig.timers.due_s:
        rig.timers.fire()

    assert rig.received["a"] == [(8, True)]


def test_queued_tokens_are_whole_prompts_until_the_first_token() -> None:
    rig = Rig()
    a, b = rig.submit("a", 150, 3), rig.submit("b", 40, 3)
    seen = [rig.clocked.queued_tokens]

    rig.timers.fire()  # 100 tokens of a are computed
    seen.append(rig.clocked.queued_tokens)
    rig.timers.fire()
    seen.append(rig.clocked.queued_tokens)
    rig.clocked.abort(a)
    rig.submit("c", 30, 3)
    seen.append(rig.clocked.queued_tokens)
    rig.clocked.abort(b)
    rig.clocked.abort(b)
    seen.append(rig.clocked.queued_tokens)

    assert seen == [190, 190, 0, 30, 30]
    assert rig.clocked.in_flight == 1


def test_an_aborted_stream_gets_nothing_more() -> None:
    rig = Rig()
    a = rig.submit("a", 10, 8)
    rig.submit("b", 10, 3)
    rig.timers.fire()

    rig.clocked.abort(a)
    while rig.timers.due_s:
        rig.timers.fire()

    assert rig.received == {"a": [(1, False)], "b": [(1, False), (1, False), (1, True)]}


def test_the_phases_of_a_request_are_timed_by_the_engines_clock() -> None:
    """Half a second in the queue, three iterations to the first token, four more to the last."""
    rig = Rig()
    rig.submit("other", 10, 1)
    rig.timers.now_s += 0.5
    rig.submit("a", 250, 5)
    while rig.timers.due_s:
        rig.timers.fire(late_s=0.01)
    page = rig.clocked.metrics.render(rig.clocked.engine)

    total_s = {
        "time_to_first_token": 1 + 3.5,
        "request_queue_time": 0 + 0.5,
        "request_prefill_time": 1 + 3,
        "request_decode_time": 0 + 4,
        "request_inference_time": 1 + 7,
        "e2e_request_latency": 1 + 7.5,
        "inter_token_latency": 0 + 4,
        "request_time_per_output_token": 0 + 1,
    }
    shown = {name: value_of(page, f"vllm:{name}_seconds_sum") for name in total_s}
    assert shown == pytest.approx(total_s)
