"""What Trimtab says about itself, as Prometheus, a kubelet and a reader of logs hear it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from fakes import FakeClock
from trimtab import __version__
from trimtab.adapters.telemetry import Telemetry
from trimtab.core.model import (
    Decision,
    Endpoint,
    EndpointReport,
    EndpointState,
    Failure,
    FailureKind,
    Observation,
    Reading,
    Sample,
    Snapshot,
)
from trimtab.ports import PublishError, StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

A, B = Endpoint("pod-a", "10.0.0.1", 8000), Endpoint("pod-b", "2001:db8::1", 8001)
Labels = dict[str, str]


@dataclass
class DataPlane:
    connected: int = 2
    nacks_total: int = 3
    pushes_total: int = 40
    last_nack: str | None = None

    def following(self, pool: str) -> int:
        return len(pool)


class Rig:
    """A telemetry, its clock, and whoever asks it over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, port: int, told: Telemetry) -> None:
        self.clock = FakeClock()
        self.telemetry = told
        self._session = session
        self._url = f"http://127.0.0.1:{port}"

    async def status(self, path: str) -> int:
        async with self._session.get(self._url + path) as answer:
            return answer.status

    async def text(self, path: str, **headers: str) -> str:
        async with self._session.get(self._url + path, headers=headers) as answer:
            return await answer.text()

    async def series(self, name: str) -> list[tuple[Labels, float]]:
        families = text_string_to_metric_families(await self.text("/metrics"))
        samples = [sample for family in families for sample in family.samples]
        return [(sample.labels, sample.value) for sample in samples if sample.name == name]

    async def value(self, name: str, **labels: str) -> float:
        (value,) = [v for has, v in await self.series(name) if labels.items() <= has.items()]
        return value

    def tick(self, pool: str, *endpoints: Endpoint, skipped: int = 0) -> None:
        self.telemetry.decided(pool, observation(*endpoints), decision(*endpoints))
        self.telemetry.published(pool)
        self.telemetry.ticked(pool, took_s=0.02, skipped=skipped)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    clock = FakeClock()
    telemetry = Telemetry(clock, data_plane=DataPlane())
    async with telemetry.serve("127.0.0.1", 0) as port, aiohttp.ClientSession() as session:
        made = Rig(session, port, telemetry)
        made.clock = clock
        yield made


def observation(*endpoints: Endpoint, failure: Failure | None = None) -> Observation:
    outcome = failure or Sample(running=1, waiting=0)
    return Observation(
        {each: Reading(asked_s=0, answered_s=0, outcome=outcome) for each in endpoints}
    )


def decision(*endpoints: Endpoint, changes: tuple[str, ...] = ()) -> Decision:
    reports = {
        endpoint: EndpointReport(
            state=EndpointState.SLOW,
            weight=number,
            backlog_tokens=100.0 * number,
            drain_s=1.5 * number,
            speed_ratio=0.5,
            age_s=2.0,
        )
        for number, endpoint in enumerate(endpoints, start=1)
    }
    snapshot = Snapshot({endpoint: report.weight for endpoint, report in reports.items()})
    return Decision(snapshot=snapshot, endpoints=reports, changes=changes)


# Metrics


async def test_each_endpoint_shows_the_numbers_its_weight_rests_on(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    rig.tick("pool", A, B)
    of_b = {"pool": "pool", "pod": "pod-b", "address": "[2001:db8::1]:8001"}
    assert await rig.value("trimtab_endpoint_weight", **of_b) == 2
    assert await rig.value("trimtab_endpoint_backlog_tokens", **of_b) == 200
    assert await rig.value("trimtab_endpoint_drain_seconds", **of_b) == 3
    assert await rig.value("trimtab_endpoint_speed_ratio", **of_b) == 0.5
    assert await rig.value("trimtab_endpoint_state", **of_b, state="Slow") == 1
    assert await rig.value("trimtab_endpoint_state", **of_b, state="Serving") == 0
    of_a = {"pool": "pool", "pod": "pod-a", "address": "10.0.0.1:8000"}
    assert await rig.value("trimtab_endpoint_weight", **of_a) == 1


async def test_each_pool_shows_its_sums_and_its_fullest_endpoint(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    rig.tick("pool", A, B)
    assert await rig.value("trimtab_pool_endpoints", pool="pool", state="Slow") == 2
    assert await rig.value("trimtab_pool_endpoints", pool="pool", state="Serving") == 0
    assert await rig.value("trimtab_pool_backlog_tokens", pool="pool") == 300
    assert await rig.value("trimtab_pool_drain_seconds", pool="pool") == 3


async def test_the_age_of_data_grows_while_no_tick_comes(rig: Rig) -> None:
    """A gauge set by ticks would show young data for ever once they stop."""
    rig.telemetry.expect("pool", interval_s=1.0)
    rig.tick("pool", A)
    rig.clock.time_s += 60.0
    assert await rig.value("trimtab_endpoint_data_age_seconds") == 62.0


async def test_series_disappear_with_their_endpoint_and_their_pool(rig: Rig) -> None:
    for pool in ("stays", "goes"):
        rig.telemetry.expect(pool, interval_s=1.0)
        rig.telemetry.decided(
            pool, observation(A, B, failure=Failure(FailureKind.REFUSED)), decision(A, B)
        )
        rig.telemetry.failed(pool, PublishError("Envoy", "no"))
        rig.telemetry.failed(pool, ValueError("a bug"))
        rig.tick(pool, A, B, skipped=1)
    rig.tick("stays", B)
    rig.telemetry.forget("goes")
    text = await rig.text("/metrics")
    assert "pod-a" not in text
    assert "goes" not in text
    assert {labels["pod"] for labels, _ in await rig.series("trimtab_endpoint_weight")} == {"pod-b"}


async def test_ticks_and_what_went_wrong_in_them_are_counted(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    rig.tick("pool", A, skipped=3)
    refused = observation(A, B, failure=Failure(FailureKind.REFUSED))
    rig.telemetry.decided("pool", refused, decision(A, B))
    rig.telemetry.failed("pool", PublishError("Envoy", "no"))
    rig.telemetry.failed("pool", ValueError("a bug"))
    rig.telemetry.ticked("pool", took_s=7.0, skipped=0)
    assert await rig.value("trimtab_pool_tick_seconds_count") == 2
    assert await rig.value("trimtab_pool_tick_seconds_bucket", le="5.0") == 1
    assert await rig.value("trimtab_pool_ticks_skipped_total") == 3
    assert await rig.value("trimtab_pool_scrape_failures_total", kind="Refused") == 2
    assert await rig.value("trimtab_pool_publish_failures_total") == 1
    assert await rig.value("trimtab_pool_tick_bugs_total") == 1


async def test_the_last_success_has_its_time(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    failed = observation(A, failure=Failure(FailureKind.TIMED_OUT))
    rig.telemetry.decided("pool", failed, decision(A))
    assert await rig.series("trimtab_pool_last_sample_timestamp_seconds") == []
    assert await rig.series("trimtab_pool_last_publish_timestamp_seconds") == []
    rig.tick("pool", A)
    assert await rig.value("trimtab_pool_last_sample_timestamp_seconds") > 1.7e9
    assert await rig.value("trimtab_pool_last_publish_timestamp_seconds") > 1.7e9


async def test_the_build_and_the_data_plane_are_told_of(rig: Rig) -> None:
    assert await rig.value("trimtab_build_info", version=__version__) == 1
    assert await rig.value("trimtab_xds_envoys_connected") == 2
    assert await rig.value("trimtab_xds_nacks_total") == 3
    assert await rig.value("trimtab_xds_pushes_total") == 40


async def test_openmetrics_is_answered_to_whoever_asks_for_it(rig: Rig) -> None:
    text = await rig.text("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


# Health


async def test_it_is_ready_when_every_pool_was_published_and_stays_so_until_it_leaves(
    rig: Rig,
) -> None:
    assert await rig.status("/readyz") == 503
    for pool in ("one", "two"):
        rig.telemetry.expect(pool, interval_s=1.0)
    rig.tick("one", A)
    assert await rig.status("/readyz") == 503
    assert "two" in await rig.text("/readyz")
    rig.tick("two", A)
    assert await rig.status("/readyz") == 200
    rig.telemetry.expect("three", interval_s=1.0)
    assert await rig.status("/readyz") == 200
    rig.telemetry.hold("leaving")
    assert await rig.status("/readyz") == 503
    assert await rig.text("/readyz") == "leaving\n"
    assert await rig.status("/healthz") == 200
    rig.telemetry.release()
    assert await rig.status("/readyz") == 200


async def test_it_is_healthy_while_ticks_are_young_even_if_data_planes_refuse(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    for _ in range(5):
        rig.clock.time_s += 9.0
        assert await rig.status("/healthz") == 200
        rig.telemetry.failed("pool", PublishError("Envoy", "no"))
        rig.telemetry.ticked("pool", took_s=1.0, skipped=0)
    rig.clock.time_s += 11.0
    assert await rig.status("/healthz") == 503
    assert "pool" in await rig.text("/healthz")


async def test_a_pool_with_a_long_period_may_be_silent_for_three_of_them(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    rig.telemetry.expect("pool", interval_s=60.0)
    rig.clock.time_s += 179.0
    assert await rig.status("/healthz") == 200
    rig.clock.time_s += 2.0
    assert await rig.status("/healthz") == 503


async def test_a_bug_in_every_tick_is_a_reason_to_be_restarted(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    for _ in range(11):
        rig.clock.time_s += 1.0
        rig.telemetry.failed("pool", ValueError("a bug"))
        rig.telemetry.ticked("pool", took_s=0.1, skipped=0)
    assert await rig.status("/healthz") == 503
    rig.tick("pool", A)
    assert await rig.status("/healthz") == 200


async def test_a_port_that_is_taken_is_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}: "):
            async with Telemetry(FakeClock()).serve("127.0.0.1", port):
                pass


# Logs


async def test_a_change_has_one_line_with_its_pool_and_tick_and_a_tick_has_none(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    with capture_logs() as lines:
        rig.tick("pool", A)
        rig.tick("pool", A)
        changed = decision(A, changes=("pod-a was Serving, is Slow",))
        rig.telemetry.decided("pool", observation(A), changed)
        rig.tick("pool", A)
        rig.telemetry.forget("pool")
    assert [line["event"] for line in lines] == [
        "pool is served",
        "pod-a was Serving, is Slow",
        "pool is no longer served",
    ]
    assert (lines[1]["pool"], lines[1]["tick"]) == ("pool", 3)


async def test_a_trouble_that_stays_is_told_once_and_then_its_end(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    with capture_logs() as lines:
        for detail in ("no", "no", "never"):
            rig.telemetry.failed("pool", PublishError("Envoy", detail))
        rig.tick("pool", A)
        rig.tick("pool", A)
    assert [line.get("reason", line["event"]) for line in lines] == [
        "PublishError: Envoy refused the snapshot: no",
        "PublishError: Envoy refused the snapshot: never",
        "pool is all right again",
    ]
    assert [bool(line.get("exc_info")) for line in lines] == [False, False, False]


async def test_a_bug_is_told_with_its_traceback(rig: Rig) -> None:
    rig.telemetry.expect("pool", interval_s=1.0)
    bug = ValueError("a bug")
    with capture_logs() as lines:
        rig.telemetry.failed("pool", bug)
    assert lines[0]["exc_info"] is bug
