"""The law of filling, by example and by property."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import endpoints, levels_tokens, speed_ratios
from trimtab.core.weights import FULL_WEIGHT, MIN_ARRIVING_TOKENS, settle, weigh

if TYPE_CHECKING:
    from trimtab.core.model import Endpoint

A, B, C, D = endpoints(4)
_rows = st.lists(st.tuples(levels_tokens, speed_ratios), min_size=1, max_size=12)
_arriving = st.floats(0, 1e7)


def _tables(
    rows: list[tuple[float, float]],
) -> tuple[dict[Endpoint, float], dict[Endpoint, float]]:
    names = endpoints(len(rows))
    level_tokens = {e: level for e, (level, _) in zip(names, rows, strict=True)}
    return level_tokens, {e: speed for e, (_, speed) in zip(names, rows, strict=True)}


def test_the_emptiest_fill_to_one_common_level() -> None:
    """With 900 tokens to come the surface is at 500: A gets 500, B 400, C is above and gets 0."""
    weights = weigh(
        {A: 0.0, B: 100.0, C: 600.0}, dict.fromkeys((A, B, C), 1.0), arriving_tokens=900
    )
    assert weights == {A: 1000, B: 800, C: round(1000 * 0.02 * 900 / 3 / 500)}


def test_a_slow_endpoint_is_filled_to_the_same_level_with_less_work() -> None:
    weights = weigh({A: 0.0, B: 0.0}, {A: 1.0, B: 0.4}, arriving_tokens=900)
    assert weights == {A: 1000, B: 400}


def test_an_idle_pool_does_not_turn_noise_into_sharp_weights() -> None:
    weights = weigh({A: 0.0, B: 30.0}, {A: 1.0, B: 1.0}, arriving_tokens=0)
    assert weights == {A: 1000, B: round(1000 * 85 / 115)}
    assert MIN_ARRIVING_TOKENS == 100


def test_an_empty_pool_has_no_weights() -> None:
    assert weigh({}, {}, arriving_tokens=100) == {}


def test_the_floor_is_the_policys() -> None:
    level_tokens, speed = {A: 0.0, B: 1e9}, {A: 1.0, B: 1.0}
    assert weigh(level_tokens, speed, arriving_tokens=1, minimum_weight_ratio=0.0)[B] == 1
    assert weigh(level_tokens, speed, arriving_tokens=1, minimum_weight_ratio=0.1)[B] == 50


@given(_rows, _arriving, st.floats(0, 1))
def test_weights_are_integers_of_1_to_1000_and_the_best_has_1000(
    rows: list[tuple[float, float]], arriving: float, minimum: float
) -> None:
    level_tokens, speed = _tables(rows)
    weights = weigh(level_tokens, speed, arriving_tokens=arriving, minimum_weight_ratio=minimum)
    assert weights.keys() == level_tokens.keys()
    assert min(weights.values()) >= 1
    assert max(weights.values()) == FULL_WEIGHT


@given(st.lists(levels_tokens, min_size=1, max_size=12), _arriving)
def test_more_backlog_never_earns_more_weight(levels: list[float], arriving: float) -> None:
    level_tokens, speed = _tables([(level, 1.0) for level in levels])
    weights = weigh(level_tokens, speed, arriving_tokens=arriving)
    by_level = [weights[e] for e in sorted(level_tokens, key=level_tokens.__getitem__)]
    assert by_level == sorted(by_level, reverse=True)


@given(_rows, _arriving, st.data())
def test_growing_backlog_never_raises_the_own_share(
    rows: list[tuple[float, float]], arriving: float, data: st.DataObject
) -> None:
    level_tokens, speed = _tables(rows)
    endpoint = data.draw(st.sampled_from(sorted(level_tokens)))
    before = weigh(level_tokens, speed, arriving_tokens=arriving)
    level_tokens[endpoint] += data.draw(levels_tokens)
    after = weigh(level_tokens, speed, arriving_tokens=arriving)
    # Rounding to a thousandth of the best moves a share by half a step of each of the weights.
    blur = 0.5 * (len(rows) + 1) / min(sum(before.values()), sum(after.values()))
    share = before[endpoint] / sum(before.values())
    assert after[endpoint] / sum(after.values()) <= share + blur


@given(_rows, _arriving, st.data())
def test_the_order_of_endpoints_does_not_matter(
    rows: list[tuple[float, float]], arriving: float, data: st.DataObject
) -> None:
    level_tokens, speed = _tables(rows)
    shuffled = data.draw(st.permutations(list(level_tokens)))
    again = weigh({e: level_tokens[e] for e in shuffled}, speed, arriving_tokens=arriving)
    assert again == weigh(level_tokens, speed, arriving_tokens=arriving)


@given(_rows, st.floats(2e5, 1e7), st.integers(-6, 6))
def test_the_unit_of_work_does_not_matter(
    rows: list[tuple[float, float]], arriving: float, power: int
) -> None:
    """A common error in the cost of everything cancels; powers of two keep floats exact."""
    level_tokens, speed = _tables(rows)
    scale = 2.0**power
    scaled = {e: scale * level for e, level in level_tokens.items()}
    assert weigh(scaled, speed, arriving_tokens=scale * arriving) == weigh(
        level_tokens, speed, arriving_tokens=arriving
    )


@given(levels_tokens, st.lists(speed_ratios, min_size=1, max_size=12), _arriving)
def test_equal_levels_share_by_speed(level: float, speeds: list[float], arriving: float) -> None:
    level_tokens, speed = _tables([(level, s) for s in speeds])
    weights = weigh(level_tokens, speed, arriving_tokens=arriving)
    best = max(speeds)
    assert all(abs(weights[e] - 1000 * s / best) < 0.5 + 1e-6 for e, s in speed.items())


@given(_rows)
def test_the_more_arrives_the_nearer_the_shares_come_to_the_speeds(
    rows: list[tuple[float, float]],
) -> None:
    level_tokens, speed = _tables(rows)
    weights = weigh(level_tokens, speed, arriving_tokens=1e13)
    best = max(speed.values())
    assert all(abs(weights[e] - 1000 * speed[e] / best) <= 1 for e in weights)


def test_levels_beyond_all_measure_still_leave_the_emptiest_in_front() -> None:
    """Counted from zero, 1e20 tokens of backlog would swallow the work to come in rounding."""
    weights = weigh({A: 1e20, B: 1e20, C: 2e20}, dict.fromkeys((A, B, C), 1.0), arriving_tokens=300)
    assert weights == {A: 1000, B: 1000, C: 13}


def test_a_table_that_hardly_moved_is_not_published_again() -> None:
    published = {A: 1000, B: 990, C: 980, D: 970}
    assert settle(published, {A: 1000, B: 985, C: 980, D: 975}) is published


def test_a_table_with_one_share_moved_is_published() -> None:
    published = {A: 1000, B: 1000, C: 1000, D: 1000}
    proposed = {A: 1000, B: 1000, C: 1000, D: 970}
    assert settle(published, proposed) is proposed


def test_slow_drift_is_published_in_the_end() -> None:
    table = {A: 1000, B: 1000}
    published, changes = table, 0
    for weight in range(999, 899, -1):
        now = settle(published, {A: 1000, B: weight})
        changes += now is not published
        published = dict(now) if now is not published else published
    assert changes == pytest.approx(100 / 40, abs=1)
    assert published[B] < 950


@pytest.mark.parametrize("proposed", [{A: 1000}, {A: 1000, B: 1000, C: 1000}, {A: 1000, C: 1000}])
def test_another_set_of_endpoints_is_always_published(proposed: dict[Endpoint, int]) -> None:
    assert settle({A: 1000, B: 1000}, proposed) is proposed


def test_nothing_after_nothing_is_nothing_new() -> None:
    published: dict[Endpoint, int] = {}
    assert settle(published, {}) is published
