"""The InferencePool as users write it: what may be said, within which bounds, with which default.

One schema for the custom resource and for fleet files. A field exists here once it takes effect.
Names, descriptions, bounds and defaults are the schema's, so that tools and people read the same;
there are no floats (they do not survive JSON round trips) and no defaults hidden in code.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from trimtab.core.model import Policy


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


class Schema(BaseModel):
    """A typing error must not pass for a setting, so unknown fields are refused."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


# Strict, or "100" and `true` would pass for numbers here and be refused by the API server.
Whole = Annotated[int, Field(strict=True)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Hostname = Annotated[
    str,
    StringConstraints(
        max_length=253,
        pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    ),
]


class Metrics(Schema):
    """How the pool's endpoints are watched."""

    path: Annotated[str, StringConstraints(max_length=1024, pattern=r"^(/[!-~]*)?$")] = Field(
        default="",
        description="Path of the metrics page on each endpoint; empty: what the engine uses.",
    )
    interval_milliseconds: Whole = Field(
        default=1000,
        ge=50,
        le=60_000,
        description="Period in which endpoints are observed and weights decided.",
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
        description="Age at which an endpoint's data counts as stale.",
    )

    @model_validator(mode="after")
    def _answers_come_within_the_period(self) -> Self:
        if self.timeout_milliseconds > self.interval_milliseconds:
            raise ValueError(
                f"timeoutMilliseconds ({self.timeout_milliseconds}) must not exceed "
                f"intervalMilliseconds ({self.interval_milliseconds})"
            )
        if self.stale_after_seconds * 1000 < self.interval_milliseconds:
            raise ValueError(
                f"staleAfterSeconds ({self.stale_after_seconds}) must not be less than "
                f"intervalMilliseconds ({self.interval_milliseconds})"
            )
        return self


class Routing(Schema):
    """Which requests belong to the pool, and how mildly they are spread."""

    models: tuple[ModelName, ...] = Field(
        default=(),
        max_length=64,
        description='Values of "model" in request bodies that belong to this pool; '
        "empty: the pool's name.",
    )
    hostnames: tuple[Hostname, ...] = Field(
        default=(),
        max_length=16,
        description="Hosts whose requests belong to this pool; empty: any.",
    )
    minimum_weight_percent: Whole = Field(
        default=2,
        ge=1,
        le=100,
        description="Least share of new work of an endpoint, in percent of a fair share: "
        "an endpoint without traffic shows no speed.",
    )


class InferencePoolSpec(Schema):
    """What is wanted of one pool."""

    engine: Engine = Field(default=Engine.AUTO, description="Who writes the metrics pages.")
    metrics: Metrics = Field(default=Metrics(), description=Metrics.__doc__)
    routing: Routing = Field(default=Routing(), description=Routing.__doc__)

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
