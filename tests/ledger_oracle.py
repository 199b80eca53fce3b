"""The rules of the ledger as tersely as they go: slow, plainly right, and written separately.

One `Pod` per endpoint, after the law in `trimtab.core.ledger`; the recorded signals in
fixtures/ledger hold both to the simulator in which the rules were found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from trimtab.core.ledger import EngineModel
from trimtab.engine_sim.model import A100

MODEL = EngineModel(
    a_tokens=A100.a_s / A100.b_s, c_tokens=A100.c_s / A100.b_s, d_tokens=A100.d_s / A100.b_s
)
TOKENS_PER_S = 1 / A100.b_s


class Prompt(NamedTuple):
    request: str | None
    tokens: float
    at: float


@dataclass
class Pool:
    m_in: float = 1000.0


@dataclass
class Pod:
    pool: Pool
    w: float = 0.0
    r: float = 0.0
    kv: float = 0.0
    p: float = 0.0
    t_p: float = 0.0
    dn: float = 0.0
    dk: float = 0.0
    kw: float = 0.0
    t: float = -math.inf
    u: float = 1.0
    q: list[Prompt] = field(default_factory=list)
    ids: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> float:
        return max(0.0, self.w + self.r + self.dn)

    @property
    def k(self) -> float:
        return max(0.0, self.kv + self.kw + self.dk)

    def rate(self) -> float:
        if self.kv > 0.93 * MODEL.kv_capacity_tokens and self.q:
            return 0.0
        step = MODEL.a_tokens + MODEL.c_tokens * self.k + MODEL.d_tokens * self.n
        return self.u * TOKENS_PER_S / (1 + step / max(64, MODEL.batch_tokens - self.n))

    def flow(self, t: float) -> None:
        if t > self.t_p:
            self.p, self.t_p = max(0.0, self.p - self.rate() * (t - self.t_p)), t

    def add(self, request: str, tokens: float, at: float, now: float) -> None:
        if request in self.ids:
            return
        self.ids[request] = tokens
        i = len(self.q)
        while i and self.q[i - 1].at > at:
            i -= 1
        self.q.insert(i, Prompt(request, tokens, at))
        self.pool.m_in += 0.01 * (tokens - self.pool.m_in)
        if at >= self.t:
            self.flow(now)
            self.p, self.dn, self.dk = self.p + tokens, self.dn + 1, self.dk + tokens

    def end(self, request: str, *, answered: bool, at: float, now: float) -> None:
        tokens = self.ids.pop(request, None)
        if tokens is None:
            return
        if at >= self.t:
            self.dn, self.dk = self.dn - 1, self.dk - tokens
        if request in [x.request for x in self.q]:
            self.flow(now)
            if not answered:
                self.p = max(0.0, self.p - tokens)
            self.q = [x for x in self.q if x.request != request]

    def scrape(self, t0: float, t1: float, w: int, r: int, kv: float) -> None:
        t = (t0 + t1) / 2
        self.flow(t)
        self.w, self.r, self.kv = w, r, kv
        new = [x for x in self.q if x.at > t]
        self.dn, self.dk = len(new), sum(x.tokens for x in new)
        while sum(x.at <= t1 for x in self.q) < w:
            self.q.insert(0, Prompt(None, self.pool.m_in, t0))
        surplus = sum(x.at <= t0 for x in self.q) - w
        if surplus > 0:
            keep, sums = 0, 0.0
            for x in reversed(self.q[:surplus]):
                sums += x.tokens if keep else 0.0
                if sums > MODEL.batch_tokens or keep >= r:
                    break
                keep += 1
            del self.q[: surplus - keep]
        old = [x.tokens for x in self.q if x.at <= t]
        low = self.kw = sum(old[max(0, len(old) - w) :]) if w else 0.0
        rate = self.rate()
        left = (
            max(0.0, self.p - sum(e.tokens for e in new)) + rate * (self.t_p - t) if self.p else 0.0
        )
        y = min(sum(old), max(low, left))
        if 0 < t - self.t < math.inf and y != left and rate > 0:
            error = max(-1.0, min(1.0, (y - left) / (rate * (t - self.t))))
            self.u *= math.exp(-0.2 * min(1.0, t - self.t) * error)
            self.u = min(2.0, max(0.5, self.u))
        self.p, self.t_p, self.t = y, t, t
        for e in new:
            self.flow(e.at)
            self.p += e.tokens
        self.flow(t1)
