"""TTFT over time, all policies in one picture.

matplotlib is an extra, so it is imported only here and only when there is something to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.demo.summary import percentile
from trimtab.ports import TrimtabError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trimtab.demo.load import Record

# Orange, blue and green of Okabe and Ito's palette: told apart by every kind of colour vision.
COLORS = ("#E69F00", "#0072B2", "#009E73")
MARKERS = ("o", "s", "^")  # and by shape, where there is no colour at all
FORMATS = (".svg", ".png")
WINDOW_S = 5.0  # wide enough for a p90 to mean something


class PlotError(TrimtabError):
    """The picture could not be drawn or written; the run itself is not lost."""


def plot(
    path: Path,
    sides: Sequence[tuple[str, Sequence[Record]]],
    *,
    heading: str,
    counted_from_s: float,
) -> None:
    """Write the picture; the suffix of `path` chooses the format.

    Raises:
        PlotError: matplotlib is missing, nothing was served, or the file cannot be written.
    """
    if not any(_served(records) for _, records in sides):
        raise PlotError("no plot: no request had an answer")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise PlotError("no plot: matplotlib is missing (pip install 'trimtab[plot]')") from error
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for (title, records), color, marker in zip(sides, COLORS, MARKERS, strict=False):
        points = _served(records)
        dues_s, ttfts_s = [due_s for due_s, _ in points], [ttft_s for _, ttft_s in points]
        axes.scatter(dues_s, ttfts_s, s=7, marker=marker, color=color, alpha=0.3, linewidths=0)
        axes.plot(
            *_p90s(points), color=color, linewidth=1.8, label=f"{title}, p90 of {WINDOW_S:g} s"
        )
        p99_s = percentile((ttft_s for due_s, ttft_s in points if due_s >= counted_from_s), 0.99)
        if p99_s is not None:
            label = f"{title}, p99 of the run: {p99_s:.2f} s"
            axes.axhline(p99_s, color=color, linestyle="--", linewidth=1.4, label=label)
    axes.axvspan(0, counted_from_s, color="0.92", zorder=0, label="warm-up, not counted")
    axes.set(
        title=heading,
        xlabel="arrival of the request (s since start)",
        ylabel="time to first token (s, logarithmic)",
        yscale="log",
    )
    axes.margins(x=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="both", axis="y", color="0.9", linewidth=0.6)
    figure.legend(loc="outside lower center", fontsize="small", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise PlotError(f"no plot: {path}: {error}") from error


def _served(records: Sequence[Record]) -> list[tuple[float, float]]:
    """When each request was due, and its TTFT."""
    return [(r.due_s, r.ttft_s) for r in records if r.ttft_s is not None and not r.failed]


def _p90s(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The middle of each window, and the p90 of what arrived in it."""
    windows: dict[float, list[float]] = {}
    for due_s, ttft_s in sorted(points):
        windows.setdefault((due_s // WINDOW_S + 0.5) * WINDOW_S, []).append(ttft_s)
    return list(windows), [percentile(ttfts_s, 0.9) or 0.0 for ttfts_s in windows.values()]
