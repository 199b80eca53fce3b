"""The operator on a real Kubernetes, with the rights that its chart gives it.

A user's story first, then what must not disturb it: replicas that die, an API server that is away.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from cluster.fake_nodes import engines
from helm_chart import objects, of_kind
from pools import pool
from rig_envoy import Gateway, Load, free_ports, run_gateway, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from cluster.control_plane import ControlPlane
    from cluster.fake_nodes import Cluster
    from cluster.programs import Program

RELEASE = "trimtab"
ACCOUNT = f"{RELEASE}-operator"
RIGHTS = (
    "CustomResourceDefinition",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
)
POOLS = "/apis/trimtab.dev/v1alpha1"
TAKE_OVER_S = 15.0
LEAVE_S = 1.0
OUTAGE_S = float(os.environ.get("TRIMTAB_OUTAGE_S", "5"))
pytestmark = pytest.mark.timeout(300)


class Installation:
    """What the chart gives an operator, and operators that use it."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.plane: ControlPlane = cluster.plane
        self.namespace = namespace
        self.chart = objects(name=RELEASE, namespace=namespace)
        rights = [each for kind in RIGHTS for each in of_kind(kind, self.chart)]
        self.plane.apply(rights, namespace=namespace)
        self.plane.kubectl("wait", "--for=condition=Established", "crd/inferencepools.trimtab.dev")
        # Of the tests before: their namespaces may still be on their way out.
        self.plane.kubectl("delete", "trimpool", "--all", "--all-namespaces")
        self.kubeconfig = self.plane.kubeconfig_for(f"{namespace}/{ACCOUNT}")
        self.programs: list[Program] = []

    def start(self) -> tuple[Program, int, int]:
        """Start a replica; return it, and its ports for xDS and telemetry."""
        xds, telemetry = free_ports(2)
        program = self.plane.run(
            f"operator-{self.namespace}-{len(self.programs)}",
            sys.executable,
            "-m",
            "trimtab",
            "operator",
            f"--xds=127.0.0.1:{xds}",
            f"--telemetry=127.0.0.1:{telemetry}",
            f"--namespace={self.namespace}",
            f"--lease={ACCOUNT}",
            KUBECONFIG=str(self.kubeconfig),
        )
        self.programs.append(program)
        return program, xds, telemetry

    def deploy(self, name: str = "web", *, replicas: int = 2, **options: Any) -> None:
        """Run a pool of engines that go on for a moment when they are asked to leave.

        Without a preStop hook an engine closes its idle connections while a request is on its way
        to one, and Envoy must not send that again: it may have been what killed the engine.
        """
        options.setdefault("pre_stop_s", 2)
        self.plane.apply(
            [
                *engines(name, replicas=replicas, model="llama", **options),
                pool("llama", selector={"matchLabels": {"app": name}}),
            ],
            namespace=self.namespace,
        )
        # After an outage in a test before, the cluster's own controllers take their time.
        here = f"--namespace={self.namespace}"
        self.plane.kubectl("rollout", "status", here, "--timeout=120s", f"deployment/{name}")

    @property
    def key(self) -> str:
        return f"{self.namespace}/llama"

    async def kubectl(self, *arguments: str) -> str:
        return await asyncio.to_thread(
            self.plane.kubectl, f"--namespace={self.namespace}", *arguments
        )

    def condition(self, type_: str) -> Mapping[str, Any]:
        path = f"{POOLS}/namespaces/{self.namespace}/inferencepools/llama"
        status = self.plane.api.get(path).get("status", {})
        return next((c for c in status.get("conditions", ()) if c["type"] == type_), {})

    def holder(self) -> str:
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{ACCOUNT}"
        return str(self.plane.api.get(path)["spec"].get("holderIdentity") or "")

    def allowed(self) -> set[tuple[str, str, str]]:
        """Verb, group and resource of every rule."""
        roles = [*of_kind("ClusterRole", self.chart), *of_kind("Role", self.chart)]
        return {
            (verb, group, resource)
            for role in roles
            for rule in role["rules"]
            for verb in rule["verbs"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }

    def asked(self) -> set[tuple[str, str, str]]:
        requests = self.plane.requests_of(f"{self.namespace}/{ACCOUNT}")
        return {(r.verb, r.group, r.resource) for r in requests if r.resource}


@pytest.fixture
def installation(cluster: Cluster, namespace: str) -> Iterator[Installation]:
    installation = Installation(cluster, namespace)
    yield installation
    for program in installation.programs:
        program.thaw()
        program.kill()


@asynccontextmanager
async def gateways(*xds_ports: int) -> AsyncIterator[list[Gateway]]:
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(run_gateway(xds_port=p)) for p in xds_ports]
        for gateway in gateways:
            await gateway.process.wait_ready()
        yield gateways


@asynccontextmanager
async def loading(gateway: Gateway) -> AsyncIterator[Load]:
    load = Load(gateway)
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load.run())
        try:
            yield load
        finally:
            load.stop()


async def takes(gateway: Gateway, key: str) -> set[str]:
    """Addresses to which new requests of a pool go."""
    return {
        host["address"]["socket_address"]["address"]
        for host in await gateway.hosts(key)
        if host["health_status"].get("eds_health_status") == "HEALTHY"
    }


async def until_takes(gateway: Gateway, key: str, count: int) -> None:
    async def holds() -> bool:
        return len(await takes(gateway, key)) == count

    await until(holds)


async def until_true(holds: Callable[[], object]) -> None:
    async def now() -> bool:
        return bool(await asyncio.to_thread(holds))

    await until(now)


async def test_the_story(installation: Installation) -> None:
    """Apply a pool, send requests, scale, lose a pod, delete the pool; and every right is used."""
    it, key = installation, installation.key
    _, xds, telemetry = it.start()
    it.deploy(replicas=2)
    assert "condition met" in await it.kubectl(
        "wait", "--for=condition=Ready", "--timeout=30s", "trimpool/llama"
    )
    async with gateways(xds) as [gateway]:
        await until_takes(gateway, key, 2)
        status, answer = await gateway.post(
            {"model": "llama", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
            "/v1/chat/completions",
        )
        assert (status, answer["model"]) == (200, "llama")
        status, _ = await gateway.get(f"/{key}/v1/models")
        assert status == 200

        async with loading(gateway) as load:
            for replicas in (6, 3):
                await it.kubectl("scale", f"--replicas={replicas}", "deployment/web")
                await until_takes(gateway, key, replicas)
                await load.passes(50)
            await it.kubectl("rollout", "status", "--timeout=30s", "deployment/web")
            pods = it.cluster.pods(it.namespace, "web")
            leaver = next(pod for pod in pods if not pod.terminating)
            it.cluster.annotate(it.namespace, leaver.name, switches='{"ready": false}')
            await until_true(lambda: not ready(it.cluster, it.namespace, leaver.name))
            unready_s = time.monotonic()

            async def gone() -> bool:
                return leaver.address not in await takes(gateway, key)

            await until(gone)
            assert time.monotonic() - unready_s < LEAVE_S
            await load.passes(50)
        assert load.failed == []

        columns = (await it.kubectl("get", "trimpool")).split("\n")
        assert columns[0].split()[:4] == ["NAME", "READY", "ENDPOINTS", "VERDICT"]
        await until_true(lambda: it.condition("Published").get("reason") == "Accepted")

        async with gateway.open_stream(tokens=3000) as stream:
            await it.kubectl("delete", "--wait", "--timeout=10s", "trimpool/llama")

            async def unknown() -> bool:
                return await gateway.hosts(key) == []

            await until(unknown)
            assert (await stream.text()).rstrip().endswith("data: [DONE]")
    events = await it.kubectl("get", "events", "--output=jsonpath={.items[*].reason}")
    assert "Serving" in events
    assert await probe(telemetry, "/healthz") == 200
    await stop(it.programs[0])
    # A watch is in the audit log when it has ended.
    await until_true(lambda: sum(verb == "watch" for verb, *_ in it.asked()) == 2)
    assert it.asked() == it.allowed()
    assert not any("*" in each or "secrets" in each for each in it.allowed())


async def test_one_of_two_replicas_writes_and_the_other_when_it_is_killed(
    installation: Installation,
) -> None:
    it, key = installation, installation.key
    first, xds, _ = it.start()
    it.deploy(replicas=2)
    await until_true(lambda: it.condition("Ready").get("status") == "True")
    leader = it.holder()
    _, other_xds, other_telemetry = it.start()
    async with gateways(xds, other_xds) as [one, other], loading(other) as load:
        for gateway in (one, other):
            await until_takes(gateway, key, 2)
        assert await probe(other_telemetry, "/readyz") == 200
        assert it.holder() == leader
        first.kill()
        killed_s = time.monotonic()
        await it.kubectl("scale", "--replicas=0", "deployment/web")
        await until_true(lambda: it.condition("Ready").get("status") == "False")
        assert time.monotonic() - killed_s < TAKE_OVER_S
        assert it.holder() not in {"", leader}
        del load


async def test_a_replica_that_is_told_to_go_hands_over_at_once(installation: Installation) -> None:
    it = installation
    first, *_ = it.start()
    it.deploy(replicas=1)
    await until_true(lambda: it.condition("Ready").get("status") == "True")
    leader = it.holder()
    _, _, telemetry = it.start()
    await until(lambda: says(telemetry, "/readyz", 200))
    asked_s = time.monotonic()
    await stop(first)
    await until_true(lambda: it.holder() not in {"", leader})
    assert time.monotonic() - asked_s < TAKE_OVER_S / 2


@pytest.mark.parametrize("hang", [False, True], ids=["gone", "hanging"])
async def test_while_the_api_server_is_away_traffic_goes_on_and_then_all_is_well(
    installation: Installation, *, hang: bool
) -> None:
    it, key = installation, installation.key
    program, xds, telemetry = it.start()
    it.deploy(replicas=3)
    async with gateways(xds) as [gateway]:
        await until_takes(gateway, key, 3)
        async with loading(gateway) as load:
            await load.passes(20)
            await asyncio.to_thread(it.plane.stop_apiserver, hang=hang)
            ticks = await ticked(telemetry, key)
            away_until_s = time.monotonic() + OUTAGE_S
            while time.monotonic() < away_until_s:
                await load.passes(50)
            assert await ticked(telemetry, key) - ticks > OUTAGE_S / 2
            assert await probe(telemetry, "/healthz") == 200
            assert await probe(telemetry, "/readyz") == 200
            await asyncio.to_thread(it.plane.start_apiserver)
            await it.kubectl("scale", "--replicas=5", "deployment/web")
            # The cluster's own controllers take their time to come back.
            await it.kubectl("rollout", "status", "--timeout=120s", "deployment/web")
            await until_takes(gateway, key, 5)
            await load.passes(20)
        assert load.failed == []
        await it.kubectl("scale", "--replicas=0", "deployment/web")
        await until_true(lambda: it.condition("Ready").get("status") == "False")
    assert program.runs


async def test_nothing_is_left_stuck(installation: Installation, plane: ControlPlane) -> None:
    """Neither while the operator runs nor when it is gone."""
    it = installation
    _, xds, _ = it.start()
    it.deploy(replicas=1)
    async with gateways(xds) as [gateway]:
        await until_takes(gateway, it.key, 1)
        doomed = f"{it.namespace}-doomed"
        await asyncio.to_thread(plane.create_namespace, doomed)
        plane.apply([pool("other")], namespace=doomed)
        await until_true(lambda: "status" in plane.api.get(path_of(doomed, "other")))
        await it.kubectl("delete", "namespace", doomed, "--wait", "--timeout=30s")
        it.programs[0].kill()
        await it.kubectl("delete", "--wait", "--timeout=10s", "trimpool/llama")
        status, _ = await gateway.post(
            {"model": "llama", "prompt": "x", "max_tokens": 1}, f"/{it.key}/v1/completions"
        )
        assert status == 200  # Envoy goes on with what it was told last


async def test_a_kubeconfig_that_leads_nowhere_does_not_end_the_operator(
    installation: Installation,
) -> None:
    """It says that it is not ready, and that it lives: a restart would not help."""
    it = installation
    it.plane.stop_apiserver()
    try:
        program, _, telemetry = it.start()
        await until(lambda: says(telemetry, "/healthz", 200))
        assert await probe(telemetry, "/readyz") == 503
        assert program.runs
    finally:
        it.plane.start_apiserver()
    await until(lambda: says(telemetry, "/readyz", 200))


def path_of(namespace: str, name: str) -> str:
    return f"{POOLS}/namespaces/{namespace}/inferencepools/{name}"


def ready(cluster: Cluster, namespace: str, name: str) -> bool:
    return next(p.ready for p in cluster.pods(namespace, "web") if p.name == name)


async def stop(program: Program) -> None:
    os.kill(program.pid, signal.SIGTERM)
    assert await asyncio.to_thread(program._process.wait, 10) == 0


async def fetch(port: int, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


async def probe(port: int, path: str) -> int:
    return (await fetch(port, path))[0]


async def says(port: int, path: str, status: int) -> bool:
    try:
        return await probe(port, path) == status
    except aiohttp.ClientError:
        return False


async def ticked(port: int, key: str) -> float:
    _, page = await fetch(port, "/metrics")
    name = f'trimtab_pool_tick_seconds_count{{pool="{key}"}}'
    return float(next(line.split()[-1] for line in page.splitlines() if line.startswith(name)))
