"""Pods of a job: the one that trains, and the one that only pulls."""

from copy import deepcopy
from typing import Any

from topwork.cluster.containers import GPU, container
from topwork.cluster.labels import Role, pod_labels
from topwork.cluster.volumes import volumes
from topwork.spec import TransferJob
from topwork.spec.compute import in_bytes, in_millicores

USER = 65532
"""User and group of the image, as a number: only so can the kubelet tell that it is not root."""
PREFETCH_MILLICORES, PREFETCH_MEMORY = 4000, "8Gi"
"""What the pod that only pulls asks for at most."""


def training_pod(job: TransferJob, image: str) -> dict[str, Any]:
    """Build the template of the pod that trains: pull and transfer first, then fine-tune, which publishes, too.

    Args:
        job: The job.
        image: Image of all containers.

    Returns:
        A pod template.
    """
    compute = job.spec.compute
    pulling = {"cpu": cores(in_millicores(compute.cpu)), "memory": compute.memory}
    training = pulling | ({GPU: compute.gpus} if compute.gpus else {})
    spec = {
        "nodeSelector": dict(compute.node_selector),
        "affinity": deepcopy(compute.affinity),
        "initContainers": [container(job, "pull", image, pulling), container(job, "transfer", image, training)],
        "containers": [container(job, "fine-tune", image, training)],
    }
    return _template(job, "training", spec)


def prefetch_pod(job: TransferJob, image: str) -> dict[str, Any]:
    """Build the template of the pod that pulls ahead: no GPUs, and nothing that chooses nodes which have them.

    Args:
        job: The job.
        image: Image of its only container.

    Returns:
        A pod template.
    """
    compute = job.spec.compute
    pulling = {
        "cpu": cores(min(in_millicores(compute.cpu), PREFETCH_MILLICORES)),
        "memory": min(compute.memory, PREFETCH_MEMORY, key=in_bytes),
    }
    return _template(job, "prefetch", {"containers": [container(job, "pull", image, pulling)]})


def cores(millicores: int) -> int | str:
    """Write cores as people do: whole ones as a number, parts in thousandths."""
    return f"{millicores}m" if millicores % 1000 else millicores // 1000


def _template(job: TransferJob, role: Role, own: dict[str, Any]) -> dict[str, Any]:
    compute = job.spec.compute
    metadata = {"labels": pod_labels(job, role), "annotations": dict(compute.annotations)}
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": compute.termination_grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": compute.service_account_name,
        "imagePullSecrets": [{"name": name} for name in compute.image_pull_secrets],
        "priorityClassName": compute.priority_class_name,
        "tolerations": deepcopy(list(compute.tolerations)),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **own,
        "volumes": volumes(job, training=role == "training"),
    }
    return {"metadata": _given(metadata), "spec": _given(spec)}


def _given(manifest: dict[str, Any]) -> dict[str, Any]:
    """Leave out what nobody asked for."""
    return {key: value for key, value in manifest.items() if value not in (None, {}, [])}
