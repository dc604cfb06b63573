"""A job spec as the objects of a cluster: what `render` prints and `submit` applies. Pure: no file, no network."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.job import job_manifest
from topwork.cluster.manifests.pod import prefetch_pod, training_pod
from topwork.cluster.names import DIGEST_ANNOTATION, JOB_FILE, labels, object_name, prefetch_name
from topwork.errors import SettingError, SpecError
from topwork.spec import TransferJob
from topwork.spec.messages import shown
from topwork.spec.uris import SCHEME
from topwork.spec.yaml_output import plain, yaml_text

# [registry[:port]/]name[:tag][@digest], as container runtimes read it (github.com/distribution/reference).
IMAGE = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"
    r"[a-z0-9]+((\.|_|__|-+|/)[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Placement:
    """What a spec leaves open, because it changes from cluster to cluster.

    Attributes:
        image: Image of all containers; None is what `make image` builds, for GPUs where the job has any.
        namespace: Namespace of all objects; None leaves it to whoever applies them.

    Raises:
        SettingError: If the image or the namespace can't be one.
    """

    image: str | None = None
    namespace: str | None = None

    def __post_init__(self) -> None:
        if self.image is not None and not IMAGE.fullmatch(self.image):
            raise SettingError(
                f"the image {shown(self.image)} is no image reference. Expected: [registry/]name[:tag][@sha256:…], "
                "such as registry.example.com/team/topwork:1.0-gpu."
            )
        if self.namespace is not None and not NAMESPACE.fullmatch(self.namespace):
            raise SettingError(
                f"the namespace {shown(self.namespace)} can't be one. Expected: a-z, 0-9 and dash, first and last no "
                "dash, at most 63 characters."
            )


@dataclass(frozen=True)
class Rendered:
    """The objects of a job.

    Attributes:
        config_map: The spec in full, as the pods read it.
        training: The Job that trains.
        prefetch: The Job that pulls ahead, where the spec asks for it.
    """

    config_map: KubernetesObject
    training: KubernetesObject
    prefetch: KubernetesObject | None

    @property
    def objects(self) -> list[KubernetesObject]:
        """All of them, each after what it needs."""
        return [self.config_map, *([self.prefetch] if self.prefetch else []), self.training]


def render(job: TransferJob, placement: Placement) -> Rendered:
    """Turn a job into the objects of a cluster.

    Args:
        job: The job.
        placement: Image and namespace.

    Returns:
        The objects; the same for the same arguments and version.

    Raises:
        SpecError: If the spec names what only this machine has.
    """
    refused = [
        f"{path}: {shown(value)} is a path on this machine: a pod can't read it. Put it into object storage: s3://…"
        for path, value in local_paths(job)
    ]
    if refused:
        raise SpecError("\n".join(refused))
    image = placement.image or f"topwork:{__version__}-{'gpu' if job.spec.compute.gpus else 'cpu'}"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": object_name(job), "labels": labels(job)},
        "data": {JOB_FILE: yaml_text(job)},
    }
    training = job_manifest(job, "training", object_name(job), training_pod(job, image))
    prefetch = None
    if job.spec.compute.prefetch:
        prefetch = job_manifest(job, "prefetch", prefetch_name(job), prefetch_pod(job, image))
    return Rendered(
        _placed(config_map, placement),
        _placed(_signed(training, job), placement),
        _placed(_signed(prefetch, job), placement) if prefetch else None,
    )


def _signed(manifest: KubernetesObject, job: TransferJob) -> KubernetesObject:
    """Add the digest of what was rendered. The namespace is none of it: there, the same Job is another object.

    The spec counts by what it says and not by how it is written: the Helm chart writes YAML in another style.
    """
    content = json.dumps([manifest, plain(job)], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return manifest | {"metadata": manifest["metadata"] | {"annotations": {DIGEST_ANNOTATION: digest}}}


def _placed(manifest: KubernetesObject, placement: Placement) -> KubernetesObject:
    if placement.namespace is None:
        return manifest
    name, *others = manifest["metadata"].items()
    return manifest | {"metadata": dict([name, ("namespace", placement.namespace), *others])}


def local_paths(job: TransferJob) -> Iterator[tuple[str, str]]:
    """Find the addresses that only the user's machine knows.

    Args:
        job: The job.

    Yields:
        The path of each key and its value.
    """
    source, base = job.spec.dataset.source, job.spec.model.base
    for kind in ("folder", "archive", "table"):
        if (given := getattr(source, kind)) and not SCHEME.match(given.uri):
            yield f"spec.dataset.source.{kind}.uri", given.uri
    if base.weights not in (None, "imagenet", "none") and not SCHEME.match(base.weights):
        yield "spec.model.base.weights", base.weights
    if base.saved and not SCHEME.match(base.saved.uri):
        yield "spec.model.base.saved.uri", base.saved.uri
