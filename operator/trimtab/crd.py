"""The CustomResourceDefinition, rendered from the types of api.py: one truth for both.

JSON schema says more than the API server's structural schemas may: references are put in place,
`null` and what only pruning needs are left out, and every text becomes one line.
"""

from __future__ import annotations

from typing import Any

import yaml

from trimtab.api import GROUP, KIND, PLURAL, VERSION, InferencePool
from trimtab.schema import LIST_KEYS, LIST_TYPE, VALIDATIONS

INT32_MAX = 2**31 - 1

_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "default",
    "required",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "items",
    "additionalProperties",
    "properties",
    LIST_TYPE,
    LIST_KEYS,
    VALIDATIONS,
)
"""What structural schemas may say, in the order in which it is read best."""

Schema = dict[str, Any]


def _condition(name: str, type_: str, text: str, *, priority: int = 0) -> dict[str, Any]:
    path = f'.status.conditions[?(@.type=="{type_}")].status'
    return _column(name, path, text, priority=priority)


def _column(
    name: str, path: str, text: str, *, type_: str = "string", priority: int = 0
) -> dict[str, Any]:
    column = {"name": name, "type": type_, "jsonPath": path, "description": text}
    return column | ({"priority": priority} if priority else {})


COLUMNS = [
    _condition("Ready", "Ready", "Whether requests are answered."),
    _column("Endpoints", ".status.summary.endpoints", "Those that take new work, of all."),
    _column("Verdict", ".status.verdict.name", "What is wrong with the pool, if anything."),
    _column("Backlog", ".status.summary.backlog", "Time the fullest endpoint needs for its work."),
    _column("Replicas", ".status.replicas", "Pods that the selector matches.", type_="integer"),
    _column("Age", ".metadata.creationTimestamp", "Since it was created.", type_="date"),
    _condition("Metrics", "MetricsAvailable", "Whether there is fresh data.", priority=1),
    _condition("Published", "Published", "Whether the gateways follow.", priority=1),
    _column(
        "Reason",
        '.status.conditions[?(@.type=="Ready")].message',
        "Why it is ready or not.",
        priority=1,
    ),
]


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition as an object."""
    singular = KIND.lower()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            # All pools go with their definition, so Helm must not take it along.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": singular,
                "shortNames": ["trimpool"],
                "categories": ["trimtab"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": COLUMNS,
                    "schema": {"openAPIV3Schema": structural(InferencePool.model_json_schema())},
                }
            ],
        },
    }


def structural(schema: Schema) -> Schema:
    """Turn pydantic's JSON schema of a model into a structural schema of the API server."""
    return _rendered(schema, schema.get("$defs", {}))


def _rendered(node: Schema, definitions: Schema) -> Schema:
    node = _resolved(node, definitions)
    if "properties" in node:
        # Unknown fields are pruned, or refused where the client asks for that, without a word here.
        node.pop("additionalProperties", None)
        node["properties"] = {k: _rendered(v, definitions) for k, v in node["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in node:
            node[name] = _rendered(node[name], definitions)
    if node["type"] == "integer":
        node["format"] = "int32" if node["maximum"] <= INT32_MAX else "int64"
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    return {key: node[key] for key in _KEPT if key in node}


def _resolved(node: Schema, definitions: Schema) -> Schema:
    """Put what is referred to in its place; what stands beside a reference goes before it."""
    if "anyOf" in node:  # optional: it may be absent, and null is no value
        (only,) = (each for each in node["anyOf"] if each.get("type") != "null")
        node = only | {key: value for key, value in node.items() if value is not None}
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | node
    return dict(node)


def as_yaml() -> str:
    """Return the CustomResourceDefinition as the text of crds/inferencepools.yaml."""
    return _HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write the same thing twice, as people do."""
        del data
        return True


_HEADER = "# Rendered by `trimtab crd` from operator/trimtab/api.py; a test compares them.\n"
