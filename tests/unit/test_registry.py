"""What the API server said, in whatever order, amounts to who serves each pool."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools import pool as pool_object
from trimtab.core.model import Endpoint
from trimtab.registry import Kind, Registry, Served


def pool(name: str = "llama", version: int = 1, uid: str = "", **spec: Any) -> dict[str, Any]:
    item = pool_object(name, **spec)
    item["metadata"] |= {
        "namespace": "team",
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "generation": 1,
    }
    return item


def pod(
    name: str = "a",
    version: int = 1,
    *,
    ready: bool = True,
    leaving: bool = False,
    uid: str = "",
    labels: dict[str, str] | None = None,
    namespace: str = "team",
    address: str | None = "10.0.0.1",
    phase: str = "Running",
    heard_of: bool = True,
    gate: str = "",
) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "labels": {"app": "llama"} if labels is None else labels,
    }
    if leaving:
        metadata["deletionTimestamp"] = "2026-11-25T00:00:00Z"
    conditions = [{"type": "ContainersReady", "status": "True" if ready else "False"}]
    conditions += [{"type": "Ready", "status": "True" if ready and heard_of else "False"}]
    conditions += [{"type": gate, "status": "False"}] if gate else []
    spec = {"nodeName": "node-0", "readinessGates": [{"conditionType": gate}] if gate else []}
    status = {"phase": phase, "podIP": address, "conditions": conditions}
    return {"metadata": metadata, "spec": spec, "status": status}


def registry(*pods: dict[str, Any], pools: list[dict[str, Any]] | None = None) -> Registry:
    registry = Registry()
    registry.listed(Kind.POOLS, [pool()] if pools is None else pools, version="1")
    registry.listed(Kind.PODS, pods, version="1")
    return registry


def served(registry: Registry, key: str = "team/llama") -> Served:
    return registry.served()[key]


def serving(registry: Registry, key: str = "team/llama") -> set[str]:
    return {endpoint.pod for endpoint in served(registry, key).endpoints}


def test_absence_means_something_once_each_kind_was_listed() -> None:
    registry = Registry()
    registry.listed(Kind.PODS, [], version="1")
    registry.told(Kind.POOLS, pool())
    assert not registry.synced
    registry.listed(Kind.POOLS, [], version="1")
    assert registry.synced


def test_a_pod_is_an_endpoint_on_each_port_of_the_pool() -> None:
    two = [pool(targetPorts=[{"number": 8000}, {"number": 8001}])]
    assert served(registry(pod(), pools=two)).endpoints == {
        Endpoint("a", "10.0.0.1", 8000),
        Endpoint("a", "10.0.0.1", 8001),
    }


@pytest.mark.parametrize(
    "other",
    [
        pod(ready=False),
        pod(address=None),
        pod(labels={"app": "mistral"}),
        pod(labels={}),
        pod(namespace="other"),
        pod(phase="Succeeded"),
        pod(phase="Failed"),
    ],
    ids=["unready", "without address", "other label", "no label", "elsewhere", "over", "failed"],
)
def test_only_a_ready_pod_that_the_pool_selects_serves(other: dict[str, Any]) -> None:
    assert not served(registry(other)).endpoints


def test_a_pod_that_is_asked_to_leave_drains_until_it_is_gone() -> None:
    """Its readiness says nothing then: an engine that ends turns not ready first."""
    known = registry(pod(), pod("b", address="10.0.0.2"))
    known.told(Kind.PODS, pod("b", 2, address="10.0.0.2", leaving=True, ready=False))
    assert serving(known) == {"a"}
    assert served(known).draining == {Endpoint("b", "10.0.0.2", 8000)}
    known.told(Kind.PODS, pod("b", 3, address="10.0.0.2", leaving=True), gone=True)
    assert not served(known).draining


def test_who_drains_at_an_address_that_another_has_by_now_is_no_endpoint() -> None:
    known = registry(pod("new"), pod("old", leaving=True))
    assert serving(known) == {"new"}
    assert not served(known).draining


@pytest.mark.parametrize(
    ("change", "remain"),
    [
        (pod(version=2, ready=False), set()),
        (pod(version=2, labels={"app": "mistral"}), set()),
        (pod(version=2, address="10.0.0.9"), {"a"}),
    ],
    ids=["turns not ready", "loses its label", "moves"],
)
def test_a_change_of_a_pod_counts_at_once(change: dict[str, Any], remain: set[str]) -> None:
    known = registry(pod())
    assert serving(known) == {"a"}
    known.told(Kind.PODS, change)
    assert serving(known) == remain


def test_where_no_node_is_heard_of_the_last_word_of_the_kubelets_holds() -> None:
    """After a minute without API server, Kubernetes calls all pods unready; they are not."""
    known = registry(pod(), pod("b", address="10.0.0.2"), pod("c", address="10.0.0.3", ready=False))
    known.told(Kind.PODS, pod(version=2, heard_of=False))
    assert serving(known) == {"b"}  # one node alone is more likely dead
    known.told(Kind.PODS, pod("b", 3, address="10.0.0.2", heard_of=False))
    assert serving(known) == {"a", "b"}
    known.told(Kind.PODS, pod(version=4))
    assert serving(known) == {"a"}


@pytest.mark.parametrize(
    "other",
    [pod(heard_of=False, gate="example.com/gate"), pod(heard_of=False, leaving=True)],
    ids=["held back by a gate", "leaving"],
)
def test_who_is_unready_for_a_reason_of_his_own_does_not_serve(other: dict[str, Any]) -> None:
    assert not serving(registry(other))


def test_a_pod_that_gains_the_label_comes_in() -> None:
    known = registry(pod(labels={}))
    assert not serving(known)
    known.told(Kind.PODS, pod(version=2))
    assert serving(known) == {"a"}


def test_a_pool_that_changes_its_selector_has_other_endpoints() -> None:
    known = registry(pod(), pod("b", labels={"app": "mistral"}, address="10.0.0.2"))
    known.told(Kind.POOLS, pool(version=2, selector={"matchLabels": {"app": "mistral"}}))
    assert serving(known) == {"b"}


def test_an_older_word_never_undoes_a_newer_one() -> None:
    known = registry(pod())
    known.told(Kind.PODS, pod(version=5, ready=False))
    known.told(Kind.PODS, pod(version=4))
    assert not serving(known)
    known.told(Kind.PODS, pod(version=6))
    known.told(Kind.PODS, pod(version=5), gone=True)
    assert serving(known) == {"a"}


def test_a_list_says_by_omission_what_is_gone() -> None:
    """Kopf tells no handler of what vanished while its stream was cut."""
    known = registry(pod(), pod("b", address="10.0.0.2"))
    known.listed(Kind.PODS, [pod()], version="7")
    assert serving(known) == {"a"}
    known.listed(Kind.POOLS, [], version="7")
    assert not known.served()


def test_what_came_after_a_list_stays_and_what_was_before_it_does_not_come_back() -> None:
    known = registry()
    known.told(Kind.PODS, pod(version=9))
    known.listed(Kind.PODS, [], version="8")
    assert serving(known) == {"a"}
    known.listed(Kind.PODS, [], version="10")
    known.told(Kind.PODS, pod(version=9))
    assert not serving(known)


def test_a_cluster_restored_from_a_backup_counts_from_its_lower_versions() -> None:
    known = registry(pod(version=100))
    known.listed(Kind.PODS, [pod(version=100)], version="100")
    known.listed(Kind.PODS, [pod("b", version=5, address="10.0.0.2")], version="6")
    assert serving(known) == {"b"}
    known.told(Kind.PODS, pod("b", version=7, address="10.0.0.2", ready=False))
    assert not serving(known)


def test_a_name_that_comes_back_is_not_undone_by_the_last_word_on_its_first_bearer() -> None:
    known = registry(pod(uid="first"))
    known.told(Kind.PODS, pod(version=5, uid="second"))
    known.told(Kind.PODS, pod(version=4, uid="first"), gone=True)
    assert serving(known) == {"a"}
    known.told(Kind.POOLS, pool(version=6, uid="again", selector={"matchLabels": {"x": "y"}}))
    known.told(Kind.POOLS, pool(version=5), gone=True)
    assert served(known).pool.uid == "again"
    assert not serving(known)


def test_a_spec_that_is_not_understood_leaves_the_last_that_was() -> None:
    known = registry(pod())
    known.told(Kind.POOLS, pool(version=2, engine="Difference"))
    assert serving(known) == {"a"}
    assert served(known).spec.engine == "Auto"
    assert "engine" in known.pools()["team/llama"].complaint


def test_a_pool_that_was_never_understood_is_known_and_not_served() -> None:
    known = registry(pools=[pool(engine="Difference")])
    assert not known.served()
    assert "engine" in known.pools()["team/llama"].complaint


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {"metadata": None},
        {"metadata": {"name": 7, "namespace": "team"}},
        {"metadata": {"name": "a", "namespace": "team"}, "spec": 3, "status": [1]},
        {"metadata": {"name": "a", "namespace": "team"}, "status": {"conditions": ["Ready", 1]}},
    ],
)
@pytest.mark.parametrize("kind", Kind)
def test_whatever_is_told_nothing_breaks(kind: Kind, nonsense: dict[str, Any]) -> None:
    known = registry(pod())
    known.told(kind, nonsense)
    known.told(kind, nonsense, gone=True)
    assert serving(known) == {"a"}


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[Kind, dict[str, Any], bool]], Registry]:
    """What happened to some pods and a pool, and what is known by who was told of the end only."""
    there: dict[str, dict[str, Any]] = {}
    words: list[tuple[Kind, dict[str, Any], bool]] = []
    version = 1
    for version in range(2, 2 + draw(st.integers(0, 25))):
        name = draw(st.sampled_from("abc"))
        kind = draw(st.sampled_from(["change", "change", "delete", "pool"]))
        if kind == "pool":
            app = draw(st.sampled_from(["llama", "mistral"]))
            there["pool"] = pool(version=version, selector={"matchLabels": {"app": app}})
            words.append((Kind.POOLS, there["pool"], False))
        elif kind == "delete" and name in there:
            gone = copy.deepcopy(there.pop(name))
            gone["metadata"]["resourceVersion"] = str(version)
            words.append((Kind.PODS, gone, True))
        else:
            before = there.get(name)
            there[name] = pod(
                name,
                version,
                uid=before["metadata"]["uid"] if before else f"{name}-{version}",
                ready=draw(st.booleans()),
                leaving=draw(st.booleans()),
                labels={"app": draw(st.sampled_from(["llama", "mistral"]))},
                address=f"10.0.0.{ord(name)}",
            )
            words.append((Kind.PODS, there[name], False))
    told = Registry()
    relist(told, there, str(version))
    return words, told


def relist(registry: Registry, there: dict[str, dict[str, Any]], version: str) -> None:
    pods = [item for name, item in there.items() if name != "pool"]
    registry.listed(Kind.PODS, pods, version=version)
    registry.listed(Kind.POOLS, [there["pool"]] if "pool" in there else [], version=version)


def end_of(words: list[tuple[Kind, dict[str, Any], bool]]) -> tuple[dict[str, Any], str]:
    there: dict[str, Any] = {}
    version = "1"
    for kind, item, gone in words:
        name = "pool" if kind is Kind.POOLS else item["metadata"]["name"]
        version = item["metadata"]["resourceVersion"]
        if gone:
            there.pop(name, None)
        else:
            there[name] = item
    return there, version


@given(histories(), st.data())
def test_after_a_list_it_does_not_matter_what_was_lost_doubled_or_overtaken(
    history: tuple[list[tuple[Kind, dict[str, Any], bool]], Registry], data: st.DataObject
) -> None:
    words, ideal = history
    heard = data.draw(st.lists(st.sampled_from(words), max_size=40) if words else st.just([]))
    late = data.draw(st.lists(st.sampled_from(words), max_size=5) if words else st.just([]))
    known = Registry()
    for kind, item, gone in heard:
        known.told(kind, item, gone=gone)
        known.served()  # looking must not change anything
    relist(known, *end_of(words))
    for kind, item, gone in late:
        known.told(kind, item, gone=gone)
    assert dict(known.served()) == dict(ideal.served())


@given(histories())
def test_told_of_everything_in_order_the_answer_is_that_of_a_list(
    history: tuple[list[tuple[Kind, dict[str, Any], bool]], Registry],
) -> None:
    words, ideal = history
    known = Registry()
    for kind, item, gone in words:
        known.told(kind, item, gone=gone)
        known.served()
    assert dict(known.served()) == dict(ideal.served())
