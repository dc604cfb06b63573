"""What the objects of a job are called in a cluster, and the labels, paths and ports by which they find each other.

The longest name of a job (40 characters) makes a run of 49 and an object of 54: with what Kubernetes appends to name
a pod, that stays within the 63 characters of a label.
"""

from typing import Literal

from topwork import __version__
from topwork.spec import TransferJob

StageName = Literal["pull", "transfer", "fine-tune"]
STAGES: tuple[StageName, ...] = ("pull", "transfer", "fine-tune")
"""Containers of the pod in their order: the first two are init containers; the last one publishes, too."""

# Init and main containers share the pod's address: with one port, two targets of Prometheus would be one process.
METRICS_PORTS: dict[StageName, int] = {"pull": 9101, "transfer": 9102, "fine-tune": 9103}

MANAGER = "topwork"
"""Field manager of server-side apply, and value of `app.kubernetes.io/managed-by`."""

PART_LABEL = "app.kubernetes.io/part-of"
"""Label by which an object is known as topwork's, whether `submit`, kubectl or Helm has applied it."""
JOB_LABEL = "topwork.dev/job"
RUN_LABEL = "topwork.dev/run"
ROLE_LABEL = "topwork.dev/role"
"""Role of a Job of the run: `training`, or `prefetch` for the one that pulls ahead."""
DIGEST_ANNOTATION = "topwork.dev/digest"
"""SHA-256 of what was rendered, so that the same spec is known again."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

JOB_FILE = "job.yaml"
"""Key in the ConfigMap, and name of the file in the pod."""
JOB_FOLDER = "/etc/topwork"
SCRATCH = "/scratch"
DEFAULTS_CONFIG_MAP = "topwork-defaults"
"""ConfigMap with what the job specs of its namespace don't have to say."""
DEFAULTS_FILE = "defaults.yaml"
STORAGE_SECRET = "topwork-s3"  # noqa: S105 - the name of a Secret, no secret
"""Secret with the AWS variables of the storage; it may be missing where a service account has access."""


def object_name(job: TransferJob) -> str:
    """Name the Job and the ConfigMap of a run: the run's own name, so that one run never trains twice at once."""
    return job.run


def prefetch_name(job: TransferJob) -> str:
    """Name the Job that pulls ahead."""
    return f"{job.run}-pull"


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
