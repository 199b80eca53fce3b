"""Level B: nodes that exist as objects only, pods that answer on their own addresses.

kwok plays nodes and pod status, `kubelet` starts an engine for each pod of its image, kube-proxy
(where the machine has nft) makes ClusterIPs work. All of it, and everything that tests start, runs
in one private network: see `network`.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.control_plane import POD_RANGE
from cluster.kubelet import IMAGE
from cluster.network import NODE_ADDRESS
from cluster.tools import UnavailableError, system_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cluster.control_plane import ControlPlane

HERE = Path(__file__).parent
ZONES = ("zone-a", "zone-b")
ROOM = {"cpu": "64", "memory": "512Gi", "pods": "250"}  # a node's; its /24 has as many addresses


@dataclass(frozen=True, slots=True)
class Pod:
    """What a test wants to know of a pod."""

    name: str
    node: str
    address: str
    ready: bool
    terminating: bool


class Cluster:
    """A control plane with nodes; `start` makes one."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self._nodes = 0

    @classmethod
    @contextmanager
    def start(cls, plane: ControlPlane, *, nodes: int = 4) -> Iterator[Self]:
        """Give a control plane nodes; they end with it.

        Call `network.enter()` before the control plane starts.
        """
        cluster = cls(plane)
        plane.start_part(
            "kwok",
            f"--kubeconfig={plane.kubeconfig_of('kwok')}",
            f"--config={HERE / 'kwok.yaml'}",
            "--manage-all-nodes=true",
            f"--node-ip={NODE_ADDRESS}",
            f"--cidr={POD_RANGE}",
            "--node-lease-duration-seconds=40",
        )
        kubeconfig = plane.kubeconfig_of("kubelet")
        command = (sys.executable, "-m", "cluster.kubelet", kubeconfig)
        plane.run("kubelet", *command, PYTHONPATH=str(HERE.parent))
        cluster.add_nodes(nodes)
        with suppress(UnavailableError):
            system_program("nft")
            cluster._start_proxy()
        yield cluster

    def add_nodes(self, count: int) -> None:
        """Add nodes of alternating zones."""
        for number in range(self._nodes, self._nodes + count):
            labels = {
                "kubernetes.io/hostname": f"node-{number}",
                "topology.kubernetes.io/zone": ZONES[number % len(ZONES)],
            }
            node = {
                "metadata": {"name": f"node-{number}", "labels": labels},
                "status": {"capacity": ROOM, "allocatable": ROOM},
            }
            self.plane.api.create("/api/v1/nodes", node)
        self._nodes += count

    def pods(self, namespace: str, app: str) -> list[Pod]:
        """Return the pods with that label `app`, by name."""
        path = f"/api/v1/namespaces/{namespace}/pods?labelSelector=app%3D{app}"
        return sorted(map(_pod, self.plane.api.get(path)["items"]), key=lambda pod: pod.name)

    def endpoints(self, namespace: str, service: str) -> dict[str, dict[str, bool]]:
        """Return the conditions of a Service's endpoints, by address, from its EndpointSlices."""
        slices = self.plane.api.get(
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
            f"?labelSelector=kubernetes.io/service-name%3D{service}"
        )["items"]
        return {
            endpoint["addresses"][0]: endpoint["conditions"]
            for each in slices
            for endpoint in each["endpoints"] or ()
        }

    def annotate(self, namespace: str, pod: str, **annotations: str | None) -> None:
        """Set annotations `trimtab.test/NAME` of a pod, such as ready="false" or switches=JSON."""
        named = {f"trimtab.test/{name}": value for name, value in annotations.items()}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}"
        self.plane.api.patch(path, {"metadata": {"annotations": named}})

    def _start_proxy(self) -> None:
        plane = self.plane
        config = plane.directory / "kube-proxy.json"
        what = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": POD_RANGE,
            "hostnameOverride": "node-0",
            "bindAddress": NODE_ADDRESS,
            "clientConnection": {"kubeconfig": str(plane.kubeconfig_of("system:kube-proxy"))},
            "conntrack": {"maxPerCore": 0},  # a kernel setting that is not ours
        }
        config.write_text(json.dumps(what))
        plane.start_part("kube-proxy", f"--config={config}")


def engines(
    name: str,
    *,
    replicas: int,
    model: str = "llama",
    speed: float = 50.0,
    ports: Sequence[int] = (8000,),
    grace_s: int = 30,
    pre_stop_s: int = 0,
    annotations: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return a Deployment of simulated engines, label `app` = name, and its Service on port 80."""
    labels = {"app": name}
    arguments = [f"--ports={','.join(map(str, ports))}", f"--model={model}", f"--speed={speed}"]
    container: dict[str, Any] = {
        "name": "engine",
        "image": IMAGE,
        "args": ["--host=0.0.0.0", *arguments],
        "ports": [{"containerPort": port} for port in ports],
    }
    if pre_stop_s:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": pre_stop_s}}}
    template = {
        "metadata": {"labels": labels, "annotations": dict(annotations or {})},
        "spec": {"terminationGracePeriodSeconds": grace_s, "containers": [container]},
    }
    deployment = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    service = {"selector": labels, "ports": [{"port": 80, "targetPort": ports[0]}]}
    metadata = {"name": name, "labels": labels}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": deployment},
    ]


def _pod(what: Mapping[str, Any]) -> Pod:
    conditions = {each["type"]: each["status"] for each in what["status"].get("conditions", ())}
    return Pod(
        name=what["metadata"]["name"],
        node=what["spec"].get("nodeName", ""),
        address=what["status"].get("podIP", ""),
        ready=conditions.get("Ready") == "True",
        terminating="deletionTimestamp" in what["metadata"],
    )
