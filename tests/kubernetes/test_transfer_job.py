"""Conversion between TransferJobs in a cluster and the models of the spec, and `topwork crd`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.definition import CUSTOM_RESOURCES, definition
from topwork.cluster.manifests.transfer_job import build_transfer_job, parse_transfer_job
from topwork.spec.loading.defaults import SpecDefaults, flatten_defaults
from topwork.spec.loading.loader import read_jobs
from topwork.spec.loading.problems import InvalidSpecError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SPEC: dict[str, Any] = {
    "storage": "s3://bucket/prefix",
    "dataset": {"source": {"tfds": "mnist"}, "splits": {"train": 0.8, "test": 0.2}, "imageSize": [96, 96]},
    "model": {"base": {"application": "MobileNetV2"}},
}


def transfer_job(**changes: Any) -> KubernetesObject:
    metadata = {"name": "digits", "namespace": "team-a", "labels": {"team": "vision"}}
    kind = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob"}
    return kind | {"metadata": metadata, "spec": SPEC | changes}


def test_object_of_the_api_server_is_parsed_without_status_and_server_side_metadata() -> None:
    obj = transfer_job()
    stored = obj | {"status": {"state": "Running"}}
    stored["metadata"] = obj["metadata"] | {
        "uid": "5d41402a",
        "generation": 3,
        "managedFields": [{"manager": "kubectl"}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
    }
    job = parse_transfer_job(stored)
    assert job == parse_transfer_job(obj)
    assert (job.metadata.namespace, job.metadata.labels) == ("team-a", {"team": "vision"})


def test_all_problems_are_reported_without_a_file() -> None:
    obj = transfer_job(seed="1", transfer={"optimiser": {}, "batchSize": 3}, compute={"gpus": 2})
    with pytest.raises(InvalidSpecError) as caught:
        parse_transfer_job(obj)
    assert str(caught.value).splitlines() == [
        "spec.transfer.optimiser: unknown key. Did you mean optimizer? Known keys: train, epochs, batchSize, "
        "optimizer, loss, classWeights, earlyStopping, featureCache.",
        'spec.seed: "1" is not allowed. Remove the quotes. Allowed: an integer from 0 to 2147483647.',
        "spec.transfer.batchSize: 3 is not divisible by spec.compute.gpus 2, but each replica processes an equal part "
        "of the global batch. Try 2 or 4.",
    ]


def test_object_without_spec_is_a_problem_of_the_spec() -> None:
    obj = transfer_job()
    del obj["spec"]
    with pytest.raises(InvalidSpecError, match=r"^spec: is required"):
        parse_transfer_job(obj)


def test_booleans_become_on_and_off_only_where_these_words_are_allowed() -> None:
    obj = transfer_job(
        transfer={"featureCache": True},
        fineTune={"epochs": 2, "unfreeze": {"layers": 1}, "featureCache": {"use": False}},
        compute={"prefetch": True},
    )
    spec = parse_transfer_job(obj).spec
    assert spec.fine_tune is not None
    assert (spec.transfer.feature_cache, spec.fine_tune.cache.use, spec.compute.prefetch) == ("on", "off", True)


def test_defaults_of_the_namespace_fill_keys_that_are_not_set() -> None:
    defaults = SpecDefaults("configmap", flatten_defaults({"storage": "s3://other", "compute": {"gpus": 4}}))
    job = parse_transfer_job(transfer_job(), defaults)
    assert (job.spec.storage, job.spec.compute.gpus) == ("s3://bucket/prefix", 4)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_built_object_contains_what_the_file_sets(path: Path) -> None:
    documents = [data for data in yaml.safe_load_all(path.read_text(encoding="utf-8")) if data]
    for job, data in zip(read_jobs(path), documents, strict=True):
        obj = build_transfer_job(job, None)
        assert keys(obj["spec"]) == keys(data["spec"])
        assert parse_transfer_job(obj) == job


def keys(value: Any) -> Any:
    """Return the keys of nested mappings."""
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_built_object_is_in_the_given_namespace() -> None:
    job = parse_transfer_job(transfer_job())
    assert build_transfer_job(job, None)["metadata"]["namespace"] == "team-a"
    assert build_transfer_job(job, "team-b")["metadata"]["namespace"] == "team-b"


def test_crd_command_prints_the_definitions(topwork: Callable[..., Any]) -> None:
    code, lines = topwork("crd")
    assert code == 0
    assert [*yaml.safe_load_all("\n".join(lines))] == [definition(resource) for resource in CUSTOM_RESOURCES]


def test_crd_command_updates_the_definitions_and_keeps_objects(
    api_server: ApiServer, topwork: Callable[..., Any]
) -> None:
    names = ("transferjobs", "transfersearches")
    applied = [f"customresourcedefinition/{name}.topwork.dev applied" for name in names]
    assert topwork("crd", "--apply") == (0, applied)
    api_server.put(transfer_job())
    assert topwork("crd", "--apply")[0] == 0
    assert [obj["metadata"]["name"] for obj in api_server.list("TransferJob")] == ["digits"]
