"""Volumes of the pod, and where the containers find them."""

from typing import Any

from topwork.cluster.names import JOB_FOLDER, SCRATCH, object_name
from topwork.spec import TransferJob

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
