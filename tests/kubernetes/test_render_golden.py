"""The objects of a job, compared whole. `make goldens` writes them anew; read the diff before committing it."""

import os
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from standards import check_object

from topwork.cluster.manifests.render import Placement, render
from topwork.spec.compute import Compute
from topwork.spec.loading.loader import read_jobs, read_text
from topwork.spec.yaml_output import as_yaml

GOLDEN = Path(__file__).with_name("golden")
PLACEMENTS = {
    "least-cpu": Placement(),
    "no-fine-tune": Placement(),
    "longest-name": Placement(),
    "prefetch": Placement(namespace="vision"),
    "full": Placement(
        image="registry.example.com:5000/ml/topwork@sha256:" + "0123456789abcdef" * 4, namespace="vision"
    ),
}


def rendered(case: str) -> str:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    return as_yaml(render(job, PLACEMENTS[case]).objects)


def test_each_golden_folder_is_compared() -> None:
    assert {folder.name for folder in GOLDEN.iterdir()} == PLACEMENTS.keys()


@pytest.mark.parametrize("case", PLACEMENTS)
def test_objects_are_those_of_the_golden_file(case: str) -> None:
    golden = GOLDEN / case / "objects.yaml"
    if os.environ.get("TOPWORK_WRITE_GOLDENS"):
        golden.write_text(rendered(case), encoding="utf-8")
    assert rendered(case) == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", PLACEMENTS)
def test_every_version_of_kubernetes_takes_the_golden_objects(case: str) -> None:
    for manifest in YAML(typ="safe").load_all(GOLDEN / case / "objects.yaml"):
        check_object(manifest)


@pytest.mark.parametrize("case", PLACEMENTS)
def test_pod_reads_the_job_that_was_rendered(case: str) -> None:
    (job,) = read_jobs(GOLDEN / case / "job.yaml")
    assert read_text(render(job, PLACEMENTS[case]).config_map["data"]["job.yaml"], "job.yaml") == [job]


def test_full_job_uses_every_key_of_compute() -> None:
    (job,) = read_jobs(GOLDEN / "full" / "job.yaml")
    assert job.spec.compute.model_fields_set == set(Compute.model_fields)
