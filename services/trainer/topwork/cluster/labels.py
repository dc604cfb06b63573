"""Labels by which the objects of a job are found and grouped: by people, by queues and by monitoring."""

from typing import Literal

from topwork import __version__
from topwork.cluster.names import JOB_LABEL, MANAGER, PART_LABEL, QUEUE_LABEL, ROLE_LABEL, RUN_LABEL
from topwork.spec import TransferJob

Role = Literal["training", "prefetch"]


def labels(job: TransferJob, component: Role = "training") -> dict[str, str]:
    """Give the labels of any object of a job.

    Args:
        job: The job; its own labels are given too, where none of ours has the same key.
        component: What the object is for.

    Returns:
        The labels that Kubernetes recommends, ours, and the user's.
    """
    ours = {
        "app.kubernetes.io/name": "topwork",
        "app.kubernetes.io/instance": job.run,
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/component": component,
        PART_LABEL: MANAGER,
        "app.kubernetes.io/managed-by": MANAGER,
        JOB_LABEL: job.metadata.name,
        RUN_LABEL: job.run,
    }
    return ours | job.metadata.labels | ours


def pod_labels(job: TransferJob, role: Role) -> dict[str, str]:
    """Give the labels of a pod."""
    return labels(job, role) | {ROLE_LABEL: role}


def job_labels(job: TransferJob, role: Role) -> dict[str, str]:
    """Give the labels of a Job: with the queue's, which Kueue reads there and not on pods."""
    queue = job.spec.compute.queue
    return pod_labels(job, role) | ({QUEUE_LABEL: queue} if queue else {})
