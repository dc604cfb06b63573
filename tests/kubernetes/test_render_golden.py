"""Golden files: complete rendered objects. `make goldens` rewrites them; review the diff before you commit it."""

import os
from pathlib import Path

import pytest
from object_validation import assert_valid_object
from ruamel.yaml import YAML

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec.compute import Compute
from topwork.spec.loading.loader import read_jobs, read_text
from topwork.spec.yaml_output import dump_yaml

GOLDEN = Path(__file__).with_name("golden")
OPTIONS = {
    "least-cpu": RenderOptions(),
    "no-fine-tune": RenderOptions(),
    "longest-name": RenderOptions(),
    "prefetch": RenderOptions(namespace="vision"),
    "full": RenderOptions(
        image="registry.example.com:5000/ml/topwork@sha256:" + "0123456789abcdef" * 4, namespace="vision"
    ),
    "two-nodes": RenderOptions(),
    "four-nodes": RenderOptions(namespace="vision"),
}


def rendered_yaml(case: str) -> str:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    return dump_yaml(render(job, OPTIONS[case]).objects)


def test_every_golden_directory_is_tested() -> None:
    assert {directory.name for directory in GOLDEN.iterdir()} == OPTIONS.keys()


@pytest.mark.parametrize("case", OPTIONS)
def test_objects_match_the_golden_file(case: str) -> None:
    golden = GOLDEN / case / "objects.yaml"
    if os.environ.get("TOPWORK_WRITE_GOLDENS"):
        golden.write_text(rendered_yaml(case), encoding="utf-8")
    assert rendered_yaml(case) == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", OPTIONS)
def test_golden_objects_are_valid_in_every_kubernetes_version(case: str) -> None:
    for obj in YAML(typ="safe").load_all(GOLDEN / case / "objects.yaml"):
        assert_valid_object(obj)


@pytest.mark.parametrize("case", OPTIONS)
def test_config_map_contains_the_rendered_job(case: str) -> None:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    assert read_text(render(job, OPTIONS[case]).config_map["data"]["job.yaml"], "job.yaml") == [job]


def test_full_job_and_that_on_several_nodes_use_every_key_of_compute() -> None:
    (full,), (nodes,) = (read_jobs(GOLDEN / case / "job.yaml") for case in ("full", "four-nodes"))
    assert full.spec.compute.model_fields_set == set(Compute.model_fields) - {"nodes", "topology", "keep_checkpoint"}
    assert nodes.spec.compute.model_fields_set >= {"nodes", "topology"}
