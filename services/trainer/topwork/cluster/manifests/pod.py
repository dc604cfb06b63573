"""Pod templates: the pod that trains, and the pod that only pulls the dataset."""

import math
from copy import deepcopy
from typing import Any, Literal, NamedTuple

from topwork.cluster.manifests.nodes import build_affinity, node_pod_fields, node_ports, node_variables
from topwork.cluster.manifests.tracking import tracking_variables
from topwork.cluster.names import (
    DATASET_ANNOTATION,
    GPU_RESOURCE,
    JOB_DIRECTORY,
    JOB_FILE,
    JOB_UID_LABEL,
    METRICS_PORTS,
    PREFETCH_MAX_MEMORY,
    RESTART_ANNOTATION,
    RUN_LABEL,
    SCRATCH_DIRECTORY,
    SELECTED_RUN_ANNOTATION,
    STORAGE_SECRET,
    Role,
    StageName,
    object_name,
    pod_labels,
)
from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import cpu_to_millicores, quantity_to_bytes

HOME_DIRECTORY = "/home/topwork"
TEMP_DIRECTORY = "/tmp"  # noqa: S108 - an emptyDir of the pod
CA_DIRECTORY = "/etc/topwork-ca"
USER_ID = 65532
"""User and group of the image: the kubelet can verify runAsNonRoot only if the user is numeric."""
PREFETCH_MAX_MILLICORES = 4000
"""Upper bound for the CPU request of the pod that only pulls."""
HOME_SIZE, TEMP_SIZE, LOGS_SIZE = "1Gi", "4Gi", "1Gi"
"""Disk space of a pod in addition to `spec.compute.scratch`. The kubelet rotates logs: by default, a container keeps at
most 50 MiB."""
MEBIBYTE, MEBIBYTES_PER_GIBIBYTE = 2**20, 1024


def training_pod_template(job: TransferJob, image: str) -> dict[str, Any]:
    """Build the template of the pod that trains: init containers pull and transfer; fine-tune also publishes.

    Args:
        job: The job.
        image: Image of all containers.

    Returns:
        A pod template.
    """
    compute = job.spec.compute
    without_gpus = {
        "cpu": _cpu_quantity(cpu_to_millicores(compute.cpu)),
        "memory": compute.memory,
        "ephemeral-storage": _disk_quantity(compute.scratch),
    }
    with_gpus = without_gpus | ({GPU_RESOURCE: compute.gpus} if compute.gpus else {})
    spec = {
        "nodeSelector": dict(compute.node_selector),
        "affinity": build_affinity(job),
        **(node_pod_fields(job) if compute.nodes > 1 else {}),
        "initContainers": [
            _container(job, "pull", image, without_gpus, role="training"),
            _container(job, "transfer", image, with_gpus, role="training"),
        ],
        "containers": [_container(job, "fine-tune", image, with_gpus, role="training")],
    }
    return _pod_template(job, "training", spec)


def prefetch_pod_template(job: TransferJob, image: str) -> dict[str, Any]:
    """Build the template of the pod that only pulls: it requests no GPUs and selects no GPU nodes.

    Args:
        job: The job.
        image: Image of its only container.

    Returns:
        A pod template.
    """
    compute = job.spec.compute
    resources = {
        "cpu": _cpu_quantity(min(cpu_to_millicores(compute.cpu), PREFETCH_MAX_MILLICORES)),
        "memory": min(compute.memory, PREFETCH_MAX_MEMORY, key=quantity_to_bytes),
        "ephemeral-storage": _disk_quantity(compute.scratch),
    }
    return _pod_template(job, "prefetch", {"containers": [_container(job, "pull", image, resources, role="prefetch")]})


def _cpu_quantity(millicores: int) -> int | str:
    """Format CPUs as in a manifest: whole cores as a number, fractions in millicores."""
    return f"{millicores}m" if millicores % 1000 else millicores // 1000


def _disk_quantity(scratch: str) -> str:
    """Return the disk space that a pod may use: its emptyDirs at their size limits, and its logs.

    Every container requests all of it: Kubernetes counts the largest request of the containers, not the sum. The limit
    has the same value: the kubelet evicts a pod that exceeds it, and the Job counts that eviction as a failure.
    """
    overhead = sum(quantity_to_bytes(size) for size in (HOME_SIZE, TEMP_SIZE, LOGS_SIZE))
    # The chart computes with three decimals, too.
    mebibytes = math.ceil((round(quantity_to_bytes(scratch), 3) + overhead) / MEBIBYTE)
    gibibytes, remainder = divmod(mebibytes, MEBIBYTES_PER_GIBIBYTE)
    return f"{mebibytes}Mi" if remainder else f"{gibibytes}Gi"


def _pod_template(job: TransferJob, role: Role, role_spec: dict[str, Any]) -> dict[str, Any]:
    """Combine the fields that both pods share with the containers and node selection of a role."""
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
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **role_spec,
        "volumes": [{"name": volume.name, **volume.source} for volume in _volumes(job, training=role == "training")],
    }
    return {"metadata": _without_empty(metadata), "spec": _without_empty(spec)}


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}


def _container(
    job: TransferJob, stage: StageName, image: str, resources: dict[str, Any], *, role: Role
) -> dict[str, Any]:
    """Build the container of a stage, as the restricted Pod Security Standard requires.

    Args:
        job: The job.
        stage: The stage that the container runs.
        image: Image whose entrypoint is `topwork`.
        resources: Amounts by resource name, used as requests and limits.
        role: Role of the pod.

    Returns:
        A container.
    """
    has_peers = role == "training" and job.spec.compute.nodes > 1
    return {
        "name": stage,
        "image": image,
        "args": ["stage", stage, "--job", f"{JOB_DIRECTORY}/{JOB_FILE}"],
        "env": [
            *_environment(job),
            *(node_variables(job, stage) if has_peers else []),
            *tracking_variables(job, stage),
        ],
        # If the Secret is missing, the pod still starts: the process exits with 2 and reports the missing variables.
        "envFrom": [{"secretRef": {"name": STORAGE_SECRET, "optional": True}}],
        "ports": [
            {"name": f"http-{stage}", "containerPort": METRICS_PORTS[stage]},
            *(node_ports(stage) if has_peers else []),
        ],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [volume.mount() for volume in _volumes(job, training=stage != "pull")],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _environment(job: TransferJob) -> list[dict[str, Any]]:
    """List the environment variables of a container: writable directories, and values that it can't detect itself."""
    compute = job.spec.compute
    variables: list[dict[str, Any]] = [
        {"name": "HOME", "value": HOME_DIRECTORY},
        {"name": "TMPDIR", "value": TEMP_DIRECTORY},
        {"name": "KERAS_HOME", "value": f"{SCRATCH_DIRECTORY}/keras"},
        {"name": "TFDS_DATA_DIR", "value": f"{SCRATCH_DIRECTORY}/tfds"},
        {"name": "TOPWORK_GRACE_SECONDS", "value": str(compute.termination_grace_period_seconds)},
        _variable_from_metadata("TOPWORK_RUN", "labels", RUN_LABEL),
        _variable_from_metadata("TOPWORK_ATTEMPT", "labels", JOB_UID_LABEL),
        _variable_from_metadata("TOPWORK_DATASET", "annotations", DATASET_ANNOTATION),
        _variable_from_metadata("TOPWORK_SELECTED_RUN", "annotations", SELECTED_RUN_ANNOTATION),
        _variable_from_metadata("TOPWORK_RESTART", "annotations", RESTART_ANNOTATION),
        # TensorFlow counts the cores of the node, not the CPU limit of the container.
        {"name": "TF_NUM_INTRAOP_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    if compute.extra_ca:
        variables.append({"name": "TOPWORK_EXTRA_CA", "value": f"{CA_DIRECTORY}/{compute.extra_ca.key}"})
    return variables


def _variable_from_metadata(name: str, kind: Literal["labels", "annotations"], key: str) -> dict[str, Any]:
    """Build an environment variable with a label or annotation of the pod; empty if the pod has none of that key."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{kind}['{key}']"}}}


class _Volume(NamedTuple):
    """A volume of the pod and its mount path in the containers."""

    name: str
    source: dict[str, Any]
    mount_path: str
    read_only: bool = False

    def mount(self) -> dict[str, Any]:
        return {"name": self.name, "mountPath": self.mount_path} | ({"readOnly": True} if self.read_only else {})


def _volumes(job: TransferJob, *, training: bool) -> list[_Volume]:
    """List the volumes: the root filesystem is read-only, so containers write to emptyDirs with a size limit.

    Args:
        job: The job.
        training: Whether the pod or container trains: NCCL and tf.data need more shared memory than the default of
            64 MiB (nccl#525).

    Returns:
        The volumes, in the order in which they are mounted.
    """
    compute = job.spec.compute
    volumes = [
        _Volume("job", {"configMap": {"name": object_name(job)}}, JOB_DIRECTORY, read_only=True),
        _Volume("scratch", {"emptyDir": {"sizeLimit": compute.scratch}}, SCRATCH_DIRECTORY),
        _Volume("home", {"emptyDir": {"sizeLimit": HOME_SIZE}}, HOME_DIRECTORY),
        _Volume("tmp", {"emptyDir": {"sizeLimit": TEMP_SIZE}}, TEMP_DIRECTORY),
    ]
    if training:
        shared_memory = {"emptyDir": {"medium": "Memory", "sizeLimit": compute.shared_memory}}
        volumes.append(_Volume("shm", shared_memory, "/dev/shm"))  # noqa: S108 - an emptyDir of the pod
    if compute.extra_ca:
        # A missing ConfigMap must not keep a pod with GPUs pending: the process exits with 2 and names it.
        config_map = {"configMap": {"name": compute.extra_ca.config_map, "optional": True}}
        volumes.append(_Volume("ca", config_map, CA_DIRECTORY, read_only=True))
    return volumes
