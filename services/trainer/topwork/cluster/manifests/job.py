"""Kubernetes Jobs: how often and how long a pod is tried, and what its exit codes mean."""

from typing import Any

from topwork.cluster.names import Role, job_labels
from topwork.errors import DataError, GateError, Stopped
from topwork.spec import TransferJob

# What can't be mended by another try (2 and 3), and what was stopped with its checkpoint stored (143).
HOPELESS = (DataError.exit_code, GateError.exit_code)
STOPPED = (Stopped.exit_code,)


def job_manifest(job: TransferJob, role: Role, name: str, template: dict[str, Any]) -> dict[str, Any]:
    """Build a Job around a pod.

    Args:
        job: The job.
        role: What the Job does for the run.
        name: Name of the Job.
        template: Its pod template.

    Returns:
        A Job without namespace and digest.
    """
    compute = job.spec.compute
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": job_labels(job, role)},
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": compute.retries,
            "activeDeadlineSeconds": compute.deadline_seconds,
            "ttlSecondsAfterFinished": compute.ttl_seconds_after_finished,
            # Two pods must never share a run: the next begins when the last one has ended.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules()},
            "template": template,
        },
    }


def failure_rules() -> list[dict[str, Any]]:
    """Say what the end of a pod means; the first rule that fits holds, and any other end counts as a retry."""
    return [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(HOPELESS)}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": list(STOPPED)}},
    ]
