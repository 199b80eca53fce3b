"""Levels to weights: fill the emptiest endpoints to one common level, as water would.

The law. With L the level of each endpoint (its backlog over its speed s) and A the work that will
arrive until the weights can be corrected, the surface theta solves

    sum of s * max(0, theta - L) = A        and an endpoint's share is  s * max(0, theta - L) / A

so the more arrives, or the older the information is (both enlarge A), the nearer the shares come to
the speeds. Sharper laws herd: they send everything to where the backlog was small a while ago.

Levels and A are in tokens of prefill work; a common factor in both cancels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.core.model import Endpoint

FULL_WEIGHT = 1000  # 0.1 % steps are finer than any split of traffic that can be measured
MIN_ARRIVING_TOKENS = 100  # per endpoint: in an idle pool noise must not decide the split
DEAD_BAND_RATIO = 0.02
"""Of a fair share. At 10 requests/s an endpoint of eight would get one request more or less in 40 s:
nothing a queue can feel, while every push makes Envoy rebuild its schedule from the start."""


def weigh(
    level_tokens: Mapping[Endpoint, float],
    speed_ratio: Mapping[Endpoint, float],
    *,
    arriving_tokens: float,
    minimum_weight_ratio: float = 0.02,
) -> dict[Endpoint, int]:
    """Split the arriving work so that the emptiest endpoints fill to one common level.

    Weights are integers of 1…1000, the largest being 1000. Nobody gets less than 1, or than
    `minimum_weight_ratio` of its fair share: an endpoint without traffic shows no speed, and 0
    would stop traffic, which only readiness may do.
    """
    arriving_tokens = max(arriving_tokens, MIN_ARRIVING_TOKENS * len(level_tokens))
    # Only differences matter; counted from the lowest level, no huge backlog can swallow A.
    lowest_tokens = min(level_tokens.values(), default=0.0)
    pool_speed = math.fsum(speed_ratio[e] for e in level_tokens) or 1.0
    depth_tokens = {e: level - lowest_tokens for e, level in level_tokens.items()}
    volume_tokens = total_speed = surface_tokens = 0.0
    # By depth, then speed: where both are equal the order cannot matter, not even in rounding.
    for depth, speed in sorted((depth, speed_ratio[e]) for e, depth in depth_tokens.items()):
        if total_speed and surface_tokens <= depth:
            break
        total_speed += speed
        volume_tokens += speed * depth
        surface_tokens = (arriving_tokens + volume_tokens) / total_speed
    floor_tokens = minimum_weight_ratio * arriving_tokens / pool_speed
    share_tokens = {
        e: speed_ratio[e] * max(surface_tokens - depth, floor_tokens)
        for e, depth in depth_tokens.items()
    }
    best_tokens = max(share_tokens.values(), default=0.0)
    return {e: max(1, round(FULL_WEIGHT * s / best_tokens)) for e, s in share_tokens.items()}


def settle(
    published: Mapping[Endpoint, int], proposed: Mapping[Endpoint, int]
) -> Mapping[Endpoint, int]:
    """Keep what is published as long as no share would move by more than the dead band.

    Compared with what is published, not with the last proposal, so slow drift gets through.
    """
    if published.keys() != proposed.keys():
        return proposed
    old_total, new_total = sum(published.values()), sum(proposed.values())
    band = DEAD_BAND_RATIO / max(1, len(proposed))
    for endpoint, weight in proposed.items():
        if abs(weight / new_total - published[endpoint] / old_total) > band:
            return proposed
    return published
