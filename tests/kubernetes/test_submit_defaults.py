"""Defaults of the namespace that `topwork submit` fills in."""

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
    """Return the spec in the ConfigMap of the only run, and its main container."""
    (job,) = server.list("Job")
    config_map = server.get("ConfigMap", job["metadata"]["name"])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return yaml.safe_load(config_map["data"]["job.yaml"])["spec"], container


def test_submit_fills_in_defaults_of_the_namespace(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, DEFAULTS)
    code, lines = topwork("submit", spec)
    assert code == 0
    assert lines[0] == (
        "from configmap/topwork-defaults: image registry.example.com/topwork:1, "
        'spec.storage "s3://artifacts/topwork", spec.compute.queue "team-a", spec.compute.gpus 2'
    )
    applied_spec, container = applied(api_server)
    assert applied_spec["storage"] == "s3://artifacts/topwork"
    compute = applied_spec["compute"]
    assert (compute["queue"], compute["memory"], compute["gpus"]) == ("team-a", "64Gi", 2)
    assert container["image"] == "registry.example.com/topwork:1"


def test_command_line_takes_precedence_over_defaults(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, DEFAULTS)
    code, lines = topwork(
        "submit", spec, "--image", "own:1", "--set", "spec.compute.queue=b", "--set", "spec.compute.gpus=null"
    )
    assert code == 0
    applied_spec, container = applied(api_server)
    assert (applied_spec["compute"]["queue"], applied_spec["compute"]["gpus"], container["image"]) == ("b", 1, "own:1")
    assert "image" not in lines[0]


def test_storage_is_required_without_defaults(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    code, lines = topwork("submit", spec)
    assert code == 2
    assert "spec.storage" in lines[0]
    assert api_server.list("Job") == []


def test_submit_without_permission_to_read_defaults_ignores_them(
    topwork: Topwork, api_server: ApiServer, spec: Path
) -> None:
    put(api_server, DEFAULTS)
    api_server.inject(
        Fault(api_statuses.rbac_denied("get", "configmaps", "team-a", "topwork-defaults"), path="topwork-defaults")
    )
    code, lines = topwork("submit", spec, "--set", "spec.storage=s3://own")
    assert code == 0
    assert any(line.startswith("Note: configmap/topwork-defaults is ignored: ") for line in lines)
    assert "queue" not in applied(api_server)[0]["compute"]


def test_invalid_default_is_reported_with_its_key(topwork: Topwork, api_server: ApiServer, spec: Path) -> None:
    put(api_server, "spec: {storage: s3://artifacts, compute: {gpus: 99, quue: a}}")
    code, lines = topwork("submit", spec)
    assert code == 2
    assert lines[0].startswith("configmap/topwork-defaults: spec.compute.gpus: 99 is not allowed")
    assert lines[1].startswith("configmap/topwork-defaults: spec.compute.quue: unknown key. Did you mean queue?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imag: a", "imag: unknown key. Did you mean image? Known keys: image, spec."),
        ("spec: {seed: 1}", "spec.seed: unknown key. Known keys: storage, compute, metrics."),
        ("spec: {compute: [1]}", "spec.compute: a list of 1 is not allowed. Allowed: a mapping."),
        ("image: 1", "image: 1 is not allowed. Allowed: text."),
        ("- a", "a list of 1 is not allowed. Allowed: a mapping."),
    ],
)
def test_parse_defaults_rejects_invalid_structure(text: str, message: str) -> None:
    with pytest.raises(SettingError) as raised:
        parse_defaults(text)
    assert str(raised.value) == f"configmap/topwork-defaults: defaults.yaml: {message}"
