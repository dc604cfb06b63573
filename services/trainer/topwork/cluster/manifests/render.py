"""Rendering a job spec as the Kubernetes objects that `render` prints and `submit` applies. No I/O."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.job import build_job
from topwork.cluster.manifests.nodes import build_network_policy, build_service
from topwork.cluster.manifests.pod import prefetch_pod_template, training_pod_template
from topwork.cluster.names import (
    DATASET_ANNOTATION,
    DIGEST_ANNOTATION,
    JOB_FILE,
    RESTART_ANNOTATION,
    SELECTED_RUN_ANNOTATION,
    labels,
    object_name,
    prefetch_job_name,
)
from topwork.errors import SettingError, SpecError
from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import IMAGE_REFERENCE, NAMESPACE
from topwork.spec.messages import format_value
from topwork.spec.uris import SCHEME
from topwork.spec.yaml_output import dump_job, job_to_dict


@dataclass(frozen=True)
class RenderOptions:
    """Cluster-specific values that a spec leaves open.

    Attributes:
        image: Image of all containers, whatever the spec says; None for that of the spec.
        namespace: Namespace of all objects; None leaves it to `kubectl apply`.
        dataset: Key prefix of the stored dataset that all pods use; empty if the source decides.
        selected_run: Name of the run whose weights the Job publishes; empty for any.
        restart: Whether the first pod of the Job that trains deletes the results of the run.
        default_image: Image of specs that set none; None for the image that `make image` builds, with GPU support if
            the job requests GPUs.

    Raises:
        SettingError: If the image or the namespace is not valid.
    """

    image: str | None = None
    namespace: str | None = None
    dataset: str = ""
    selected_run: str = ""
    restart: bool = False
    default_image: str | None = None

    def __post_init__(self) -> None:
        for image in (self.image, self.default_image):
            if image is not None and not re.fullmatch(IMAGE_REFERENCE, image):
                raise SettingError(
                    f"the image {format_value(image)} is not a valid image reference. Expected: "
                    "[registry/]name[:tag][@sha256:…], such as registry.example.com/team/topwork:1.0-gpu."
                )
        if self.namespace is not None and not re.fullmatch(NAMESPACE, self.namespace):
            raise SettingError(
                f"the namespace {format_value(self.namespace)} is not a valid name. Expected: lowercase letters, "
                "digits and hyphens, starting and ending with a letter or digit, at most 63 characters."
            )


@dataclass(frozen=True)
class RenderedObjects:
    """The Kubernetes objects of a run.

    Attributes:
        config_map: ConfigMap with the complete spec, which the pods read.
        training: The Job that trains.
        prefetch: The Job that only pulls the dataset, if the spec requests one.
        service: The headless Service that gives the pods of a run on several nodes host names; None for one node.
        network_policy: The NetworkPolicy that lets only these pods connect to each other; None for one node.
    """

    config_map: KubernetesObject
    training: KubernetesObject
    prefetch: KubernetesObject | None
    service: KubernetesObject | None = None
    network_policy: KubernetesObject | None = None

    @property
    def network(self) -> list[KubernetesObject]:
        """Service and NetworkPolicy between several nodes; empty for one node."""
        return [obj for obj in (self.service, self.network_policy) if obj]

    @property
    def objects(self) -> list[KubernetesObject]:
        """All objects, each after the objects that it depends on."""
        objects = (self.config_map, self.service, self.network_policy, self.prefetch, self.training)
        return [obj for obj in objects if obj]


def render(job: TransferJob, options: RenderOptions) -> RenderedObjects:
    """Render a job as Kubernetes objects.

    Args:
        job: The job.
        options: Image and namespace.

    Returns:
        The objects; always the same for the same arguments and version of topwork.

    Raises:
        SpecError: If the spec refers to files on this machine, or is suspended.

    Example:
        >>> rendered = render(job, RenderOptions(namespace="vision"))
        >>> [obj["kind"] for obj in rendered.objects]
        ['ConfigMap', 'Job']
    """
    local_paths = [
        f"{path}: {format_value(value)} is a path on this machine: a pod can't read it. Upload it to object storage: s3://…"
        for path, value in _find_local_paths(job)
    ]
    if local_paths:
        raise SpecError("\n".join(local_paths))
    if job.spec.suspend:
        raise SpecError(
            "spec.suspend: true requires the controller, which only acts on TransferJobs in a cluster. Remove it."
        )
    image = options.image or job.spec.compute.image or options.default_image or default_image(job)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": object_name(job), "labels": labels(job)},
        "data": {JOB_FILE: dump_job(job)},
    }
    training = build_job(job, "training", object_name(job), training_pod_template(job, image))
    prefetch = None
    if job.spec.compute.prefetch:
        prefetch = build_job(job, "prefetch", prefetch_job_name(job), prefetch_pod_template(job, image))
    pinned = {DATASET_ANNOTATION: options.dataset} if options.dataset else {}
    selected = {SELECTED_RUN_ANNOTATION: options.selected_run} if options.selected_run else {}
    restart = {RESTART_ANNOTATION: "true"} if options.restart else {}
    training = _with_pod_annotations(_with_digest(training, job), pinned | selected | restart)
    # It only pulls: the Job that trains may already work on the results.
    prefetch = _with_pod_annotations(_with_digest(prefetch, job), pinned) if prefetch else None
    has_peers = job.spec.compute.nodes > 1
    return RenderedObjects(
        _with_namespace(config_map, options),
        _with_namespace(training, options),
        _with_namespace(prefetch, options) if prefetch else None,
        _with_namespace(build_service(job), options) if has_peers else None,
        _with_namespace(build_network_policy(job), options) if has_peers else None,
    )


def default_image(job: TransferJob) -> str:
    """Return the image that `make image` builds, with GPU support if the job requests GPUs."""
    return f"topwork:{__version__}-{'gpu' if job.spec.compute.gpus else 'cpu'}"


def _with_pod_annotations(kubernetes_job: KubernetesObject, annotations: Mapping[str, str]) -> KubernetesObject:
    """Add annotations to the pods of a Job. Its digest does not cover them: they change no setting of the spec."""
    result = deepcopy(kubernetes_job)
    if annotations:
        result["spec"]["template"]["metadata"].setdefault("annotations", {}).update(annotations)
    return result


def _with_digest(kubernetes_job: KubernetesObject, job: TransferJob) -> KubernetesObject:
    """Annotate a Job with the digest of its content and its spec, before a namespace is added.

    The digest covers the values of the spec, not its text: the Helm chart writes the same YAML in another style.
    """
    content = json.dumps([kubernetes_job, job_to_dict(job)], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return kubernetes_job | {"metadata": kubernetes_job["metadata"] | {"annotations": {DIGEST_ANNOTATION: digest}}}


def _with_namespace(obj: KubernetesObject, options: RenderOptions) -> KubernetesObject:
    if options.namespace is None:
        return obj
    name, *others = obj["metadata"].items()
    return obj | {"metadata": dict([name, ("namespace", options.namespace), *others])}


def _find_local_paths(job: TransferJob) -> Iterator[tuple[str, str]]:
    """Yield the path and value of each key that refers to a file on this machine."""
    source, base = job.spec.dataset.source, job.spec.model.base
    for kind in ("folder", "archive", "table"):
        if (location := getattr(source, kind)) and not SCHEME.match(location.uri):
            yield f"spec.dataset.source.{kind}.uri", location.uri
    for split, uri in job.spec.dataset.split_settings.lists.items():
        if not SCHEME.match(uri):
            yield f"spec.dataset.splits.{split}.list", uri
    if base.has_weights_file and not SCHEME.match(str(base.weights)):
        yield "spec.model.base.weights", str(base.weights)
    if base.saved and not SCHEME.match(base.saved.uri):
        yield "spec.model.base.saved.uri", base.saved.uri
