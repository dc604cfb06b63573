"""Where a Job stands: its phase, why it waits or stops, and how it ended."""

import re
from dataclasses import dataclass
from typing import Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.attempts import Attempt
from topwork.cluster.status.objects import RunObjects, condition, is_being_deleted, of_job, one_line
from topwork.cluster.status.pending_reasons import job_reason, pod_reason
from topwork.errors import GateError, SpecError, Stopped, UnavailableError

Phase = Literal["pending", "pulling ahead", "running", "stopping", "succeeded", "failed", "suspended"]
FINAL = {SpecError.exit_code, GateError.exit_code}
"""Exit codes that no retry follows."""
FOLLOWS = "a new pod follows"
UNKNOWN = 1
"""Exit code of a run that failed without a word."""


@dataclass(frozen=True)
class Standing:
    """Where a Job stands.

    Attributes:
        phase: In a word or two.
        reason: Why it waits or stops.
        exit_code: Exit code of the run; None until it is over.
        error: Why it failed.
    """

    phase: Phase
    reason: str | None = None
    exit_code: int | None = None
    error: str | None = None


def read_standing(objects: RunObjects, job: KubernetesObject, attempts: tuple[Attempt, ...]) -> Standing:
    """Tell where a Job stands.

    Args:
        objects: What the cluster holds of its run.
        job: The Job.
        attempts: Its pods, the oldest first.

    Returns:
        Where it stands.
    """
    if condition(job, "Complete") or condition(job, "SuccessCriteriaMet"):
        return Standing("succeeded", exit_code=0)
    failed = condition(job, "Failed")
    if failed:
        code, error = _failure(job, failed, attempts)
        return Standing("failed", exit_code=code, error=error)
    if job["metadata"].get("uid") in objects.deleted:
        return _deleted(attempts[-1] if attempts else None)
    if is_being_deleted(job):
        return Standing("stopping", "its Job is being deleted")
    if target := condition(job, "FailureTarget"):
        return Standing("stopping", _failure(job, target, attempts)[1])
    return _active(objects, job, attempts)


def _active(objects: RunObjects, job: KubernetesObject, attempts: tuple[Attempt, ...]) -> Standing:
    last = attempts[-1] if attempts else None
    if last and last.state == "done":
        # The Job controller is about to say so.
        return Standing("running")
    if last and last.state == "stopping":
        return Standing("stopping", f"{last.error}. Its checkpoint is kept, and a new pod goes on")
    if last and last.state == "running":
        return Standing("running")
    if last and last.state == "waiting":
        pod = of_job(objects.pods, job)[-1]
        return Standing("pending", pod_reason(pod, objects.events))
    reason = job_reason(job, objects.events)
    if job["spec"].get("suspend"):
        return Standing("suspended", reason)
    if last:
        reason = f"{ended(last)}; {reason or FOLLOWS}"
    return Standing("pending", reason)


def _deleted(last: Attempt | None) -> Standing:
    """A Job that is gone: it may have ended before, and was removed when its time to live was over."""
    if last and last.state == "done":
        return Standing("succeeded", exit_code=0)
    if last and last.exit_code in FINAL:
        return Standing("failed", exit_code=last.exit_code, error=last.error)
    return Standing("failed", exit_code=Stopped.exit_code, error="its Job was deleted")


def ended(attempt: Attempt) -> str:
    """Say how an attempt ended."""
    code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
    return f"{attempt.pod} ended{code}: {attempt.error or 'no reason given'}"


def _failure(job: KubernetesObject, failed: KubernetesObject, attempts: tuple[Attempt, ...]) -> tuple[int, str]:
    """Exit code and error of a Job that failed."""
    reason, message = failed.get("reason"), one_line(str(failed.get("message") or "no reason given"))
    if reason == "DeadlineExceeded":
        seconds = job["spec"].get("activeDeadlineSeconds")
        return UnavailableError.exit_code, (
            f"it ran longer than spec.compute.deadlineSeconds ({seconds} s). "
            "Raise it and submit again: the run goes on from its checkpoint"
        )
    found = re.search(r"with exit code (\d+)", message) if reason == "PodFailurePolicy" else None
    ended = [attempt for attempt in attempts if attempt.state == "failed" and (attempt.counted or found)]
    last = ended[-1] if ended else None
    code = int(found[1]) if found else (last.exit_code if last and last.exit_code else UNKNOWN)
    error = last.error if last and last.error else message
    if reason == "BackoffLimitExceeded":
        tries = int(job["spec"].get("backoffLimit") or 0) + 1
        error = f"{error} (attempt {tries} of {tries})" if tries > 1 else error
    return code, error
