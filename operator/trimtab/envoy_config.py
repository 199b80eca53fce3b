"""Envoy's configuration as pure functions: what never changes, and what follows the pools.

Listeners are static, because Envoy cuts running streams when it drains a changed listener.
Everything that may change hangs below them and changes without a broken stream: one route table
per listener (RDS), one cluster per pool (CDS), one assignment per cluster (EDS). Weights are only
in the last, so a push touches nothing else.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.route.v3 import route_pb2

# Imported for their descriptors: these types are named in typed configs below.
from envoy.extensions.filters.http.ext_authz.v3 import ext_authz_pb2 as _authz  # noqa: F401  # see above
from envoy.extensions.load_balancing_policies.least_request.v3 import least_request_pb2 as _lr
from envoy.extensions.load_balancing_policies.override_host.v3 import (
    override_host_pb2 as _override,  # noqa: F401  # see above
)
from envoy.extensions.load_balancing_policies.round_robin.v3 import round_robin_pb2 as _rr
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2 as _previous
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as _http
from google.protobuf.json_format import ParseDict

from trimtab import envoy_picker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.core.model import Endpoint, Snapshot

XDS_CLUSTER = "trimtab_xds"
METADATA = "trimtab"  # namespace of what Envoy read from a body, and of what is for pickers
BODY_LIMIT_BYTES = 32 << 20  # a 10 MB prompt passes whole; above, Envoy answers 413
STREAM_IDLE_S = 3600  # a queued prompt is silent for minutes; the default of 300 s would cut it
CONNECT_TIMEOUT_S = 1  # a vanished pod drops packets: wait so long, then take another
UPSTREAM_IDLE_S = 4  # below uvicorn's 5 s, or Envoy sends into a connection that is just closing
NO_LIMIT = 1_000_000  # 1024, the breakers' default, is few for streams of minutes; engines queue
RETRIES = 3
PANIC_PERCENT = 1  # avoid the unreachable while anybody is left; if nobody is, try all
# A dead host has nothing in flight, so LEAST_REQUEST prefers it: of 3 it was the first choice of
# 44 % of the requests, and each had to be sent again. Ejected, of 0.1 %.
FAILURES_TO_EJECT = 3
EJECT_S = 2

Balance = Literal["least_request", "round_robin"]
_BALANCERS = {"least_request": _lr.LeastRequest, "round_robin": _rr.RoundRobin}


@dataclass(frozen=True, slots=True)
class PoolRoute:
    """Which requests belong to a pool, and how Envoy spreads them.

    Several pools on one listener are told apart by the path `/{name}/…` (cut off on the way), by
    the request's host, and by the `model` of its body.
    """

    name: str
    models: tuple[str, ...] = ()
    """Empty: the pool's name."""
    hostnames: tuple[str, ...] = ()
    balance: Balance = "least_request"
    picked: bool = False
    """Whether Envoy asks the picker for each request; else the weights alone decide."""
    metrics_path: str = "/metrics"
    engine: str = "Auto"
    """Whose pages the picker reads there."""

    @property
    def served_models(self) -> tuple[str, ...]:
        return self.models or (self.name,)


@dataclass(frozen=True, slots=True)
class Listener:
    """A door of the gateway; its name is that of its route table."""

    name: str
    port: int
    address: str = "127.0.0.1"


# What follows the pools


def cluster(pool: PoolRoute) -> cluster_pb2.Cluster:
    """How Envoy treats the endpoints of one pool, whoever they are just now."""
    balance = {
        "policies": [
            {
                "typed_extension_config": {
                    "name": pool.balance,
                    "typed_config": {"@type": _type(_BALANCERS[pool.balance])},
                }
            }
        ]
    }
    return ParseDict(
        {
            "name": pool.name,
            "metadata": {"filter_metadata": {METADATA: facts(pool)}},
            "type": "EDS",
            "eds_cluster_config": {"eds_config": _FROM_ADS},
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "load_balancing_policy": envoy_picker.preferring(balance) if pool.picked else balance,
            "common_lb_config": {"healthy_panic_threshold": {"value": PANIC_PERCENT}},
            "circuit_breakers": {
                "thresholds": [
                    {
                        "max_connections": NO_LIMIT,
                        "max_pending_requests": NO_LIMIT,
                        "max_requests": NO_LIMIT,
                        "max_retries": NO_LIMIT,
                    }
                ]
            },
            # Only failures of the way to a host count: an engine that answers 503 is alive.
            "outlier_detection": {
                "split_external_local_origin_errors": True,
                "consecutive_local_origin_failure": FAILURES_TO_EJECT,
                "enforcing_consecutive_local_origin_failure": 100,
                "enforcing_local_origin_success_rate": 0,
                "enforcing_consecutive_5xx": 0,
                "enforcing_consecutive_gateway_failure": 0,
                "enforcing_success_rate": 0,
                "interval": "1s",
                "base_ejection_time": f"{EJECT_S}s",
                "max_ejection_time": f"{EJECT_S}s",
                "max_ejection_percent": 100,
            },
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": _type(_http.HttpProtocolOptions),
                    "common_http_protocol_options": {"idle_timeout": f"{UPSTREAM_IDLE_S}s"},
                    "explicit_http_config": {"http_protocol_options": {}},
                }
            },
            "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 60}},
        },
        cluster_pb2.Cluster(),
    )


def assignment(pool: str, snapshot: Snapshot) -> endpoint_pb2.ClusterLoadAssignment:
    """Who serves a pool, in which proportion. The one message of the hot path."""
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=pool)
    hosts = message.endpoints.add().lb_endpoints
    for endpoint in sorted({*snapshot.weights, *snapshot.unreachable, *snapshot.draining}):
        host = hosts.add(
            health_status=_health(endpoint, snapshot),
            # 0 is invalid and would make Envoy refuse the whole table.
            load_balancing_weight={"value": max(1, snapshot.weights.get(endpoint, 1))},
        )
        socket_address = host.endpoint.address.socket_address
        socket_address.address = endpoint.address
        socket_address.port_value = endpoint.port
        host.metadata.filter_metadata[METADATA].update({"pod": endpoint.pod})
    return message


def _health(endpoint: Endpoint, snapshot: Snapshot) -> int:
    if endpoint in snapshot.unreachable:
        return int(health_check_pb2.UNHEALTHY)
    if endpoint in snapshot.draining:
        return int(health_check_pb2.DRAINING)
    return int(health_check_pb2.HEALTHY)


def facts(pool: PoolRoute) -> dict[str, Any]:
    """What whoever picks for a pool has to know of it, beside its endpoints."""
    return {"picked": pool.picked, "metrics_path": pool.metrics_path, "engine": pool.engine}


def routes(listener: str, pools: Sequence[PoolRoute]) -> route_pb2.RouteConfiguration:
    """Which request goes to which pool, for one listener.

    A pool that is alone gets everything, unknown models too: its engines answer those themselves.
    """
    hosts: dict[str, list[PoolRoute]] = {}
    for pool in pools:
        for hostname in dict.fromkeys(name.lower() for name in pool.hostnames):
            hosts.setdefault(hostname, []).append(pool)
    return ParseDict(
        {
            "name": listener,
            "ignore_port_in_host_matching": True,
            "max_direct_response_body_size_bytes": 1 << 20,  # long lists of models pass 4 KB
            "virtual_hosts": [
                {"name": host, "domains": [host], "routes": _routes(members)}
                for host, members in {**hosts, "*": list(pools)}.items()
            ],
        },
        route_pb2.RouteConfiguration(),
    )


def _routes(pools: Sequence[PoolRoute]) -> list[dict[str, Any]]:
    by_path = [_lead({"prefix": f"/{pool.name}/"}, pool, prefix_rewrite="/") for pool in pools]
    if not pools:
        return [_answer({"prefix": "/"}, 503, "No pool is configured here yet.")]
    if len(pools) == 1:
        return [*by_path, _lead({"prefix": "/"}, pools[0])]
    models = list(dict.fromkeys(model for pool in pools for model in pool.served_models))
    by_model = [
        _lead({"prefix": "/", "dynamic_metadata": [_model_is_one_of(pool.served_models)]}, pool)
        for pool in pools
    ]
    listing = {
        "object": "list",
        "data": [
            {"id": model, "object": "model", "created": 0, "owned_by": "trimtab"}
            for model in models
        ],
    }
    choice = f"The models served here are: {', '.join(models)}."
    is_get = {"name": ":method", "string_match": {"exact": "GET"}}
    return [
        *by_path,
        _answer({"path": "/v1/models", "headers": [is_get]}, 200, json.dumps(listing)),
        *by_model,
        _answer({"prefix": "/", "dynamic_metadata": [_MODEL_NAMED]}, 404, choice),
        _answer({"prefix": "/"}, 400, f"The request names no model. {choice}"),
    ]


def _lead(match: dict[str, Any], pool: PoolRoute, **more: Any) -> dict[str, Any]:
    route = {
        # The picker is told the pool by this name.
        "name": pool.name,
        "match": match,
        "route": {
            "cluster": pool.name,
            "timeout": "0s",  # a long answer is no failure; the idle timeouts find dead streams
            # Only what cannot have reached an engine is sent again: work is never done twice, and
            # a request that kills its engine does not visit the next one.
            "retry_policy": {
                "retry_on": "connect-failure,refused-stream,reset-before-request",
                "num_retries": RETRIES,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {"@type": _type(_previous.PreviousHostsPredicate)},
                    }
                ],
                "host_selection_retry_max_attempts": 8,
            },
            **more,
        },
    }
    return route if pool.picked else route | _UNPICKED


def _model_is_one_of(models: Sequence[str]) -> dict[str, Any]:
    matchers = [{"string_match": {"exact": model}} for model in models]
    return _MODEL_NAMED | {
        "value": {"or_match": {"value_matchers": matchers}} if len(matchers) > 1 else matchers[0],
    }


def _answer(match: dict[str, Any], status: int, text: str) -> dict[str, Any]:
    json_type = {"header": {"key": "content-type", "value": "application/json"}}
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": text}},
        **_UNPICKED,
        "response_headers_to_add": [json_type | {"append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    }


# What never changes


def bootstrap(
    listeners: Sequence[Listener],
    *,
    xds: tuple[str, int],
    admin_port: int,
    node: str = "trimtab-gateway",
    delta: bool = True,
    pickers: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:
    """Build the file an Envoy starts with: its listeners, and where it learns the rest.

    The admin interface can stop Envoy and shows everything, so it is on loopback only. `pickers`
    are asked in this order; none need be there, and without any no pool can be picked for.
    """
    host, port = xds
    return {
        "node": {"id": node, "cluster": "trimtab"},
        "admin": {"address": _address("127.0.0.1", admin_port)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if delta else "GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {
                        "envoy_grpc": {
                            "cluster_name": XDS_CLUSTER,
                            # The default of up to 30 s would leave weights frozen for as long.
                            "retry_policy": {
                                "retry_back_off": {"base_interval": "0.2s", "max_interval": "1s"}
                            },
                        }
                    }
                ],
            },
            "cds_config": _AWAITED,
        },
        "static_resources": {
            "listeners": [_listener(listener, picked=bool(pickers)) for listener in listeners],
            "clusters": [_xds_cluster(host, port), *_picker_clusters(pickers)],
        },
        "overload_manager": {"resource_monitors": [_CONNECTION_LIMIT]},
    }


def _xds_cluster(host: str, port: int) -> dict[str, Any]:
    return {
        "name": XDS_CLUSTER,
        "type": "STATIC" if _is_ip(host) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": XDS_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, port)}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _type(_http.HttpProtocolOptions),
                "explicit_http_config": {
                    "http2_protocol_options": {
                        # Without it a server that hangs goes unnoticed for good; with it, 7 s.
                        "connection_keepalive": {"interval": "5s", "timeout": "2s"}
                    }
                },
            }
        },
    }


def _picker_clusters(pickers: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    if not pickers:
        return []
    discovery = "STATIC" if all(_is_ip(host) for host, _ in pickers) else "STRICT_DNS"
    return [envoy_picker.cluster([_address(*picker) for picker in pickers], discovery=discovery)]


def _listener(listener: Listener, *, picked: bool) -> dict[str, Any]:
    return {
        "name": listener.name,
        "address": _address(listener.address, listener.port),
        "per_connection_buffer_limit_bytes": BODY_LIMIT_BYTES,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": _connection_manager(listener.name, picked=picked),
                    }
                ]
            }
        ],
    }


def _connection_manager(name: str, *, picked: bool) -> dict[str, Any]:
    return {
        "@type": f"{_HCM}.HttpConnectionManager",
        "stat_prefix": name,
        "rds": {"route_config_name": name, "config_source": _AWAITED},
        "use_remote_address": True,
        "normalize_path": True,
        "preserve_external_request_id": True,  # a client that traces finds its id in our logs
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": f"{STREAM_IDLE_S}s",
        "request_headers_timeout": "60s",
        "local_reply_config": {"mappers": [_in_openai_form(*reply) for reply in _REPLIES]},
        "http_filters": [
            {
                "name": "envoy.filters.http.json_to_metadata",
                "typed_config": {
                    "@type": f"{_FILTERS}.json_to_metadata.v3.JsonToMetadata",
                    "request_rules": {
                        "allow_content_types_regex": {"regex": "(?i)application/json.*"},
                        "allow_empty_content_type": True,
                        "rules": [
                            {
                                "selectors": [{"key": "model"}],
                                "on_present": {"metadata_namespace": METADATA, "key": "model"},
                            }
                        ],
                    },
                },
            },
            *([envoy_picker.check_filter()] if picked else []),
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_FILTERS}.router.v3.Router"},
            },
        ],
    }


def _in_openai_form(comparison: str, status: int, error: dict[str, Any]) -> dict[str, Any]:
    """Make what Envoy itself answers look like what the engines answer; the first match counts."""
    return {
        "filter": {
            "status_code_filter": {
                "comparison": {
                    "op": comparison,
                    "value": {"default_value": status, "runtime_key": f"trimtab.{status}"},
                }
            }
        },
        "body_format_override": {
            "json_format": {
                "error": {"message": "%LOCAL_REPLY_BODY%", "code": "%RESPONSE_CODE%"} | error
            }
        },
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _type(message: Any) -> str:
    return f"type.googleapis.com/{message.DESCRIPTOR.full_name}"


_UNPICKED = {"typed_per_filter_config": envoy_picker.no_check()}
_FROM_ADS = {"ads": {}, "resource_api_version": "V3"}
# By default Envoy waits 15 s for each and then opens its port to answer 404: it looked ready.
_AWAITED = {**_FROM_ADS, "initial_fetch_timeout": "0s"}
_FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
_HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
_CONNECTION_LIMIT = {  # Envoy warns at each start when there is none
    "name": "envoy.resource_monitors.global_downstream_max_connections",
    "typed_config": {
        "@type": (
            "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3"
            ".DownstreamConnectionsConfig"
        ),
        "max_active_downstream_connections": NO_LIMIT,
    },
}
_MODEL_NAMED = {
    "filter": METADATA,
    "path": [{"key": "model"}],
    "value": {"present_match": True},
}
_ASKED = "%DYNAMIC_METADATA(trimtab:model)%"
_REPLIES = (
    (
        "EQ",
        404,  # Envoy's own 404 has one cause, see `_routes`: no pool has this model
        {
            "message": f"The model `{_ASKED}` does not exist. %LOCAL_REPLY_BODY%",
            "type": "NotFoundError",
            "param": "model",
        },
    ),
    ("GE", 500, {"type": "InternalServerError", "param": None}),
    ("GE", 400, {"type": "BadRequestError", "param": None}),
)
