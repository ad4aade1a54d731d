"""The manifest for Kubernetes: what the API's schema takes, and what our server has.

The schema is that of the official client, whose classes are made of it: a field that it does not
know is lost on the way through them, and one that it wants and does not get is an error.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient

from shared_engine import Options
from shared_engine.cli import main, serve
from shared_engine.server.app import create_app
from shared_engine.server.limits import ServerLimits
from shared_engine.server.metrics import Metrics
from tests.conftest import ROOT

MANIFEST = ROOT / "cookbook" / "kubernetes" / "nemoretriever.yaml"
OBJECTS = {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text("utf-8"))}
TYPES = {
    "Deployment": "V1Deployment",
    "Service": "V1Service",
    "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}
POD = OBJECTS["Deployment"]["spec"]["template"]
SERVER = POD["spec"]["containers"][0]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def pass_through(found: dict[str, Any]) -> Any:
    """Return what is left of an object behind the API's classes."""
    client = ApiClient()
    typed = client.deserialize(json.dumps(found), TYPES[found["kind"]], "application/json")
    return client.sanitize_for_serialization(typed)


@pytest.mark.parametrize("kind", TYPES)
def test_the_schema_takes_every_field(kind):
    assert pass_through(OBJECTS[kind]) == OBJECTS[kind]


def test_the_schema_would_show_a_mistake():
    found = copy.deepcopy(OBJECTS["Deployment"])
    found["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    assert pass_through(found) != found  # an unknown field
    found = copy.deepcopy(OBJECTS["Service"])
    found["spec"]["ports"][0]["port"] = "8000"
    with pytest.raises(ValueError, match="valid integer"):
        pass_through(found)
    del found["spec"]["ports"][0]["port"]
    with pytest.raises(ValueError, match="port"):
        pass_through(found)


def test_there_is_nothing_else():
    assert OBJECTS.keys() - TYPES.keys() == {"PodMonitor"}  # no part of Kubernetes itself


def test_the_command_is_one_of_ours():
    program, *arguments = SERVER["command"] + SERVER["args"]
    asked = main.build_parser().parse_args(arguments)
    assert program == "nemoretriever"
    assert asked.run is serve.run
    assert asked.host == "0.0.0.0"  # else no probe arrives
    assert [asked.port] == [port["containerPort"] for port in SERVER["ports"]]
    assert asked.api_key_env in [variable["name"] for variable in SERVER["env"]]
    assert asked.checkpoint.startswith(SERVER["volumeMounts"][0]["mountPath"])


def test_paths_ports_and_metrics_are_those_of_the_server():
    app = create_app(Options(model="no/such-model", backend="local"), api_key="secret")
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    asked = [SERVER[probe]["httpGet"] for probe in PROBES]
    asked += OBJECTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert {each["path"] for each in asked} <= paths
    ports = {each["port"] for each in asked}
    ports |= {port["targetPort"] for port in OBJECTS["Service"]["spec"]["ports"]}
    assert ports == {port["name"] for port in SERVER["ports"]}

    (metric,) = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    names = Metrics(lambda: 0, []).text().decode()
    assert f"\n{metric['pods']['metric']['name']} 0.0\n" in names
    target = int(metric["pods"]["target"]["averageValue"])
    assert 0 < target < ServerLimits().max_waiting / 2  # more pods long before a 429


def test_all_parts_name_the_same_pods_and_key():
    labels = POD["metadata"]["labels"]
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert OBJECTS[kind]["spec"]["selector"] == {"matchLabels": labels}
    scaled = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = OBJECTS["Deployment"]
    assert scaled["name"] == deployment["metadata"]["name"]
    assert (scaled["kind"], scaled["apiVersion"]) == ("Deployment", deployment["apiVersion"])
    (monitor,) = OBJECTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    (key,) = [each["valueFrom"]["secretKeyRef"] for each in SERVER["env"] if "valueFrom" in each]
    assert monitor["authorization"]["credentials"] == key


def test_a_pod_finishes_what_it_accepted():
    pause = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    patience = Options.model_fields["timeout"].default  # seconds that our client waits for a reply
    assert POD["spec"]["terminationGracePeriodSeconds"] >= pause + patience
