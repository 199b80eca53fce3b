"""What a simulated engine is, and what can be made to go wrong with it while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from trimtab.engine_sim.model import EngineSpec


class MetricsMode(StrEnum):
    """What `/metrics` answers."""

    NORMAL = "normal"
    FROZEN = "frozen"
    GARBAGE = "garbage"
    MISSING = "missing"
    SLOW = "slow"
    HUGE = "huge"
    REDIRECT = "redirect"
    RENAMED = "renamed"


class Switches(BaseModel):
    """What can be changed while an engine runs. A crash and a restart leave them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    metrics: MetricsMode = MetricsMode.NORMAL
    metrics_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """How long a slow page takes."""
    max_num_queued_reqs: Annotated[int | None, Field(ge=0)] = None
    """Requests in flight, running or waiting, at which vLLM rejects the next."""
    max_num_queued_tokens: Annotated[int | None, Field(ge=0)] = None
    """Prompt tokens of requests without a first token at which vLLM rejects the next."""
    rejection_event_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rejected streams told with status 200 and an error event, the others with 503:
    real vLLM does both, by a race between two checks."""
    ready: bool = True
    crashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What is fixed while an engine lives. Port 0 is any free one, kept over restarts."""

    model: str
    port: int = 0
    spec: EngineSpec = field(default_factory=EngineSpec)
    speed: float = 1.0
    stream_interval: int = 1
