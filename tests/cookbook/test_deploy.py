"""Files of `cookbook/deploy`: what Docker, Kubernetes and systemd take, and what our server has.

The schema of Kubernetes is that of the official client, whose classes are made of it: they lose a
field that they do not know, and a required field that is missing is an error.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient

from shared_engine import Options
from shared_engine._version import __version__
from shared_engine.cli import main, serve
from shared_engine.server.app import create_app
from shared_engine.server.limits import ServerLimits
from shared_engine.server.metrics import Metrics
from tests.conftest import ROOT

DEPLOY = ROOT / "cookbook" / "deploy"
OBJECTS = {
    found["kind"]: found
    for found in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
}
TYPES = {
    "Deployment": "V1Deployment",
    "Service": "V1Service",
    "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}
POD = OBJECTS["Deployment"]["spec"]["template"]
SERVER = POD["spec"]["containers"][0]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["nemoretriever"]
CUDA = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text("utf-8"))["services"]
IMAGE = f"nemoretriever-embeddings:{__version__}"
STOP_SECONDS = ServerLimits().grace_seconds + 6
"""Seconds from a signal to the end of the process, at most."""


def parse_command(program: str, *arguments: str) -> Namespace:
    """Return the arguments of a command of ours, which must be `serve`."""
    assert program.endswith("nemoretriever")
    asked = main.build_parser().parse_args(arguments)
    assert asked.run is serve.run
    return asked


def read_dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split(" ")[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def read_unit() -> dict[str, list[str]]:
    """Return the settings of the unit of systemd."""
    text = (DEPLOY / "nemoretriever.service").read_text("utf-8").replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            found.setdefault(line.partition("=")[0], []).append(line.partition("=")[2])
    return found


def read_paths() -> set[str]:
    """Return the paths of the server."""
    app = create_app(Options(model="no/such-model", backend="local"), api_key="secret")
    return {route.path for route in app.routes}  # type: ignore[attr-defined]


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer GET requests with a status until the block ends; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


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
    asked = parse_command(*SERVER["command"], *SERVER["args"])
    assert SERVER["image"] == CUDA["nemoretriever"]["image"] == f"{IMAGE}-cuda"
    assert asked.host == "0.0.0.0"  # else no probe arrives
    assert [asked.port] == [port["containerPort"] for port in SERVER["ports"]]
    assert asked.api_key_env in [variable["name"] for variable in SERVER["env"]]
    assert asked.checkpoint.startswith(SERVER["volumeMounts"][0]["mountPath"])


def test_paths_ports_and_metrics_are_those_of_the_server():
    asked = [SERVER[probe]["httpGet"] for probe in PROBES]
    asked += OBJECTS["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert {each["path"] for each in asked} <= read_paths()
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
    assert POD["spec"]["terminationGracePeriodSeconds"] >= pause + STOP_SECONDS


def test_the_image_serves_as_another_user_than_root():
    found = dict(read_dockerfile())  # the last instruction of each kind counts
    command = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    asked = parse_command(*command)
    assert (asked.host, str(asked.port)) == ("0.0.0.0", found["EXPOSE"])
    assert found["USER"] == "10001:10001"
    assert POD["spec"]["securityContext"]["runAsUser"] == 10001
    probe = re.search(rf"127.0.0.1:{asked.port}(/[\w/]+)'", found["HEALTHCHECK"])
    assert probe
    assert probe[1] in read_paths()


def test_the_health_check_of_the_image_reads_the_status(tmp_path):
    for status in (200, 503):
        with answering(status) as port:
            command = dict(read_dockerfile())["HEALTHCHECK"].partition("CMD ")[2]
            command = command.replace(":8000", f":{port}")
            done = subprocess.run(
                [sys.executable, *json.loads(command)[1:]], check=False, stderr=subprocess.DEVNULL
            )
            assert (done.returncode == 0) == (status == 200)


def test_the_image_has_the_whole_package_and_no_secret():
    instructions = read_dockerfile()
    copied = {
        source
        for kind, text in instructions
        if kind == "COPY" and "--from" not in text
        for source in text.split(" ")[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *project["project"]["license-files"], "pyproject.toml"}
    assert needed | {project["project"]["readme"]} <= copied
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert "*" in ignored
    assert not [
        text
        for kind, text in instructions
        if kind in ("ARG", "ENV") and re.search("KEY|TOKEN|SECRET|PASSWORD", text)
    ]


@pytest.mark.parametrize(("device", "is_valid"), [("cpu", True), ("cuda", True), ("gpu", False)])
def test_an_unknown_device_ends_the_build(device, is_valid, tmp_path):
    (script,) = [text for kind, text in read_dockerfile() if kind == "RUN" and "case" in text]
    script = script.partition("pip ")[2].replace("python -m venv", "echo venv")
    script = script.replace("/opt/nemoretriever/bin/pip", "echo pip")
    done = subprocess.run(
        ["sh", "-c", script], check=False, env={"DEVICE": device}, capture_output=True
    )
    assert (done.returncode == 0) is is_valid
    assert (b"pip install" in done.stdout) is is_valid
    assert (b"whl/cpu" in done.stdout) is (device == "cpu")


def test_compose_runs_the_image():
    asked = parse_command("nemoretriever", *COMPOSE["command"])
    assert COMPOSE["image"] == IMAGE
    assert COMPOSE["ports"] == [f"127.0.0.1:{asked.port}:{asked.port}"]
    assert asked.host == "0.0.0.0"  # of the container
    assert COMPOSE["environment"][asked.api_key_env].startswith(f"${{{asked.api_key_env}:?")
    build = COMPOSE["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert CUDA["nemoretriever"]["build"]["args"] == {"DEVICE": "cuda"}
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) >= STOP_SECONDS
    volumes = dict(read_dockerfile())["VOLUME"]
    assert COMPOSE["volumes"] == [f"models:{volumes}"]


def test_systemd_starts_and_stops_the_server():
    unit = read_unit()
    (command,) = unit["ExecStart"]
    asked = parse_command(*command.split())
    assert asked.host == "127.0.0.1"
    assert f'echo "{asked.api_key_env}=' in (DEPLOY / "nemoretriever.service").read_text("utf-8")
    assert int(unit["TimeoutStopSec"][0]) >= STOP_SECONDS


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_every_setting(tmp_path):
    unit = tmp_path / "nemoretriever.service"
    text = (DEPLOY / "nemoretriever.service").read_text("utf-8")
    program = read_unit()["ExecStart"][0].split()[0]
    unit.write_text(text.replace(program, sys.executable), "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], check=False, capture_output=True, text=True
    )
    assert str(unit) not in done.stderr
    assert unit.name not in done.stderr
    assert done.returncode == 0, done.stderr
