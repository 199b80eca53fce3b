"""Envoy's configuration, where no Envoy is needed to see that it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from envoy.config.core.v3 import health_check_pb2

from trimtab.core.model import Endpoint, Snapshot
from trimtab.envoy_config import Listener, PoolRoute, assignment, bootstrap, cluster, routes

if TYPE_CHECKING:
    from envoy.config.route.v3 import route_pb2

A, B, C = (Endpoint(name, f"10.0.0.{i}", 8000 + i) for i, name in enumerate("abc", start=1))


def hosts(snapshot: Snapshot) -> dict[str, tuple[int, int]]:
    """Weight and health by address."""
    (group,) = assignment("pool", snapshot).endpoints
    return {
        host.endpoint.address.socket_address.address: (
            host.load_balancing_weight.value,
            host.health_status,
        )
        for host in group.lb_endpoints
    }


def domains(table: route_pb2.RouteConfiguration) -> dict[str, int]:
    return {host.domains[0]: len(host.routes) for host in table.virtual_hosts}


def test_weight_and_state_of_each_endpoint_are_what_the_snapshot_says() -> None:
    snapshot = Snapshot({A: 1000, B: 3}, unreachable=frozenset({B}), draining=frozenset({C}))
    assert hosts(snapshot) == {
        A.address: (1000, health_check_pb2.HEALTHY),
        B.address: (3, health_check_pb2.UNHEALTHY),
        C.address: (1, health_check_pb2.DRAINING),
    }


def test_no_weight_is_below_1() -> None:
    """Envoy refuses the whole table for one 0."""
    assert hosts(Snapshot({A: 0, B: -5})) == {
        A.address: (1, health_check_pb2.HEALTHY),
        B.address: (1, health_check_pb2.HEALTHY),
    }


def test_equal_snapshots_make_equal_bytes_whatever_their_order() -> None:
    one, other = Snapshot({A: 1, B: 2}), Snapshot({B: 2, A: 1})
    assert assignment("p", one).SerializeToString() == assignment("p", other).SerializeToString()
    assert one.version == other.version


@pytest.mark.parametrize("balance", ["least_request", "round_robin"])
def test_the_balance_of_a_pool_is_that_of_its_cluster(balance: str) -> None:
    made = cluster(PoolRoute("p", balance=balance))  # type: ignore[arg-type]  # a parameter is str
    (policy,) = made.load_balancing_policy.policies
    assert balance.replace("_", "") in policy.typed_extension_config.typed_config.type_url.lower()


def test_pools_that_share_a_host_share_one_virtual_host() -> None:
    """Envoy refuses a table that names a domain twice."""
    shared = ("Same.example", "same.example")
    table = routes("door", [PoolRoute("a", hostnames=shared), PoolRoute("b", hostnames=shared)])
    assert list(domains(table)) == ["same.example", "*"]


def test_the_admin_interface_is_on_loopback_whatever_the_listeners_are() -> None:
    made = bootstrap([Listener("door", 80, "0.0.0.0")], xds=("xds.example", 18000), admin_port=9901)
    assert made["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "kind"), [("10.0.0.1", "STATIC"), ("::1", "STATIC"), ("trimtab.llm", "STRICT_DNS")]
)
def test_an_xds_server_may_be_named_or_numbered(host: str, kind: str) -> None:
    made = bootstrap([], xds=(host, 18000), admin_port=9901)
    assert made["static_resources"]["clusters"][0]["type"] == kind


def test_a_gateway_that_nobody_tells_anything_keeps_its_port_closed() -> None:
    """It would open after 30 s, answer 404 to everybody and look ready to a probe."""
    told = bootstrap([Listener("gateway", 8000)], xds=("127.0.0.1", 18000), admin_port=9901)
    manager = told["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    routes = manager["typed_config"]["rds"]["config_source"]
    clusters = told["dynamic_resources"]["cds_config"]
    assert routes["initial_fetch_timeout"] == clusters["initial_fetch_timeout"] == "0s"
