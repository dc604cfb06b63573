"""The TransferJobs of a search: one for each trial, and one that publishes the best trial; and what they result in."""

from dataclasses import dataclass
from datetime import datetime

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.run_objects import owner_reference
from topwork.cluster.manifests.transfer_job import build_transfer_job, parse_transfer_job
from topwork.cluster.names import DATASET_ANNOTATION, SELECTED_RUN_ANNOTATION
from topwork.cluster.status.transfer_job_run import is_processed, read_transfer_job_status
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import SpecError
from topwork.search.jobs import TRIAL_LABEL
from topwork.search.trials import Trial, TrialResult
from topwork.spec import TransferJob


@dataclass(frozen=True)
class TrialFailure:
    """Why the run of a trial failed for good, and what it cost."""

    error: str
    seconds: float
    gpu_seconds: float


def build_trial_job(
    job: TransferJob, search: KubernetesObject, trial: str, *, suspend: bool, dataset: str, selected_run: str = ""
) -> KubernetesObject:
    """Build the TransferJob of a trial.

    Args:
        job: Its name, labels and spec.
        search: The TransferSearch in the cluster, which owns it.
        trial: Number of the trial, or `best`.
        suspend: Whether it is suspended.
        dataset: Key prefix of the stored dataset of earlier trials, which it uses, too; empty if there is none.
        selected_run: Name of the run whose weights `best` publishes.

    Returns:
        The TransferJob.
    """
    spec = job.spec.model_copy(update={"suspend": suspend})
    namespace = search["metadata"]["namespace"]
    pinned = {DATASET_ANNOTATION: dataset, SELECTED_RUN_ANNOTATION: selected_run}
    annotations = {name: value for name, value in pinned.items() if value}
    obj = build_transfer_job(job.model_copy(update={"spec": spec}), namespace)
    obj["metadata"] = {
        "name": job.metadata.name,
        "namespace": namespace,
        "labels": {**job.metadata.labels, TRIAL_LABEL: trial},
        **({"annotations": annotations} if annotations else {}),
        "ownerReferences": [owner_reference(search)],
    }
    return obj


def needs_change(existing: KubernetesObject, desired: KubernetesObject) -> bool:
    """Return whether an existing TransferJob of the search has another spec, or lacks labels.

    A finished one can't be suspended.
    """
    labels = existing["metadata"].get("labels") or {}
    if labels | desired["metadata"]["labels"] != labels:
        return True
    after = parse_transfer_job(desired).spec
    try:
        before = parse_transfer_job(existing).spec
    except SpecError:  # edited
        return True
    return before != (after if is_unfinished(existing) else after.model_copy(update={"suspend": before.suspend}))


def change_spec(existing: KubernetesObject, desired: KubernetesObject) -> KubernetesObject:
    """Return an existing TransferJob with the spec, labels and annotations of another one, to replace it."""
    before, metadata = existing["metadata"], desired["metadata"]
    merged = {key: (before.get(key) or {}) | metadata.get(key, {}) for key in ("labels", "annotations")}
    return existing | {"metadata": before | merged, "spec": desired["spec"]}


def is_unfinished(obj: KubernetesObject) -> bool:
    """Return whether a TransferJob runs, or will run."""
    return not (read_transfer_job_status(obj).is_final and is_processed(obj))


def read_outcome(obj: KubernetesObject, trial: Trial, metric: str) -> TrialResult | TrialFailure:
    """Read what the TransferJob of a running trial resulted in.

    Args:
        obj: The finished TransferJob, with the spec of the trial.
        trial: The trial.
        metric: Metric of the search.
    """
    status = read_transfer_job_status(obj)
    metrics = status.metrics or {}
    seconds, gpu_seconds = _seconds(status), _gpu_seconds(status, trial)
    if error := _describe_failure(status, metric):
        return TrialFailure(error, seconds, gpu_seconds)
    return TrialResult(
        epochs=trial.epochs,
        run=str(status.run),
        value=metrics[metric],
        metrics=metrics,
        seconds=seconds,
        gpu_seconds=gpu_seconds,
        dataset=status.dataset or "",
    )


def _describe_failure(status: TransferJobStatus, metric: str) -> str | None:
    if status.state == "Cancelled":
        return f"{status.run} was canceled"
    if status.state == "Failed":
        return status.error or f"{status.run} failed"
    if metric in (status.metrics or {}):
        return None
    cause = f"it reported {', '.join(status.metrics)}" if status.metrics else "its pod was deleted before it was read"
    return f"{status.run} is complete, but its {metric} on the validation split is unknown: {cause}"


def _seconds(status: TransferJobStatus) -> float:
    """Return for how long the containers of a run ran: that of its first node, over all attempts."""
    own = [record for record in status.attempt_history if record.pod.startswith(f"{status.run}-") and not record.index]
    return sum(_duration(record.started, record.ended) for record in own)


def _duration(start: datetime | None, end: datetime | None) -> float:
    return max(0.0, (end - start).total_seconds()) if start and end else 0.0


def _gpu_seconds(status: TransferJobStatus, trial: Trial) -> float:
    """Return the GPU time of a run. That of its TransferJob includes the earlier runs of the trial."""
    # A TransferJob that was deleted and created again has lost them: the time of the pods of this run is what is known.
    own = sum(record.gpu_seconds for record in status.attempt_history if record.pod.startswith(f"{status.run}-"))
    return max(own, (status.gpu_seconds or 0.0) - trial.gpu_seconds)
