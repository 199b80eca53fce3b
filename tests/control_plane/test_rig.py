"""The rig that every cluster test stands on does what it says: docs/testing.md."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.api import ApiError
from cluster.fake_nodes import ZONES, engines
from cluster.programs import Program, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.control_plane import ControlPlane
    from cluster.fake_nodes import Cluster, Pod

TIMEOUT_S = 2.0  # a packet to an address without a listener is refused, not lost
ROLLED_OUT = ("rollout", "status", "--timeout=30s")


def ask(address: str, port: int = 8000, **body: Any) -> Any:
    """Return the JSON of a chat completion."""
    with streaming(address, port, **body) as response:
        assert response.status == 200
        return json.load(response)


@contextmanager
def streaming(address: str, port: int = 8000, **body: Any) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    with closing(connection):
        messages = [{"role": "user", "content": "Hello"}]
        what = {"model": "llama", "messages": messages, "max_tokens": 4, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(what | body), headers)
        yield connection.getresponse()


def answers(address: str, port: int = 8000) -> bool:
    try:
        ask(address, port)
    except OSError:
        return False
    return True


def deploy(cluster: Cluster, namespace: str, replicas: int, **options: Any) -> list[Pod]:
    """Run that many engines named web, and return their pods when all are Ready."""
    cluster.plane.apply(engines("web", replicas=replicas, **options), namespace=namespace)
    cluster.plane.kubectl(*ROLLED_OUT, f"--namespace={namespace}", "deployment/web")
    return cluster.pods(namespace, "web")


def names(cluster: Cluster, namespace: str) -> set[str]:
    return {pod.name for pod in cluster.pods(namespace, "web")}


def test_the_control_plane_is_of_the_version_that_the_tools_pin(plane: ControlPlane) -> None:
    assert plane.api.get("/version")["gitVersion"].startswith("v1.37.")
    assert set(plane.usage()) >= {"etcd", "kube-apiserver"}
    assert all(usage.rss_mib > 10 for usage in plane.usage().values())


def test_a_service_account_may_do_what_it_was_granted_and_nothing_else(
    plane: ControlPlane, namespace: str
) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    with closing(plane.api_with(plane.token_for(f"{namespace}/default"))) as api:
        with pytest.raises(ApiError, match="configmaps is forbidden") as refused:
            api.get(path)
        assert (refused.value.status, refused.value.reason) == (403, "Forbidden")

        here = f"--namespace={namespace}"
        plane.kubectl(here, "create", "role", "see", "--verb=list", "--resource=configmaps")
        account = f"--serviceaccount={namespace}:default"
        plane.kubectl(here, "create", "rolebinding", "see", "--role=see", account)

        def granted() -> bool:
            try:
                return bool(api.get(path)["items"])
            except ApiError:
                return False

        until(granted, "the role to hold")
        with pytest.raises(ApiError, match="secrets is forbidden"):
            api.get(f"/api/v1/namespaces/{namespace}/secrets")

    requests = plane.requests_of(f"{namespace}/default")
    asked = Counter((r.verb, r.resource, r.namespace, r.status) for r in requests)
    assert set(asked) == {
        ("list", "configmaps", namespace, 403),
        ("list", "configmaps", namespace, 200),
        ("list", "secrets", namespace, 403),
    }


def test_what_a_killed_test_run_started_ends_with_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from cluster.programs import Program;"
        "log = pathlib.Path(sys.argv[1]);"
        "print(Program('sleep', ['sleep', '1000'], log=log, env={}).pid, flush=True);"
        "sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        until(lambda: _comm(pid) == "sleep", "its start")
        starter.send_signal(signal.SIGKILL)

    until(lambda: _ended(pid), "the end of what it had started")


def test_a_program_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    started: list[Program] = []

    def start() -> None:
        started.append(Program("sleep", ["sleep", "1000"], log=tmp_path / "log", env={}))
        until(lambda: _comm(started[0].pid) == "sleep", "its start")

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert started[0].runs
    started[0].kill()


def _comm(pid: int) -> str:
    return Path("/proc", str(pid), "comm").read_text().strip()


def _ended(pid: int) -> bool:
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"  # nobody may have collected it


def test_a_deployment_becomes_pods_that_answer_on_their_own_addresses(
    cluster: Cluster, namespace: str
) -> None:
    pods = deploy(cluster, namespace, 4, model="tiny")

    assert all(pod.ready for pod in pods)
    assert len({pod.address for pod in pods}) == 4
    for pod in pods:
        answer = ask(pod.address, model="tiny")
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("tiny", 4)
    nodes = {
        node["metadata"]["name"]: node for node in cluster.plane.api.get("/api/v1/nodes")["items"]
    }
    zones = [nodes[pod.node]["metadata"]["labels"]["topology.kubernetes.io/zone"] for pod in pods]
    assert set(zones) == set(ZONES)


def test_a_pod_may_be_several_engines(cluster: Cluster, namespace: str) -> None:
    [pod] = deploy(cluster, namespace, 1, ports=(8000, 8001))

    assert answers(pod.address, 8000)
    assert answers(pod.address, 8001)
    assert not answers(pod.address, 8002)


def test_a_pod_of_any_other_image_is_ready_and_answers_nothing(
    cluster: Cluster, namespace: str
) -> None:
    service, deployment = engines("web", replicas=1)
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = "example.com/other:1"
    cluster.plane.apply([service, deployment], namespace=namespace)
    cluster.plane.kubectl(*ROLLED_OUT, f"--namespace={namespace}", "deployment/web")

    [pod] = cluster.pods(namespace, "web")
    assert pod.ready
    assert not answers(pod.address)


def test_a_cluster_ip_spreads_connections_over_the_pods(
    cluster_ips: Cluster, namespace: str
) -> None:
    pods = deploy(cluster_ips, namespace, 3)
    service = cluster_ips.plane.api.get(f"/api/v1/namespaces/{namespace}/services/web")
    address = service["spec"]["clusterIP"]

    until(lambda: answers(address, 80), "an answer by ClusterIP")  # kube-proxy follows with a lag

    def spread() -> bool:
        ask(address, 80)
        return all(served(pod) for pod in pods)

    until(spread, "a request at each pod")


def served(pod: Pod) -> int:
    with closing(http.client.HTTPConnection(pod.address, 8000, timeout=TIMEOUT_S)) as connection:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    lines = [line for line in page.splitlines() if line.startswith("vllm:request_success_total")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


def test_engines_come_and_go_with_the_replica_count(cluster: Cluster, namespace: str) -> None:
    before = {pod.address for pod in deploy(cluster, namespace, 2)}

    def scaled(replicas: int) -> set[str]:
        here = f"--namespace={namespace}"
        cluster.plane.kubectl(here, "scale", "deployment/web", f"--replicas={replicas}")
        cluster.plane.kubectl(*ROLLED_OUT, here, "deployment/web")
        until(lambda: len(cluster.pods(namespace, "web")) == replicas, f"{replicas} pods")
        until(lambda: len(cluster.endpoints(namespace, "web")) == replicas, "as many endpoints")
        return set(cluster.endpoints(namespace, "web"))

    six = scaled(6)
    assert six > before
    assert all(answers(address) for address in six)

    three = scaled(3)
    assert three < six
    assert Counter(answers(address) for address in six) == {True: 3, False: 3}


def test_an_unready_pod_leaves_the_endpoints_and_returns(cluster: Cluster, namespace: str) -> None:
    pods = deploy(cluster, namespace, 2)

    def ready() -> set[str]:
        found = cluster.endpoints(namespace, "web").items()
        return {address for address, conditions in found if conditions["ready"]}

    until(lambda: len(ready()) == 2, "two ready endpoints")
    cluster.annotate(namespace, pods[0].name, ready="false")
    until(lambda: ready() == {pods[1].address}, "one ready endpoint")
    assert answers(pods[0].address)  # it still runs

    cluster.annotate(namespace, pods[0].name, ready="true")
    until(lambda: len(ready()) == 2, "two ready endpoints again")


def test_a_crashed_engine_is_alone_unready_until_revived(cluster: Cluster, namespace: str) -> None:
    pods = deploy(cluster, namespace, 2)

    cluster.annotate(namespace, pods[0].name, switches='{"crashed": true}')
    until(lambda: [pod.ready for pod in cluster.pods(namespace, "web")] == [False, True], "unready")
    assert [answers(pod.address) for pod in pods] == [False, True]

    cluster.annotate(namespace, pods[0].name, switches='{"crashed": false}')
    until(lambda: all(pod.ready for pod in cluster.pods(namespace, "web")), "ready again")
    assert answers(pods[0].address)


def test_a_deleted_pod_serves_on_then_drains_then_goes(cluster: Cluster, namespace: str) -> None:
    [pod] = deploy(cluster, namespace, 1, speed=1.0, pre_stop_s=1)
    path = f"/api/v1/namespaces/{namespace}/pods/{pod.name}"
    with streaming(pod.address, stream=True, max_tokens=150) as stream:
        stream.readline()
        cluster.plane.api.delete(path)

        def conditions() -> dict[str, bool]:
            return cluster.endpoints(namespace, "web").get(pod.address, {})

        until(lambda: conditions().get("terminating"), "a terminating endpoint")
        assert conditions() == {"ready": False, "serving": True, "terminating": True}
        assert answers(pod.address)  # during preStop
        until(lambda: not answers(pod.address), "no new connections")
        assert cluster.plane.api.get(path)["metadata"]["deletionTimestamp"]
        assert stream.read().endswith(b"data: [DONE]\n\n")

    until(lambda: pod.name not in names(cluster, namespace), "its end")


def test_a_stream_longer_than_the_grace_period_is_cut(cluster: Cluster, namespace: str) -> None:
    [pod] = deploy(cluster, namespace, 1, speed=1.0, grace_s=1)
    with streaming(pod.address, stream=True, max_tokens=10_000) as stream:
        stream.readline()
        cluster.plane.api.delete(f"/api/v1/namespaces/{namespace}/pods/{pod.name}")
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            stream.read()


@pytest.mark.parametrize("hang", [False, True], ids=["gone", "hanging"])
def test_engines_outlive_an_outage_of_the_api_server(
    cluster: Cluster, namespace: str, *, hang: bool
) -> None:
    [pod] = deploy(cluster, namespace, 1)
    token = cluster.plane.token_for(f"{namespace}/default")
    cluster.plane.stop_apiserver(hang=hang)
    try:
        with (
            closing(cluster.plane.api_with(token, timeout_s=0.5)) as api,
            pytest.raises(OSError, match="timed out" if hang else "refused"),
        ):
            api.get("/version")
        assert answers(pod.address)
    finally:
        cluster.plane.start_apiserver()

    here = f"--namespace={namespace}"
    cluster.plane.kubectl(here, "scale", "deployment/web", "--replicas=2")
    cluster.plane.kubectl(*ROLLED_OUT, here, "deployment/web")
    assert all(answers(pod.address) for pod in cluster.pods(namespace, "web"))
