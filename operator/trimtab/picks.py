"""The choices of all pools, and the books they rest on.

Per request: find the pool, estimate the prompt from its bytes, pick and book in one step
(core/picking). Beside that, each endpoint's page is read about twice a second, sets the books right
(core/ledger), and shows speeds and lengths (core/backlog), by the same code as in the control loop:
so nothing that is measured has to be told, and a picker alone goes on as well as before.

Pages are read one by one, evenly over the period: a hundred at once would keep requests waiting for
longer than Envoy waits for an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import structlog

from trimtab.core.backlog import Memory, comparable, estimate
from trimtab.core.ledger import Ledger
from trimtab.core.model import Failure, FailureKind, Observation, Policy, Sample
from trimtab.core.picking import pick

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from trimtab.core.model import Endpoint, Reading, Snapshot
    from trimtab.core.picking import Pick
    from trimtab.envoy_config import PoolRoute
    from trimtab.ports import Clock, Scraper

PERIOD_S = 0.5  # from 1 s to 0.2 s the tail gains 1 %, short requests 8 %
PAGES_PER_S = 100.0  # at most, over all pools: 0.1 core
TRIES = 3  # endpoints named for a request: the best, and where to go if nobody listens there
LOGGED_DECISIONS = 256  # with 100 candidates each, 5 MB

PRIOR_REQUESTS = 10.0
PRIOR_PROMPT_TOKENS = 1000.0
PRIOR_BYTES_PER_TOKEN = 4.0  # English; a body of token ids has 2 to 7, an image millions
MEMORY_REQUESTS = 5000.0


log = structlog.get_logger(__name__)


class Decided(NamedTuple):
    """One line of the decision log. Nothing that came from the client but sizes."""

    number: int
    at_s: float
    pool: str
    body_bytes: int | None
    tokens: float
    pick: Pick


@dataclass(slots=True, kw_only=True)
class TokenSize:
    """How many bytes of body a token of prompt takes: the means of both over the same requests.

    Bytes are those of our own picks, counted once the engines have admitted as many requests.
    Tokens are those prefilled (cached ones cost nothing), so requests that came another way do no
    harm as long as they are like ours. A common error of all prompts cancels in every choice.
    """

    sent: float = PRIOR_REQUESTS
    sent_bytes: float = PRIOR_REQUESTS * PRIOR_PROMPT_TOKENS * PRIOR_BYTES_PER_TOKEN
    admitted: float = PRIOR_REQUESTS
    prefilled_tokens: float = PRIOR_REQUESTS * PRIOR_PROMPT_TOKENS
    waiting: float = 0.0
    """Sent and not yet counted, and their bytes."""
    waiting_bytes: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        mean_bytes = self.sent_bytes / self.sent
        mean_tokens = self.prefilled_tokens / max(1.0, self.admitted)
        return max(1.0, mean_bytes) / max(1.0, mean_tokens)

    def learn_sent(self, body_bytes: int) -> None:
        if self.waiting > MEMORY_REQUESTS:  # they never came: the means are kept, not the sums
            self.waiting, self.waiting_bytes = self.waiting / 2, self.waiting_bytes / 2
        self.waiting += 1
        self.waiting_bytes += body_bytes

    def learn_done(self, before: Sample, sample: Sample) -> None:
        """Take in what an engine did between two pages, if it counts both."""
        if not comparable(before, sample):
            return
        if sample.finished_total is None or sample.prompt_tokens_total is None:
            return
        finished = sample.finished_total - (before.finished_total or 0.0)
        admitted = max(0.0, finished + sample.running - before.running)
        keep = math.exp(-admitted / MEMORY_REQUESTS)
        self.admitted = keep * self.admitted + admitted
        self.prefilled_tokens = (
            keep * self.prefilled_tokens
            + sample.prompt_tokens_total
            - (before.prompt_tokens_total or 0.0)
        )
        if self.waiting:
            share = min(1.0, admitted / self.waiting)
            self.sent = keep * self.sent + share * self.waiting
            self.sent_bytes = keep * self.sent_bytes + share * self.waiting_bytes
            self.waiting -= share * self.waiting
            self.waiting_bytes -= share * self.waiting_bytes


@dataclass(slots=True, eq=False)
class PoolBooks:
    """One pool's ledger, and all that its picks rest on."""

    route: PoolRoute
    scraper: Scraper
    snapshot: Snapshot
    ledger: Ledger = field(default_factory=Ledger)
    memory: Memory = field(default_factory=Memory)
    size: TokenSize = field(default_factory=TokenSize)
    picks_total: int = 0
    bugs_total: int = 0
    readings: dict[Endpoint, Reading] = field(default_factory=dict)
    samples: dict[Endpoint, Sample] = field(default_factory=dict)
    refused: set[Endpoint] = field(default_factory=set)
    """Where nobody listened, when last heard."""
    excluded: frozenset[Endpoint] = frozenset()

    @property
    def endpoints(self) -> Collection[Endpoint]:
        return self.snapshot.weights.keys()

    def follow(self, snapshot: Snapshot) -> None:
        """Hear who serves the pool now."""
        self.snapshot = snapshot
        self.ledger.follow(snapshot.weights)
        self.refused &= snapshot.weights.keys()
        for table in (self.readings, self.samples):
            for gone in table.keys() - snapshot.weights.keys():
                del table[gone]
        self._exclude()

    def take(self, endpoint: Endpoint, reading: Reading) -> None:
        """Set the books right by a page, or by its failure."""
        if endpoint not in self.snapshot.weights:
            return
        self.readings[endpoint] = reading
        outcome = reading.outcome
        if isinstance(outcome, Sample):
            if endpoint in self.samples:
                self.size.learn_done(self.samples[endpoint], outcome)
            self.samples[endpoint] = outcome
            self.ledger.scrape(endpoint, reading)
        refuses = isinstance(outcome, Failure) and outcome.kind is FailureKind.REFUSED
        if refuses != (endpoint in self.refused):
            (self.refused.add if refuses else self.refused.discard)(endpoint)
            self._exclude()

    def learn(self, now_s: float) -> None:
        """Measure speeds and lengths by the last page of each endpoint."""
        self.memory = estimate(
            self.memory, Observation(self.readings), _POLICY, now_s=now_s, weights={}
        )
        self.ledger.learn(
            self.memory.speed_ratio,
            tokens_per_s=self.memory.rate_tokens_per_s,
            mean_output_tokens=self.memory.lengths.mean_output_tokens,
        )

    def _exclude(self) -> None:
        """Avoid who leaves and who is not there.

        If nobody is there, that says more about the way there: then the weights shall decide.
        """
        self.excluded = self.snapshot.unreachable | self.snapshot.draining | self.refused


_POLICY = Policy()


class Picks:
    """Chooses for all pools; `follow` says which there are, `watch` keeps the books right."""

    def __init__(self, clock: Clock, make_scraper: Callable[[PoolRoute], Scraper]) -> None:
        self.pools: dict[str, PoolBooks] = {}
        self.unknown_total = 0
        """Checks for pools that are not known here: the control plane is late, or another's."""
        self.decisions: deque[Decided] = deque(maxlen=LOGGED_DECISIONS)
        self._clock = clock
        self._make_scraper = make_scraper
        self._numbers = itertools.count(1)
        self._heard = False

    @property
    def ready(self) -> bool:
        """Whether it was ever said which pools there are."""
        return self._heard

    def follow(self, pools: Mapping[str, tuple[PoolRoute, Snapshot]]) -> None:
        """Hear which pools there are. What is known of those that stay outlives the change."""
        before, self.pools = self.pools, {}
        for name, (route, snapshot) in pools.items():
            books = before.get(name)
            if books is None:
                books = PoolBooks(route, self._make_scraper(route), snapshot)
            elif books.route != route:
                books.route, books.scraper = route, self._make_scraper(route)
            books.follow(snapshot)
            self.pools[name] = books
        self._heard = True

    def choose(self, pool: str, body_bytes: int | None) -> Sequence[Endpoint]:
        books = self.pools.get(pool)
        if books is None:
            self.unknown_total += 1
            return ()
        ledger = books.ledger
        if body_bytes is None:
            tokens = ledger.mean_input_tokens
        else:
            tokens = body_bytes / books.size.bytes_per_token
            books.size.learn_sent(body_bytes)
        number = next(self._numbers)
        now_s = self._clock.now_s()
        # Nobody tells of its end: the pages do. Of equals another one is first each time.
        choice = pick(
            ledger, None, tokens=tokens, now_s=now_s, start=number, excluded=books.excluded
        )
        if choice is None:
            return ()
        books.picks_total += 1
        self.decisions.append(Decided(number, now_s, pool, body_bytes, tokens, choice))
        return [endpoint for endpoint, _ in choice.best(TRIES)]

    async def watch(self) -> NoReturn:
        """Read all pages, round after round."""
        async with asyncio.TaskGroup() as group:
            due_s = self._clock.now_s()
            while True:
                turns = [(b, endpoint) for b in self.pools.values() for endpoint in b.endpoints]
                pause_s = max(PERIOD_S / max(1, len(turns)), 1 / PAGES_PER_S)
                for books, endpoint in turns:
                    group.create_task(_read(books, endpoint))
                    due_s = max(due_s + pause_s, self._clock.now_s())
                    await self._clock.sleep_until_s(due_s)
                if not turns:
                    await self._clock.sleep_until_s(self._clock.now_s() + PERIOD_S)
                for books in self.pools.values():
                    books.learn(self._clock.now_s())


async def _read(books: PoolBooks, endpoint: Endpoint) -> None:
    try:
        observation = await books.scraper.observe([endpoint])
        books.take(endpoint, observation.readings[endpoint])
    except Exception:
        books.bugs_total += 1
        if books.bugs_total == 1:
            log.exception("a page was not taken in; the reckoning goes on", pod=endpoint.pod)
