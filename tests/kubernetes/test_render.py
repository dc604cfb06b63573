"""What the renderer promises beyond its golden files: names, images, digests, refusals, and whose labels win."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from standards import check_object, violations

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import Placement, Rendered, render
from topwork.cluster.names import DIGEST_ANNOTATION
from topwork.errors import SettingError, SpecError
from topwork.spec import TransferJob

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# The Job controller appends a dash and five characters to name a pod.
POD_SUFFIX = len("-xxxxx")
LONGEST = 63
IMAGES = ["a", "topwork:1", "localhost/topwork:1", "host:5000/a/b__c/d-e:V_1.2-x", f"a.b/c@sha256:{'0' * 64}"]


def make(compute: dict[str, Any] | None = None, name: str = "cats-vs-dogs", **metadata: Any) -> TransferJob:
    return TransferJob.model_validate(
        {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferJob",
            "metadata": {"name": name, **metadata},
            "spec": {
                "storage": "s3://ml-artifacts/topwork",
                "dataset": {
                    "source": {"tfds": "cats_vs_dogs"},
                    "splits": {"train": "train[:80%]", "test": "train[80%:]"},
                    "imageSize": [96, 96],
                },
                "model": {"base": {"application": "MobileNetV2"}},
                "compute": compute or {},
            },
        }
    )


def with_spec(job: TransferJob, change: Callable[[dict[str, Any]], Any]) -> TransferJob:
    data = job.model_dump(mode="json", by_alias=True)
    change(data["spec"])
    return TransferJob.model_validate(data)


def objects(job: TransferJob, **placement: str) -> list[KubernetesObject]:
    return render(job, Placement(**placement)).objects


def pod(job: KubernetesObject) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def digest(job: KubernetesObject | None) -> str:
    assert job
    return job["metadata"]["annotations"][DIGEST_ANNOTATION]


@pytest.mark.parametrize("name", ["a", "a" * 40, f"a{'-' * 38}a"])
def test_names_and_labels_are_valid_for_any_name_of_a_job(name: str) -> None:
    for manifest in objects(make({"prefetch": True}, name)):
        own = manifest["metadata"]["name"]
        assert DNS_LABEL.fullmatch(own)
        assert len(own) + POD_SUFFIX <= LONGEST
        for value in manifest["metadata"]["labels"].values():
            assert LABEL_VALUE.fullmatch(value)
            assert len(value) <= LONGEST
        check_object(manifest)


def test_names_of_two_specs_with_the_same_name_differ() -> None:
    job = make({"prefetch": True}, "a" * 40)
    other = with_spec(job, lambda spec: spec.update(seed=1))
    names = [manifest["metadata"]["name"] for one in (job, other) for manifest in objects(one)]
    # The ConfigMap and the Job that trains share theirs.
    assert len(names) == 6
    assert len(set(names)) == 4


def test_name_is_that_of_the_run_whatever_is_computed_where() -> None:
    names = {objects(make(compute))[0]["metadata"]["name"] for compute in ({}, {"gpus": 4}, {"queue": "a"})}
    assert names == {make().run}


def test_rendering_is_pure() -> None:
    job = make({"affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}], "prefetch": True})
    before = copy.deepcopy(job)
    first = render(job, Placement())
    expected = copy.deepcopy(first.objects)
    for manifest in first.objects:
        manifest["metadata"]["labels"]["mine"] = "yes"
    for part in (pod(first.training), pod(first.prefetch or {})):
        part["tolerations"][0]["key"] = "mine"
        part.setdefault("affinity", {}).setdefault("nodeAffinity", {})["mine"] = 1
        part["containers"][0]["resources"]["limits"]["mine"] = 1
    assert job == before
    assert render(job, Placement()).objects == expected


def test_no_part_of_an_object_is_part_of_another() -> None:
    seen: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            seen.append(id(value))
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    rendered = objects(make({"gpus": 2, "prefetch": True, "extraCA": {"configMap": "ca"}}))
    walk(rendered)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(("gpus", "flavour"), [(0, "cpu"), (1, "gpu"), (8, "gpu")])
def test_image_is_the_one_that_make_image_builds(gpus: int, flavour: str) -> None:
    training = render(make({"gpus": gpus}), Placement()).training
    containers = pod(training)["initContainers"] + pod(training)["containers"]
    assert {container["image"] for container in containers} == {f"topwork:{__version__}-{flavour}"}


@pytest.mark.parametrize("image", IMAGES)
def test_image_of_the_user_is_that_of_every_container(image: str) -> None:
    for manifest in objects(make({"prefetch": True}), image=image)[1:]:
        for container in pod(manifest).get("initContainers", []) + pod(manifest)["containers"]:
            assert container["image"] == image


@pytest.mark.parametrize("image", ["", "Topwork:1", "a b", "a:", ":1", "https://host/a", "a@sha256:1", "a/", "a:b:c/d"])
def test_image_that_is_no_reference_is_refused(image: str) -> None:
    with pytest.raises(SettingError) as caught:
        Placement(image=image)
    assert str(caught.value) == (
        f'the image "{image}" is no image reference. Expected: [registry/]name[:tag][@sha256:…], such as '
        "registry.example.com/team/topwork:1.0-gpu."
    )


@pytest.mark.parametrize("namespace", ["", "Team", "team_a", "-a", "a.b", "a" * 64])
def test_namespace_that_can_be_none_is_refused(namespace: str) -> None:
    with pytest.raises(SettingError) as caught:
        Placement(namespace=namespace)
    assert str(caught.value).endswith(
        "can't be one. Expected: a-z, 0-9 and dash, first and last no dash, at most 63 characters."
    )


def test_namespace_is_that_of_every_object_or_of_none() -> None:
    job = make({"prefetch": True})
    assert [manifest["metadata"]["namespace"] for manifest in objects(job, namespace="team-a")] == ["team-a"] * 3
    assert not any("namespace" in manifest["metadata"] for manifest in objects(job))


def test_labels_of_the_user_are_on_every_object_and_never_in_place_of_ours() -> None:
    job = make({"prefetch": True}, labels={"team": "vision", "topwork.dev/run": "mine", "topwork.dev/role": "mine"})
    for manifest in objects(job):
        assert manifest["metadata"]["labels"]["team"] == "vision"
        assert manifest["metadata"]["labels"]["topwork.dev/run"] == job.run
    for manifest, role in zip(objects(job)[1:], ("prefetch", "training"), strict=True):
        assert manifest["metadata"]["labels"]["topwork.dev/role"] == role
        assert manifest["spec"]["template"]["metadata"]["labels"] == manifest["metadata"]["labels"]


def test_queue_is_a_label_of_jobs_alone() -> None:
    config_map, prefetch, training = objects(make({"queue": "team-a", "prefetch": True}))
    assert "kueue.x-k8s.io/queue-name" not in config_map["metadata"]["labels"]
    for manifest in (prefetch, training):
        assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert "kueue.x-k8s.io/queue-name" not in manifest["spec"]["template"]["metadata"]["labels"]


def test_pull_ahead_asks_for_no_more_than_the_job() -> None:
    small = render(make({"cpu": 0.5, "memory": "6Gi", "prefetch": True}), Placement()).prefetch
    assert small
    assert pod(small)["containers"][0]["resources"]["limits"] == {"cpu": "500m", "memory": "6Gi"}


def of(**changes: Any) -> tuple[str, str]:
    rendered: Rendered = render(make({"prefetch": True, **changes}), Placement())
    return digest(rendered.training), digest(rendered.prefetch)


def test_digest_is_that_of_the_objects() -> None:
    assert of() == of()
    training, prefetch = of()
    assert training != prefetch
    assert not {training, prefetch} & set(of(gpus=4))
    job = make()
    assert digest(render(job, Placement(image="a:1")).training) != digest(render(job, Placement(image="a:2")).training)
    # In another namespace it is another object; there, too, it can be compared with what is rendered without one.
    assert digest(render(job, Placement(namespace="a")).training) == digest(render(job, Placement()).training)


LOCAL = "is a path on this machine: a pod can't read it. Put it into object storage: s3://…"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"folder": {"uri": "photos/"}}, f'spec.dataset.source.folder.uri: "photos/" {LOCAL}'),
        ({"archive": {"uri": "/tmp/cats.zip"}}, f'spec.dataset.source.archive.uri: "/tmp/cats.zip" {LOCAL}'),
        ({"table": {"uri": "../cats.csv"}}, f'spec.dataset.source.table.uri: "../cats.csv" {LOCAL}'),
    ],
)
def test_dataset_on_this_machine_is_refused(source: dict[str, Any], told: str) -> None:
    job = with_spec(make(), lambda spec: spec["dataset"].update(source=source))
    with pytest.raises(SpecError) as caught:
        render(job, Placement())
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ({"saved": {"uri": "old.keras"}}, f'spec.model.base.saved.uri: "old.keras" {LOCAL}'),
        (
            {"application": "Xception", "weights": "x.weights.h5"},
            f'spec.model.base.weights: "x.weights.h5" {LOCAL}',
        ),
    ],
)
def test_base_on_this_machine_is_refused(base: dict[str, Any], told: str) -> None:
    job = with_spec(make(), lambda spec: spec["model"].update(base=base))
    with pytest.raises(SpecError) as caught:
        render(job, Placement())
    assert str(caught.value) == told


@pytest.mark.parametrize("weights", ["imagenet", "none", None, "s3://ml-artifacts/x.weights.h5"])
@pytest.mark.parametrize("source", [{"archive": {"uri": "https://host/a"}}, {"folder": {"uri": "s3://bucket/photos/"}}])
def test_what_a_pod_can_reach_is_rendered(weights: str | None, source: dict[str, Any]) -> None:
    job = with_spec(make(), lambda spec: spec["model"].update(base={"application": "ResNet50", "weights": weights}))
    job = with_spec(job, lambda spec: spec["dataset"].update(source=source))
    assert len(objects(job)) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork is set"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "volume x is a hostPath"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "pull: runAsNonRoot is not true"),
        (lambda pod: pod["securityContext"].update(runAsUser=0), "pull: runAsUser is 0"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "pull: no seccompProfile"),
        (lambda pod: pod["initContainers"][0].pop("securityContext"), "pull: allowPrivilegeEscalation is not false"),
        (
            lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
            "fine-tune: capabilities are added",
        ),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80), "fine-tune: hostPort"),
    ],
)
def test_check_of_the_restricted_standard_finds_what_breaks_it(change: Callable[[Any], Any], told: str) -> None:
    spec = pod(render(make(), Placement()).training)
    change(spec)
    assert told in list(violations(spec))


def test_check_of_the_schemas_finds_a_key_that_is_none() -> None:
    manifest = render(make(), Placement()).training
    pod(manifest)["nodeSelektor"] = {}
    with pytest.raises(Exception, match="nodeSelektor"):
        check_object(manifest)
