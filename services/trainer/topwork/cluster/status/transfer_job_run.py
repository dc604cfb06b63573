"""The status of the run of a TransferJob: from its Job if there is one, otherwise from what the controller stored."""

import re
from dataclasses import replace
from datetime import UTC, datetime

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import QUEUE_LABEL
from topwork.cluster.status.attempts import Attempt, AttemptState, number_attempts
from topwork.cluster.status.job_status import Phase
from topwork.cluster.status.objects import creation_time, get_label, is_being_deleted, name_of
from topwork.cluster.status.run_status import EpochProgress, RunStatus
from topwork.cluster.status.stored_status import read_stored_status
from topwork.cluster.transfer_job_status import AttemptRecord, State, TransferJobStatus
from topwork.errors import SpecError, Stopped

PHASES: dict[State, Phase] = {
    "Pending": "pending",
    "Running": "running",
    "Suspended": "suspended",
    "Complete": "succeeded",
    "Failed": "failed",
    "Cancelled": "cancelled",
}
UNKNOWN_FAILURE = 1
UNPROCESSED_SECONDS = 10.0
"""A controller that runs processes a change in less time."""
CONTROLLER_COMMAND = "kubectl get deployments --all-namespaces --field-selector metadata.name=topwork-controller"
PROGRESS = re.compile(r"(\d+)/(\d+)")


def read_transfer_job_status(obj: KubernetesObject) -> TransferJobStatus:
    """Read the status of a TransferJob.

    Args:
        obj: The TransferJob.

    Returns:
        Its status; that of a pending run if no controller has written one.

    Raises:
        SettingError: If a newer version of topwork wrote it with values that this one does not know.
    """
    return read_stored_status(obj, TransferJobStatus, "transferjob")


def is_processed(obj: KubernetesObject) -> bool:
    """Return whether the controller has processed the current spec of a TransferJob."""
    observed = read_transfer_job_status(obj).observed_generation
    return 0 < int(obj["metadata"].get("generation") or 0) <= observed


def is_final(obj: KubernetesObject) -> bool:
    """Return whether the run of the current spec of a TransferJob is finished."""
    return read_transfer_job_status(obj).is_final and is_processed(obj)


def read_transfer_job_run(obj: KubernetesObject, job_status: RunStatus | None = None) -> RunStatus:
    """Read the status of the run of a TransferJob.

    Args:
        obj: The TransferJob.
        job_status: Status of its run from the objects in the cluster; None if it has no Job: the run is pending,
            suspended or finished, or its spec is invalid.

    Returns:
        The status, with what only the TransferJob knows: its state, and why a changed spec is not accepted.
    """
    status = read_transfer_job_status(obj)
    rejection = _explain_rejection(status)
    unprocessed = explain_unprocessed(obj)
    if job_status is not None:
        notes = tuple(note for note in (rejection, unprocessed) if note)
        job_status = _add_progress(job_status, status)
        return replace(job_status, job=name_of(obj), transfer_job=status, notes=notes)
    phase: Phase = "pending" if unprocessed else PHASES[status.state]
    metric, value = _read_metric(status)
    attempts = number_attempts(_read_attempt(record, is_finished=status.is_final) for record in status.attempt_history)
    compute = (obj.get("spec") or {}).get("compute") or {}
    return RunStatus(
        job=name_of(obj),
        run=status.run or "",
        namespace=str(obj["metadata"].get("namespace") or ""),
        phase=phase,
        stage=status.stage,
        attempts=attempts,
        failures=status.failures or 0,
        retries=compute.get("retries"),
        epoch=_read_progress(status),
        metric=metric,
        value=value,
        model=status.model,
        exit_code=_exit_code(status, phase),
        error=(status.error or rejection) if phase in {"failed", "cancelled"} else None,
        reason=_reason(obj, status, phase, unprocessed or rejection),
        created=status.start_time or creation_time(obj),
        ended=status.completion_time if phase in {"succeeded", "failed", "cancelled"} else None,
        node=next((attempt.node for attempt in reversed(attempts) if attempt.index == 0), None),
        queue=get_label(obj, QUEUE_LABEL) or compute.get("queue"),
        transfer_job=status,
        nodes=compute.get("nodes") or 1,
    )


def explain_unprocessed(obj: KubernetesObject, *, now: datetime | None = None) -> str | None:
    """Explain that the controller has not processed the spec of a TransferJob.

    Args:
        obj: The TransferJob.
        now: The time; None for the current one.

    Returns:
        The explanation, with the likely cause if the TransferJob has existed for some seconds without a status; None
        if the controller has processed it, or is expected to do so in a moment.
    """
    if is_processed(obj):
        return None
    if read_transfer_job_status(obj).observed_generation:
        return f"the controller has not yet processed generation {obj['metadata'].get('generation')} of the spec"
    created = creation_time(obj)
    age = ((now or datetime.now(UTC)) - created).total_seconds() if created else 0.0
    if age < UNPROCESSED_SECONDS:
        return None
    return (
        "no controller has processed it: topwork-controller does not run, or does not watch this namespace. See "
        f"{CONTROLLER_COMMAND}"
    )


def _explain_rejection(status: TransferJobStatus) -> str | None:
    """Return why the spec is not accepted; None if it is."""
    accepted = status.condition("Accepted")
    if accepted is None or accepted.status != "False":
        return None
    return f"the spec is not accepted ({accepted.reason}): {accepted.message}"


def _reason(obj: KubernetesObject, status: TransferJobStatus, phase: Phase, problem: str | None) -> str | None:
    if is_being_deleted(obj):
        return "the TransferJob is being deleted"
    if phase == "suspended":
        suspended = status.condition("Suspended")
        return status.waiting_for or (suspended.message if suspended else "") or "spec.suspend is true"
    return (problem or status.waiting_for) if phase in {"pending", "running"} else None


def _exit_code(status: TransferJobStatus, phase: Phase) -> int | None:
    if phase == "succeeded":
        return 0
    if phase == "cancelled":
        return status.exit_code or Stopped.exit_code
    if phase == "failed":
        return status.exit_code or (SpecError.exit_code if _explain_rejection(status) else UNKNOWN_FAILURE)
    return None


def _read_metric(status: TransferJobStatus) -> tuple[str | None, float | None]:
    """Parse the metric, such as `validation_accuracy 0.9312`."""
    name, _, value = (status.metric or "").rpartition(" ")
    try:
        return (name, float(value)) if name else (None, None)
    except ValueError:
        return None, None


def _read_progress(status: TransferJobStatus) -> EpochProgress | None:
    match = PROGRESS.match(status.progress or "")
    if match is None or status.stage is None:
        return None
    metric, value = _read_metric(status)
    return EpochProgress(status.stage, int(match[1]), int(match[2]), metric, None, value)


def _add_progress(job_status: RunStatus, status: TransferJobStatus) -> RunStatus:
    """Add the progress that the controller stored, if it is that of the running stage."""
    epoch = _read_progress(status)
    is_current = (status.run, status.stage, "running") == (job_status.run, job_status.stage, job_status.phase)
    if epoch is None or not is_current:
        return job_status
    if epoch.metric is None:
        return replace(job_status, epoch=epoch)
    return replace(job_status, epoch=epoch, metric=epoch.metric, value=epoch.best)


def _read_attempt(record: AttemptRecord, *, is_finished: bool) -> Attempt:
    state: AttemptState = "running"
    if record.exit_code is not None:
        state = {0: "done", Stopped.exit_code: "stopped"}.get(record.exit_code, "failed")  # type: ignore[assignment]
    elif record.ended or is_finished:
        state = "stopped"
    return Attempt(
        pod=record.pod,
        node=record.node,
        created=record.started,
        state=state,
        containers=(),
        exit_code=record.exit_code,
        error=record.error,
        counted=state == "failed",
        index=record.index or 0,
        number=record.attempt or 1,
    )
