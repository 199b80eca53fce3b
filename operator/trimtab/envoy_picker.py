"""How Envoy asks the picker for an endpoint, and why it never needs one.

For each request of a pool that is picked, Envoy asks over HTTP/1.1 (ext_authz) and gives the answer
50 ms. What comes back is only a preference: it is kept as metadata, which no client can write, and
the pool's balancer (override_host) takes an endpoint named there if it knows it and else balances
by the weights. So no answer, a late one, a senseless one: the request goes on by the live weights.

Envoy says which pool it has found, by path, host or model, and how many bytes it has read: the body
itself stays with it. Neither can come from a client, because Envoy writes both anew.

Pickers are asked in the order of their priority: one is active, the others stand by, as two that
pick at once each see half of what is sent. Everything here is plain data; see envoy_config.
"""

from __future__ import annotations

from typing import Any

NODE = "trimtab-picker"
"""What pickers call themselves to the control plane."""
CLUSTER = "trimtab_picker"
ANSWER = "x-trimtab-endpoint"
"""Names the endpoint, and after it those to try next."""
POOL = "x-trimtab-pool"
BYTES_READ = "x-trimtab-bytes"
"""Of the body: all of a JSON body, as it is read for its model first; of others perhaps none yet."""
BYTES_TOLD = "x-trimtab-length"
"""Its content-length, where there is one."""
CHECK_PREFIX = "/pick"
HEALTH_PATH = "/readyz"

BUDGET_S = 0.05  # a pick takes 0.3 ms; whoever waits longer is better off with the weights
NO_LIMIT = 1_000_000  # 1024, the breakers' default, would silently skip the picker under load

_FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
_EXT_AUTHZ = "envoy.filters.http.ext_authz"


def check_filter() -> dict[str, Any]:
    """The filter that asks; its place is behind whatever decides on the route."""
    asked = {
        POOL: "%ROUTE_NAME%",
        BYTES_READ: "%BYTES_RECEIVED%",
        BYTES_TOLD: "%REQ(content-length)%",
    }
    return {
        "name": _EXT_AUTHZ,
        "typed_config": {
            "@type": f"{_FILTERS}.ext_authz.v3.ExtAuthz",
            "failure_mode_allow": True,
            "disallowed_headers": {"patterns": [{"exact": "authorization"}]},
            "http_service": {
                "server_uri": {
                    "uri": f"http://{CLUSTER}",
                    "cluster": CLUSTER,
                    "timeout": f"{BUDGET_S}s",
                },
                "path_prefix": CHECK_PREFIX,
                "authorization_request": {
                    "headers_to_add": [{"key": k, "value": v} for k, v in asked.items()]
                },
                "authorization_response": {
                    "dynamic_metadata_from_headers": {"patterns": [{"exact": ANSWER}]},
                    "allowed_client_headers": {"patterns": [{"exact": "retry-after"}]},
                },
            },
        },
    }


def no_check() -> dict[str, Any]:
    """What a route says whose requests are not to be picked for."""
    return {_EXT_AUTHZ: {"@type": f"{_FILTERS}.ext_authz.v3.ExtAuthzPerRoute", "disabled": True}}


def preferring(fallback: dict[str, Any]) -> dict[str, Any]:
    """A balancing policy that takes the endpoint the picker named, else `fallback` does."""
    # From metadata alone: a header would let clients name their endpoint when no picker answers.
    source = {"metadata": {"key": _EXT_AUTHZ, "path": [{"key": ANSWER}]}}
    return {
        "policies": [
            {
                "typed_extension_config": {
                    "name": "override_host",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies"
                        ".override_host.v3.OverrideHost",
                        "override_host_sources": [source],
                        "fallback_policy": fallback,
                    },
                }
            }
        ]
    }


def cluster(addresses: list[dict[str, Any]], *, discovery: str) -> dict[str, Any]:
    """Where pickers are, the active one first."""
    return {
        "name": CLUSTER,
        "type": discovery,
        "connect_timeout": "0.2s",
        "load_assignment": {
            "cluster_name": CLUSTER,
            "endpoints": [
                {"priority": priority, "lb_endpoints": [{"endpoint": {"address": address}}]}
                for priority, address in enumerate(addresses)
            ],
        },
        # A picker that hangs costs each request the budget until this has noticed.
        "health_checks": [
            {
                "timeout": "0.2s",
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "healthy_threshold": 1,
                "unhealthy_threshold": 1,
                "http_health_check": {"path": HEALTH_PATH},
            }
        ],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": NO_LIMIT,
                    "max_pending_requests": NO_LIMIT,
                    "max_requests": NO_LIMIT,
                }
            ]
        },
    }
