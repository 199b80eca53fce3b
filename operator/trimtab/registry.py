"""Pools and pods as the API server told of them, and who serves each pool by that.

What counts is the last that was said of an object, not the way there. Words may be lost, doubled or
overtaken: each carries its version and never undoes a newer one, and a list says by omission what
is gone. So whatever happened before, after a list of each kind the answer is the same.

A pod serves while it is ready. One that is asked to leave drains: what it works on goes on, new
work goes elsewhere. When the API server was away for a minute, Kubernetes hears of no node and
calls every pod unready; where that is so of a whole pool, the last word of the kubelets holds. A
pool whose spec cannot be understood keeps the last that could.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trimtab.api import InferencePoolSpec
from trimtab.core.model import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_OVER = frozenset({"Succeeded", "Failed"})  # such a pod keeps the address that others get next


class Kind(StrEnum):
    """What is watched, by its plural."""

    POOLS = "inferencepools"
    PODS = "pods"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What matters of a pod; the rest of the object is not kept."""

    namespace: str
    name: str
    uid: str
    version: int
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    """Empty until it has one, and when it is over."""
    node: str = ""
    ready: bool = False
    vouched: bool = False
    """Its kubelet called it ready last; if it is not, its node is not heard of."""
    leaving: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """An InferencePool object."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created: str
    spec: InferencePoolSpec | None
    """The last that could be understood, if any ever could."""
    complaint: str = ""
    """Why the present one cannot; empty if it can."""
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique in the cluster: the name of its loop, its cluster in Envoy and its path there."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A pool that can be served, and by whom."""

    pool: Pool
    spec: InferencePoolSpec
    endpoints: frozenset[Endpoint] = frozenset()
    """Who takes new work, and who only finishes what he has."""
    draining: frozenset[Endpoint] = frozenset()
    pods: tuple[Pod, ...] = ()
    """Those selected, ready or not, in the order of their names."""


class Registry:
    """The last words about pools and pods, and what they amount to."""

    def __init__(self) -> None:
        self._pods: dict[str, dict[str, Pod]] = defaultdict(dict)
        """By namespace and uid: a name may come back while the last word on its bearer is due."""
        self._where: dict[str, str] = {}
        self._pools: dict[str, Pool] = {}
        self._listed: dict[Kind, int] = {}
        """The version of the last list of each kind: it told of everything up to there."""
        self._served: dict[str, Served] = {}
        self._doubtful: set[str] = set()
        """Pools that may be served by others than `_served` says."""

    @property
    def synced(self) -> bool:
        """Whether each kind was listed, so that absence means something."""
        return len(self._listed) == len(Kind)

    def told(self, kind: Kind, item: Mapping[str, Any], *, gone: bool = False) -> None:
        """Hear the API server's last word about one object."""
        if (known := _known(kind, item)) is None:
            return
        if not 0 < known.version <= self._listed.get(kind, 0):
            self._take(known, gone=gone)

    def listed(self, kind: Kind, items: Iterable[Mapping[str, Any]], *, version: str) -> None:
        """Hear of all objects there were at that version; what it does not name was gone by then.

        Those of a later version came after the list, and stay.
        """
        every = {each.uid: each for item in items if (each := _known(kind, item)) is not None}
        at = _number(version)
        anew = at < self._listed.get(kind, 0)  # the cluster was restored from a backup
        for each in self._all(kind):
            if anew or (each.uid not in every and (not at or each.version <= at)):
                self._drop(each)
        for each in every.values():
            self._take(each, gone=False)
        self._listed[kind] = at

    def served(self) -> Mapping[str, Served]:
        """Say who serves each pool now; nothing where it is not known what the pool wants."""
        pools = self.pools() if self._doubtful else {}
        for key in self._doubtful:
            newest = pools.get(key)
            self._served.pop(key, None)
            if newest is not None and newest.spec is not None:
                self._served[key] = self._judge(newest, newest.spec)
        self._doubtful.clear()
        return self._served

    def pools(self) -> Mapping[str, Pool]:
        """Give every pool there is, understood or not, by its key.

        One deleted and made again is there twice until the last word on the first has come.
        """
        in_order = sorted(self._pools.values(), key=lambda pool: pool.version)
        return {pool.key: pool for pool in in_order}

    def _all(self, kind: Kind) -> list[Pod] | list[Pool]:
        if kind is Kind.POOLS:
            return list(self._pools.values())
        return [pod for members in self._pods.values() for pod in members.values()]

    def _take(self, known: Pod | Pool, *, gone: bool) -> None:
        table = self._pools if isinstance(known, Pool) else self._pods[known.namespace]
        before = table.get(known.uid)
        if before is not None and 0 < known.version < before.version:
            return
        if gone:
            if before is not None:
                self._drop(before)
        elif isinstance(known, Pool):
            if known.spec is None and isinstance(before, Pool):
                known = replace(known, spec=before.spec)
            self._pools[known.uid] = known
            self._doubtful.add(known.key)
        else:
            self._pods[known.namespace][known.uid] = known
            self._doubt(before, known)

    def _drop(self, known: Pod | Pool) -> None:
        if isinstance(known, Pool):
            del self._pools[known.uid]
            self._doubtful.add(known.key)
        else:
            del self._pods[known.namespace][known.uid]
            if not self._pods[known.namespace]:
                del self._pods[known.namespace]
            self._doubt(known, None)

    def _doubt(self, before: Any, after: Pod | None) -> None:
        """Look again at the pools that a pod was or is selected by."""
        for key, served in self._served.items():
            if any(pod and selects(served, pod) for pod in (before, after)):
                self._doubtful.add(key)

    def _judge(self, pool: Pool, spec: InferencePoolSpec) -> Served:
        served = Served(pool=pool, spec=spec)
        there = self._pods.get(pool.namespace, {}).values()
        pods = sorted((pod for pod in there if selects(served, pod)), key=lambda pod: pod.name)
        ports = [port.number for port in spec.target_ports]

        def endpoints(among: list[Pod]) -> frozenset[Endpoint]:
            return frozenset(Endpoint(p.name, p.address, port) for p in among for port in ports)

        staying = [pod for pod in pods if pod.address and not pod.leaving]
        ready = [pod for pod in staying if pod.ready]
        serving = endpoints(ready or [pod for pod in staying if pod.vouched])
        taken = {(address, port) for _, address, port in serving}
        leaving = endpoints([pod for pod in pods if pod.address and pod.leaving])
        draining = {e for e in leaving if (e.address, e.port) not in taken}
        return replace(served, endpoints=serving, draining=frozenset(draining), pods=tuple(pods))


def selects(served: Served, pod: Pod) -> bool:
    return pod.namespace == served.pool.namespace and served.spec.selector.matches(pod.labels)


def _known(kind: Kind, item: Mapping[str, Any]) -> Pod | Pool | None:
    """Take what matters from an object; None where it is none."""
    meta = _map(item, "metadata")
    name, namespace = meta.get("name"), meta.get("namespace")
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    uid = str(meta.get("uid") or f"{namespace}/{name}")
    version = _number(meta.get("resourceVersion"))
    if kind is Kind.PODS:
        spec, status = _map(item, "spec"), _map(item, "status")
        over = status.get("phase") in _OVER
        true = _true_conditions(status)
        gates = {str(gate.get("conditionType")) for gate in _maps(spec, "readinessGates")}
        return Pod(
            namespace=namespace,
            name=name,
            uid=uid,
            version=version,
            labels=_map(meta, "labels"),
            address="" if over else str(status.get("podIP") or ""),
            node=str(spec.get("nodeName") or ""),
            ready="Ready" in true,
            vouched={"ContainersReady", *gates} <= true,
            leaving=meta.get("deletionTimestamp") is not None,
        )
    wanted, complaint = _spec(item)
    return Pool(
        namespace=namespace,
        name=name,
        uid=uid,
        version=version,
        generation=_number(meta.get("generation")),
        created=str(meta.get("creationTimestamp") or ""),
        spec=wanted,
        complaint=complaint,
        status=_map(item, "status"),
    )


def _spec(item: Mapping[str, Any]) -> tuple[InferencePoolSpec | None, str]:
    try:
        return InferencePoolSpec.model_validate(item.get("spec")), ""
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("spec", *first["loc"])))
        return None, f"{where}: {first['msg']}"


def _true_conditions(status: Mapping[str, Any]) -> set[str]:
    conditions = _maps(status, "conditions")
    return {str(each.get("type")) for each in conditions if each.get("status") == "True"}


def _map(item: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = item.get(key)
    return value if isinstance(value, dict) else _NOTHING


def _maps(item: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = item.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _number(version: object) -> int:
    """Versions grow, and are numbers since Kubernetes 1.35; 0 where one says nothing."""
    text = str(version)
    return int(text) if text.isascii() and text.isdigit() else 0
