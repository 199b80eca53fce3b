"""What the demo shows fits a terminal of 80 columns and says what the numbers are."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from trimtab.core.model import Endpoint, EndpointReport, EndpointState
from trimtab.demo.load import COMPLETE, Record
from trimtab.demo.plot import PlotError, plot
from trimtab.demo.screen import (
    ALL_SENT,
    BAR_CELLS,
    SideView,
    View,
    closing,
    frame,
    line,
    open_screen,
)
from trimtab.demo.summary import RigSummary, summarize

if TYPE_CHECKING:
    from pathlib import Path

FULL_BAR = "█" * BAR_CELLS


def records(ttft_s: float, *, outcome: str = COMPLETE) -> list[Record]:
    return [Record(0, n, float(n), 100, 0.001, ttft_s, n + 1.0, outcome) for n in range(20)]


def side(title: str, drains_s: list[float], ttft_s: float) -> SideView:
    endpoints = {
        Endpoint(f"pod-{n:02}", "127.0.0.1", 9000 + n): EndpointReport(
            state=EndpointState.SERVING,
            weight=100,
            backlog_tokens=drain_s * 1000,
            drain_s=drain_s,
            speed_ratio=1.0,
            age_s=0.1,
        )
        for n, drain_s in enumerate(drains_s, start=1)
    }
    return SideView(
        title=title,
        endpoints=endpoints,
        shares={endpoint: 1 / len(endpoints) for endpoint in endpoints},
        summary=summarize(records(ttft_s)),
    )


def view(elapsed_s: float) -> View:
    sides = [
        side("least request", [8.0, 2.0], 2.0),
        side("Trimtab weights", [1.0, 0.0], 0.5),
        replace(side("Trimtab picker", [0.5, 0.0], 0.25), shares={}),
    ]
    return View(elapsed_s=elapsed_s, total_s=75.0, warm_up_s=11.0, sides=sides)


def rendered(what: object) -> str:
    out = StringIO()
    Console(file=out, width=80).print(what)
    return out.getvalue()


def test_a_frame_fits_80_columns_and_cuts_no_name() -> None:
    text = rendered(frame(view(20.0)))
    assert "…" not in text
    assert "pod-02" in text
    assert all(name in text for name in ("least", "request ", "weights", "picker"))
    assert max(map(len, text.splitlines())) <= 80


def test_all_sides_are_drawn_to_one_scale() -> None:
    text = rendered(frame(view(20.0)))
    first = next(each for each in text.splitlines() if "pod-01" in each)
    assert FULL_BAR in first
    assert first.count("█") == BAR_CELLS + 1  # of the others, an eighth and a sixteenth
    assert "full bar: 8 s" in text


def test_a_frame_says_what_is_going_on() -> None:
    assert "5 of 75 s (warm-up, not counted)" in rendered(frame(view(5.0)))
    assert "20 of 75 s\n" in rendered(frame(view(20.0))).replace("  ", "")
    assert ALL_SENT in rendered(frame(view(80.0)))


def test_a_line_says_the_same_in_short() -> None:
    assert line(view(20.4)) == (
        " 20 of 75 s | least request 2.00 s / 2.00 s, 2.0 … 8.0 s, 0 failed"
        " | Trimtab weights 0.50 s / 0.50 s, 0.0 … 1.0 s, 0 failed"
        " | Trimtab picker 0.25 s / 0.25 s, 0.0 … 0.5 s, 0 failed"
    )


def test_where_there_is_no_terminal_plain_lines_come_and_the_wait_is_told_once() -> None:
    out = StringIO()
    with open_screen(Console(file=out, width=80)) as screen:
        for elapsed_s in (5.0, 10.0, 75.0, 80.0, 85.0):
            screen.show(view(elapsed_s))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 2 + 1
    assert lines[-1] == ALL_SENT
    assert "\x1b" not in out.getvalue()


def test_the_closing_table_compares_and_tells_of_the_rig() -> None:
    out = StringIO()
    rig = RigSummary(schedule_lag_p99_s=0.0042, cpu_ratio=0.137)
    closing(Console(file=out, width=80), view(80.0).sides, rig, cores=2)
    text = out.getvalue()
    assert "short requests' TTFT p99" in text
    assert max(map(len, text.splitlines())) <= 80
    p99 = next(each for each in text.splitlines() if each.strip().startswith("TTFT p99"))
    assert p99.split() == ["TTFT", "p99", "2.00", "s", "0.50", "s", "0.25", "0.25", "s", "0.12"]
    assert "4.2 ms late at p99" in text
    assert "14% of 2 cores" in text


@pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_the_plot_is_written_in_the_form_its_name_asks_for(
    name: str, magic: bytes, tmp_path: Path
) -> None:
    sides = [("a", records(2.0)), ("b", records(0.5)), ("c", records(0.2))]
    plot(tmp_path / name, sides, heading="conversation", counted_from_s=3.0)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_a_side_that_served_nothing_can_be_drawn_and_two_of_them_cannot(tmp_path: Path) -> None:
    nothing = ("Trimtab", records(2.0, outcome="HTTP 503"))
    plot(
        tmp_path / "a.svg",
        [("round robin", records(2.0)), nothing],
        heading="conversation",
        counted_from_s=3.0,
    )
    assert (tmp_path / "a.svg").exists()
    with pytest.raises(PlotError, match="no request had an answer"):
        plot(tmp_path / "b.svg", [nothing, ("", [])], heading="", counted_from_s=3.0)


def test_a_plot_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"no plot: .*No such file or directory"):
        plot(
            tmp_path / "nowhere" / "a.svg",
            [("round robin", records(2.0)), ("Trimtab", records(0.5))],
            heading="conversation",
            counted_from_s=3.0,
        )


def test_without_matplotlib_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sides = [("round robin", records(2.0)), ("Trimtab", records(0.5))]
    with pytest.raises(PlotError, match=r"pip install 'trimtab\[plot\]'"):
        plot(tmp_path / "a.svg", sides, heading="", counted_from_s=0.0)
