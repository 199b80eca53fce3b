"""The InferencePool as users write it: what may be said, within which bounds, with which default.

One schema for the custom resource and for fleet files. A field exists here once it takes effect.
Names, descriptions, bounds and defaults are the schema's, so that tools and people read the same;
there are no floats (they do not survive JSON round trips) and no defaults hidden in code. What a
schema cannot say is a `Rule`.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from trimtab.core.conditions import MAX_ENDPOINTS
from trimtab.core.model import EndpointState, Policy
from trimtab.core.verdict import Verdict  # noqa: TC001  # pydantic reads annotations at run time
from trimtab.schema import LIST_TYPE, Keyed, Rule, Schema, Whole, form

if TYPE_CHECKING:
    from collections.abc import Mapping

GROUP = "trimtab.dev"
VERSION = "v1alpha1"
KIND = "InferencePool"
PLURAL = "inferencepools"

Count = Annotated[Whole, Field(ge=0, le=2**31 - 1)]
BigCount = Annotated[Whole, Field(ge=0, le=2**53)]  # beyond it JSON readers round
Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Moment = Annotated[datetime, Field(strict=False)]
ShortText = Annotated[str, StringConstraints(max_length=256)]
Text = Annotated[str, StringConstraints(max_length=4096)]
Port = Annotated[Whole, Field(ge=1, le=65_535)]

Path = Annotated[
    str,
    StringConstraints(max_length=1024),
    form("(/[!-~]*)?", "must be empty or begin with / and hold no blanks"),
]
Hostname = Annotated[
    str,
    StringConstraints(max_length=253),
    form(
        r"(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
        "must be a host name in lower case, such as llm.example.com or *.example.com",
    ),
]

_LABEL_KEY = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_A_LABEL_KEY = "must be the name of a label, such as app or example.com/app"
_MAX_LABEL_KEY = 253 + len("/") + 63
LabelKey = Annotated[
    str, StringConstraints(max_length=_MAX_LABEL_KEY), form(_LABEL_KEY, _A_LABEL_KEY)
]
LabelValue = Annotated[
    str,
    StringConstraints(max_length=63),
    form(
        "([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?",
        "must be the value of a label: letters, digits, - _ and ., the first and last no sign",
    ),
]


class Engine(StrEnum):
    """Who writes the metrics pages; Auto finds out from each page."""

    AUTO = "Auto"
    VLLM = "VLLM"
    SGLANG = "SGLang"
    TGI = "TGI"
    TENSORRT_LLM = "TensorRTLLM"
    TRITON = "Triton"
    LLAMA_CPP = "LlamaCpp"


_PATHS = {Engine.TENSORRT_LLM: "/prometheus/metrics"}
"""Where an engine does not use `/metrics`."""


class Metrics(Schema):
    """How the endpoints are watched.

    Where their metrics page is, how often it is read, and when what it said is too old to count.
    """

    RULES = (
        Rule(
            "self.timeoutMilliseconds <= self.intervalMilliseconds",
            lambda it: it.timeout_milliseconds <= it.interval_milliseconds,
            "must not exceed intervalMilliseconds: the next answer would overtake it",
            "timeoutMilliseconds",
        ),
        Rule(
            "self.staleAfterSeconds * 1000 >= 2 * self.intervalMilliseconds",
            lambda it: it.stale_after_seconds * 1000 >= 2 * it.interval_milliseconds,
            "must be at least two intervals, or one late answer would count as an outage",
            "staleAfterSeconds",
        ),
    )

    path: Path = Field(
        default="",
        description="Path of the metrics page on each endpoint. Empty: the one that the engine "
        "uses, /prometheus/metrics for TensorRTLLM and /metrics for all others.",
    )
    interval_milliseconds: Whole = Field(
        default=1000,
        ge=50,
        le=60_000,
        description="Period in which endpoints are observed and weights decided. A shorter one "
        "follows bursts better; each page read costs the pod and Trimtab about 1 ms of CPU.",
    )
    timeout_milliseconds: Whole = Field(
        default=500,
        ge=10,
        le=30_000,
        description="Time an endpoint has to answer; at most intervalMilliseconds.",
    )
    stale_after_seconds: Whole = Field(
        default=10,
        ge=1,
        le=600,
        description="Age at which an endpoint's data counts as stale; at least two intervals. "
        "Weights grow flatter long before, with the age of the data.",
    )


class Mode(StrEnum):
    """Who decides where a request goes."""

    PER_REQUEST = "PerRequest"
    WEIGHTS = "Weights"


class Routing(Schema):
    """Which requests belong to the pool, and how they are spread."""

    mode: Mode = Field(
        default=Mode.PER_REQUEST,
        description="PerRequest: the picker chooses for each request, and while it does not answer "
        "the weights do. Weights: the weights alone.",
    )
    models: Annotated[tuple[Name, ...], Keyed()] = Field(
        default=(),
        max_length=64,
        description='Values of "model" in request bodies that belong to this pool. '
        "Empty: the pool's name.",
    )
    hostnames: Annotated[tuple[Hostname, ...], Keyed()] = Field(
        default=(),
        max_length=16,
        description="Hosts whose requests belong to this pool, such as llm.example.com or "
        "*.example.com. Empty: any host.",
    )
    minimum_weight_percent: Whole = Field(
        default=2,
        ge=1,
        le=100,
        description="Least share of new work that an endpoint gets, in percent of a fair share. "
        "An endpoint without traffic shows no speed, so it is never 0; 100 splits evenly.",
    )


class PoolSpec(Schema):
    """What is wanted of one pool, whoever serves it."""

    engine: Engine = Field(
        default=Engine.AUTO,
        description="The model server that writes the metrics pages. Auto finds out from each "
        "page; name it where a page could pass for several.",
    )
    metrics: Metrics = Metrics()
    routing: Routing = Routing()

    @property
    def metrics_path(self) -> str:
        return self.metrics.path or _PATHS.get(self.engine, "/metrics")

    def policy(self) -> Policy:
        """Say it in the core's units."""
        return Policy(
            interval_s=self.metrics.interval_milliseconds / 1000,
            stale_after_s=float(self.metrics.stale_after_seconds),
            minimum_weight_ratio=self.routing.minimum_weight_percent / 100,
        )


class Comparison(StrEnum):
    """How a label is compared."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Expression(Schema):
    """One comparison of a label, as in the selectors of Kubernetes itself."""

    RULES = (
        Rule(
            "(self.operator in ['In', 'NotIn']) == (size(self.values) > 0)",
            lambda it: (it.operator in {Comparison.IN, Comparison.NOT_IN}) == bool(it.values),
            "must be given for In and NotIn, and only for them",
            "values",
        ),
    )

    key: LabelKey = Field(description="Name of the label.")
    operator: Comparison = Field(
        description="In, NotIn: the value is one of `values`, or none of them (a pod without the "
        "label is in none). Exists, DoesNotExist: whether the pod has the label."
    )
    values: Annotated[tuple[LabelValue, ...], Keyed()] = Field(
        default=(), max_length=32, description="Values for In and NotIn."
    )

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case Comparison.IN:
                return labels.get(self.key) in self.values
            case Comparison.NOT_IN:
                return labels.get(self.key) not in self.values
            case Comparison.EXISTS:
                return self.key in labels
            case Comparison.DOES_NOT_EXIST:
                return self.key not in labels


class Selector(Schema):
    """Which pods of the pool's namespace belong to it: those that fulfil all that is said here."""

    RULES = (
        Rule(
            "size(self.matchLabels) + size(self.matchExpressions) > 0",
            lambda it: bool(it.match_labels or it.match_expressions),
            "must name at least one label: an empty selector would take every pod of the namespace",
        ),
    )

    match_labels: Annotated[
        dict[str, LabelValue],
        Rule(
            f"self.all(key, size(key) <= {_MAX_LABEL_KEY} && key.matches(r'^{_LABEL_KEY}$'))",
            lambda labels: all(
                len(key) <= _MAX_LABEL_KEY and re.fullmatch(_LABEL_KEY, key) for key in labels
            ),
            f"each key {_A_LABEL_KEY}",
        ),
    ] = Field(
        default={},
        max_length=16,
        description="Labels and values that a pod must have, all of them.",
    )
    match_expressions: Annotated[
        tuple[Expression, ...], Field(json_schema_extra={LIST_TYPE: "atomic"})
    ] = Field(default=(), max_length=16, description="Comparisons that must hold, all of them.")

    def matches(self, labels: Mapping[str, str]) -> bool:
        return self.match_labels.items() <= labels.items() and all(
            expression.holds(labels) for expression in self.match_expressions
        )


class TargetPort(Schema):
    """A port on which a pod serves."""

    number: Port = Field(description="Port of the OpenAI API and of the metrics page.")


class InferencePoolSpec(PoolSpec):
    """What is wanted of one pool.

    Which pods serve it, how they are watched, and which requests are theirs.
    """

    selector: Selector
    target_ports: Annotated[tuple[TargetPort, ...], Keyed(("number",))] = Field(
        min_length=1,
        max_length=8,
        description="Ports on which each pod serves. Each is an endpoint of its own on every pod, "
        "as the data-parallel ranks of one model server are.",
    )


# What Trimtab answers. core/conditions.py writes it.


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Schema):
    """One aspect of the pool, in the form that all of Kubernetes uses (metav1.Condition)."""

    type: Annotated[str, StringConstraints(max_length=316)] = Field(
        description="The aspect: Ready, MetricsAvailable, Published or Balanced."
    )
    status: ConditionStatus = Field(description="True, False or Unknown.")
    observed_generation: BigCount = Field(
        description="The generation of the spec that this was said of."
    )
    last_transition_time: Moment = Field(description="When status last changed.")
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = Field(
        description="Why, in one word for programs; docs/conditions.md lists them."
    )
    message: Text = Field(description="Why, in a sentence for people.")


class Evidence(Schema):
    """The numbers that the verdict rests on."""

    heard_endpoints: Count = Field(description="Endpoints with fresh data.")
    least_queue_milliseconds: BigCount = Field(
        description="Time until the emptiest endpoint begins with new work; mean of 30 s."
    )
    most_queue_milliseconds: BigCount = Field(
        description="Time until the fullest endpoint begins with new work; mean of 30 s."
    )
    load_percent: Count = Field(
        description="Work that arrived in the last minute, of what the endpoints could do at most."
    )


class PoolVerdict(Schema):
    """What is wrong with the pool, if anything."""

    name: Verdict = Field(
        description="Balanced, Imbalanced, SlowEndpoint, Saturated, Oversized, or Unknown while "
        "there is not enough fresh data."
    )
    since: Moment = Field(description="When this became the verdict.")
    evidence: Evidence
    message: Text = Field(description="The verdict in a sentence.")


class Summary(Schema):
    """What `kubectl get` shows; programs find the numbers in the other fields."""

    endpoints: ShortText = Field(
        description="Endpoints that take new work, of all the pool has: 7/8."
    )
    backlog: ShortText = Field(
        description="Time that the fullest endpoint needs for the work it owes: 1.8s."
    )


class PoolEndpoint(Schema):
    """One endpoint, with the numbers behind its weight."""

    pod: Name = Field(description="Name of the pod.")
    address: ShortText = Field(description="IP address.")
    port: Port = Field(description="Port.")
    node: ShortText | None = Field(default=None, description="Node on which the pod runs.")
    weight_percent: Count = Field(
        description="Its share of new work, in percent of a fair share; 0 where it gets none."
    )
    backlog_tokens: BigCount = Field(description="Work it owes, in tokens of prefill.")
    drain_milliseconds: BigCount = Field(description="Time it needs for that.")
    speed_percent: Count = Field(
        description="Its measured speed, in percent of the median of the pool; 100 until known."
    )
    data_age_seconds: Count | None = Field(
        default=None,
        description="Age of the data behind these numbers when this was written; absent where "
        "there never was any.",
    )
    state: EndpointState = Field(description="Serving, Slow, Stale, Unreachable or Draining.")
    reason: Text | None = Field(default=None, description="Why its state is not Serving.")


class InferencePoolStatus(Schema):
    """What became of the pool.

    Written by Trimtab when conditions change, and otherwise at most every 30 s; what moves each
    second is in Trimtab's own metrics.
    """

    observed_generation: BigCount | None = Field(
        default=None, description="The generation of the spec that all of this was said of."
    )
    conditions: Annotated[tuple[Condition, ...], Field(max_length=8), Keyed(("type",))] | None = (
        Field(default=None, description="Ready, which sums up, and its parts.")
    )
    verdict: PoolVerdict | None = None
    summary: Summary | None = None
    replicas: Count | None = Field(
        default=None, description="Pods that the selector matches, ready or not."
    )
    endpoints: (
        Annotated[
            tuple[PoolEndpoint, ...],
            Field(max_length=MAX_ENDPOINTS),
            Keyed(("address", "port")),
        ]
        | None
    ) = Field(
        default=None,
        description=f"The endpoints; of more than {MAX_ENDPOINTS}, first those that are not "
        "Serving.",
    )


class InferencePool(Schema):
    """Pods that serve a model, and how requests are spread over them.

    New requests go where they will be done soonest: Trimtab weighs each pod by the tokens of work
    that it still owes, once a second.
    """

    spec: InferencePoolSpec
    status: InferencePoolStatus | None = None
