"""The resource definition, without an API server: drift, and what each field of it must have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from pools import INVALID, VALID, Refused, pool
from trimtab.api import InferencePoolSpec
from trimtab.cli import main
from trimtab.crd import crd

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = crd()["spec"]
(VERSION,) = SPEC["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
COPIES = ("crds/inferencepools.yaml", "charts/trimtab/files/inferencepools.yaml")


def fields(node: dict[str, Any] = SCHEMA, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each field below, items and values of maps included, by its path."""
    inner = {f"{at}.{name}": each for name, each in node.get("properties", {}).items()}
    inner |= {f"{at}[]": node[key] for key in ("items", "additionalProperties") if key in node}
    for path, each in inner.items():
        yield path, each
        yield from fields(each, path)


FIELDS = dict(fields())


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_committed_is_what_the_types_say(copy: str) -> None:
    rendered = CliRunner().invoke(main, ["crd"]).output
    assert Path(copy).read_text() == rendered, f"run: trimtab crd > {copy}"


def test_the_schema_is_structural() -> None:
    """Without a reference, an alternative, a null or a title; each has one type."""
    for path, field in FIELDS.items():
        assert field["type"] in {"object", "array", "string", "integer"}, path
        assert not {"$ref", "anyOf", "oneOf", "allOf", "title", "nullable"} & field.keys(), path
        assert not [key for key in field if key.startswith("x-kubernetes-preserve")], path
        assert not {"properties", "additionalProperties"} <= field.keys(), path


def test_every_field_is_described() -> None:
    for path, field in FIELDS.items():
        if not path.endswith("[]") or field["type"] == "object":
            assert re.fullmatch(r"[A-Z](?s:.*)[.]", field["description"]), path


def test_everything_is_bounded() -> None:
    """Lists, maps, texts and numbers: or rules would cost too much, and objects grow too large."""
    bounds = {
        "array": {"maxItems"},
        "integer": {"maximum"},
        "string": {"maxLength", "enum", "format"},
        "object": {"maxProperties", "properties"},
    }
    for path, field in FIELDS.items():
        assert bounds[field["type"]] & field.keys(), path


def test_lists_say_how_they_are_merged() -> None:
    for path, field in FIELDS.items():
        if field["type"] == "array":
            kind = field["x-kubernetes-list-type"]
            assert kind in {"map", "set", "atomic"}, path
            if kind == "map":
                keys = field["x-kubernetes-list-map-keys"]
                assert set(keys) <= set(field["items"]["required"]), path


def test_enum_case_is_that_of_kubernetes() -> None:
    for path, field in FIELDS.items():
        for value in field.get("enum", ()):
            assert re.fullmatch(r"([A-Z]+[a-z]*)+", value), path


def test_every_setting_is_required_or_has_a_default() -> None:
    for path, field in FIELDS.items():
        if path.startswith(".spec"):
            for name in field.get("properties", {}).keys() - set(field.get("required", ())):
                assert "default" in field["properties"][name], f"{path}.{name}"


def test_every_rule_has_a_message_and_a_field_that_exists() -> None:
    rules = 0
    for path, field in FIELDS.items():
        for rule in field.get("x-kubernetes-validations", ()):
            rules += 1
            assert rule["message"], path
            assert FIELDS[path + rule.get("fieldPath", "")]
    assert rules == 10


def test_names_and_subresources() -> None:
    assert SPEC["names"]["shortNames"] == ["trimpool"]
    assert SPEC["names"]["categories"] == ["trimtab"]
    assert VERSION["subresources"] == {"status": {}}
    assert [v["name"] for v in SPEC["versions"] if v["storage"]] == ["v1alpha1"]


def test_columns_lead_to_fields() -> None:
    first = [c["name"] for c in VERSION["additionalPrinterColumns"] if not c.get("priority")]
    assert first == ["Ready", "Endpoints", "Verdict", "Backlog", "Replicas", "Age"]
    for column in VERSION["additionalPrinterColumns"]:
        path = re.sub(r"\[\?\(.*\)\]", "[]", column["jsonPath"])
        assert path in FIELDS or path == ".metadata.creationTimestamp"


def test_nothing_is_called_phase_or_is_a_float() -> None:
    text = yaml.safe_dump(crd())
    assert "phase" not in text
    assert "type: number" not in text


@pytest.mark.parametrize("name", VALID)
def test_what_the_api_server_takes_the_types_take(name: str) -> None:
    InferencePoolSpec.model_validate(VALID[name]["spec"])


@pytest.mark.parametrize("name", INVALID)
def test_what_the_api_server_refuses_the_types_refuse(name: str) -> None:
    wrong: Refused = INVALID[name]
    with pytest.raises(ValidationError) as refused:
        InferencePoolSpec.model_validate(pool(**wrong.spec)["spec"])
    if wrong.rule.startswith("must "):
        assert wrong.rule in str(refused.value)


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({"matchLabels": {"app": "a"}}, {"1", "2"}),
        ({"matchLabels": {"app": "a", "tier": "gpu"}}, {"1"}),
        ({"matchLabels": {"app": ""}}, set()),
        ({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["gpu"]}]}, {"1"}),
        ({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["gpu"]}]}, {"2"}),
        ({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}, {"1"}),
        ({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}, {"2"}),
        (
            {
                "matchLabels": {"app": "a"},
                "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}],
            },
            {"2"},
        ),
    ],
)
def test_a_selector_selects_as_those_of_kubernetes(
    selector: dict[str, Any], selected: set[str]
) -> None:
    """A label that is missing is in no list, so NotIn takes pods without it."""
    pods = {"1": {"app": "a", "tier": "gpu"}, "2": {"app": "a"}}
    spec = InferencePoolSpec.model_validate(pool(selector=selector)["spec"])
    assert {name for name, labels in pods.items() if spec.selector.matches(labels)} == selected
