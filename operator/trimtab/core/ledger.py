"""What each endpoint still owes: reckoned from what was sent, set right by the gauges.

The law. First outputs are not counted; nothing accumulates, so nothing drifts, and nothing is
reaped by age, so no live stream is forgotten. Per endpoint the ledger keeps

    n = W + R + what was sent less what ended since the last scrape                requests in flight
    K = KV + prompts waiting then + the tokens of what changed since               context in flight
    P = prompt tokens sent and not yet prefilled

P grows by what is sent, runs down as an engine of this kind prefills,

    rate = u * s * v / (1 + (a + c*K + d*n) / (B - n))    tokens/s; nothing when the KV cache is full

and is clamped at every scrape to what the gauges allow: at least the last W prompts sent, at most
all that are not known to be prefilled. W waiting requests more than were sent are somebody else's:
they are booked at the mean length. Where the clamp had to correct, u (the pace) learns from it.

So a lost, late or doubled event, an abort, a restart of the engine or of the picker, or requests
that came another way are all mended by the next scrape. Without scrapes the reckoning goes on.

Times are monotonic; `at_s` is when something happened, `now_s` when it is told. What happens at the
very time of a snapshot and is told after it is not in it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from trimtab.core.backlog import (
    DECODE_TOKENS,
    KV_TOKENS,
    PRIOR_INPUT_TOKENS,
    PRIOR_OUTPUT_TOKENS,
    RATE_TOKENS_PER_S,
    STEP_TOKENS,
)
from trimtab.core.model import Sample

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from trimtab.core.model import Endpoint, Reading

MEAN_GAIN = 0.01  # remembers about 100 prompts
KV_FULL_RATIO = 0.93  # engines admit up to 0.99, but the gauge is old
KV_ADMITTED_RATIO = 0.95  # beyond it a new prompt waits for others to end
MIN_FREE_TOKENS = 64  # of the batch: it never fills up entirely with decodes
PACE_GAIN_PER_S = 0.2  # single prompts do not move it, and a factor 2 takes 4 s
PACE_RANGE = (0.5, 2.0)  # unseen requests look like a slow engine and would pull it without end
MAX_KNOWN = 100_000  # requests remembered for their end events, of all endpoints
MAX_OWED = 10_000  # prompts remembered as not prefilled, of each endpoint
MAX_GAUGE = 1e9  # requests or tokens; no engine holds so much, so the page is garbage
STALE_S = 10.0  # so long without a scrape was no measurable loss


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What an iteration costs, in units of one prefilled token, and what an engine holds.

    The costs are within a factor 2 of every engine measured; 4 times wrong is harmless.
    """

    a_tokens: float = STEP_TOKENS
    """Of an iteration."""
    c_tokens: float = KV_TOKENS
    """Of a token of KV cache read."""
    d_tokens: float = DECODE_TOKENS
    """Of a decode."""
    batch_tokens: int = 2048
    max_sequences: int = 256
    kv_capacity_tokens: float = 400_000.0
    """Where the engine does not tell its own."""


class Basis(StrEnum):
    """What an estimate rests on."""

    GAUGES = "Gauges"
    RECKONING = "Reckoning"
    """Only what was sent: no fresh scrape."""
    NOTHING = "Nothing"
    """Neither heard from nor sent to, yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    prefill_tokens: float
    context_tokens: float
    requests: float
    age_s: float
    """Since the engine's last snapshot; infinite when there was none."""
    basis: Basis


@dataclass(slots=True, eq=False)
class Booking:
    """A prompt that was sent, or that must have been."""

    account: Account
    tokens: float
    at_s: float
    owed: bool = True
    """Not known to be prefilled."""


@dataclass(slots=True, eq=False)
class Account:
    """One endpoint's page. Only the ledger writes it; picking reads the second half."""

    endpoint: Endpoint
    model: EngineModel
    tokens_per_s: float
    kv_capacity_tokens: float
    speed_ratio: float = 1.0
    pace_ratio: float = 1.0
    snapshot_s: float = -math.inf
    scraped_requests: float = 0.0
    scraped_tokens: float = 0.0
    """KV in use, and the prompts that were waiting to get into it."""
    kv_tokens: float = 0.0
    changed_requests: int = 0
    """Sent less ended, since the snapshot; their tokens likewise."""
    changed_tokens: float = 0.0
    owed: list[Booking] = field(default_factory=list)
    """In order of sending; prompts nobody announced come first."""

    prefill_tokens: float = 0.0
    """P at `flowed_s`; it has run down by `rate_tokens_per_s` since."""
    flowed_s: float = -math.inf
    rate_tokens_per_s: float = 0.0
    requests: float = 0.0
    context_tokens: float = 0.0
    step_tokens: float = 0.0
    """What an iteration costs beside its prefill."""
    cost_ratio: float = 1.0
    """Tokens of time per prompt token prefilled, the rest of the batch paid for."""
    room_tokens: float = 0.0
    """The longest prompt that is admitted at once: there is KV and a batch slot for it."""

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Derive what follows from the bookings: n, K, and how fast P runs down."""
        model = self.model
        self.requests = max(0.0, self.scraped_requests + self.changed_requests)
        self.context_tokens = max(0.0, self.scraped_tokens + self.changed_tokens)
        self.step_tokens = (
            model.a_tokens + model.c_tokens * self.context_tokens + model.d_tokens * self.requests
        )
        free_tokens = max(MIN_FREE_TOKENS, model.batch_tokens - self.requests)
        prefill_ratio = 1 + self.step_tokens / free_tokens
        self.cost_ratio = prefill_ratio / self.speed_ratio
        self.room_tokens = (
            KV_ADMITTED_RATIO * self.kv_capacity_tokens - self.context_tokens
            if self.requests + 1 <= model.max_sequences
            else -math.inf
        )
        full = self.kv_tokens > KV_FULL_RATIO * self.kv_capacity_tokens
        self.rate_tokens_per_s = (
            0.0 if full and self.owed else self.pace_ratio * self.tokens_per_s / self.cost_ratio
        )

    def flow(self, to_s: float) -> None:
        """Let P run down until `to_s`."""
        if to_s > self.flowed_s:
            self.prefill_tokens = self.prefill_at(to_s)
            self.flowed_s = to_s

    def prefill_at(self, now_s: float) -> float:
        """P at `now_s`, not before `flowed_s`."""
        done_tokens = self.rate_tokens_per_s * max(0.0, now_s - self.flowed_s)
        return max(0.0, self.prefill_tokens - done_tokens)

    def insert(self, booking: Booking) -> None:
        """By time. Events are late by little, so the scan from the end is short."""
        at, owed = len(self.owed), self.owed
        while at and owed[at - 1].at_s > booking.at_s:
            at -= 1
        owed.insert(at, booking)
        if len(owed) > MAX_OWED:
            owed.pop(0).owed = False


@dataclass(slots=True, eq=False)
class Ledger:
    """What all endpoints of one pool still owe. Mutable: it is written for every request.

    Endpoints that it does not follow are ignored, as are pages that make no sense.
    """

    model: EngineModel = field(default_factory=EngineModel)
    tokens_per_s: float = RATE_TOKENS_PER_S
    mean_input_tokens: float = PRIOR_INPUT_TOKENS
    mean_output_tokens: float = PRIOR_OUTPUT_TOKENS
    accounts: tuple[Account, ...] = ()
    _by_endpoint: dict[Endpoint, Account] = field(default_factory=dict)
    _known: OrderedDict[Hashable, Booking] = field(default_factory=OrderedDict)
    _flowed_s: float = -math.inf

    def follow(self, endpoints: Iterable[Endpoint]) -> None:
        """Keep books of just these. One that comes back starts with a clean page."""
        self._by_endpoint = {
            endpoint: self._by_endpoint.get(endpoint)
            or Account(endpoint, self.model, self.tokens_per_s, self.model.kv_capacity_tokens)
            for endpoint in endpoints
        }
        self.accounts = tuple(self._by_endpoint.values())

    def learn(
        self,
        speed_ratio: Mapping[Endpoint, float],
        *,
        tokens_per_s: float,
        mean_output_tokens: float,
    ) -> None:
        """Take over what was measured: speeds over the median, and the median itself.

        What is not positive was not measured.

        Args:
            speed_ratio: endpoints it does not name count as 1.
            tokens_per_s: work that the pool's median endpoint does, in prefill tokens.
            mean_output_tokens: of this pool's requests.
        """
        if tokens_per_s > 0:
            self.tokens_per_s = tokens_per_s
        self.mean_output_tokens = max(1.0, mean_output_tokens)
        for account in self.accounts:
            account.flow(self._flowed_s)
            account.tokens_per_s = self.tokens_per_s
            speed = speed_ratio.get(account.endpoint, 1.0)
            account.speed_ratio = speed if speed > 0 else 1.0
            account.settle()

    def flow(self, now_s: float) -> None:
        """Let all endpoints work until `now_s`: a pick is being made.

        They are only told when next their books change, so this costs nothing.
        """
        self._flowed_s = max(self._flowed_s, now_s)

    def add(
        self, request: Hashable, endpoint: Endpoint, *, tokens: float, at_s: float, now_s: float
    ) -> None:
        """Book a request that was picked for an endpoint or is heard to have started there.

        Known there, it is counted once. Known elsewhere, it has moved: a retry, or a choice that
        was not followed. None is a request of which nothing more will be heard.
        """
        account = self._by_endpoint.get(endpoint)
        if account is None:
            return
        known = self._known.get(request)
        if known is not None:
            if known.account is account:
                return
            self._close(known, answered=False, at_s=at_s, now_s=now_s)
        # What an engine's memory cannot hold it refuses; a length that is no number counts as 1.
        tokens = min(tokens, account.kv_capacity_tokens) if tokens > 1 else 1.0
        at_s = min(at_s, now_s)
        account.flow(self._flowed_s)
        booking = Booking(account, tokens, at_s)
        if request is not None:
            self._known[request] = booking
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        account.insert(booking)
        self.mean_input_tokens += MEAN_GAIN * (tokens - self.mean_input_tokens)
        account.settle()
        if at_s >= account.snapshot_s:
            account.flow(now_s)
            account.prefill_tokens += tokens
            account.changed_requests += 1
            account.changed_tokens += tokens
            account.settle()

    def end(
        self, request: Hashable, endpoint: Endpoint, *, answered: bool, at_s: float, now_s: float
    ) -> None:
        """Strike out a request that ended; `answered` says that it brought a byte of body.

        Ends of requests that are not known there are ignored: told twice, or from before a restart.
        """
        known = self._known.get(request)
        if known is not None and known.account is self._by_endpoint.get(endpoint):
            del self._known[request]
            self._close(known, answered=answered, at_s=at_s, now_s=now_s)

    def scrape(self, endpoint: Endpoint, reading: Reading) -> None:
        """Set an endpoint's books right by what its engine said."""
        account, sample = self._by_endpoint.get(endpoint), reading.outcome
        asked_s, answered_s = reading.asked_s, reading.answered_s
        snapshot_s = (asked_s + answered_s) / 2
        if account is None or not isinstance(sample, Sample) or snapshot_s < account.snapshot_s:
            return
        capacity_tokens = sample.kv_capacity_tokens or account.kv_capacity_tokens
        if sample.kv_used_ratio is None:
            kv_tokens = sample.running * (self.mean_input_tokens + self.mean_output_tokens / 2)
        else:
            kv_tokens = sample.kv_used_ratio * capacity_tokens
        gauges = (sample.waiting, sample.running, kv_tokens, capacity_tokens)
        if not all(0 <= gauge <= MAX_GAUGE for gauge in gauges):
            return
        waiting = int(sample.waiting)
        account.flow(max(self._flowed_s, snapshot_s))
        later = [booking for booking in account.owed if booking.at_s > snapshot_s]
        later_tokens = sum(booking.tokens for booking in later)
        account.kv_capacity_tokens, account.kv_tokens = capacity_tokens, kv_tokens
        self._add_unannounced(account, waiting, asked_s=asked_s, answered_s=answered_s)
        _drop_prefilled(account, waiting, running=sample.running, asked_s=asked_s)
        earlier = [booking.tokens for booking in account.owed if booking.at_s <= snapshot_s]
        waiting_tokens = sum(earlier[max(0, len(earlier) - waiting) :]) if waiting else 0.0
        account.scraped_requests = waiting + sample.running
        account.scraped_tokens = kv_tokens + waiting_tokens
        account.changed_requests, account.changed_tokens = len(later), later_tokens
        account.settle()
        reckoned_tokens = 0.0
        if account.prefill_tokens > 0:
            since_tokens = account.rate_tokens_per_s * (account.flowed_s - snapshot_s)
            reckoned_tokens = max(0.0, account.prefill_tokens - later_tokens) + since_tokens
        clamped_tokens = min(sum(earlier), max(waiting_tokens, reckoned_tokens))
        _learn_pace(account, clamped_tokens - reckoned_tokens, snapshot_s=snapshot_s)
        account.settle()
        account.prefill_tokens = clamped_tokens
        account.flowed_s = account.snapshot_s = snapshot_s
        for booking in later:
            account.flow(booking.at_s)
            account.prefill_tokens += booking.tokens
        account.flow(answered_s)

    def estimate(self, endpoint: Endpoint, *, now_s: float) -> Estimate | None:
        """Say what an endpoint owes now, and how well that is known; None if not followed."""
        account = self._by_endpoint.get(endpoint)
        if account is None:
            return None
        age_s = now_s - account.snapshot_s
        if age_s <= STALE_S:
            basis = Basis.GAUGES
        elif age_s < math.inf or account.requests:
            basis = Basis.RECKONING
        else:
            basis = Basis.NOTHING
        return Estimate(
            prefill_tokens=account.prefill_at(now_s),
            context_tokens=account.context_tokens,
            requests=account.requests,
            age_s=age_s,
            basis=basis,
        )

    def _close(self, booking: Booking, *, answered: bool, at_s: float, now_s: float) -> None:
        account = booking.account
        account.flow(self._flowed_s)
        if at_s >= account.snapshot_s:
            account.changed_requests -= 1
            account.changed_tokens -= booking.tokens
            account.settle()
        if booking.owed:
            account.flow(now_s)
            if not answered:
                account.prefill_tokens = max(0.0, account.prefill_tokens - booking.tokens)
            account.owed.remove(booking)
            booking.owed = False
            account.settle()

    def _add_unannounced(
        self, account: Account, waiting: int, *, asked_s: float, answered_s: float
    ) -> None:
        """Book as many prompts as are waiting beyond those known.

        Only what is missing for every possible time of the snapshot is missing.
        """
        owed = account.owed
        sent = sum(booking.at_s <= answered_s for booking in owed)
        missing = min(waiting - sent, MAX_OWED - len(owed))
        if missing > 0:
            owed[:0] = [Booking(account, self.mean_input_tokens, asked_s)] * missing


def _drop_prefilled(account: Account, waiting: int, *, running: float, asked_s: float) -> None:
    """Forget prompts that left the queue, but those that may still be in prefill.

    All prompts of one iteration but the last end in it, so at most a batch and one prompt more are
    under way: of what left the queue the youngest, whatever its length, and older ones that fit
    into a batch, no more than are running.
    """
    owed = account.owed
    surplus = sum(booking.at_s <= asked_s for booking in owed) - waiting
    kept, kept_tokens = 0, 0.0
    while kept < min(surplus, running):
        if kept:
            kept_tokens += owed[surplus - 1 - kept].tokens
        if kept_tokens > account.model.batch_tokens:
            break
        kept += 1
    if surplus > kept:
        for booking in owed[: surplus - kept]:
            booking.owed = False
        del owed[: surplus - kept]


def _learn_pace(account: Account, wrong_tokens: float, *, snapshot_s: float) -> None:
    """The engine has more left than reckoned: it is slower; less left: faster."""
    since_s = snapshot_s - account.snapshot_s
    could_tokens = account.rate_tokens_per_s * since_s
    if wrong_tokens and since_s < math.inf and could_tokens > 0:
        error_ratio = max(-1.0, min(1.0, wrong_tokens / could_tokens))
        pace = account.pace_ratio * math.exp(-PACE_GAIN_PER_S * min(1.0, since_s) * error_ratio)
        account.pace_ratio = max(PACE_RANGE[0], min(PACE_RANGE[1], pace))
