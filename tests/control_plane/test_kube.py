"""How writes look on the wire, and what becomes of each way in which the API server fails."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from api_server import ApiServer, refuse
from trimtab.adapters.kube import ANSWER_S, KubeApi, own_namespace
from trimtab.ports import AbsentError, ClusterError, ConflictError, LeaseRecord, StartError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

POOL = {
    "apiVersion": "trimtab.dev/v1alpha1",
    "kind": "InferencePool",
    "namespace": "team",
    "name": "llama",
    "uid": "1",
}
RECORD = LeaseRecord(holder="b", duration_s=10, transitions=3)


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the client read a file of ours, whoever runs the tests."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@asynccontextmanager
async def connected(kubeconfig: Path) -> AsyncIterator[tuple[ApiServer, KubeApi]]:
    async with ApiServer.start() as server:
        server.put("inferencepools", {"metadata": {"name": "llama"}, "spec": {}})
        server.kubeconfig(kubeconfig)
        async with KubeApi.connect(identity="me", lease=("system", "trimtab")) as api:
            yield server, api


async def test_status_is_applied_on_the_servers_side_as_trimtab(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (server, api):
        answer = await api.apply_status("team", "llama", {"replicas": 2})
    (asked,) = server.asked
    assert answer["status"] == {"replicas": 2}
    assert (asked.verb, asked.resource) == ("patch", "inferencepools/status")
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml"
    assert asked.query == {"fieldManager": "trimtab", "force": "true"}
    assert asked.headers["Authorization"].lower() == "bearer secret"
    assert asked.headers["User-Agent"] == "trimtab"
    assert asked.body == {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "InferencePool",
        "metadata": {"name": "llama", "namespace": "team"},
        "status": {"replicas": 2},
    }


async def test_an_event_is_about_the_pool_and_says_who_tells_it(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (server, api):
        await api.post_event(POOL, reason="NoPods", note="x" * 2000, warning=True)
    (asked,) = server.asked
    event = asked.body
    assert (asked.verb, asked.resource, asked.namespace) == ("create", "events", "team")
    assert event["regarding"] == POOL
    assert (event["reason"], event["action"], event["type"]) == ("NoPods", "Reconcile", "Warning")
    assert event["reportingController"] == "trimtab.dev/operator"
    assert event["reportingInstance"] == "me"
    assert len(event["note"]) == 1024
    assert event["eventTime"].endswith("Z")
    assert event["metadata"] == {"generateName": "llama-", "namespace": "team"}


async def test_a_lease_is_made_read_and_replaced(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (_, api):
        with pytest.raises(AbsentError):
            await api.read_lease()
        made = await api.write_lease(RECORD)
        assert (made.holder, made.duration_s, made.transitions) == ("b", 10, 3)
        assert made.acquired
        assert await api.read_lease() == made
        again = await api.write_lease(made)
        assert (again.acquired, again.holder) == (made.acquired, "b")
        assert again.version != made.version


async def test_a_lease_is_replaced_only_as_it_was_read(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (_, api):
        made = await api.write_lease(RECORD)
        await api.write_lease(made)
        with pytest.raises(ConflictError):
            await api.write_lease(made)
        with pytest.raises(ConflictError):
            await api.write_lease(RECORD)


async def test_a_lease_that_somebody_emptied_is_free(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (server, api):
        server.put("leases", {"metadata": {"name": "trimtab", "namespace": "system"}, "spec": None})
        lease = await api.read_lease()
    assert (lease.holder, lease.duration_s, lease.acquired) == ("", 0, "")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, AbsentError),
        (409, ConflictError),
        *((status, ClusterError) for status in (400, 401, 403, 422, 429, 500, 503)),
    ],
)
async def test_a_refusal_says_what_can_be_done_and_what_the_server_said(
    kubeconfig: Path, status: int, error: type[ClusterError]
) -> None:
    async with connected(kubeconfig) as (server, api):
        server.spoil = lambda _: refuse(status, "what it said")
        with pytest.raises(ClusterError, match=f"{status} what it said") as refused:
            await api.apply_status("team", "llama", {})
    assert type(refused.value) is error
    assert len(server.asked) == 1  # whoever asked comes round again; nothing is tried twice here


async def test_who_is_asked_to_wait_is_told_how_long(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (server, api):
        server.spoil = lambda _: refuse(429, **{"Retry-After": "7"})
        with pytest.raises(ClusterError) as refused:
            await api.apply_status("team", "llama", {})
        server.spoil = lambda _: refuse(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
        with pytest.raises(ClusterError) as other:
            await api.apply_status("team", "llama", {})
    assert (refused.value.retry_after_s, other.value.retry_after_s) == (7.0, 0.0)


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"", b"\xff", b'{"metadata": {}}'])
async def test_an_answer_that_is_no_lease_is_an_error(kubeconfig: Path, body: bytes) -> None:
    async with connected(kubeconfig) as (server, api):
        server.spoil = lambda _: web.Response(body=body, content_type="application/json")
        with pytest.raises(ClusterError):
            await api.read_lease()


async def test_a_server_that_hangs_is_left_after_the_deadline(kubeconfig: Path) -> None:
    async with connected(kubeconfig) as (server, api):
        server.delay = lambda _: 2 * ANSWER_S
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(ClusterError, match=f"within {ANSWER_S:g} s"):
            await api.read_lease()
        assert asyncio.get_running_loop().time() - began_s >= ANSWER_S


async def test_a_server_that_is_not_there_is_an_error_at_once(kubeconfig: Path) -> None:
    gone = ApiServer()
    gone.url = "http://127.0.0.1:1"
    gone.kubeconfig(kubeconfig)
    async with KubeApi.connect(identity="me", lease=("system", "trimtab")) as api:
        with pytest.raises(ClusterError, match="cannot be reached"):
            await api.read_lease()


async def test_where_no_cluster_is_known_the_user_is_told_what_to_do(
    kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError, match="KUBECONFIG"):
        async with KubeApi.connect(identity="me", lease=("system", "trimtab")):
            pass
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(kubeconfig.parent))
    with pytest.raises(StartError, match="KUBECONFIG"):
        async with KubeApi.connect(identity="me", lease=("system", "trimtab")):
            pass


def test_outside_a_pod_the_lease_is_in_the_default_namespace() -> None:
    assert own_namespace() == "default"
