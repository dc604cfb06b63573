"""What `topwork submit` takes from the namespace where a spec says nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_statuses
import pytest
import yaml
from api_server import ApiServer, Fault

from topwork.cluster.manifests.defaults import parse_defaults
from topwork.errors import SettingError

SPEC = """\
apiVersion: topwork.dev/v1alpha1
kind: TransferJob
metadata: {name: cats}
spec:
  dataset:
    source: {tfds: cats_vs_dogs}
    splits: {train: "train[:80%]", test: "train[80%:]"}
    imageSize: [96, 96]
  model: {base: {application: MobileNetV2}}
  compute: {memory: 64Gi}
"""
DEFAULTS = """\
image: registry.example.com/topwork:1
spec:
  storage: s3://artifacts/topwork
  compute: {queue: team-a, memory: 32Gi, gpus: 2}
"""
Topwork = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(SPEC)
    return path


def put(server: ApiServer, text: str) -> None:
    metadata = {"name": "topwork-defaults"}
    server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}})


def applied(server: ApiServer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec in the ConfigMap of the only run, and its last container."""
    (job,) = server.all("Job")
    config_map = server.get("ConfigMap", job["metadata"]["name"])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return yaml.safe_load(config_map["data"]["job.yaml"])["spec"], container


def test_what_a_spec_does_not_say_comes_from_the_namespace(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, DEFAULTS)
    code, lines = topwork("submit", spec)
    assert code == 0
    assert lines[0] == (
        "from configmap/topwork-defaults: image registry.example.com/topwork:1, "
        'spec.storage "s3://artifacts/topwork", spec.compute.queue "team-a", spec.compute.gpus 2'
    )
    found, container = applied(api_server)
    assert found["storage"] == "s3://artifacts/topwork"
    assert (found["compute"]["queue"], found["compute"]["memory"], found["compute"]["gpus"]) == ("team-a", "64Gi", 2)
    assert container["image"] == "registry.example.com/topwork:1"


def test_the_command_line_comes_before_the_defaults(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, DEFAULTS)
    code, lines = topwork(
        "submit", spec, "--image", "own:1", "--set", "spec.compute.queue=b", "--set", "spec.compute.gpus=null"
    )
    assert code == 0
    found, container = applied(api_server)
    assert (found["compute"]["queue"], found["compute"]["gpus"], container["image"]) == ("b", 1, "own:1")
    assert "image" not in lines[0]


def test_without_defaults_a_spec_names_its_storage(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    code, lines = topwork("submit", spec)
    assert code == 2
    assert "spec.storage" in lines[0]
    assert api_server.all("Job") == []


def test_who_must_not_read_the_defaults_goes_without(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, DEFAULTS)
    api_server.plant(
        Fault(api_statuses.rbac("get", "configmaps", "team-a", "topwork-defaults"), path="topwork-defaults")
    )
    code, lines = topwork("submit", spec, "--set", "spec.storage=s3://own")
    assert code == 0
    assert any(line.startswith("Note: configmap/topwork-defaults is not taken into account: ") for line in lines)
    assert "queue" not in applied(api_server)[0]["compute"]


def test_a_wrong_default_is_told_with_its_place(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, "spec: {storage: s3://artifacts, compute: {gpus: 99, quue: a}}")
    code, lines = topwork("submit", spec)
    assert code == 2
    assert lines[0].startswith("configmap/topwork-defaults: spec.compute.gpus: 99 is not allowed")
    assert lines[1].startswith("configmap/topwork-defaults: spec.compute.quue: no such key. Did you mean queue?")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("imag: a", "imag: no such key. Did you mean image? Known: image, spec."),
        ("spec: {seed: 1}", "spec.seed: no such key. Known: storage, compute, metrics."),
        ("spec: {compute: [1]}", "spec.compute: a list of 1 is not allowed. Allowed: a mapping."),
        ("image: 1", "image: 1 is not allowed. Allowed: text."),
        ("- a", "a list of 1 is not allowed. Allowed: a mapping."),
    ],
)
def test_defaults_of_another_shape_are_refused(text: str, told: str) -> None:
    with pytest.raises(SettingError) as refused:
        parse_defaults(text)
    assert str(refused.value) == f"configmap/topwork-defaults: defaults.yaml: {told}"
