"""`trimtab simulate` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from trimtab.ports import ConfigurationError
from trimtab.simulate import simulate_command

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--requests", "300", "--seeds", "2"]
FIGURES = {
    *("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "short_ttft_p99_s", "tpot_p99_s", "slo_ratio"),
    *("requests", "failed", "backlog_cv", "spread"),
}
PROGRAM = "from trimtab.simulate import simulate_command as c; c()"


def _command(*arguments: str, **environment: str) -> str:
    """Run it as a process of its own, as it starts processes itself."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    return done.stdout


def test_json_has_every_figure_of_every_policy() -> None:
    document = json.loads(_command(*SMALL, "--json", "--policies", "round-robin,weights"))
    assert set(document) == {"policies"}
    assert list(document["policies"]) == ["round_robin", "weights"]
    for figures in document["policies"].values():
        assert set(figures) == FIGURES
        assert 0 < figures["ttft_p50_s"] <= figures["ttft_p95_s"] <= figures["ttft_p99_s"]
        assert set(figures["spread"]) == FIGURES - {"spread"}


def test_a_seed_gives_the_same_figures_in_every_process() -> None:
    """Neither the hashes of this process nor the layout of the others may show."""
    arguments = [*SMALL, "--json", "--policies", "least_request,picker", "--crash", "1@1+1"]
    one, other = (_command(*arguments, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert one == other


def test_a_trace_faults_a_picture_and_the_highest_load_in_one_go(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{i % 60:02}.{i:07},{100 + i},{20 + i % 30}" for i in range(50)]
    trace.write_text("\r\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    picture = tmp_path / "tails.svg"
    out = _command(
        *("--trace", str(trace), "--speeds", "1,1,0.5", "--load", "0.6", "--requests", "300"),
        *("--seeds", "1", "--policies", "weights,picker", "--max-load", "--plot", str(picture)),
        *("--slow", "0@0.2=0.4", "--join", "2@0.1", "--picker-outage", "0.1+0.2"),
        *("--pickers", "2", "--period", "0.5", "--metrics-age", "0.1"),
    )
    assert "weights" in out
    assert "picker" in out
    assert "load" in out
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "round_robin,luck"], "'luck' is not one of random, round_robin"),
        (["--speeds", "1,fast"], "'1,fast' is not like 1,1,0.5"),
        (["--speeds", "1,0"], "'1,0' is not like 1,1,0.5"),
        (["--crash", "one@5"], "'one@5' is not like 3@60+20"),
        (["--slow", "1@5"], "'1@5' is not like 3@60+20=0.4"),
        (["--slow", "1@5=0"], "'1@5=0' is not like 3@60+20=0.4"),
        (["--picker-outage", "5"], "'5' is not like 60+30"),
        (["--trace", "nowhere.csv"], "'nowhere.csv' does not exist"),
        (["--load", "0"], "0.01<=x<=2"),
    ],
)
def test_bad_options_are_told_by_an_example(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(simulate_command, arguments)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crash", "8@5"], "there is no pod 8: 8 pods, counted from 0"),
        (["--pods", "2", "--speeds", "1,1,1"], "3 speeds for 2 pods"),
        (["--pods", "1", "--join", "0@5"], "at least one pod must be there from the beginning"),
        (["--recorded-gaps"], "give --trace"),
        (["--users", "5", "--max-load"], "there is no highest one to find"),
    ],
)
def test_what_cannot_be_simulated_is_a_configuration_error(
    arguments: list[str], message: str
) -> None:
    done = CliRunner().invoke(simulate_command, arguments)
    assert isinstance(done.exception, ConfigurationError)
    assert message in str(done.exception)


@pytest.mark.parametrize(
    ("row", "message"),
    [("374,x", "line 2: "), ("399990,11", "a request of 400001 tokens does not fit a pod")],
)
def test_a_trace_that_cannot_be_played_is_told(tmp_path: Path, row: str, message: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,{row}\n")
    done = CliRunner().invoke(simulate_command, ["--trace", str(trace)])
    assert isinstance(done.exception, ConfigurationError)
    assert message in str(done.exception)
