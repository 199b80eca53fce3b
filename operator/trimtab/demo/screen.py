"""What the demo shows: a live table in a terminal, plain lines elsewhere, a closing table for all.

The law: all sides are drawn to one scale, so the eye compares what the numbers compare. The
screen takes finished values and knows nothing of where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType

    from trimtab.core.model import Endpoint, EndpointReport
    from trimtab.demo.summary import RigSummary, Summary

# Orange, blue and green of Okabe and Ito's palette: told apart by every kind of colour vision.
COLORS = ("#E69F00", "#56B4E9", "#009E73")
ALL_SENT = "all sent; waiting for the last answers"
BAR_CELLS = 9  # as much as 80 columns leave to each of three sides
FRAMES_PER_S = 4.0  # what an eye follows; each costs 4 ms of CPU time
LINE_EVERY_S = 5.0  # for logs: few enough to read, often enough to see that it lives

ROWS = (
    ("TTFT p50", "ttft_p50_s"),
    ("TTFT p99", "ttft_p99_s"),
    ("short requests' TTFT p99", "short_ttft_p99_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideView:
    """One side at one moment."""

    title: str
    endpoints: Mapping[Endpoint, EndpointReport]
    shares: Mapping[Endpoint, float]
    """Of new requests, by the weights the data plane has now; empty where it does not go by them."""
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that one frame shows."""

    elapsed_s: float
    total_s: float
    warm_up_s: float
    sides: Sequence[SideView]


class Screen(Protocol):
    interval_s: float
    """How often `show` is worth calling."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, view: View) -> None: ...


def open_screen(console: Console) -> Screen:
    return LiveTable(console) if console.is_terminal else PlainLines(console)


class LiveTable:
    """Redraws in place; gone when the run ends, because the closing table says it better."""

    interval_s = 1 / FRAMES_PER_S

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, view: View) -> None:
        self._live.update(frame(view), refresh=True)


class PlainLines:
    """A line every few seconds, and none while only the last answers are waited for."""

    interval_s = LINE_EVERY_S

    def __init__(self, console: Console) -> None:
        self._console = console
        self._all_sent = False

    def __enter__(self) -> Self:
        self._say("TTFT p50 / p99 so far; backlog of the emptiest and the fullest pod")
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""

    def show(self, view: View) -> None:
        if view.elapsed_s < view.total_s:
            self._say(line(view))
        elif not self._all_sent:
            self._all_sent = True
            self._say(ALL_SENT)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def line(view: View) -> str:
    """Say the whole view on one line."""
    parts = [f"{_elapsed_s(view):3.0f} of {view.total_s:.0f} s"]
    for side in view.sides:
        summary = side.summary
        drains_s = [report.drain_s for report in side.endpoints.values()] or [0.0]
        parts.append(
            f"{side.title} {seconds(summary.ttft_p50_s)} / {seconds(summary.ttft_p99_s)},"
            f" {min(drains_s):.1f} … {max(drains_s):.1f} s, {summary.failed} failed"
        )
    return " | ".join(parts)


def frame(view: View) -> RenderableType:
    return Group(Text(_clock(view)), _pods(view), figures(view.sides))


def _clock(view: View) -> str:
    if view.elapsed_s >= view.total_s:
        return ALL_SENT
    clock = f"{_elapsed_s(view):.0f} of {view.total_s:.0f} s"
    return clock + (" (warm-up, not counted)" if view.elapsed_s < view.warm_up_s else "")


def _elapsed_s(view: View) -> float:
    return min(max(0.0, view.elapsed_s), view.total_s)


def _pods(view: View) -> Table:
    largest_s = max((r.drain_s for s in view.sides for r in s.endpoints.values()), default=0.0)
    # Powers of two, so that bars of one moment compare with those of the next.
    full_bar_s = 2.0 ** math.ceil(math.log2(max(largest_s, 0.5)))
    caption = f" full bar: {full_bar_s:g} s of work owed; weight: share of new requests"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left", padding=0)
    table.add_column("\npod", min_width=6)
    for side, color in zip(view.sides, COLORS, strict=False):
        table.add_column(f"{side.title}\nbacklog", header_style=color, width=BAR_CELLS)
        table.add_column("\ns", justify="right", width=5)
        table.add_column("\nweight", justify="right", width=6)
    for endpoints in zip(*(sorted(side.endpoints) for side in view.sides), strict=False):
        row: list[RenderableType] = [endpoints[0].pod]
        for side, endpoint, color in zip(view.sides, endpoints, COLORS, strict=False):
            drain_s = side.endpoints[endpoint].drain_s
            share = side.shares.get(endpoint)
            bar = Bar(full_bar_s, 0, drain_s, width=BAR_CELLS, color=color)
            row += [bar, f"{drain_s:.2f}", "-" if share is None else f"{share:.1%}"]
        table.add_row(*row)
    return table


def figures(sides: Sequence[SideView]) -> Table:
    """Tabulate what the sides reached; ratios are those to the first."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("")
    for number, (side, color) in enumerate(zip(sides, COLORS, strict=False)):
        table.add_column(side.title, justify="right", style=color, width=10)
        if number:
            table.add_column("ratio", justify="right")

    def add(label: str, cells: Sequence[str | Text], ratios: Sequence[str] = ()) -> None:
        first, *others = cells
        pairs = zip(others, ratios or [""] * len(others), strict=True)
        table.add_row(label, first, *(cell for pair in pairs for cell in pair))

    summaries = [side.summary for side in sides]
    add("requests", [str(summary.requests) for summary in summaries])
    add("failed", [Text(str(s.failed), style="bold red" if s.failed else "") for s in summaries])
    for label, name in ROWS:
        first_s, *others_s = (getattr(summary, name) for summary in summaries)
        ratios = [_ratio(first_s, value_s) for value_s in others_s]
        add(label, [seconds(value_s) for value_s in (first_s, *others_s)], ratios)
    return table


def closing(console: Console, sides: Sequence[SideView], rig: RigSummary, *, cores: int) -> None:
    """Print the closing table, and whether the rig was quick enough for it to be believed."""
    console.print(figures(sides))
    lag_s = rig.schedule_lag_p99_s or 0.0
    console.print(
        f"Requests went out {lag_s * 1e3:.1f} ms late at p99; the whole rig used "
        f"{rig.cpu_ratio:.0%} of {cores} cores.",
        highlight=False,
    )


def seconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s:.2f} s"


def _ratio(baseline: float | None, ours: float | None) -> str:
    return f"{ours / baseline:.2f}" if baseline and ours is not None else "-"
