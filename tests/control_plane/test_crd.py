"""The real API server takes what is right and says of everything else which field and rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.api import ApiError
from cluster.programs import until
from pools import EXAMPLE, INVALID, VALID, Refused, pool
from trimtab.api import InferencePool
from trimtab.core.conditions import Facts, status
from trimtab.core.model import Decision, Endpoint, EndpointReport, EndpointState, Snapshot

if TYPE_CHECKING:
    from cluster.control_plane import ControlPlane

CRD = Path("crds/inferencepools.yaml")
READY = "--for=condition=Ready"


@pytest.fixture(scope="module")
def pools(plane: ControlPlane) -> ControlPlane:
    """Give a control plane that knows InferencePools."""
    plane.apply(CRD.read_text())
    plane.kubectl("wait", "--for=condition=Established", "-f", str(CRD), "--timeout=30s")
    return plane


def path(namespace: str, name: str = "") -> str:
    return f"/apis/trimtab.dev/v1alpha1/namespaces/{namespace}/inferencepools/{name}".rstrip("/")


def create(plane: ControlPlane, namespace: str, what: dict[str, Any]) -> Any:
    # Strictly, as kubectl does: unknown fields are refused, not pruned.
    return plane.api.create(f"{path(namespace)}?fieldValidation=Strict", what)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_pool_is_taken_and_shows_all_its_defaults(
    pools: ControlPlane, namespace: str, name: str
) -> None:
    stored = create(pools, namespace, VALID[name])
    meant = InferencePool.model_validate({"spec": VALID[name]["spec"]})
    assert stored["spec"] == meant.model_dump(by_alias=True, mode="json")["spec"]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_pool_is_refused_with_the_field_and_the_rule(
    pools: ControlPlane, namespace: str, name: str
) -> None:
    wrong: Refused = INVALID[name]
    with pytest.raises(ApiError) as refused:
        create(pools, namespace, pool(**wrong.spec))
    assert refused.value.status in {400, 422}
    assert wrong.field in str(refused.value)
    assert wrong.rule in str(refused.value)


def test_several_mistakes_are_told_at_once(pools: ControlPlane, namespace: str) -> None:
    wrong = pool(engine="vllm", targetPorts=[{"number": 0}])
    with pytest.raises(
        ApiError, match=r"(?s)spec\.targetPorts.*spec\.engine|spec\.engine.*spec\.t"
    ):
        create(pools, namespace, wrong)


def test_a_null_is_not_stored_but_filled_with_the_default(
    pools: ControlPlane, namespace: str
) -> None:
    stored = create(pools, namespace, pool() | {"spec": {**pool()["spec"], "metrics": None}})
    assert stored["spec"]["metrics"]["intervalMilliseconds"] == 1000


def test_explain_reads_like_documentation(pools: ControlPlane) -> None:
    def told() -> str:
        return pools.kubectl("explain", "trimpool.spec.routing")

    def known() -> bool:
        try:
            told()
        except Exception:  # noqa: BLE001  # discovery follows the definition within a second
            return False
        return True

    until(known, "an explanation", deadline_s=30)
    text = told()
    for word in ("hostnames\t<[]string>", "models\t<[]string>", "minimumWeightPercent\t<integer>"):
        assert word in text
    assert "Empty: the pool's name." in " ".join(text.split())
    assert "<no description>" not in pools.kubectl("explain", "--recursive=false", "trimpool")
    enum = pools.kubectl("explain", "trimpool.spec.engine")
    assert "SGLang" in enum


def test_the_columns_tell_what_the_status_says(pools: ControlPlane, namespace: str) -> None:
    here = f"--namespace={namespace}"
    stored = create(pools, namespace, yaml.safe_load(EXAMPLE.read_text()))
    endpoint = Endpoint("llama-0", "10.0.0.1", 8000)
    report = EndpointReport(
        state=EndpointState.SERVING,
        weight=1000,
        backlog_tokens=12_345.6,
        drain_s=1.84,
        speed_ratio=0.98,
        age_s=0.2,
    )
    decision = Decision(snapshot=Snapshot({endpoint: 1000}), endpoints={endpoint: report})
    facts = Facts(
        generation=stored["metadata"]["generation"],
        pods=1,
        nodes={"llama-0": "gpu-1"},
        gateways=1,
        accepted=True,
    )
    said = status(decision, facts, {}, wall_s=1_700_000_000)
    pools.api.call(
        "PATCH",
        f"{path(namespace, 'llama')}/status?fieldManager=trimtab&force=true&fieldValidation=Strict",
        {
            "apiVersion": stored["apiVersion"],
            "kind": stored["kind"],
            "metadata": {"name": "llama"},
            "status": said,
        },
        content_type="application/apply-patch+yaml",
    )
    assert pools.api.get(path(namespace, "llama"))["status"] == said
    pools.kubectl("wait", here, READY, "trimpool/llama", "--timeout=5s")
    header, row = pools.kubectl("get", here, "trimpool").splitlines()
    assert header.split() == ["NAME", "READY", "ENDPOINTS", "VERDICT", "BACKLOG", "REPLICAS", "AGE"]
    assert row.split()[:4] == ["llama", "True", "1/1", "1.8s"]  # no verdict yet: nothing to split
    header, row = pools.kubectl("get", here, "trimpool", "-o", "wide").splitlines()
    assert header.split()[-3:] == ["METRICS", "PUBLISHED", "REASON"]
    assert "1 of 1 endpoints take new work." in row
    assert "llama" in pools.kubectl("get", here, "trimtab")


def test_a_status_of_256_endpoints_is_taken(pools: ControlPlane, namespace: str) -> None:
    create(pools, namespace, pool())
    report = EndpointReport(
        state=EndpointState.STALE,
        weight=1,
        backlog_tokens=float("inf"),
        drain_s=float("nan"),
        speed_ratio=1e300,
        age_s=float("inf"),
        reason="never a sample; " + "x" * 10_000,
    )
    endpoints = {Endpoint(f"p{n}" + "x" * 240, f"10.0.{n // 250}.{n % 250}", 1): report
                 for n in range(1000)}  # fmt: skip
    decision = Decision(snapshot=Snapshot(dict.fromkeys(endpoints, 1)), endpoints=endpoints)
    said = status(decision, Facts(generation=1, pods=1000), {}, wall_s=0)
    assert len(json.dumps(said)) < 500_000
    stored = pools.api.call(
        "PATCH",
        f"{path(namespace, 'llama')}/status?fieldValidation=Strict",
        {"status": said},
        content_type="application/merge-patch+json",
    )
    assert stored["status"] == said
