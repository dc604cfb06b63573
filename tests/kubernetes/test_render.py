"""Rendering: names, images, labels, digests, and rejected specs; the golden files cover the rest."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from object_validation import assert_valid_object, pod_security_violations

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import DIGEST_ANNOTATION
from topwork.errors import SettingError, SpecError
from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import quantity_to_bytes

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# The Job controller appends a hyphen and five characters to name a pod.
POD_SUFFIX = len("-xxxxx")
MAX_LENGTH = 63
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


def objects(job: TransferJob, **options: str) -> list[KubernetesObject]:
    return render(job, RenderOptions(**options)).objects


def pod(job: KubernetesObject) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def digest(job: KubernetesObject | None) -> str:
    assert job
    return job["metadata"]["annotations"][DIGEST_ANNOTATION]


@pytest.mark.parametrize("name", ["a", "a" * 40, f"a{'-' * 38}a"])
def test_names_and_labels_are_valid_for_any_job_name(name: str) -> None:
    for obj in objects(make({"prefetch": True}, name)):
        object_name = obj["metadata"]["name"]
        assert DNS_LABEL.fullmatch(object_name)
        assert len(object_name) + POD_SUFFIX <= MAX_LENGTH
        for value in obj["metadata"]["labels"].values():
            assert LABEL_VALUE.fullmatch(value)
            assert len(value) <= MAX_LENGTH
        assert_valid_object(obj)


def test_object_names_of_two_specs_with_the_same_name_differ() -> None:
    job = make({"prefetch": True}, "a" * 40)
    other = with_spec(job, lambda spec: spec.update(seed=1))
    names = [obj["metadata"]["name"] for run in (job, other) for obj in objects(run)]
    # The ConfigMap and the training Job have the same name.
    assert len(names) == 6
    assert len(set(names)) == 4


def test_object_name_is_the_run_for_any_compute_settings() -> None:
    names = {
        objects(make(compute))[0]["metadata"]["name"] for compute in ({}, {"gpus": 4}, {"nodes": 2}, {"queue": "a"})
    }
    assert names == {make().run}


def test_render_is_pure() -> None:
    job = make({"affinity": {"nodeAffinity": {}}, "tolerations": [{"operator": "Exists"}], "prefetch": True})
    before = copy.deepcopy(job)
    first = render(job, RenderOptions())
    expected = copy.deepcopy(first.objects)
    for obj in first.objects:
        obj["metadata"]["labels"]["mine"] = "yes"
    for part in (pod(first.training), pod(first.prefetch or {})):
        part["tolerations"][0]["key"] = "mine"
        part.setdefault("affinity", {}).setdefault("nodeAffinity", {})["mine"] = 1
        part["containers"][0]["resources"]["limits"]["mine"] = 1
    assert job == before
    assert render(job, RenderOptions()).objects == expected


def test_rendered_objects_share_no_parts() -> None:
    seen: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            seen.append(id(value))
            for child in value.values() if isinstance(value, dict) else value:
                walk(child)

    rendered = objects(make({"gpus": 2, "prefetch": True, "extraCA": {"configMap": "ca"}}))
    walk(rendered)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(("gpus", "accelerator"), [(0, "cpu"), (1, "gpu"), (8, "gpu")])
def test_default_image_is_built_by_make_image(gpus: int, accelerator: str) -> None:
    training = render(make({"gpus": gpus}), RenderOptions()).training
    containers = pod(training)["initContainers"] + pod(training)["containers"]
    assert {container["image"] for container in containers} == {f"topwork:{__version__}-{accelerator}"}


@pytest.mark.parametrize("image", IMAGES)
def test_image_option_is_used_for_every_container(image: str) -> None:
    for obj in objects(make({"prefetch": True}), image=image)[1:]:
        for container in pod(obj).get("initContainers", []) + pod(obj)["containers"]:
            assert container["image"] == image


@pytest.mark.parametrize(
    ("spec_image", "options", "expected"),
    [
        (None, {"default_image": "c:1"}, "c:1"),
        ("b:1", {"default_image": "c:1"}, "b:1"),
        ("b:1", {"default_image": "c:1", "image": "a:1"}, "a:1"),
    ],
)
def test_image_of_the_spec_is_between_option_and_default(
    spec_image: str | None, options: dict[str, str], expected: str
) -> None:
    _, training = objects(make({"image": spec_image}), **options)
    assert {container["image"] for container in pod(training)["containers"]} == {expected}


def test_suspended_job_requires_the_controller() -> None:
    job = make()
    suspended = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": True})})
    with pytest.raises(SpecError) as caught:
        render(suspended, RenderOptions())
    assert str(caught.value) == (
        "spec.suspend: true requires the controller, which only acts on TransferJobs in a cluster. Remove it."
    )


@pytest.mark.parametrize("image", ["", "Topwork:1", "a b", "a:", ":1", "https://host/a", "a@sha256:1", "a/", "a:b:c/d"])
def test_invalid_image_reference_is_rejected(image: str) -> None:
    with pytest.raises(SettingError) as caught:
        RenderOptions(image=image)
    assert str(caught.value) == (
        f'the image "{image}" is not a valid image reference. Expected: [registry/]name[:tag][@sha256:…], such as '
        "registry.example.com/team/topwork:1.0-gpu."
    )


@pytest.mark.parametrize("namespace", ["", "Team", "team_a", "-a", "a.b", "a" * 64])
def test_invalid_namespace_is_rejected(namespace: str) -> None:
    with pytest.raises(SettingError) as caught:
        RenderOptions(namespace=namespace)
    assert str(caught.value).endswith(
        "is not a valid name. Expected: lowercase letters, digits and hyphens, starting and ending with a letter or "
        "digit, at most 63 characters."
    )


def test_namespace_is_set_on_every_object_or_on_none() -> None:
    job = make({"prefetch": True})
    assert [obj["metadata"]["namespace"] for obj in objects(job, namespace="team-a")] == ["team-a"] * 3
    assert not any("namespace" in obj["metadata"] for obj in objects(job))


def test_user_labels_are_on_every_object_and_never_override_those_of_topwork() -> None:
    job = make({"prefetch": True}, labels={"team": "vision", "topwork.dev/run": "mine", "topwork.dev/role": "mine"})
    for obj in objects(job):
        assert obj["metadata"]["labels"]["team"] == "vision"
        assert obj["metadata"]["labels"]["topwork.dev/run"] == job.run
    for obj, role in zip(objects(job)[1:], ("prefetch", "training"), strict=True):
        assert obj["metadata"]["labels"]["topwork.dev/role"] == role
        assert obj["spec"]["template"]["metadata"]["labels"] == obj["metadata"]["labels"]


def test_queue_label_is_only_on_jobs() -> None:
    config_map, prefetch, training = objects(make({"queue": "team-a", "prefetch": True}))
    assert "kueue.x-k8s.io/queue-name" not in config_map["metadata"]["labels"]
    for obj in (prefetch, training):
        assert obj["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert "kueue.x-k8s.io/queue-name" not in obj["spec"]["template"]["metadata"]["labels"]


def test_prefetch_pod_requests_no_more_than_the_job() -> None:
    prefetch = render(make({"cpu": 0.5, "memory": "6Gi", "prefetch": True}), RenderOptions()).prefetch
    assert prefetch
    assert pod(prefetch)["containers"][0]["resources"]["limits"] == {
        "cpu": "500m",
        "memory": "6Gi",
        "ephemeral-storage": "56Gi",
    }


def digests(**changes: Any) -> tuple[str, str]:
    rendered: RenderedObjects = render(make({"prefetch": True, **changes}), RenderOptions())
    return digest(rendered.training), digest(rendered.prefetch)


def test_digest_depends_on_the_rendered_objects() -> None:
    assert digests() == digests()
    training, prefetch = digests()
    assert training != prefetch
    assert not {training, prefetch} & set(digests(gpus=4))
    job = make()
    assert digest(render(job, RenderOptions(image="a:1")).training) != digest(
        render(job, RenderOptions(image="a:2")).training
    )
    # The digest excludes the namespace, so that a Job can be compared with one rendered without a namespace.
    assert digest(render(job, RenderOptions(namespace="a")).training) == digest(render(job, RenderOptions()).training)


LOCAL = "is a path on this machine: a pod can't read it. Upload it to object storage: s3://…"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"folder": {"uri": "photos/"}}, f'spec.dataset.source.folder.uri: "photos/" {LOCAL}'),
        ({"archive": {"uri": "/tmp/cats.zip"}}, f'spec.dataset.source.archive.uri: "/tmp/cats.zip" {LOCAL}'),
        ({"table": {"uri": "../cats.csv"}}, f'spec.dataset.source.table.uri: "../cats.csv" {LOCAL}'),
    ],
)
def test_local_dataset_is_rejected(source: dict[str, Any], message: str) -> None:
    job = with_spec(make(), lambda spec: spec["dataset"].update(source=source))
    with pytest.raises(SpecError) as caught:
        render(job, RenderOptions())
    assert str(caught.value) == message


def test_local_list_of_a_split_is_rejected() -> None:
    splits = {"train": {"list": "s3://bucket/train.txt"}, "test": {"list": "./test.txt"}}
    changes = {"splits": splits, "source": {"folder": {"uri": "s3://photos/pets"}}}
    job = with_spec(make(), lambda spec: spec["dataset"].update(changes))
    with pytest.raises(SpecError) as caught:
        render(job, RenderOptions())
    assert str(caught.value) == f'spec.dataset.splits.test.list: "./test.txt" {LOCAL}'


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"saved": {"uri": "old.keras"}}, f'spec.model.base.saved.uri: "old.keras" {LOCAL}'),
        (
            {"application": "Xception", "weights": "x.weights.h5"},
            f'spec.model.base.weights: "x.weights.h5" {LOCAL}',
        ),
    ],
)
def test_local_base_model_is_rejected(base: dict[str, Any], message: str) -> None:
    job = with_spec(make(), lambda spec: spec["model"].update(base=base))
    with pytest.raises(SpecError) as caught:
        render(job, RenderOptions())
    assert str(caught.value) == message


@pytest.mark.parametrize("weights", ["imagenet", "none", None, "s3://ml-artifacts/x.weights.h5"])
@pytest.mark.parametrize("source", [{"archive": {"uri": "https://host/a"}}, {"folder": {"uri": "s3://bucket/photos/"}}])
def test_remote_sources_and_weights_are_rendered(weights: str | None, source: dict[str, Any]) -> None:
    job = with_spec(make(), lambda spec: spec["model"].update(base={"application": "ResNet50", "weights": weights}))
    job = with_spec(job, lambda spec: spec["dataset"].update(source=source))
    assert len(objects(job)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_pod_security_check_finds_violations(change: Callable[[Any], Any], message: str) -> None:
    spec = pod(render(make(), RenderOptions()).training)
    change(spec)
    assert message in list(pod_security_violations(spec))


def test_schema_check_finds_an_unknown_key() -> None:
    obj = render(make(), RenderOptions()).training
    pod(obj)["nodeSelektor"] = {}
    with pytest.raises(Exception, match="nodeSelektor"):
        assert_valid_object(obj)


def containers(template_spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template_spec.get("initContainers", []), *template_spec["containers"]]


@pytest.mark.parametrize(
    ("scratch", "requested"),
    [("50Gi", "56Gi"), ("1.5Ti", "1542Gi"), ("512Mi", "6656Mi"), ("500M", "6621Mi"), ("200G", "196879Mi")],
)
def test_every_container_requests_the_disk_space_that_the_pod_may_use(scratch: str, requested: str) -> None:
    # Scratch, 4Gi of /tmp, 1Gi of home and 1Gi of logs. The scheduler counts the largest request of the containers.
    rendered = render(make({"scratch": scratch, "prefetch": True}), RenderOptions())
    for job in (rendered.training, rendered.prefetch):
        assert job
        for container in containers(pod(job)):
            amounts = container["resources"]
            assert amounts["requests"]["ephemeral-storage"] == requested, container["name"]
            assert amounts["limits"]["ephemeral-storage"] == requested, container["name"]


def test_requested_disk_space_covers_the_size_limits_of_all_volumes_on_disk() -> None:
    for job in objects(make({"scratch": "7G", "sharedMemory": "1Gi", "prefetch": True})):
        if job["kind"] == "ConfigMap":
            continue
        on_disk = [volume["emptyDir"] for volume in pod(job)["volumes"] if "emptyDir" in volume]
        sizes = [quantity_to_bytes(source["sizeLimit"]) for source in on_disk if source.get("medium") != "Memory"]
        request = pod(job)["containers"][0]["resources"]["requests"]["ephemeral-storage"]
        assert len(sizes) == 3
        assert quantity_to_bytes(request) >= sum(sizes) + quantity_to_bytes("1Gi")


def test_every_container_knows_its_run_and_the_uid_of_its_job() -> None:
    rendered = render(make({"prefetch": True}), RenderOptions())
    for job in (rendered.training, rendered.prefetch):
        assert job
        for container in containers(pod(job)):
            paths = {
                variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"]
                for variable in container["env"]
                if "fieldRef" in variable.get("valueFrom", {})
            }
            assert paths["TOPWORK_RUN"] == "metadata.labels['topwork.dev/run']"
            # Kubernetes adds this label to the pods of every Job.
            assert paths["TOPWORK_ATTEMPT"] == "metadata.labels['batch.kubernetes.io/controller-uid']"
        assert job["spec"]["template"]["metadata"]["labels"]["topwork.dev/run"] == make().run
