"""The Kubernetes objects of a run that a TransferJob owns, and changes to an existing Job."""

import hashlib
import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import (
    DATASET_ANNOTATION,
    GENERATION_ANNOTATION,
    LABELS_ANNOTATION,
    SELECTED_RUN_ANNOTATION,
    TEMPLATE_ANNOTATION,
    TTL_ANNOTATION,
)
from topwork.cluster.status.objects import get_annotation, name_of, node_count
from topwork.spec import TransferJob

# Fields of a Job that can't be changed, or that Kueue changes.
KEPT_FIELDS = ("completions", "parallelism", "podReplacementPolicy", "podFailurePolicy", "template")
# The same of a Job on several nodes. Of other Jobs, the API server sets a default for the mode.
KEPT_FIELDS_OF_NODES = ("completionMode", "successPolicy", *KEPT_FIELDS)
MAX_TTL_SECONDS = 2**31 - 1


def build_run_objects(job: TransferJob, transfer_job: KubernetesObject, options: RenderOptions) -> RenderedObjects:
    """Render the objects of a run as dependents of its TransferJob.

    The Jobs have no TTL: the outcome of a Job must not be deleted before it is stored in the TransferJob.

    Args:
        job: The job.
        transfer_job: The TransferJob in the cluster.
        options: Namespace, image, dataset and restart.

    Returns:
        The objects.

    Raises:
        SpecError: If the spec refers to files on this machine.
    """
    rendered = render(job, options)
    return replace(
        rendered,
        config_map=_as_dependent(rendered.config_map, transfer_job),
        training=_as_dependent(_without_ttl(rendered.training), transfer_job),
        prefetch=_as_dependent(_without_ttl(rendered.prefetch), transfer_job) if rendered.prefetch else None,
        service=_as_dependent(rendered.service, transfer_job) if rendered.service else None,
        network_policy=_as_dependent(rendered.network_policy, transfer_job) if rendered.network_policy else None,
    )


def owner_reference(transfer_job: KubernetesObject) -> KubernetesObject:
    """Return the reference that makes a TransferJob the controller of an object."""
    return {
        "apiVersion": transfer_job["apiVersion"],
        "kind": transfer_job["kind"],
        "name": name_of(transfer_job),
        "uid": transfer_job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def updated_job(existing: KubernetesObject, desired: KubernetesObject) -> KubernetesObject:
    """Change an existing Job, except for its pod template.

    Args:
        existing: The Job in the cluster.
        desired: The Job to be, with any pod template.

    Returns:
        The object to apply. It has the UID of the existing Job, so that the server rejects it if that Job is gone.
    """
    spec = {key: existing["spec"][key] for key in _kept_fields(existing) if key in existing["spec"]}
    changed = {key: desired["spec"][key] for key in ("backoffLimit", "activeDeadlineSeconds")}
    # A Job that `submit` created has a TTL, which an apply can't remove because it belongs to another field manager.
    ttl = {"ttlSecondsAfterFinished": MAX_TTL_SECONDS} if "ttlSecondsAfterFinished" in existing["spec"] else {}
    template = get_annotation(existing, TEMPLATE_ANNOTATION)
    annotations = desired["metadata"]["annotations"] | ({TEMPLATE_ANNOTATION: template} if template else {})
    metadata = desired["metadata"] | {"annotations": annotations, "uid": existing["metadata"]["uid"]}
    return desired | {"metadata": metadata, "spec": spec | changed | ttl}


def job_with_ttl(existing: KubernetesObject) -> KubernetesObject | None:
    """Give a Job the TTL of its annotation.

    Args:
        existing: The Job in the cluster.

    Returns:
        The object to apply; None if the Job has that TTL, or the annotation is missing or was changed to no TTL.
    """
    ttl = get_annotation(existing, TTL_ANNOTATION)
    if ttl is None or not ttl.isdecimal() or int(ttl) > MAX_TTL_SECONDS:
        return None
    if existing["spec"].get("ttlSecondsAfterFinished") == int(ttl):
        return None
    kept = ("name", "namespace", "uid", "labels", "annotations", "ownerReferences")
    fields = (*_kept_fields(existing), "backoffLimit", "activeDeadlineSeconds")
    return {
        "apiVersion": existing["apiVersion"],
        "kind": existing["kind"],
        "metadata": {key: existing["metadata"][key] for key in kept if key in existing["metadata"]},
        "spec": {key: existing["spec"][key] for key in fields if key in existing["spec"]}
        | {"ttlSecondsAfterFinished": int(ttl)},
    }


def _kept_fields(job: KubernetesObject) -> tuple[str, ...]:
    return KEPT_FIELDS_OF_NODES if node_count(job) > 1 else KEPT_FIELDS


def labels_digest(transfer_job: KubernetesObject) -> str:
    """Hash the labels of a TransferJob, which its objects get, too."""
    content = json.dumps(transfer_job["metadata"].get("labels") or {}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def image_of(job: KubernetesObject) -> str:
    """Return the image of the pods of a Job."""
    return str(job["spec"]["template"]["spec"]["containers"][0]["image"])


def _without_ttl(job: KubernetesObject) -> KubernetesObject:
    """Move the TTL of a Job to an annotation, and annotate it with the digest of its pod template."""
    result = deepcopy(job)
    ttl = result["spec"].pop("ttlSecondsAfterFinished")
    digest = _template_digest(job["spec"]["template"])
    result["metadata"]["annotations"] |= {TEMPLATE_ANNOTATION: digest, TTL_ANNOTATION: str(ttl)}
    return result


def _template_digest(template: dict[str, Any]) -> str:
    """Hash what the pods run, without labels and annotations that only describe them."""
    annotations = template["metadata"].get("annotations") or {}
    pinned = [annotations.get(name) for name in (DATASET_ANNOTATION, SELECTED_RUN_ANNOTATION)]
    content = json.dumps([template["spec"], *pinned], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _as_dependent(obj: KubernetesObject, transfer_job: KubernetesObject) -> KubernetesObject:
    annotations = obj["metadata"].get("annotations", {}) | {
        GENERATION_ANNOTATION: str(transfer_job["metadata"]["generation"]),
        LABELS_ANNOTATION: labels_digest(transfer_job),
    }
    owners = [owner_reference(transfer_job)]
    return obj | {"metadata": obj["metadata"] | {"annotations": annotations, "ownerReferences": owners}}
