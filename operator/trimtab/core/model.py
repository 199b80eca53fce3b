"""The nouns of the core. Data flows one way: Observation in, Decision out.

All values are immutable, so a decision can be kept, compared, logged and replayed. Times are
monotonic seconds of one clock; only differences mean anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trimtab.core.verdict import Judgement


class Endpoint(NamedTuple):
    """One address:port that serves; a pod may be several.

    A tuple, because it is the key of every table and the simulator hashes it millions of times.
    """

    pod: str
    address: str
    port: int

    @property
    def where(self) -> str:
        """address:port as in a URL: IPv6 in brackets."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one metrics page says about one engine; None where the engine has no such metric."""

    running: float
    """Sequences admitted to the batch, those still in prefill included."""
    waiting: float
    """Requests accepted and not yet admitted."""
    kv_used_ratio: float | None = None
    kv_capacity_tokens: float | None = None
    steps_total: float | None = None
    """Iterations that emitted a token."""
    prompt_tokens_total: float | None = None
    """Grows by the whole prompt when its first token comes out (vLLM v1/metrics/stats.py)."""
    generation_tokens_total: float | None = None
    finished_total: float | None = None
    finished_prompt_tokens_total: float | None = None
    finished_generation_tokens_total: float | None = None


class FailureKind(StrEnum):
    """Why an endpoint gave no sample. Only the first says that nobody listens there."""

    REFUSED = "Refused"
    TIMED_OUT = "TimedOut"
    DISCONNECTED = "Disconnected"
    HTTP_STATUS = "HttpStatus"
    REDIRECTED = "Redirected"
    TOO_LARGE = "TooLarge"
    UNPARSABLE = "Unparsable"


@dataclass(frozen=True, slots=True)
class Failure:
    kind: FailureKind
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One endpoint in one tick: when it was asked and answered, and what came of it."""

    asked_s: float
    answered_s: float
    outcome: Sample | Failure


@dataclass(frozen=True, slots=True)
class Observation:
    """What one tick saw. Its keys are the endpoints the pool has now, heard from or not."""

    readings: Mapping[Endpoint, Reading]
    draining: frozenset[Endpoint] = frozenset()
    """Those of them that are asked to leave: they finish what they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the pool's users were promised."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a pool's spec asks of the core. The defaults are those of the custom resource."""

    interval_s: float = 1.0
    stale_after_s: float = 10.0
    minimum_weight_ratio: float = 0.02
    """Of a fair share: an endpoint without traffic shows no speed."""
    objective: Objective = Objective()


class EndpointState(StrEnum):
    SERVING = "Serving"
    SLOW = "Slow"
    STALE = "Stale"
    UNREACHABLE = "Unreachable"
    DRAINING = "Draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointReport:
    """The straight line of one endpoint, with its numbers: inputs, estimate, weight."""

    state: EndpointState
    weight: int
    backlog_tokens: float
    """Work owed, in prefill tokens."""
    drain_s: float
    speed_ratio: float
    """Measured speed over the pool's median; 1 until known."""
    age_s: float
    """How old the data is on which all this rests; infinite when there never was any."""
    running: float = 0.0
    waiting: float = 0.0
    kv_used_ratio: float | None = None
    reason: str = ""
    """Why the state is not Serving; empty when it is."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Which endpoints take new work, and in which proportion: what a data plane is to follow.

    Weights are integers of 1…1000. Endpoints in `unreachable` and `draining` get no new work.
    """

    weights: Mapping[Endpoint, int]
    unreachable: frozenset[Endpoint] = frozenset()
    draining: frozenset[Endpoint] = frozenset()

    @property
    def version(self) -> str:
        """Derived from the content, so equal tables have equal versions in every replica."""
        content = (sorted(self.weights.items()), sorted(self.unreachable), sorted(self.draining))
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Everything a tick wants done, and what it rests on."""

    snapshot: Snapshot
    endpoints: Mapping[Endpoint, EndpointReport] = field(
        default_factory=lambda: MappingProxyType({})
    )
    changes: tuple[str, ...] = ()
    """One sentence per change of an endpoint's state, for the log."""
    judgement: Judgement | None = None
    """What is wrong with the pool, if anything; None until somebody judges."""
