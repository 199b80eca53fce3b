"""Kopf against an API server that fails: what is told ends up right, and nothing is written."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from api_server import ApiServer, Asked, refuse
from pools import pool
from trimtab.adapters.watch import DEAD_S, STALE_S, Watch
from trimtab.registry import Kind, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from pathlib import Path

DEADLINE_S = 20.0


class Heard:
    """A registry that is told in Kopf's thread; here nobody reads it meanwhile."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.words: list[tuple[str, str, bool]] = []
        self.lists: list[str] = []
        self.breaks = False
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def told(self, kind: str, item: Mapping[str, Any], *, gone: bool) -> None:
        if self.breaks:
            raise ZeroDivisionError
        self._loop.call_soon_threadsafe(self._told, kind, item, gone)

    def listed(self, kind: str, items: Iterable[Mapping[str, Any]], *, version: str) -> None:
        self._loop.call_soon_threadsafe(self._listed, kind, items, version)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    def pods(self) -> set[str]:
        return {pod.name for each in self.registry.served().values() for pod in each.pods}

    def _told(self, kind: str, item: Mapping[str, Any], gone: bool) -> None:  # noqa: FBT001  # a call back
        self.words.append((kind, item["metadata"]["name"], gone))
        self.registry.told(Kind(kind), item, gone=gone)
        self._news.set()

    def _listed(self, kind: str, items: Iterable[Mapping[str, Any]], version: str) -> None:
        self.lists.append(kind)
        self.registry.listed(Kind(kind), items, version=version)
        self._news.set()


def pod(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"app": "llama"}}, "spec": {}, "status": {}}


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@asynccontextmanager
async def watching(
    kubeconfig: Path, server: ApiServer, **options: Any
) -> AsyncIterator[tuple[Heard, Watch]]:
    server.kubeconfig(kubeconfig)
    heard = Heard()
    watch = Watch(heard, **options)
    watch.start()
    try:
        yield heard, watch
    finally:
        await watch.stop()
        assert not watch._thread.is_alive()


@asynccontextmanager
async def a_cluster() -> AsyncIterator[ApiServer]:
    async with ApiServer.start() as server:
        server.put("inferencepools", pool())
        server.put("pods", pod("a"))
        yield server


async def test_what_is_there_and_what_happens_is_told(kubeconfig: Path) -> None:
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, watch):
        await heard.until(lambda: heard.registry.synced and heard.pods() == {"a"})
        server.put("pods", pod("b"))
        await heard.until(lambda: heard.pods() == {"a", "b"})
        server.remove("pods", "a")
        await heard.until(lambda: heard.pods() == {"b"})
        server.remove("inferencepools", "llama")
        await heard.until(lambda: not heard.registry.served())
        assert watch.failures_total == 0
        assert watch.stale == []


async def test_there_is_one_watch_per_kind_and_nothing_is_written(kubeconfig: Path) -> None:
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, _):
        await heard.until(lambda: heard.registry.synced)
        for number in range(20):
            server.put("pods", pod(f"p{number}"))
        await heard.until(lambda: len(heard.pods()) == 21)
    counts = [(asked.verb, asked.resource) for asked in server.asked]
    assert sorted(counts) == [
        ("list", "inferencepools"),
        ("list", "pods"),
        ("watch", "inferencepools"),
        ("watch", "pods"),
    ]
    assert all(asked.query.get("allowWatchBookmarks", "true") == "true" for asked in server.asked)


async def test_pods_are_selected_by_the_server(kubeconfig: Path) -> None:
    """Kopf ignores a selector under a name that it does not know, without a word."""
    async with (
        a_cluster() as server,
        watching(kubeconfig, server, pod_selector="serving=llm") as (heard, _),
    ):
        await heard.until(lambda: heard.registry.synced)
        await until_asked(server, "watch", "pods")
    selectors = {a.query.get("labelSelector") for a in server.asked if a.resource == "pods"}
    assert selectors == {"serving=llm"}
    assert not any("labelSelector" in a.query for a in server.asked if a.resource != "pods")


async def test_one_namespace_can_be_watched_alone(kubeconfig: Path) -> None:
    async with (
        a_cluster() as server,
        watching(kubeconfig, server, namespace="team") as (heard, _),
    ):
        await heard.until(lambda: heard.registry.synced)
    assert {asked.namespace for asked in server.asked} == {"team"}


async def test_a_stream_that_is_cut_goes_on_where_it_ended(kubeconfig: Path) -> None:
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, _):
        await heard.until(lambda: heard.registry.synced)
        await until_asked(server, "watch", "pods")
        server.cut_streams()
        server.put("pods", pod("b"))
        server.remove("pods", "a")
        await heard.until(lambda: heard.pods() == {"b"})
        assert heard.lists.count("pods") == 1


async def test_what_vanished_while_nobody_could_tell_is_gone_after_the_next_list(
    kubeconfig: Path,
) -> None:
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, _):
        server.put("pods", pod("b"))
        await heard.until(lambda: heard.pods() == {"a", "b"})
        server.loses = lambda _type, _item: True
        server.remove("pods", "a")
        server.remove("inferencepools", "llama")
        server.put("inferencepools", pool("other"))
        server.loses = lambda _type, _item: False
        server.cut_streams(forget=True)
        await heard.until(lambda: set(heard.registry.served()) == {"team/other"})
        await heard.until(lambda: heard.pods() == {"b"})
        assert ("pods", "a", True) not in heard.words


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_a_server_that_refuses_for_a_while_is_asked_again(
    kubeconfig: Path, status: int
) -> None:
    async with a_cluster() as server:
        server.spoil = lambda _: refuse(status, **{"Retry-After": "1"})
        async with watching(kubeconfig, server) as (heard, watch):
            await until_asked(server, "list", "pods")
            server.spoil = lambda _: None
            await heard.until(lambda: heard.registry.synced and heard.pods() == {"a"})
            server.spoil = lambda asked: refuse(status) if asked.verb == "watch" else None
            server.cut_streams()
            refused = len(server.asked)
            await poll(lambda: len(server.asked) >= refused + 2)
            server.spoil = lambda _: None
            server.put("pods", pod("b"))
            await heard.until(lambda: heard.pods() == {"a", "b"})
            assert watch.failures_total > 0
            assert watch.stale == []


async def test_a_stream_that_breaks_off_with_an_error_is_made_anew(kubeconfig: Path) -> None:
    """Kopf ends altogether then, or hangs in its end."""
    error = b'{"type": "ERROR", "object": {"code": 500, "message": "leader changed"}}'
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, watch):
        await heard.until(lambda: heard.registry.synced)
        for round_ in range(2, 6):
            await until_asked(server, "watch", "pods", times=round_ - 1)
            await until_asked(server, "watch", "inferencepools", times=round_ - 1)
            broken = {"pods", "inferencepools"}

            def spoil(asked: Asked, broken: set[str] = broken) -> web.Response | None:
                if asked.verb != "watch" or asked.resource not in broken:
                    return None
                broken.remove(asked.resource)
                return web.Response(body=error)

            server.spoil = spoil
            server.cut_streams()
            await until_asked(server, "list", "pods", times=round_)
            server.put("pods", pod(f"b{round_}"))
            await heard.until(lambda: len(heard.pods()) == round_)  # noqa: B023  # awaited here
        assert watch.failures_total > 0


async def test_words_that_cannot_be_passed_on_are_counted_and_end_nothing(
    kubeconfig: Path,
) -> None:
    async with a_cluster() as server, watching(kubeconfig, server) as (heard, watch):
        await heard.until(lambda: ("pods", "a", False) in heard.words)
        heard.breaks = True
        failures = watch.failures_total
        server.put("pods", pod("b"))
        await poll(lambda: watch.failures_total > failures)
        heard.breaks = False
        server.put("pods", pod("c"))
        await heard.until(lambda: "c" in heard.pods())


async def test_who_asks_for_nothing_for_long_is_stale(kubeconfig: Path) -> None:
    now_s = 0.0
    async with (
        a_cluster() as server,
        watching(kubeconfig, server, now_s=lambda: now_s) as (heard, watch),
    ):
        await heard.until(lambda: heard.registry.synced)
        await until_asked(server, "watch", "pods")
        await until_asked(server, "watch", "inferencepools")
        watch._leaving.set()  # nobody looks after it any more
        now_s = DEAD_S
        assert watch.stale == []
        now_s = DEAD_S + 1
        assert watch.stale == ["inferencepools", "pods"]


async def test_a_watch_that_stands_still_is_started_again(kubeconfig: Path) -> None:
    now_s = 0.0
    async with (
        a_cluster() as server,
        watching(kubeconfig, server, now_s=lambda: now_s) as (heard, watch),
    ):
        await heard.until(lambda: heard.registry.synced)
        await until_asked(server, "watch", "pods")
        now_s = STALE_S + 1
        await until_asked(server, "list", "pods", times=2)
        assert watch.failures_total == 1


async def until_asked(server: ApiServer, verb: str, resource: str, *, times: int = 1) -> None:
    await poll(
        lambda: [(a.verb, a.resource) for a in server.asked].count((verb, resource)) >= times
    )


async def poll(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110  # another thread does it, and offers no event
            await asyncio.sleep(0.02)
