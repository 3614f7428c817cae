"""The manifests speak of settings, addresses, ports and metrics that tfserve has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.http.fakes import FakeEngine
from tfserve.cli_config import config_from_args
from tfserve.config import EngineConfig
from tfserve.http.app import create_app
from tfserve.http.routes import OPEN_PATHS
from tfserve.http.server import ENGINE_SHUTDOWN_S, GOODBYE_S
from tfserve.http.service import Service

KUBERNETES = Path(__file__).parents[2] / "examples" / "kubernetes"


def manifests(name: str) -> dict[str, Any]:
    """Objects of a file by their kind; there are never two of a kind."""
    objects = list(yaml.safe_load_all((KUBERNETES / name).read_text()))
    by_kind = {each["kind"]: each for each in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@pytest.fixture
def deployment() -> dict[str, Any]:
    return manifests("deployment.yaml")


@pytest.fixture
def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


@pytest.fixture
def config(deployment: dict[str, Any], container: dict[str, Any], tmp_path: Path) -> EngineConfig:
    """The config from the container's arguments and the mounted file, read by the program itself."""
    command, target, *settings = container["args"]
    assert command == "serve"
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "config")
    assert Path(target).parent == Path(mount["mountPath"])
    file = tmp_path / Path(target).name
    file.write_text(deployment["ConfigMap"]["data"][file.name])
    return config_from_args(str(file), settings)


def test_everything_speaks_of_the_servers_port(
    deployment: dict[str, Any], container: dict[str, Any], config: EngineConfig
) -> None:
    (port,) = container["ports"]
    assert port["containerPort"] == config.server.port
    (service_port,) = deployment["Service"]["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    annotations = deployment["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(config.server.port)
    assert annotations["prometheus.io/path"] in OPEN_PATHS
    routing = manifests("inference-routing.yaml")
    assert routing["InferencePool"]["spec"]["targetPorts"] == [{"number": config.server.port}]
    # A server that listens on the loopback alone is reached by no probe.
    assert config.server.host == "0.0.0.0"


async def test_probes_ask_addresses_that_need_no_key(container: dict[str, Any], config: EngineConfig) -> None:
    routes = {resource.canonical for resource in create_app(Service(config)).router.resources()}
    (port,) = container["ports"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = container[probe]["httpGet"]
        assert get["port"] == port["name"]
        assert get["path"] in routes & OPEN_PATHS


def test_a_pod_has_time_to_drain(pod: dict[str, Any], container: dict[str, Any], config: EngineConfig) -> None:
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    least_s = pause_s + config.server.drain_timeout + GOODBYE_S + ENGINE_SHUTDOWN_S
    assert pod["terminationGracePeriodSeconds"] > least_s


def test_the_memory_limit_holds_the_host_tier(container: dict[str, Any], config: EngineConfig) -> None:
    limit = container["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    assert config.host_kv_gib is not None
    assert float(limit.removesuffix("Gi")) >= config.host_kv_gib + 8
    assert container["resources"]["requests"]["memory"] == limit


def test_selectors_find_the_pods(deployment: dict[str, Any]) -> None:
    labels = deployment["Deployment"]["spec"]["template"]["metadata"]["labels"]
    routing = manifests("inference-routing.yaml")
    for selector in (
        deployment["Deployment"]["spec"]["selector"]["matchLabels"],
        deployment["Service"]["spec"]["selector"],
        deployment["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        routing["InferencePool"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()
    (rule,) = routing["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    pool = routing["InferencePool"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    assert pool["apiVersion"] == f"{backend['group']}/v1"


async def test_the_picker_asks_for_metrics_that_there_are(config: EngineConfig) -> None:
    service = Service(config)
    service.ready(FakeEngine(config))
    exposed = {line.split()[0] for line in service.metrics.render([]).decode().splitlines() if line[0] != "#"}
    picker = manifests("endpoint-picker.yaml")["EndpointPickerConfig"]
    (extractor,) = (plugin for plugin in picker["plugins"] if plugin["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    asked = {value for name, value in engine.items() if name.endswith("Spec") and value}
    assert len(asked) == 3
    assert asked <= exposed
    told = set(re.findall(r"tfserve:[a-z_]+", (KUBERNETES / "README.md").read_text()))
    assert asked < told <= exposed
