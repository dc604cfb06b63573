"""Containers of the pod: one stage each, all from one image."""

from typing import Any

from topwork.cluster.names import JOB_FILE, JOB_FOLDER, METRICS_PORTS, SCRATCH, STORAGE_SECRET, StageName
from topwork.cluster.volumes import CA_FOLDER, HOME, TEMPORARY, mounts
from topwork.spec import TransferJob

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
