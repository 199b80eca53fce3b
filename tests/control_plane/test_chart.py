"""What Helm renders is applied to the real API server, under admission, and rights are tried."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from cluster.api import Api, ApiError
from cluster.programs import until
from helm_chart import CASES, objects
from pools import pool

if TYPE_CHECKING:
    from cluster.control_plane import ControlPlane

POOLS = "/apis/trimtab.dev/v1alpha1"
RESTRICTED = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
FOREIGN = (
    "/api/v1/secrets",
    "/api/v1/configmaps",
    "/api/v1/nodes",
    "/apis/apps/v1/deployments",
    "/apis/coordination.k8s.io/v1/leases",
)


def install(
    plane: ControlPlane, namespace: str, values: dict[str, Any], *, name: str = "trimtab"
) -> None:
    plane.api.patch(f"/api/v1/namespaces/{namespace}", RESTRICTED)
    plane.apply(objects(values, name=name, namespace=namespace), namespace=namespace)
    plane.kubectl("wait", "--for=condition=Established", "crd/inferencepools.trimtab.dev")


def components(plane: ControlPlane, namespace: str) -> list[str]:
    pods = plane.api.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
    return sorted(pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods)


def refused(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except ApiError as error:
        return error.reason == "Forbidden"
    return False


def test_an_installation_gets_its_pods_past_admission(plane: ControlPlane, namespace: str) -> None:
    """The namespace enforces "restricted"; a pod that is not would never be created."""
    install(plane, namespace, {})
    expected = ["gateway", "gateway", "operator", "operator"]
    until(lambda: components(plane, namespace) == expected, "four pods", deadline_s=30)


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_taken_by_the_api_server(
    plane: ControlPlane, namespace: str, case: str
) -> None:
    values = CASES[case]
    if values.get("watch"):
        values = {**values, "watch": {**values["watch"], "namespace": namespace}}
    install(plane, namespace, values)


def test_the_operator_may_do_what_it_does_and_nothing_else(
    plane: ControlPlane, namespace: str
) -> None:
    install(plane, namespace, {})
    here = f"{POOLS}/namespaces/{namespace}/inferencepools"
    plane.api.create(here, pool())
    with closing(plane.api_with(plane.token_for(f"{namespace}/trimtab-operator"))) as api:
        # The rights follow the binding within moments.
        until(lambda: not refused(api, "/api/v1/pods"), "a right", deadline_s=10)
        assert api.get(f"{POOLS}/inferencepools")["items"]
        status = {"status": {"replicas": 1}}
        assert api.patch(f"{here}/llama/status", status)["status"] == {"replicas": 1}
        with pytest.raises(ApiError, match="forbidden"):
            api.patch(f"{here}/llama", {"spec": {"engine": "VLLM"}})
        with pytest.raises(ApiError, match="forbidden"):
            api.delete(f"{here}/llama")
        assert all(refused(api, path) for path in FOREIGN)


def test_within_one_namespace_the_operator_sees_no_other(
    plane: ControlPlane, namespace: str
) -> None:
    install(plane, namespace, {"watch": {"namespace": namespace}})
    with closing(plane.api_with(plane.token_for(f"{namespace}/trimtab-operator"))) as api:
        pods = f"/api/v1/namespaces/{namespace}/pods"
        until(lambda: not refused(api, pods), "a right", deadline_s=10)
        assert refused(api, "/api/v1/pods")
        assert refused(api, f"{POOLS}/inferencepools")


def test_the_gateway_has_no_rights(plane: ControlPlane, namespace: str) -> None:
    install(plane, namespace, {})
    with closing(plane.api_with(plane.token_for(f"{namespace}/trimtab-gateway"))) as api:
        assert refused(api, f"/api/v1/namespaces/{namespace}/pods")
        assert refused(api, f"{POOLS}/inferencepools")


def test_two_releases_live_side_by_side(plane: ControlPlane, namespace: str) -> None:
    install(plane, namespace, {}, name="one")
    install(plane, namespace, {"crds": {"enabled": False}}, name="two")
    until(lambda: len(components(plane, namespace)) == 8, "eight pods", deadline_s=30)
