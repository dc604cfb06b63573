"""Names, labels, paths and ports of the Kubernetes objects of a run.

The name of a job has at most 40 characters, the name of its run 49, and the name of an object 54. Kubernetes appends a
suffix to name a pod or its host; the result stays within the 63 characters of a label value and of a host name.
"""

from enum import StrEnum
from typing import Literal

from topwork import __version__
from topwork.spec import TransferJob

StageName = Literal["pull", "transfer", "fine-tune"]
STAGES: tuple[StageName, ...] = ("pull", "transfer", "fine-tune")
"""Containers of the training pod in order: the first two are init containers; the last one also publishes."""

# Init and main containers share the pod IP: on a single port, Prometheus would treat them as one process.
METRICS_PORTS: dict[StageName, int] = {"pull": 9101, "transfer": 9102, "fine-tune": 9103}

# Ports between the pods of a run on several nodes: TensorFlow's servers, and the coordinator on node 0.
NODE_PORTS: dict[StageName, int] = {"transfer": 9112, "fine-tune": 9113}
COORDINATOR_PORTS: dict[StageName, int] = {"transfer": 9122, "fine-tune": 9123}

APP_NAME = "topwork"
"""Value of the labels `app.kubernetes.io/name`, `part-of` and `managed-by`."""

PART_OF_LABEL = "app.kubernetes.io/part-of"
"""Label that identifies an object as topwork's, whether `submit`, kubectl or Helm applied it."""
JOB_LABEL = "topwork.dev/job"
RUN_LABEL = "topwork.dev/run"
ROLE_LABEL = "topwork.dev/role"
"""Role of a Job of the run: `training`, or `prefetch` for the Job that only pulls the dataset."""
JOB_UID_LABEL = "batch.kubernetes.io/controller-uid"
"""UID of the Job, which Kubernetes 1.27 or newer adds to the labels of its pods: it differs if a Job of
the same name is deleted and created again."""
BEST_TRIAL = "best"
"""Value of the label `topwork.dev/trial`, and end of the name, of the TransferJob that publishes the best trial."""
DIGEST_ANNOTATION = "topwork.dev/digest"
"""SHA-256 of the rendered Job and its spec: two submissions with the same digest are identical."""
DATASET_ANNOTATION = "topwork.dev/dataset"
"""Annotation of a pod: key prefix of the stored dataset that it uses, whatever the source contains now."""
SELECTED_RUN_ANNOTATION = "topwork.dev/selected-run"
"""Annotation of a pod: name of the run whose weights it publishes, that of the best trial of a search. It stops rather
than train others."""
RESTART_ANNOTATION = "topwork.dev/restart"
"""Annotation of a pod: `true` if the first pod of its Job deletes the results of the run."""
CANCEL_ANNOTATION = "topwork.dev/cancel"
"""Annotation of a TransferJob: name of the run to cancel. A run with another name is not affected. Annotation of a
TransferSearch: ID of the search to cancel."""
CHECKED_RUN_ANNOTATION = "topwork.dev/checked-run"
"""Annotation of a TransferJob that `submit` applied: the name that its run has with the dataset that its source gave at
that time. Another name for the same spec means that the source has changed."""
TEMPLATE_ANNOTATION = "topwork.dev/template-digest"
"""Annotation of the controller's Jobs: SHA-256 of what their pods run; a Job with another one has to be replaced."""
GENERATION_ANNOTATION = "topwork.dev/generation"
"""Annotation of the controller's Jobs: generation of the TransferJob that the Job was last adapted to."""
LABELS_ANNOTATION = "topwork.dev/labels-digest"
"""Annotation of the controller's Jobs: SHA-256 of the labels of the TransferJob that the Job was last given."""
TTL_ANNOTATION = "topwork.dev/ttl-seconds-after-finished"
"""Annotation of the controller's Jobs: the TTL that a Job gets once its outcome is stored in the TransferJob."""
CONTROLLER_MANAGER = "topwork-controller"
"""Field manager of the controller."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

GPU_RESOURCE = "nvidia.com/gpu"
"""Extended resource of the NVIDIA device plugin."""
PREFETCH_MAX_MEMORY = "8Gi"
"""Upper bound for the memory of the pod that only pulls."""

JOB_FILE = "job.yaml"
"""Key in the ConfigMap, and file name in the pod."""
SEARCH_FILE = "search.yaml"
"""Key in the ConfigMap of a search: its spec with the defaults of the namespace."""
JOB_DIRECTORY = "/etc/topwork"
SCRATCH_DIRECTORY = "/scratch"
DEFAULTS_CONFIG_MAP = "topwork-defaults"
"""ConfigMap with default values for the job specs of its namespace."""
DEFAULTS_FILE = "defaults.yaml"
STORAGE_SECRET = "topwork-s3"  # noqa: S105 - the name of a Secret, not a secret
"""Secret with the AWS variables of the storage; optional if a service account grants access."""


class RunKind(StrEnum):
    """The kind of object that represents a job in the cluster."""

    job = "job"
    transferjob = "transferjob"


def object_name(job: TransferJob) -> str:
    """Return the name of the training Job and the ConfigMap: the run. A run is never trained twice concurrently."""
    return job.run


def prefetch_job_name(job: TransferJob) -> str:
    """Return the name of the Job that only pulls the dataset."""
    return f"{job.run}-pull"


def service_name(job: TransferJob) -> str:
    """Return the name of the headless Service between the nodes of a run.

    It has a prefix because the name of a Service must begin with a letter, unlike that of a job.
    """
    return service_name_of_run(job.run)


def service_name_of_run(run: str) -> str:
    """Return the name of the headless Service between the nodes of a run, from the name of the run."""
    return f"{APP_NAME}-{run}"


def node_hosts(job: TransferJob) -> list[str]:
    """Return the host names of the nodes of a run, which are resolved in the namespace of their pods.

    Kubernetes names the host of a pod of an Indexed Job `<job>-<index>`.
    """
    return [f"{object_name(job)}-{index}.{service_name(job)}" for index in range(job.spec.compute.nodes)]


Role = Literal["training", "prefetch"]


def labels(job: TransferJob, role: Role = "training") -> dict[str, str]:
    """Return the labels of any object of a job.

    Args:
        job: The job. Its own labels are included, but never override topwork's.
        role: Purpose of the object.

    Returns:
        The labels that Kubernetes recommends, topwork's labels, and the user's.
    """
    own = {
        "app.kubernetes.io/name": APP_NAME,
        "app.kubernetes.io/instance": job.run,
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/component": role,
        PART_OF_LABEL: APP_NAME,
        "app.kubernetes.io/managed-by": APP_NAME,
        JOB_LABEL: job.metadata.name,
        RUN_LABEL: job.run,
    }
    return own | job.metadata.labels | own


def pod_labels(job: TransferJob, role: Role) -> dict[str, str]:
    """Return the labels of a pod."""
    return labels(job, role) | {ROLE_LABEL: role}


def node_selector(job: TransferJob) -> dict[str, str]:
    """Return the labels that select the pods that train a run."""
    return {RUN_LABEL: job.run, ROLE_LABEL: "training"}


def job_labels(job: TransferJob, role: Role) -> dict[str, str]:
    """Return the labels of a Job, with the queue: Kueue reads its label on Jobs, not on pods."""
    queue = job.spec.compute.queue
    return pod_labels(job, role) | ({QUEUE_LABEL: queue} if queue else {})
