"""Fleet files as people write them, well and badly, and while Trimtab watches them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes import FakeClock
from trimtab.adapters.files import Fleet, FleetFile
from trimtab.core.model import Endpoint
from trimtab.ports import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXAMPLE = Path(__file__).parents[2] / "docs/examples/fleet.yaml"
LATER_S = 5.0  # when a file changes; the first looks are at 0.5 s, 1 s, ...


def fleet_of(*names: str) -> str:
    pools = [f"  - {{name: {name}, endpoints: ['10.0.0.1:8000']}}\n" for name in names]
    return "pools:\n" + "".join(pools)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "fleet.yaml"
    written.write_text(fleet_of("a"))
    return written


def load(path: Path) -> Fleet:
    return FleetFile(path, FakeClock()).load()


# What is written well


def test_endpoints_are_written_short_or_with_their_pod(path: Path) -> None:
    path.write_text("""
pools:
  - name: llama
    endpoints:
      - 10.0.0.1:8000
      - "[2001:DB8::1]:8000"
      - {pod: gpu-3, address: 10.0.0.3, port: 8001}
""")
    assert load(path).pools[0].endpoints == (
        Endpoint("10.0.0.1:8000", "10.0.0.1", 8000),
        Endpoint("[2001:db8::1]:8000", "2001:db8::1", 8000),
        Endpoint("gpu-3", "10.0.0.3", 8001),
    )


def test_several_pools_and_all_fields_of_the_resource_may_stand_in_a_file() -> None:
    """The example in the documentation is this test's file."""
    llama, qwen = load(EXAMPLE).pools
    assert llama.routing.models == ("meta-llama/Llama-3.1-8B-Instruct", "llama")
    assert (qwen.name, len(qwen.endpoints)) == ("qwen", 2)


def test_the_example_tells_the_defaults_it_says_it_tells() -> None:
    llama, qwen = load(EXAMPLE).pools
    assert (llama.engine, llama.metrics) == (qwen.engine, qwen.metrics)
    spread = {"minimum_weight_percent", "hostnames"}
    assert llama.routing.model_dump(include=spread) == qwen.routing.model_dump(include=spread)


def test_anchors_and_merges_of_yaml_work(path: Path) -> None:
    path.write_text("""
pools:
  - &first {name: a, endpoints: ['10.0.0.1:8000'], engine: VLLM}
  - {<<: *first, name: b}
""")
    assert [(pool.name, pool.engine) for pool in load(path).pools] == [("a", "VLLM"), ("b", "VLLM")]


# What is written badly


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        ("", 1, "the file must be a mapping of fields to values"),
        ("pools: []", 1, "pools must have at least 1 item"),
        ("pools: three", 1, "pools must be a list, not 'three'"),
        ("\npools:\n  - name: [a\n", 4, "not valid YAML"),
        ("a: 1\n---\nb: 1\n", 2, "not valid YAML: expected a single document"),
        ("{[a]: b}", 1, "not valid YAML: while constructing a mapping found unhashable key"),
        (fleet_of("a") + "pools: []\n", 3, "not valid YAML: pools is set twice"),
        ("kind: InferencePool\n" + fleet_of("a"), 1, "kind is no field that is known here"),
        (fleet_of("a", "b", "a"), 1, "two pools are called a"),
        (fleet_of("a", "A"), 3, "pools[1].name must match"),
        (fleet_of("v1"), 2, "pools[0].name is refused: a pool may not be called like a version"),
        (fleet_of("5"), 2, "pools[0].name must be a valid string, not 5"),
        ("pools:\n- name: a\n", 2, "pools[0].endpoints is required"),
        ("pools:\n- name: a\n  endpoints: []\n", 3, "endpoints must have at least 1 item"),
    ],
)
def test_a_bad_file_is_told_in_one_line_with_its_place_and_the_rule(
    path: Path, text: str, line: int, rule: str
) -> None:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as told:
        load(path)
    assert str(told.value).startswith(f"{path}:{line}: ")
    assert rule in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("engine: vllm", "pools[0].engine must be 'Auto', 'VLLM'"),
        ("selector: {}", "pools[0].selector is no field that is known here"),
        ("metrics: {intervalMilliseconds: 1}", "greater than or equal to 50, not 1"),
        ("metrics: {intervalMilliseconds: '100'}", "must be a valid integer, not '100'"),
        ("metrics: {timeoutMilliseconds: true}", "must be a valid integer, not True"),
        (
            "metrics: {timeoutMilliseconds: 1001}",
            "timeoutMilliseconds must not exceed intervalMilliseconds",
        ),
        ("metrics: {interval_milliseconds: 100}", "metrics.interval_milliseconds is no field"),
        ("metrics: {path: metrics}", "metrics.path is refused: must be empty or begin with /"),
        ("routing: {models: llama}", "pools[0].routing.models must be a list, not 'llama'"),
        ("routing: {hostnames: [Example.com]}", "routing.hostnames[0] is refused: must be a host"),
        ("routing: {minimumWeightPercent: 0}", "greater than or equal to 1, not 0"),
        ("routing: 5", "pools[0].routing must be a mapping of fields to values, not 5"),
    ],
)
def test_a_bad_field_is_told_with_its_line(path: Path, field: str, rule: str) -> None:
    path.write_text(f"pools:\n- name: a\n  endpoints: ['10.0.0.1:8000']\n\n  {field}\n")
    with pytest.raises(ConfigurationError) as told:
        load(path)
    assert str(told.value).startswith(f"{path}:5: pools[0].")
    assert rule in str(told.value)
    assert "more)" not in str(told.value)  # one mistake is one


@pytest.mark.parametrize(
    ("endpoint", "rule"),
    [
        ("gpu-1:8000", "endpoints[1].address must be an IPv4 or IPv6 address, not 'gpu-1'"),
        ("10.0.0.1", 'endpoints[1] is refused: an endpoint is written "10.0.0.1:8000"'),
        ("2001:db8::1:8000", "endpoints[1] is refused: an endpoint is written"),
        ("10.0.0.1:0", "endpoints[1].port must be greater than or equal to 1, not 0"),
        ("10.0.0.1:65536", "endpoints[1].port must be less than or equal to 65535"),
        ("{address: 10.0.0.1}", "endpoints[1].port is required"),
        ("{address: 10.0.0.1, port: 1, weight: 2}", "endpoints[1].weight is no field"),
        ("8000", "endpoints[1] must be a mapping of fields to values, not 8000"),
    ],
)
def test_a_bad_endpoint_is_told_with_its_line(path: Path, endpoint: str, rule: str) -> None:
    path.write_text(f"pools:\n- name: a\n  endpoints:\n  - 10.0.0.9:1\n  - {endpoint}\n")
    with pytest.raises(ConfigurationError) as told:
        load(path)
    assert str(told.value).startswith(f"{path}:5: pools[0].{rule}")


def test_an_endpoint_that_is_listed_twice_is_told(path: Path) -> None:
    path.write_text("""pools:
- name: a
  endpoints: ['10.0.0.1:8000', {pod: b, address: 10.0.0.1, port: 8000}]
""")
    with pytest.raises(ConfigurationError, match="endpoint b is listed twice"):
        load(path)


def test_further_mistakes_are_counted(path: Path) -> None:
    path.write_text("a: 1\nb: 2\npools: 3\n")
    with pytest.raises(ConfigurationError, match=r"\(and 2 more\)$"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0", b"\x00", b"[" * 10_000, b"pools: &a [*a]", b"x: 2024-13-13"]
)
def test_garbage_is_told_like_any_mistake(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as told:
        load(path)
    assert "\n" not in str(told.value)


def test_a_file_that_cannot_be_read_is_told(path: Path) -> None:
    path.unlink()
    with pytest.raises(ConfigurationError, match=r"fleet\.yaml: No such file or directory"):
        load(path)
    path.mkdir()
    with pytest.raises(ConfigurationError, match=r"fleet\.yaml: Is a directory"):
        load(path)
    with pytest.raises(ConfigurationError, match="larger than"):
        load(Path("/dev/zero"))


# While it is watched


class Watch:
    """A fleet file that is followed; `next` is what it is told to be next."""

    def __init__(self, path: Path, *, end_s: float = 20.0) -> None:
        self.clock = FakeClock(end_s)
        self.file = FleetFile(path, self.clock)
        self.file.load()
        self._changes: AsyncIterator[Fleet | ConfigurationError] = self.file.changes()

    async def next(self) -> list[str] | str:
        """Names of the pools, or what is wrong."""
        change = await anext(self._changes)
        if isinstance(change, ConfigurationError):
            return str(change)
        return [pool.name for pool in change.pools]

    async def nothing(self) -> bool:
        """Whether nothing is told until time ends."""
        told = asyncio.create_task(self.next())
        ended = asyncio.create_task(self.clock.ended.wait())
        await asyncio.wait([told, ended], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        return not told.done()


async def test_an_edit_is_seen_within_two_looks(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(LATER_S, lambda: path.write_text(fleet_of("a", "b")))
    assert await watch.next() == ["a", "b"]
    assert watch.clock.time_s <= LATER_S + 1.0


async def test_an_edit_before_the_first_look_is_seen(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(0.0, lambda: path.write_text(fleet_of("b")))
    assert await watch.next() == ["b"]
    assert watch.clock.time_s <= 1.0


async def test_an_atomic_replacement_is_seen(path: Path) -> None:
    watch = Watch(path)
    new = path.with_suffix(".new")
    new.write_text(fleet_of("b"))
    watch.clock.at(LATER_S, lambda: new.replace(path))
    assert await watch.next() == ["b"]


async def test_a_symlink_that_is_swapped_is_seen(tmp_path: Path) -> None:
    """So Kubernetes changes the files of a ConfigMap: fleet.yaml -> ..data/fleet.yaml, ..data -> 1."""
    for version in "12":
        (tmp_path / version).mkdir()
        (tmp_path / version / "fleet.yaml").write_text(fleet_of(f"a{version}"))
    data = tmp_path / "..data"
    data.symlink_to("1")
    (tmp_path / "fleet.yaml").symlink_to("..data/fleet.yaml")
    watch = Watch(tmp_path / "fleet.yaml")

    def swap() -> None:
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").rename(data)

    watch.clock.at(LATER_S, swap)
    assert await watch.next() == ["a2"]


async def test_a_file_half_written_is_waited_for(path: Path) -> None:
    """The first half of a list is a shorter list: it would take endpoints out of service."""
    watch = Watch(path)
    watch.clock.at(LATER_S, lambda: path.write_text(fleet_of("b")))
    watch.clock.at(LATER_S + 0.5, lambda: path.write_text(fleet_of("b", "c")))
    assert await watch.next() == ["b", "c"]


async def test_a_bad_file_is_told_once_and_then_its_mending(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(LATER_S, lambda: path.write_text("pools: 3"))
    watch.clock.at(LATER_S + 5, lambda: path.write_text(fleet_of("b")))
    assert "pools must be a list" in await watch.next()
    assert await watch.next() == ["b"]


async def test_a_file_that_is_gone_is_told_once_and_then_its_return(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(LATER_S, path.unlink)
    watch.clock.at(LATER_S + 5, lambda: path.write_text(fleet_of("b")))
    assert "No such file" in await watch.next()
    assert await watch.next() == ["b"]


async def test_a_file_that_only_gets_a_new_date_has_not_changed(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(LATER_S, path.touch)
    assert await watch.nothing()


async def test_a_change_that_is_taken_back_at_once_is_none(path: Path) -> None:
    watch = Watch(path)
    watch.clock.at(LATER_S, lambda: path.write_text("half"))
    watch.clock.at(LATER_S + 0.5, lambda: path.write_text(fleet_of("a")))
    assert await watch.nothing()
