"""The Kubernetes Job around a pod template: retries, deadline, and the meaning of exit codes."""

from typing import Any

from topwork.cluster.names import Role, job_labels
from topwork.errors import DataError, GateError, Stopped, UnavailableError
from topwork.spec import TransferJob

# A retry can't fix a wrong spec or wrong data (2), or an unmet gate (3).
PERMANENT_FAILURES = (DataError.exit_code, GateError.exit_code)
# A problem outside the job (75): retried and counted, even in a pod that is being terminated for another reason.
COUNTED_FAILURES = (UnavailableError.exit_code,)
# Stopped with a stored checkpoint (143): retried, but not counted.
STOPPED = (Stopped.exit_code,)


def build_job(job: TransferJob, role: Role, name: str, template: dict[str, Any]) -> dict[str, Any]:
    """Build a Job around a pod template.

    Args:
        job: The job.
        role: Role of the Job in the run.
        name: Name of the Job.
        template: Its pod template.

    Returns:
        A Job without namespace and digest annotation.
    """
    compute = job.spec.compute
    nodes = compute.nodes if role == "training" else 1
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": job_labels(job, role)},
        "spec": {
            **(_indexed_fields() if nodes > 1 else {}),
            "completions": nodes,
            "parallelism": nodes,
            # When a node fails, all others end, too, and each of them counts.
            "backoffLimit": compute.retries * nodes,
            "activeDeadlineSeconds": compute.deadline_seconds,
            "ttlSecondsAfterFinished": compute.ttl_seconds_after_finished,
            # Two pods must never share a run: the next pod starts only after the previous one has terminated.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _pod_failure_rules()},
            "template": template,
        },
    }


def _indexed_fields() -> dict[str, Any]:
    """Return the fields of a Job on several nodes: each pod has an index, and node 0 publishes the model."""
    return {"completionMode": "Indexed", "successPolicy": {"rules": [{"succeededIndexes": "0"}]}}


def _pod_failure_rules() -> list[dict[str, Any]]:
    """Return the rules for a failed pod: the first match applies; any other failure counts as a retry."""
    return [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(PERMANENT_FAILURES)}},
        {"action": "Count", "onExitCodes": {"operator": "In", "values": list(COUNTED_FAILURES)}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": list(STOPPED)}},
    ]
