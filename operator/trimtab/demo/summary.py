"""What a run showed: the same few numbers of each side, from the records of its requests.

The law: only requests due after the warm-up count, and the same ones on both sides. The first
seconds meet empty engines, on which every policy looks good.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trimtab.demo.load import Record

SHORT_PROMPT_TOKENS = 256
"""Below this a request is a question a person waits for, and hardly any work itself."""


@dataclass(slots=True, kw_only=True)
class Side:
    """One policy's requests; of each request the newest record stands."""

    name: str
    counted_from_s: float = 0.0
    records: dict[int, Record] = field(default_factory=dict)

    def note(self, record: Record) -> None:
        self.records[record.number] = record

    @property
    def counted(self) -> list[Record]:
        return [r for r in self.records.values() if r.due_s >= self.counted_from_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    requests: int
    failed: int
    ttft_p50_s: float | None
    """None where nobody has had a first token."""
    ttft_p99_s: float | None
    short_ttft_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RigSummary:
    """Whether the rig itself disturbed what it measured."""

    schedule_lag_p99_s: float | None
    cpu_ratio: float
    """CPU time of all the rig's processes over that of all cores, while requests arrived."""


def percentile(values: Iterable[float], ratio: float) -> float | None:
    """Interpolate between the two values around the rank; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = ratio * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarize(records: Sequence[Record]) -> Summary:
    served = [(r.ttft_s, r) for r in records if r.ttft_s is not None and not r.failed]
    ttfts_s = [ttft_s for ttft_s, _ in served]
    short_s = [ttft_s for ttft_s, r in served if r.prompt_tokens < SHORT_PROMPT_TOKENS]
    return Summary(
        requests=len(records),
        failed=sum(r.failed for r in records),
        ttft_p50_s=percentile(ttfts_s, 0.5),
        ttft_p99_s=percentile(ttfts_s, 0.99),
        short_ttft_p99_s=percentile(short_s, 0.99),
    )


def report(summaries: Mapping[str, Summary], rig: RigSummary) -> dict[str, object]:
    """Shape the object that `trimtab demo --json` prints."""
    policies = {name: asdict(summary) for name, summary in summaries.items()}
    return {"policies": policies, "rig": asdict(rig)}
