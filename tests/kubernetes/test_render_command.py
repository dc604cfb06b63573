"""`topwork render` as a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from object_validation import TRICKY_STRINGS, VERSIONS, assert_valid_object
from ruamel.yaml import YAML

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec.loading.loader import read_jobs

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
GOLDEN = Path(__file__).with_name("golden")
KUBECTL = Path(sys.executable).with_name("kubectl")
FULL = GOLDEN / "full" / "job.yaml"
HEAVY_MODULES = {
    "tensorflow",
    "keras",
    "tensorflow_datasets",
    "numpy",
    "boto3",
    "botocore",
    "kubernetes",
    "prometheus_client",
}
IMAGE = "registry.example.com/topwork:1"


def topwork(*arguments: object, stdin: bytes = b"", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "topwork", *map(str, arguments)],
        input=stdin,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


def test_render_prints_readable_yaml() -> None:
    result = topwork("render", GOLDEN / "least-cpu" / "job.yaml")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == (GOLDEN / "least-cpu" / "objects.yaml").read_text()
    documents = result.stdout.decode().split("---\n")
    assert all(document.startswith("apiVersion: ") for document in documents)
    assert "  job.yaml: |\n    apiVersion: topwork.dev/v1alpha1\n    kind: TransferJob\n" in documents[0]


def test_render_prints_json_as_one_list() -> None:
    (job,) = read_jobs(FULL)
    result = topwork("render", FULL, "-o", "json", "--image", IMAGE, "-n", "vision")
    objects = render(job, RenderOptions(IMAGE, "vision")).objects
    assert json.loads(result.stdout) == {"apiVersion": "v1", "kind": "List", "items": objects}


def test_image_option_takes_precedence_over_the_environment_variable() -> None:
    file = GOLDEN / "least-cpu" / "job.yaml"
    assert b"image: registry.example.com/topwork:1\n" in topwork("render", file, TOPWORK_IMAGE=IMAGE).stdout
    assert b"image: other:2\n" in topwork("render", file, "--image", "other:2", TOPWORK_IMAGE=IMAGE).stdout


def test_render_reads_several_jobs_from_standard_input() -> None:
    text = b"---\n".join((GOLDEN / case / "job.yaml").read_bytes() for case in ("least-cpu", "prefetch"))
    kinds = [document["kind"] for document in YAML(typ="safe").load_all(topwork("render", "-", stdin=text).stdout)]
    assert kinds == ["ConfigMap", "Job", "ConfigMap", "Job", "Job"]


def test_render_reports_all_local_paths_of_all_files_and_prints_nothing(tmp_path: Path) -> None:
    text = (GOLDEN / "least-cpu" / "job.yaml").read_text()
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(text.replace("{tfds: cats_vs_dogs}", "{folder: {uri: photos}}"))
    two.write_text(
        text.replace("{tfds: cats_vs_dogs}", "{table: {uri: labels.csv}}").replace(
            "{application: MobileNetV2}", "{saved: {uri: /models/old.keras}}"
        )
    )
    result = topwork("render", FULL, one, two)
    message = "is a path on this machine: a pod can't read it. Upload it to object storage: s3://…"
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().splitlines() == [
        f'{one}: spec.dataset.source.folder.uri: "photos" {message}',
        f'{two}: spec.dataset.source.table.uri: "labels.csv" {message}',
        f'{two}: spec.model.base.saved.uri: "/models/old.keras" {message}',
    ]


def test_render_names_standard_input_like_validate() -> None:
    text = (GOLDEN / "least-cpu" / "job.yaml").read_bytes().replace(b"{tfds: cats_vs_dogs}", b"{folder: {uri: photos}}")
    assert topwork("render", "-", stdin=text).stderr.startswith(b"standard input: spec.dataset.source.folder.uri: ")


def test_render_rejects_two_specs_of_the_same_run(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FULL.read_text().replace("gpus: 2", "gpus: 4"))
    result = topwork("render", FULL, other)
    assert (result.returncode, result.stdout) == (2, b"")
    (job,) = read_jobs(FULL)
    assert result.stderr.decode() == (
        f"{other}: is the same run, {job.run}, as {FULL}: the two specs differ only in keys that do not affect the "
        "result. Remove one of them, or change metadata.name.\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--image", "a b", 'topwork: the image "a b" is not'), ("--namespace", "A", 'topwork: the namespace "A" is not')],
)
def test_render_rejects_an_invalid_option_without_a_traceback(option: str, value: str, message: str) -> None:
    result = topwork("render", FULL, option, value)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().startswith(message)
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_in_the_oldest_and_newest_kubernetes_version(example: Path) -> None:
    # test_kustomize validates the same objects against every version.
    result = topwork("render", example)
    assert result.returncode == 0, result.stderr
    for obj in YAML(typ="safe").load_all(result.stdout):
        assert_valid_object(obj, (VERSIONS[0], VERSIONS[-1]))


def test_render_imports_no_heavy_modules() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "topwork", "render", FULL],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "topwork.cluster.manifests.render" in modules
    assert not HEAVY_MODULES & modules


# The only kubectl command that parses objects as the API server does, but requires no API server.
PARSE_COMMAND = ("annotate", "--local", "--filename=-", "--output=json", "read-by=kubectl")


def parse_with_kubectl(text: bytes) -> list[dict[str, Any]]:
    result = subprocess.run([KUBECTL, *PARSE_COMMAND], input=text, capture_output=True, check=True)
    objects, decoder, rest = [], json.JSONDecoder(), result.stdout.decode().strip()
    while rest:
        obj, end = decoder.raw_decode(rest)
        rest = rest[end:].strip()
        manifests = obj["items"] if obj["kind"] == "List" else [obj]
        for manifest in manifests:
            del manifest["metadata"]["annotations"]["read-by"]
        objects += manifests
    return objects


def normalize(value: Any, *, is_quantity: bool = False) -> Any:
    """Convert values as kubectl does: quantities become strings, and empty mappings are removed."""
    if isinstance(value, dict):
        quantity_keys = value.keys() & {"requests", "limits"}
        normalized = {
            key: normalize(child, is_quantity=is_quantity or key in quantity_keys) for key, child in value.items()
        }
        return {key: child for key, child in normalized.items() if child != {}}
    if isinstance(value, list):
        return [normalize(child) for child in value]
    return str(value) if is_quantity else value


@pytest.mark.parametrize("output", ["yaml", "json"])
@pytest.mark.parametrize("case", ["least-cpu", "prefetch", "full"])
def test_kubectl_parses_every_object_as_rendered(case: str, output: str) -> None:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    result = topwork("render", GOLDEN / case / "job.yaml", "--output", output)
    objects = normalize(parse_with_kubectl(result.stdout))
    for obj in objects:
        obj.pop("status", None)
        # The API server sets this field; kubectl writes null.
        for metadata in (obj["metadata"], obj.get("spec", {}).get("template", {}).get("metadata", {})):
            metadata.pop("creationTimestamp", None)
    assert objects == normalize(render(job, RenderOptions()).objects)


def test_kubectl_parses_tricky_annotations_as_written(tmp_path: Path) -> None:
    file = tmp_path / "annotations.yaml"
    annotations = {f"k{index}": text for index, text in enumerate(TRICKY_STRINGS)}
    # JSON is valid YAML, except for escaped surrogate pairs.
    compute = json.dumps({"annotations": annotations}, ensure_ascii=False).replace("\u2028", "\\u2028")
    file.write_text((GOLDEN / "least-cpu" / "job.yaml").read_text().replace("{gpus: 0}", compute))
    for output in ("yaml", "json"):
        result = topwork("render", file, "-o", output)
        assert result.returncode == 0, result.stderr
        job = parse_with_kubectl(result.stdout)[1]
        assert job["spec"]["template"]["metadata"]["annotations"] == annotations


def test_namespace_of_the_spec_is_used_unless_another_is_requested(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    text = EXAMPLES[0].read_text()
    assert "metadata:\n" in text
    file.write_text(text.replace("metadata:\n", "metadata:\n  namespace: vision\n", 1))
    objects = YAML(typ="safe").load_all(topwork("render", file).stdout)
    assert {obj["metadata"]["namespace"] for obj in objects} == {"vision"}
    assert topwork("render", file, "-n", "vision").returncode == 0
    rejected = topwork("render", file, "-n", "other")
    assert rejected.returncode == 2
    assert b"metadata.namespace is vision, but --namespace is other." in rejected.stderr
