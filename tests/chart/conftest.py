"""Fixtures that render the Helm chart, and run the containers of its hooks."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
from api_server import ApiServer

# The image of the controller does not contain the S3 client.
TOPWORK = "import sys; sys.modules.update(boto3=None, botocore=None); from topwork.cli import main; main()"
CHART = Path(__file__).parents[2] / "charts" / "topwork"
NAMESPACE = "ml"


@pytest.fixture(scope="session")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def render_chart(chart: helm_python.Chart) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """Render values as the release topwork in the namespace ml.

    Returns objects by kind and name; the name of an object in another namespace is `namespace/name`.
    """

    def render(values: dict[str, Any], **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
        templates = chart.render(values, **({"name": "topwork", "namespace": NAMESPACE} | options))
        manifests = [
            # The parser of Helm, kubectl and Argo CD.
            manifest
            for path, text in templates.items()
            if not path.endswith("NOTES.txt")
            for document in f"\n{text}".split("\n---\n")
            if (manifest := helm_python.values_from_yaml(document))
        ]
        objects = {(manifest["kind"], _name(manifest["metadata"])): manifest for manifest in manifests}
        assert len(objects) == len(manifests), "two objects have the same kind and name"
        return objects

    return render


def _name(metadata: dict[str, Any]) -> str:
    is_elsewhere = metadata.get("namespace", NAMESPACE) != NAMESPACE
    return f"{metadata['namespace']}/{metadata['name']}" if is_elsewhere else metadata["name"]


@pytest.fixture
def run_pod(tmp_path: Path) -> Callable[[ApiServer, dict[str, Any]], tuple[int, str]]:
    """Function that runs the container of a pod as a process, with its ConfigMaps; returns its exit code and output."""
    numbers = itertools.count()

    def run(server: ApiServer, pod: dict[str, Any]) -> tuple[int, str]:
        (container,) = pod["containers"]
        program, *words = [*container["command"], *container.get("args", ())]
        assert program == "topwork"
        directory = tmp_path / f"pod-{next(numbers)}"
        directory.mkdir()
        config_maps = {
            volume["name"]: volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume
        }
        for mount in container["volumeMounts"]:
            if mount["name"] in config_maps:
                config_map = server.get("ConfigMap", config_maps[mount["name"]])
                assert config_map
                for name, text in config_map["data"].items():
                    (directory / name).write_text(text, encoding="utf-8")
                words = [word.replace(mount["mountPath"], str(directory)) for word in words]
        environment = os.environ | {"KUBECONFIG": str(server.kubeconfig(directory / "kubeconfig"))}
        completed = subprocess.run(
            [sys.executable, "-c", TOPWORK, *words], env=environment, capture_output=True, text=True, check=False
        )
        return completed.returncode, completed.stdout + completed.stderr

    return run
