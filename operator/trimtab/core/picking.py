"""One request to one endpoint: where its first token is predicted to come soonest.

The law, per endpoint, in tokens of prefill (a, c, d, B: the engine model; s: measured speed):

    step = a + c*K + d*n
    cost = [ (P + in - w*hit) * (1 + step/(B - n))              the prefills before it, and its own
           + max(0, K + in - 0.95*KV capacity) * m_out/2 * step/K         until there is KV for it
           + max(0, n + 1 - sequences) * m_out/2 * step/n ] / s         until there is a batch slot

P, K and n are what the ledger reckons. Chosen and booked in one step, so that of two requests at
the same moment the second sees the first. How long outputs will be is not asked: work that is
still to be decoded delays nobody's first token, and even an oracle of it makes picks worse.

`hit` are the request's prompt tokens cached on the endpoint. They weigh double (w), as a hit also
leaves room for others; more, or a hard pin, and one common first block would draw everything to
one endpoint.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from trimtab.core.ledger import KV_ADMITTED_RATIO

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

    from trimtab.core.ledger import Account, Ledger
    from trimtab.core.model import Endpoint

HIT_WEIGHT = 2.0

NO_HITS: Mapping[Endpoint, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Pick:
    """The choice, and what it was made from."""

    endpoint: Endpoint
    ttft_s: float
    """Predicted."""
    candidates: tuple[Account, ...]
    cost_tokens: list[float]
    """Of each candidate, as they were then; spelt out when somebody asks, not for every pick."""
    tokens_per_s: float

    @property
    def costs_s(self) -> tuple[tuple[Endpoint, float], ...]:
        """Of all candidates: predicted TTFT, less what prefix hits save others."""
        return tuple(
            (account.endpoint, cost / self.tokens_per_s)
            for account, cost in zip(self.candidates, self.cost_tokens, strict=True)
        )

    def best(self, count: int) -> list[tuple[Endpoint, float]]:
        """Give the `count` cheapest candidates: to explain the choice, or to retry in order."""
        costs = self.cost_tokens
        return [
            (self.candidates[at].endpoint, costs[at] / self.tokens_per_s)
            for at in heapq.nsmallest(count, range(len(costs)), key=costs.__getitem__)
        ]


def pick(
    ledger: Ledger,
    request: Hashable,
    *,
    tokens: float,
    now_s: float,
    start: int = 0,
    hit_tokens: Mapping[Endpoint, float] = NO_HITS,
    excluded: Collection[Endpoint] = (),
) -> Pick | None:
    """Choose an endpoint and book the request on it; None where no endpoint is left.

    Args:
        ledger: what the endpoints owe; written.
        request: by which its end will be known; None if nobody will tell of it.
        tokens: of its prompt.
        now_s: of the ledger's clock.
        start: where to begin to look, at random: of equals the first one met is taken.
        hit_tokens: of the prompt, cached on an endpoint.
        excluded: draining, unreachable, or already tried in vain.
    """
    accounts = ledger.accounts
    if excluded:
        accounts = tuple(account for account in accounts if account.endpoint not in excluded)
    if not accounts:
        return None
    start %= len(accounts)
    accounts = accounts[start:] + accounts[:start]
    tokens = tokens if tokens > 1 else 1.0
    residual_tokens = ledger.mean_output_tokens / 2
    costs: list[float] = []
    for account in accounts:
        work_tokens = account.prefill_tokens - account.rate_tokens_per_s * (
            now_s - account.flowed_s
        )
        work_tokens = work_tokens + tokens if work_tokens > 0 else tokens
        if hit_tokens:
            work_tokens -= HIT_WEIGHT * hit_tokens.get(account.endpoint, 0.0)
        ratio = account.cost_ratio
        # Below 0 the slower of two equals must still cost more.
        cost = work_tokens * ratio if work_tokens > 0 else work_tokens / ratio
        if tokens > account.room_tokens:
            cost += _wait_tokens(account, tokens, residual_tokens)
        costs.append(cost)
    least = min(costs)
    chosen = accounts[costs.index(least)]
    hit = hit_tokens.get(chosen.endpoint, 0.0)
    if hit:
        least = max(0.0, chosen.prefill_at(now_s) + tokens - hit) * chosen.cost_ratio
        least += _wait_tokens(chosen, tokens, residual_tokens)
    ledger.flow(now_s)
    ledger.add(request, chosen.endpoint, tokens=max(1.0, tokens - hit), at_s=now_s, now_s=now_s)
    return Pick(
        endpoint=chosen.endpoint,
        ttft_s=least / ledger.tokens_per_s,
        candidates=accounts,
        cost_tokens=costs,
        tokens_per_s=ledger.tokens_per_s,
    )


def _wait_tokens(account: Account, tokens: float, residual_tokens: float) -> float:
    """Until enough of the batch has ended for one more to be admitted."""
    context_tokens = max(1.0, account.context_tokens)
    over_tokens = context_tokens + tokens - KV_ADMITTED_RATIO * account.kv_capacity_tokens
    over_requests = account.requests + 1 - account.model.max_sequences
    share = max(0.0, over_tokens) / context_tokens
    if over_requests > 0:
        share += over_requests / max(1.0, account.requests)
    return share * residual_tokens * account.step_tokens / account.speed_ratio
