"""`topwork render`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from standards import ODD, VERSIONS, check_object

from topwork.cluster.manifests.render import Placement, render
from topwork.spec.loading.loader import read_jobs

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
GOLDEN = Path(__file__).with_name("golden")
KUBECTL = Path(sys.executable).with_name("kubectl")
FULL = GOLDEN / "full" / "job.yaml"
HEAVY = {"tensorflow", "keras", "tensorflow_datasets", "numpy", "boto3", "botocore", "kubernetes", "prometheus_client"}
IMAGE = "registry.example.com/topwork:1"


def topwork(*arguments: object, stdin: bytes = b"", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "topwork", *map(str, arguments)],
        input=stdin,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


def test_render_prints_yaml_as_people_write_it() -> None:
    ended = topwork("render", GOLDEN / "least-cpu" / "job.yaml")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.decode() == (GOLDEN / "least-cpu" / "objects.yaml").read_text()
    documents = ended.stdout.decode().split("---\n")
    assert all(document.startswith("apiVersion: ") for document in documents)
    assert "  job.yaml: |\n    apiVersion: topwork.dev/v1alpha1\n    kind: TransferJob\n" in documents[0]


def test_render_prints_json_as_one_list() -> None:
    (job,) = read_jobs(FULL)
    ended = topwork("render", FULL, "-o", "json", "--image", IMAGE, "-n", "vision")
    objects = render(job, Placement(IMAGE, "vision")).objects
    assert json.loads(ended.stdout) == {"apiVersion": "v1", "kind": "List", "items": objects}


def test_render_takes_the_image_from_the_environment_and_rather_from_its_option() -> None:
    least = GOLDEN / "least-cpu" / "job.yaml"
    assert b"image: registry.example.com/topwork:1\n" in topwork("render", least, TOPWORK_IMAGE=IMAGE).stdout
    assert b"image: other:2\n" in topwork("render", least, "--image", "other:2", TOPWORK_IMAGE=IMAGE).stdout


def test_render_reads_standard_input_with_several_jobs() -> None:
    text = b"---\n".join((GOLDEN / case / "job.yaml").read_bytes() for case in ("least-cpu", "prefetch"))
    kinds = [document["kind"] for document in YAML(typ="safe").load_all(topwork("render", "-", stdin=text).stdout)]
    assert kinds == ["ConfigMap", "Job", "ConfigMap", "Job", "Job"]


def test_render_refuses_all_local_paths_of_all_files_at_once_and_prints_nothing(tmp_path: Path) -> None:
    text = (GOLDEN / "least-cpu" / "job.yaml").read_text()
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(text.replace("{tfds: cats_vs_dogs}", "{folder: {uri: photos}}"))
    two.write_text(
        text.replace("{tfds: cats_vs_dogs}", "{table: {uri: labels.csv}}").replace(
            "{application: MobileNetV2}", "{saved: {uri: /models/old.keras}}"
        )
    )
    ended = topwork("render", FULL, one, two)
    told = "is a path on this machine: a pod can't read it. Put it into object storage: s3://…"
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.decode().splitlines() == [
        f'{one}: spec.dataset.source.folder.uri: "photos" {told}',
        f'{two}: spec.dataset.source.table.uri: "labels.csv" {told}',
        f'{two}: spec.model.base.saved.uri: "/models/old.keras" {told}',
    ]


def test_render_names_standard_input_as_validate_does() -> None:
    text = (GOLDEN / "least-cpu" / "job.yaml").read_bytes().replace(b"{tfds: cats_vs_dogs}", b"{folder: {uri: photos}}")
    assert topwork("render", "-", stdin=text).stderr.startswith(b"standard input: spec.dataset.source.folder.uri: ")


def test_render_refuses_two_specs_of_one_run(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FULL.read_text().replace("gpus: 2", "gpus: 4"))
    ended = topwork("render", FULL, other)
    assert (ended.returncode, ended.stdout) == (2, b"")
    (job,) = read_jobs(FULL)
    assert ended.stderr.decode() == (
        f"{other}: makes the objects of {job.run}, as {FULL} does: the two differ in nothing that changes the result. "
        "Leave one out, or change metadata.name.\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--image", "a b", 'topwork: the image "a b" is no'), ("--namespace", "A", 'topwork: the namespace "A" can')],
)
def test_render_refuses_a_wrong_option_without_a_traceback(option: str, value: str, told: str) -> None:
    ended = topwork("render", FULL, option, value)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.decode().startswith(told)
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_renders_objects_that_the_oldest_and_newest_version_take(example: Path) -> None:
    # Every version is asked about the same objects in k8s/examples.
    ended = topwork("render", example)
    assert ended.returncode == 0, ended.stderr
    for manifest in YAML(typ="safe").load_all(ended.stdout):
        check_object(manifest, (VERSIONS[0], VERSIONS[-1]))


def test_render_imports_nothing_heavy() -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "topwork", "render", FULL],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
    assert "topwork.cluster.manifests.render" in modules
    assert not HEAVY & modules


# Without a server, this is the one command of kubectl that reads an object as the server would.
LOCALLY = ("annotate", "--local", "--filename=-", "--output=json", "read-by=kubectl")


def read_by_kubectl(text: bytes) -> list[dict[str, Any]]:
    ended = subprocess.run([KUBECTL, *LOCALLY], input=text, capture_output=True, check=True)
    found, decoder, rest = [], json.JSONDecoder(), ended.stdout.decode().strip()
    while rest:
        manifest, end = decoder.raw_decode(rest)
        rest = rest[end:].strip()
        manifests = manifest["items"] if manifest["kind"] == "List" else [manifest]
        for one in manifests:
            del one["metadata"]["annotations"]["read-by"]
        found += manifests
    return found


def as_kubectl_writes(value: Any, *, amount: bool = False) -> Any:
    """Amounts as text, as Kubernetes has them; and no mapping that is empty."""
    if isinstance(value, dict):
        amounts = value.keys() & {"requests", "limits"}
        found = {key: as_kubectl_writes(inner, amount=amount or key in amounts) for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner != {}}
    if isinstance(value, list):
        return [as_kubectl_writes(inner) for inner in value]
    return str(value) if amount else value


@pytest.mark.parametrize("output", ["yaml", "json"])
@pytest.mark.parametrize("case", ["least-cpu", "prefetch", "full"])
def test_kubectl_reads_every_object_as_it_was_rendered(case: str, output: str) -> None:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    ended = topwork("render", GOLDEN / case / "job.yaml", "--output", output)
    found = as_kubectl_writes(read_by_kubectl(ended.stdout))
    for manifest in found:
        manifest.pop("status", None)
        # The server sets these; a client only writes out that they are not set.
        for metadata in (manifest["metadata"], manifest.get("spec", {}).get("template", {}).get("metadata", {})):
            metadata.pop("creationTimestamp", None)
    assert found == as_kubectl_writes(render(job, Placement()).objects)


def test_kubectl_reads_odd_annotations_as_they_were_written(tmp_path: Path) -> None:
    spec = tmp_path / "odd.yaml"
    odd = {f"k{index}": text for index, text in enumerate(ODD)}
    # JSON is YAML, but for what it writes of characters beyond 16 bits.
    compute = json.dumps({"annotations": odd}, ensure_ascii=False).replace("\u2028", "\\u2028")
    spec.write_text((GOLDEN / "least-cpu" / "job.yaml").read_text().replace("{gpus: 0}", compute))
    for output in ("yaml", "json"):
        ended = topwork("render", spec, "-o", output)
        assert ended.returncode == 0, ended.stderr
        job = read_by_kubectl(ended.stdout)[1]
        assert job["spec"]["template"]["metadata"]["annotations"] == odd
