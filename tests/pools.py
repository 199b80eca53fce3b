"""InferencePools that the API server must take, and such as it must refuse with a good message."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

API_VERSION = "trimtab.dev/v1alpha1"
EXAMPLE = Path("docs/examples/pool.yaml")
SELECTOR = {"matchLabels": {"app": "llama"}}
MINIMAL = {"selector": SELECTOR, "targetPorts": [{"number": 8000}]}


def pool(name: str = "llama", **spec: Any) -> dict[str, Any]:
    """Build a pool; fields of the spec that are None are left out."""
    said = {key: value for key, value in {**MINIMAL, **spec}.items() if value is not None}
    return {
        "apiVersion": API_VERSION,
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": said,
    }


def expression(operator: str, *values: str, key: str = "tier") -> dict[str, Any]:
    compared = {"key": key, "operator": operator, "values": list(values)}
    return {"matchExpressions": [compared]}


VALID: dict[str, dict[str, Any]] = {
    "minimal": pool(),
    "example": yaml.safe_load(EXAMPLE.read_text()),
    "data-parallel": pool(targetPorts=[{"number": n} for n in range(8000, 8008)]),
    "expressions": pool(
        selector={
            "matchLabels": {"example.com/app": "a_b.c", "empty": ""},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["gpu", "tpu"]},
                {"key": "canary", "operator": "DoesNotExist"},
            ],
        }
    ),
    "only-expressions": pool(selector=expression("Exists")),
    "fast": pool(metrics={"intervalMilliseconds": 50, "timeoutMilliseconds": 50}),
    "slow": pool(
        metrics={
            "intervalMilliseconds": 60_000,
            "timeoutMilliseconds": 30_000,
            "staleAfterSeconds": 600,
        }
    ),
    "two-intervals": pool(metrics={"intervalMilliseconds": 5000, "staleAfterSeconds": 10}),
    "path": pool(engine="TensorRTLLM", metrics={"path": "/a/b?c=d"}),
    "routing": pool(
        routing={
            "mode": "Weights",
            "models": ["meta-llama/Llama-3.1-8B-Instruct", "m" * 253],
            "hostnames": ["llm.example.com", "*.example.com", "localhost"],
            "minimumWeightPercent": 100,
        }
    ),
    "empty-lists": pool(routing={"models": [], "hostnames": []}),
}


class Refused(NamedTuple):
    """A spec, and what the refusal has to say."""

    spec: dict[str, Any]
    field: str
    rule: str


TWO_INTERVALS = "must be at least two intervals"
A_HOST = "must be a host name in lower case"
A_KEY = "must be the name of a label"
A_VALUE = "must be the value of a label"
AT_LEAST_ONE = "must name at least one label"

INVALID: dict[str, Refused] = {
    # Types and what is missing.
    "no-selector": Refused({"selector": None}, "spec.selector", "Required value"),
    "no-ports": Refused({"targetPorts": None}, "spec.targetPorts", "Required value"),
    "port-without-number": Refused(
        {"targetPorts": [{}]}, "spec.targetPorts[0].number", "Required value"
    ),
    "port-as-text": Refused(
        {"targetPorts": [{"number": "8000"}]}, "spec.targetPorts[0].number", "type integer"
    ),
    "ports-not-in-a-list": Refused({"targetPorts": 8000}, "spec.targetPorts", "type array"),
    "interval-as-float": Refused(
        {"metrics": {"intervalMilliseconds": 99.5}}, "spec.metrics.intervalMilliseconds", "integer"
    ),
    "models-as-text": Refused(
        {"routing": {"models": "llama"}}, "spec.routing.models", "type array"
    ),
    "unknown-field": Refused({"metric": {}}, "spec.metric", "unknown field"),
    "unknown-field-within": Refused(
        {"routing": {"weights": 1}}, "spec.routing.weights", "unknown field"
    ),
    # Enums.
    "engine-in-lower-case": Refused({"engine": "vllm"}, "spec.engine", "supported values"),
    "mode-of-elsewhere": Refused(
        {"routing": {"mode": "RoundRobin"}}, "spec.routing.mode", "supported values"
    ),
    "operator-of-elsewhere": Refused(
        {"selector": expression("Gt", "1")},
        "spec.selector.matchExpressions[0].operator",
        "supported values",
    ),
    # Bounds.
    "port-0": Refused(
        {"targetPorts": [{"number": 0}]}, "spec.targetPorts[0].number", "greater than or equal to 1"
    ),
    "port-65536": Refused(
        {"targetPorts": [{"number": 65_536}]}, "spec.targetPorts[0].number", "65535"
    ),
    "empty-ports": Refused({"targetPorts": []}, "spec.targetPorts", "at least 1"),
    "nine-ports": Refused(
        {"targetPorts": [{"number": n} for n in range(1, 10)]}, "spec.targetPorts", "at most 8"
    ),
    "interval-too-short": Refused(
        {"metrics": {"intervalMilliseconds": 49, "timeoutMilliseconds": 40}},
        "spec.metrics.intervalMilliseconds",
        "greater than or equal to 50",
    ),
    "interval-too-long": Refused(
        {"metrics": {"intervalMilliseconds": 60_001, "staleAfterSeconds": 600}},
        "spec.metrics.intervalMilliseconds",
        "60000",
    ),
    "timeout-too-short": Refused(
        {"metrics": {"timeoutMilliseconds": 9}}, "spec.metrics.timeoutMilliseconds", "10"
    ),
    "timeout-too-long": Refused(
        {
            "metrics": {
                "intervalMilliseconds": 60_000,
                "timeoutMilliseconds": 30_001,
                "staleAfterSeconds": 600,
            }
        },
        "spec.metrics.timeoutMilliseconds",
        "30000",
    ),
    "stale-at-once": Refused(
        {"metrics": {"staleAfterSeconds": 0}}, "spec.metrics.staleAfterSeconds", "equal to 1"
    ),
    "stale-never": Refused(
        {"metrics": {"staleAfterSeconds": 601}}, "spec.metrics.staleAfterSeconds", "600"
    ),
    "path-too-long": Refused(
        {"metrics": {"path": "/" + "x" * 1024}}, "spec.metrics.path", "may not be more than 1024"
    ),
    "weight-0": Refused(
        {"routing": {"minimumWeightPercent": 0}},
        "spec.routing.minimumWeightPercent",
        "equal to 1",
    ),
    "weight-above-fair": Refused(
        {"routing": {"minimumWeightPercent": 101}}, "spec.routing.minimumWeightPercent", "100"
    ),
    "too-many-models": Refused(
        {"routing": {"models": [f"m{n}" for n in range(65)]}}, "spec.routing.models", "at most 64"
    ),
    "nameless-model": Refused(
        {"routing": {"models": [""]}}, "spec.routing.models[0]", "at least 1 chars"
    ),
    "model-too-long": Refused(
        {"routing": {"models": ["m" * 254]}}, "spec.routing.models[0]", "more than 253"
    ),
    "too-many-hosts": Refused(
        {"routing": {"hostnames": [f"h{n}" for n in range(17)]}},
        "spec.routing.hostnames",
        "at most 16",
    ),
    "host-too-long": Refused(
        {"routing": {"hostnames": ["h" * 254]}}, "spec.routing.hostnames[0]", "more than 253"
    ),
    "too-many-labels": Refused(
        {"selector": {"matchLabels": {f"l{n}": "" for n in range(17)}}},
        "spec.selector.matchLabels",
        "at most 16",
    ),
    "too-many-expressions": Refused(
        {"selector": {"matchExpressions": expression("Exists")["matchExpressions"] * 17}},
        "spec.selector.matchExpressions",
        "at most 16",
    ),
    "too-many-values": Refused(
        {"selector": expression("In", *(f"v{n}" for n in range(33)))},
        "spec.selector.matchExpressions[0].values",
        "at most 32",
    ),
    "label-too-long": Refused(
        {"selector": {"matchLabels": {"app": "x" * 64}}},
        "spec.selector.matchLabels.app",
        "more than 63",
    ),
    "label-key-too-long": Refused(
        {"selector": expression("Exists", key="x" * 318)},
        "spec.selector.matchExpressions[0].key",
        "more than 317",
    ),
    # Lists whose items differ.
    "port-twice": Refused(
        {"targetPorts": [{"number": 1}, {"number": 1}]}, "spec.targetPorts[1]", "Duplicate value"
    ),
    "model-twice": Refused(
        {"routing": {"models": ["a", "a"]}}, "spec.routing.models[1]", "Duplicate value"
    ),
    "host-twice": Refused(
        {"routing": {"hostnames": ["a", "a"]}}, "spec.routing.hostnames[1]", "Duplicate value"
    ),
    "value-twice": Refused(
        {"selector": expression("In", "a", "a")},
        "spec.selector.matchExpressions[0].values[1]",
        "Duplicate value",
    ),
    # Rules in CEL.
    "empty-selector": Refused({"selector": {}}, "spec.selector", AT_LEAST_ONE),
    "selector-of-nothing": Refused(
        {"selector": {"matchLabels": {}, "matchExpressions": []}}, "spec.selector", AT_LEAST_ONE
    ),
    "label-key-of-two-slashes": Refused(
        {"selector": {"matchLabels": {"a/b/c": "x"}}}, "spec.selector.matchLabels", A_KEY
    ),
    "label-value-with-blank": Refused(
        {"selector": {"matchLabels": {"app": "a b"}}}, "spec.selector.matchLabels[app]", A_VALUE
    ),
    "expression-key": Refused(
        {"selector": expression("Exists", key="-x")},
        "spec.selector.matchExpressions[0].key",
        A_KEY,
    ),
    "expression-value": Refused(
        {"selector": expression("In", "x-")},
        "spec.selector.matchExpressions[0].values[0]",
        A_VALUE,
    ),
    "in-nothing": Refused(
        {"selector": expression("In")},
        "spec.selector.matchExpressions[0].values",
        "must be given for In and NotIn",
    ),
    "exists-with-value": Refused(
        {"selector": expression("Exists", "x")},
        "spec.selector.matchExpressions[0].values",
        "must be given for In and NotIn, and only for them",
    ),
    "timeout-above-interval": Refused(
        {"metrics": {"intervalMilliseconds": 400}},
        "spec.metrics.timeoutMilliseconds",
        "must not exceed intervalMilliseconds",
    ),
    "stale-before-two-intervals": Refused(
        {"metrics": {"intervalMilliseconds": 5001}},
        "spec.metrics.staleAfterSeconds",
        TWO_INTERVALS,
    ),
    "path-without-slash": Refused(
        {"metrics": {"path": "metrics"}}, "spec.metrics.path", "begin with /"
    ),
    "path-with-line-break": Refused(
        {"metrics": {"path": "/metrics\n"}}, "spec.metrics.path", "hold no blanks"
    ),
    "host-in-capitals": Refused(
        {"routing": {"hostnames": ["Example.com"]}}, "spec.routing.hostnames[0]", A_HOST
    ),
    "host-with-port": Refused(
        {"routing": {"hostnames": ["example.com:80"]}}, "spec.routing.hostnames[0]", A_HOST
    ),
    "host-of-all": Refused({"routing": {"hostnames": ["*"]}}, "spec.routing.hostnames[0]", A_HOST),
    "empty-host": Refused({"routing": {"hostnames": [""]}}, "spec.routing.hostnames[0]", A_HOST),
}
