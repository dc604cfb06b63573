"""Pods of a job: the one that trains, and the one that only pulls."""

from copy import deepcopy
from typing import Any

from topwork.cluster.names import (
    JOB_FILE,
    JOB_FOLDER,
    METRICS_PORTS,
    SCRATCH,
    STORAGE_SECRET,
    Role,
    StageName,
    object_name,
    pod_labels,
)
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


GPU = "nvidia.com/gpu"


def container(job: TransferJob, stage: StageName, image: str, amounts: dict[str, Any]) -> dict[str, Any]:
    """Build the container of a stage.

    Args:
        job: The job.
        stage: What the container does; the last stage publishes, too.
        image: Image whose entrypoint is `topwork`.
        amounts: Resources by name. What is requested is also the limit: the pod gets it, and gets no more.

    Returns:
        A container that the restricted Pod Security Standard admits.
    """
    return {
        "name": stage,
        "image": image,
        "args": ["stage", stage, "--job", f"{JOB_FOLDER}/{JOB_FILE}"],
        "env": environment(job),
        # A Secret that is missing must not keep the pod from starting: the process ends with 2 and says what it lacks.
        "envFrom": [{"secretRef": {"name": STORAGE_SECRET, "optional": True}}],
        "ports": [{"name": f"http-{stage}", "containerPort": METRICS_PORTS[stage]}],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": mounts(job, training=stage != "pull"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def environment(job: TransferJob) -> list[dict[str, Any]]:
    """List the variables of a container: where it may write, and what it can't find out by itself."""
    grace = job.spec.compute.termination_grace_period_seconds
    found: list[dict[str, Any]] = [
        {"name": "HOME", "value": HOME},
        {"name": "TMPDIR", "value": TEMPORARY},
        {"name": "KERAS_HOME", "value": f"{SCRATCH}/keras"},
        {"name": "TFDS_DATA_DIR", "value": f"{SCRATCH}/tfds"},
        {"name": "TOPWORK_GRACE_SECONDS", "value": str(grace)},
        # TensorFlow counts the cores of the node and not those of the container.
        {"name": "TF_NUM_INTRAOP_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    if job.spec.compute.extra_ca:
        found.append({"name": "TOPWORK_EXTRA_CA", "value": f"{CA_FOLDER}/{job.spec.compute.extra_ca.key}"})
    return found


HOME = "/home/topwork"
TEMPORARY = "/tmp"  # noqa: S108 - an emptyDir of the pod's own
CA_FOLDER = "/etc/topwork-ca"


def volumes(job: TransferJob, *, training: bool) -> list[dict[str, Any]]:
    """List the volumes of a pod: the root of its containers is read-only, so what they write lies in these.

    Args:
        job: The job.
        training: Whether the pod trains.

    Returns:
        Volumes, each emptyDir with its size limit.
    """
    compute = job.spec.compute
    found: list[dict[str, Any]] = [
        {"name": "job", "configMap": {"name": object_name(job)}},
        {"name": "scratch", "emptyDir": {"sizeLimit": compute.scratch}},
        {"name": "home", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
    ]
    if training:
        found.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": compute.shared_memory}})
    if compute.extra_ca:
        # One that is missing must not keep the pod waiting, with its GPUs: the process ends with 2 and names it.
        found.append({"name": "ca", "configMap": {"name": compute.extra_ca.config_map, "optional": True}})
    return found


def mounts(job: TransferJob, *, training: bool) -> list[dict[str, Any]]:
    """List where a container finds the volumes.

    Args:
        job: The job.
        training: Whether the container trains: NCCL and tf.data need more shared memory than a container has by
            itself (64 MiB, nccl#525).

    Returns:
        Mounts, those that only configure the container read-only.
    """
    found: list[dict[str, Any]] = [
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "home", "mountPath": HOME},
        {"name": "tmp", "mountPath": TEMPORARY},
    ]
    if training:
        found.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - likewise
    if job.spec.compute.extra_ca:
        found.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    return found
