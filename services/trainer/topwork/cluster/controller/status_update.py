"""Builds the status of a TransferJob from its last status and what the cluster contains."""

from collections.abc import Mapping, Sequence
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.attempt_history import update_history
from topwork.cluster.controller.conditions import Fact, update_conditions
from topwork.cluster.controller.observation import Observation
from topwork.cluster.controller.run_objects import image_of
from topwork.cluster.names import GPU_RESOURCE
from topwork.cluster.status.job_status import FINAL_EXIT_CODES
from topwork.cluster.status.objects import (
    RunObjects,
    creation_time,
    find_condition,
    is_pod_unfinished,
    kubectl_name,
    name_of,
    node_count,
    owner_uids,
    parse_quantity,
    parse_time,
    requested_amount,
)
from topwork.cluster.status.run_status import RunStatus, read_status_of_job
from topwork.cluster.transfer_job_status import ConditionType, State, TransferJobStatus
from topwork.errors import GateError, SpecError, UnavailableError, shorten

MAX_TEXT_CHARACTERS = 1000
"""Limit of error and waitingFor."""
OVERDUE_SECONDS = 60
"""Seconds after the end of its grace period at which a pod is reported as stuck."""
FAILURE_REASONS = {
    SpecError.exit_code: "InvalidInput",
    GateError.exit_code: "GateNotMet",
    UnavailableError.exit_code: "Unavailable",
}


def build_status(
    seen: Observation,
    run: str | None,
    state: State,
    facts: Mapping[ConditionType, Fact] | None = None,
    *,
    read: RunStatus | None = None,
    waiting_for: str | None = None,
    **values: Any,
) -> TransferJobStatus:
    """Build a status from the last one; what belongs to another run is dropped.

    Args:
        seen: The observation.
        run: Name of the run.
        state: Its state.
        facts: Conditions that differ from the defaults of the state.
        read: The status of the Job in the cluster.
        waiting_for: Why it is pending or stopping.
        values: Other values.
    """
    previous = seen.previous
    kept = previous if previous.run == run else TransferJobStatus(job_uid=previous.job_uid)
    history = update_history(previous, run, seen.own_training_pods, seen.now)
    values = {
        "observed_generation": seen.generation,
        "run": run,
        "state": state,
        "conditions": update_conditions(previous, state, facts or {}, seen.generation, seen.now),
        "waiting_for": _short(waiting_for),
        "attempt_history": history.records,
        "attempts": history.attempts,
        "gpu_seconds": history.gpu_seconds,
        "error": None,
        "exit_code": None,
        "completion_time": None,
        **_progress_values(kept, state, read),
        **values,
    }
    values["error"] = _short(values["error"])
    return kept.model_copy(update=values)


def _progress_values(kept: TransferJobStatus, state: State, read: RunStatus | None) -> dict[str, Any]:
    """Return stage, progress and metric; progress of a stage that is not running is out of date."""
    stage = (read.stage if read else None) or kept.stage
    if state != "Running" or stage != kept.stage:
        progress: dict[str, Any] = {"stage": stage, "progress": None, "eta": None}
    else:
        progress = {"stage": stage}
    if read and read.metric is not None and read.value is not None:
        progress["metric"] = f"{read.metric} {read.value:.4f}"
    if read and read.metrics:
        progress |= {"metrics": read.metrics, "dataset": read.dataset}
    if read and read.model:
        progress |= {"model": read.model, "model_version": model_version(read.model)}
    return progress


def job_values(seen: Observation, run: str, job: KubernetesObject, read: RunStatus) -> dict[str, Any]:
    """Return the values that the Job that trains determines."""
    is_same_run = seen.previous.run == run
    values: dict[str, Any] = {
        "gpus": gpus_of(job),
        # An image that the spec sets is not kept when the spec no longer sets it.
        "image": None if seen.sets_image else image_of(job),
        "failures": read.failures,
        "job_uid": job["metadata"]["uid"],
        "start_time": (seen.previous.start_time if is_same_run else None) or creation_time(job),
    }
    if read.is_finished:
        values |= {"exit_code": read.exit_code, "error": read.error, "completion_time": read.ended or seen.now}
    return values


def gpus_of(job: KubernetesObject) -> int:
    """Return how many GPUs the pods of a Job request, all nodes together."""
    return node_count(job) * int(parse_quantity(requested_amount(job["spec"]["template"], GPU_RESOURCE) or "0"))


def model_version(uri: str) -> int | None:
    """Return the version of a published model, with which its URI ends."""
    version = uri.rstrip("/").rpartition("/")[2]
    return int(version) if version.isdigit() else None


def describe_wait(seen: Observation, jobs: Sequence[KubernetesObject], pods: Sequence[KubernetesObject]) -> str | None:
    """Explain which pod has to end, or which Job has to be deleted, before the run goes on."""
    uids = {job["metadata"]["uid"] for job in jobs}
    pods = pods or [pod for pod in seen.pods if owner_uids(pod) & uids and is_pod_unfinished(pod)]
    if not pods:
        return f"{kubectl_name(jobs[0])} to be deleted" if jobs else None
    pod = pods[0]
    # The deletion timestamp is the end of the grace period.
    end = parse_time(pod["metadata"].get("deletionTimestamp"))
    if end and (seen.now - end).total_seconds() > OVERDUE_SECONDS:
        node = pod["spec"].get("nodeName") or "its node"
        return (
            f"{kubectl_name(pod)} to end, which is overdue: is {node} down? If it is, delete the pod with: "
            f"kubectl delete pod {name_of(pod)} -n {seen.namespace} --force"
        )
    grace = pod["spec"].get("terminationGracePeriodSeconds") or 30
    return f"{kubectl_name(pod)} to write its checkpoint (at most {grace} s)"


def _short(text: str | None) -> str | None:
    return shorten(text, MAX_TEXT_CHARACTERS) if text else None


def read_outcome(job: KubernetesObject, read: RunStatus) -> tuple[State, dict[ConditionType, Fact]]:
    """Return the final state of a run, and its condition."""
    if read.phase == "succeeded":
        return "Complete", {"Complete": completed(read.model)}
    return "Failed", {"Failed": Fact(_failure_reason(job, read), read.error or "")}


def read_job(seen: Observation, job: KubernetesObject) -> RunStatus:
    """Read the status of a Job, with the outcome of pods that were deleted."""
    ended = [pod for pod in seen.own_training_pods if pod not in seen.pods]
    deleted = frozenset(pod["metadata"]["uid"] for pod in ended)
    return read_status_of_job(RunObjects([job], [*seen.pods, *ended], seen.events or (), deleted), job)


def _failure_reason(job: KubernetesObject, read: RunStatus) -> str:
    failed = find_condition(job, "Failed") or {}
    if failed.get("reason") == "DeadlineExceeded":
        return "DeadlineExceeded"
    if read.exit_code in FINAL_EXIT_CODES:
        return FAILURE_REASONS[read.exit_code]
    if failed.get("reason") == "BackoffLimitExceeded":
        return "RetriesExceeded"
    return FAILURE_REASONS.get(read.exit_code or 0, "JobFailed")


def completed(model: str | None) -> Fact:
    """Return the condition Complete of a run that succeeded."""
    return Fact("Completed", f"published {model}" if model else "")


def facts_of(status: TransferJobStatus) -> dict[ConditionType, Fact]:
    """Return the conditions of a status as facts."""
    return {
        condition.type: Fact(condition.reason, condition.message, condition.status == "True")
        for condition in status.conditions
    }
