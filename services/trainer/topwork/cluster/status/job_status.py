"""The status of one Job: its phase, why it is pending or stopping, and how it ended."""

import re
from dataclasses import dataclass
from typing import Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.attempts import Attempt, describe_end
from topwork.cluster.status.nodes import (
    current_attempts,
    describe_error,
    explain_pending_nodes,
    find_first_failure,
)
from topwork.cluster.status.objects import (
    RunObjects,
    find_condition,
    is_being_deleted,
    node_count,
    one_line,
    pods_of_job,
)
from topwork.cluster.status.pending_reasons import explain_pending_job, explain_pending_pod
from topwork.errors import GateError, SpecError, Stopped, UnavailableError

Phase = Literal["pending", "pulling ahead", "running", "stopping", "succeeded", "failed", "suspended", "cancelled"]
"""Phases of a run; only a TransferJob can be cancelled, because a canceled Job does not exist any more."""
FINAL_EXIT_CODES = {SpecError.exit_code, GateError.exit_code}
"""Exit codes that are never retried."""
JOB_DELETED = "the Job was deleted"
NEW_POD_FOLLOWS = "a new pod will be created"
UNKNOWN_FAILURE = 1
"""Exit code of a run that failed without reporting one."""


@dataclass(frozen=True)
class JobStatus:
    """The status of a Job.

    Attributes:
        phase: Its phase.
        reason: Why it is pending or stopping.
        exit_code: Exit code of the run; None until the Job is finished.
        error: Why it failed.
    """

    phase: Phase
    reason: str | None = None
    exit_code: int | None = None
    error: str | None = None


def read_job_status(objects: RunObjects, job: KubernetesObject, attempts: tuple[Attempt, ...]) -> JobStatus:
    """Read the status of a Job.

    Args:
        objects: The objects of its run.
        job: The Job.
        attempts: Its pods, oldest first.

    Returns:
        The status.
    """
    if find_condition(job, "Complete") or find_condition(job, "SuccessCriteriaMet"):
        return JobStatus("succeeded", exit_code=0)
    if failed := find_condition(job, "Failed"):
        code, error = _read_failure(job, failed, attempts)
        return JobStatus("failed", exit_code=code, error=error)
    if job["metadata"].get("uid") in objects.deleted:
        return _status_after_deletion(job, attempts)
    if is_being_deleted(job):
        return JobStatus("stopping", "the Job is being deleted")
    if target := find_condition(job, "FailureTarget"):
        return JobStatus("stopping", _read_failure(job, target, attempts)[1])
    return _read_active(objects, job, attempts) if node_count(job) == 1 else _read_active_nodes(objects, job, attempts)


def _read_active(objects: RunObjects, job: KubernetesObject, attempts: tuple[Attempt, ...]) -> JobStatus:
    last = attempts[-1] if attempts else None
    # After the pod succeeded, the Job controller still has to set the condition Complete.
    if last and last.state in {"running", "done"}:
        return JobStatus("running")
    if last and last.state == "stopping":
        return JobStatus("stopping", f"{last.error}. Its checkpoint is kept, and a new pod will resume from it")
    if last and last.state == "waiting":
        pod = pods_of_job(objects.pods, job)[-1]
        return JobStatus("pending", explain_pending_pod(pod, objects.events))
    if last and _is_last_failure(job, attempts):
        return JobStatus("stopping", last.error)
    reason = explain_pending_job(job, objects.events)
    if job["spec"].get("suspend"):
        return JobStatus("suspended", reason)
    if last:
        reason = f"{describe_end(last)}; {reason or NEW_POD_FOLLOWS}"
    return JobStatus("pending", reason)


def _read_active_nodes(objects: RunObjects, job: KubernetesObject, attempts: tuple[Attempt, ...]) -> JobStatus:
    """Read the status of an unfinished Job on several nodes: it runs if all of them do."""
    current = current_attempts(attempts)
    if 0 in current and current[0].state == "done":
        return JobStatus("running")
    if (cause := find_first_failure(attempts)) and _fails(job, attempts):
        return JobStatus("stopping", describe_error(cause, job))
    if stopping := [attempt for attempt in current.values() if attempt.state == "stopping"]:
        error = describe_error(stopping[0], job)
        return JobStatus("stopping", f"{error}. The checkpoint is kept, and new pods will resume from it")
    if job["spec"].get("suspend") and all(attempt.is_finished for attempt in current.values()):
        return JobStatus("suspended", explain_pending_job(job, objects.events))
    reason = explain_pending_nodes(objects, job, attempts)
    return JobStatus("pending" if reason else "running", reason)


def _fails(job: KubernetesObject, attempts: tuple[Attempt, ...]) -> bool:
    """Return whether the Job controller will let a Job on several nodes fail."""
    is_final = any(attempt.state == "failed" and attempt.exit_code in FINAL_EXIT_CODES for attempt in attempts)
    return is_final or sum(attempt.counted for attempt in attempts) > int(job["spec"].get("backoffLimit") or 0)


def _is_last_failure(job: KubernetesObject, attempts: tuple[Attempt, ...]) -> bool:
    """Return whether the Job controller will let the Job fail; it sets the condition FailureTarget a moment later."""
    if attempts[-1].state != "failed":
        return False
    counted = sum(attempt.counted for attempt in attempts)
    return attempts[-1].exit_code in FINAL_EXIT_CODES or counted > int(job["spec"].get("backoffLimit") or 0)


def _status_after_deletion(job: KubernetesObject, attempts: tuple[Attempt, ...]) -> JobStatus:
    """Return the status of a deleted Job: it may have finished before its TTL expired."""
    chief = current_attempts(attempts).get(0)
    last = chief if node_count(job) == 1 else find_first_failure(attempts)
    if chief and chief.state == "done":
        return JobStatus("succeeded", exit_code=0)
    if last and last.exit_code in FINAL_EXIT_CODES:
        return JobStatus("failed", exit_code=last.exit_code, error=describe_error(last, job))
    return JobStatus("failed", exit_code=Stopped.exit_code, error=JOB_DELETED)


def _read_failure(job: KubernetesObject, condition: KubernetesObject, attempts: tuple[Attempt, ...]) -> tuple[int, str]:
    """Return the exit code and error of a Job with the condition Failed or FailureTarget."""
    reason, message = condition.get("reason"), one_line(str(condition.get("message") or "no reason given"))
    if reason == "DeadlineExceeded":
        seconds = job["spec"].get("activeDeadlineSeconds")
        return UnavailableError.exit_code, (
            f"the Job ran longer than spec.compute.deadlineSeconds ({seconds} s). "
            "Raise it and submit again: the run resumes from its checkpoint"
        )
    policy = re.search(r"with exit code (\d+)", message) if reason == "PodFailurePolicy" else None
    failed = [attempt for attempt in attempts if attempt.state == "failed" and (attempt.counted or policy)]
    if node_count(job) > 1:
        return _read_failure_of_nodes(job, failed, int(policy[1]) if policy else None, message)
    last = failed[-1] if failed else None
    code = int(policy[1]) if policy else (last.exit_code if last and last.exit_code else UNKNOWN_FAILURE)
    error = last.error if last and last.error else message
    return code, _with_tries(job, error) if reason == "BackoffLimitExceeded" else error


def _read_failure_of_nodes(
    job: KubernetesObject, failed: list[Attempt], policy_code: int | None, message: str
) -> tuple[int, str]:
    """Return the exit code and error of a Job on several nodes: those of the pod that failed first, with its node."""
    # A pod failure policy names the pod whose exit code is never retried; its peers end with 75.
    named = [attempt for attempt in failed if policy_code in {None, attempt.exit_code}]
    first = find_first_failure(named)
    code = policy_code or (first.exit_code if first and first.exit_code else UNKNOWN_FAILURE)
    error = (describe_error(first, job) if first else None) or message
    return code, error if policy_code else _with_tries(job, error)


def _with_tries(job: KubernetesObject, error: str) -> str:
    tries = int(job["spec"].get("backoffLimit") or 0) // node_count(job) + 1
    return f"{error} (attempt {tries} of {tries})" if tries > 1 else error
