"""The status of a run: phase, stage, progress in epochs, best metric, attempts, and model URI."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL, QUEUE_LABEL, RUN_LABEL
from topwork.cluster.status.attempts import Attempt, ContainerStatus, number_attempts, read_attempt
from topwork.cluster.status.job_status import JOB_DELETED, Phase, read_job_status
from topwork.cluster.status.nodes import count_failed_attempts
from topwork.cluster.status.objects import (
    RunObjects,
    creation_time,
    find_condition,
    get_label,
    name_of,
    node_count,
    parse_time,
    pods_of_job,
)
from topwork.cluster.termination_message import TerminationMessage
from topwork.cluster.transfer_job_status import TransferJobStatus

# The metric to show: the first of these that a log line contains.
METRICS = ("validation_accuracy", "validation_auc", "validation_loss", "accuracy", "auc", "loss")


@dataclass(frozen=True)
class EpochProgress:
    """Progress of a stage, from the log of its container.

    Attributes:
        stage: The stage.
        epoch: The last completed epoch, counted from 1.
        epochs: Number of planned epochs.
        metric: Name of the metric that is shown.
        value: Its value in that epoch.
        best: Its best value so far.
    """

    stage: str
    epoch: int
    epochs: int
    metric: str | None = None
    value: float | None = None
    best: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        job: Name of the job: `metadata.name` of the spec.
        run: Name of the run; empty if the controller has not yet given a TransferJob one.
        namespace: Its namespace.
        phase: Its phase.
        stage: The stage that runs, or that ran last.
        attempts: The pods of the Job, oldest first; on several nodes, those of all nodes.
        failures: Number of failed attempts that count against the retries.
        retries: Number of such failures that the Job tolerates; None if it is unknown, without a Job.
        epoch: Progress of the stage.
        metric: Name of the best known metric.
        value: Its value.
        metrics: Metrics on the validation split of a finished run that publishes nothing.
        dataset: Identifies the images of such a run; see `identify_split_images`.
        model: URI of the published model.
        weights_from: Stage and epoch that the weights of the trained model come from.
        transfer_job: Status of its TransferJob; None for a plain Job.
        notes: What the status of the TransferJob adds, in sentences, such as a changed spec that is not accepted.
        exit_code: Exit code of the run; None until it is finished.
        error: Why it failed.
        reason: Why it is pending or stopping.
        created: When the Job was created.
        ended: When the Job finished.
        node: Machine of the last pod; on several nodes, of that of node 0.
        queue: Its Kueue queue.
        nodes: Number of nodes that train the run together. Stage, progress, metric and model are those of node 0.
    """

    job: str
    run: str
    namespace: str
    phase: Phase
    stage: str | None = None
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    retries: int | None = None
    epoch: EpochProgress | None = None
    metric: str | None = None
    value: float | None = None
    model: str | None = None
    exit_code: int | None = None
    error: str | None = None
    reason: str | None = None
    created: datetime | None = None
    ended: datetime | None = None
    node: str | None = None
    queue: str | None = None
    weights_from: str | None = None
    transfer_job: TransferJobStatus | None = None
    notes: tuple[str, ...] = ()
    nodes: int = 1
    metrics: dict[str, float] | None = None
    dataset: str | None = None

    @property
    def last_attempt(self) -> Attempt | None:
        """The last pod of node 0; None if it never had one."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.index == 0), None)

    @property
    def attempt_count(self) -> int:
        """Number of attempts: that of the pods of the node that had most."""
        return max((attempt.number for attempt in self.attempts), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the status is final."""
        return self.phase in {"succeeded", "failed", "cancelled"}

    @property
    def name(self) -> str:
        """Name that commands accept: that of the run, or of its TransferJob as long as it has no run."""
        return self.run or f"transferjob/{self.job}"

    @property
    def was_deleted(self) -> bool:
        """Whether the Job was deleted before it was finished: its TransferJob may be suspended, changed or canceled."""
        return self.error == JOB_DELETED

    @property
    def running_container(self) -> tuple[str, str] | None:
        """Names of the pod of node 0 and its container that are running; None if no container of it is running."""
        for attempt in reversed(self.attempts):
            for container in attempt.containers:
                if attempt.index == 0 and container.state == "running":
                    return attempt.pod, container.stage
        return None


def read_run_status(objects: RunObjects, epoch: EpochProgress | None = None) -> RunStatus:
    """Read the status of a run.

    Args:
        objects: The objects of the run: at least one Job.
        epoch: Progress of the running stage, from its log.

    Returns:
        The status of its training Job; while that Job waits for the prefetch Job, the status of the latter.

    Example:
        >>> status = read_run_status(read_run_objects(cluster, "cats-1a2b3c4d"))
        >>> status.phase, status.stage
        ('running', 'transfer')
    """
    training, prefetch = objects.job("training"), objects.job("prefetch")
    if training is None:
        return _prefetch_only(read_status_of_job(objects, prefetch or objects.jobs[0], epoch))
    status = read_status_of_job(objects, training, epoch)
    if prefetch is None or status.phase not in {"pending", "suspended"}:
        return status
    pull = read_status_of_job(objects, prefetch)
    if pull.is_finished or pull.phase == "stopping":
        return status
    return replace(status, phase="pulling ahead", stage="pull", reason=pull.reason or status.reason, node=pull.node)


def _prefetch_only(status: RunStatus) -> RunStatus:
    """Return the status of a run without a training Job: it is not finished when its dataset is pulled."""
    if status.phase == "succeeded":
        reason = "the dataset is pulled; submit the job again to train"
        return replace(status, phase="pending", exit_code=None, ended=None, reason=reason)
    return replace(status, phase="pulling ahead") if status.phase in {"pending", "running"} else status


def read_status_of_job(objects: RunObjects, job: KubernetesObject, epoch: EpochProgress | None = None) -> RunStatus:
    """Read the status of a run from only one of its Jobs; see `read_run_status`."""
    attempts = number_attempts(read_attempt(pod, job, objects.deleted) for pod in pods_of_job(objects.pods, job))
    # Node 0 pulls, reports epochs, and publishes.
    own = tuple(attempt for attempt in attempts if attempt.index == 0)
    nodes, last = node_count(job), own[-1] if own else None
    current = last.current_container if last else None
    # Progress of an earlier stage, or of an earlier attempt, is out of date.
    if epoch and not (current and current.stage == epoch.stage and current.state == "running"):
        epoch = None
    metric, value = _best_metric(own, epoch)
    job_status = read_job_status(objects, job, attempts)
    validated = _validation_message(own)
    return RunStatus(
        job=get_label(job, JOB_LABEL) or name_of(job),
        run=get_label(job, RUN_LABEL) or name_of(job),
        namespace=str(job["metadata"].get("namespace") or ""),
        phase=job_status.phase,
        stage=current.stage if current else None,
        attempts=attempts,
        failures=count_failed_attempts(job, attempts),
        retries=int(job["spec"].get("backoffLimit") or 0) // nodes,
        epoch=epoch,
        metric=metric,
        value=value,
        model=_model_uri(own),
        weights_from=_weights_from(own),
        exit_code=job_status.exit_code,
        error=job_status.error,
        reason=job_status.reason,
        created=creation_time(job),
        ended=_end_time(job),
        node=last.node if last else None,
        queue=get_label(job, QUEUE_LABEL),
        nodes=nodes,
        metrics=validated.metrics if validated else None,
        dataset=validated.dataset if validated else None,
    )


def _best_metric(attempts: tuple[Attempt, ...], epoch: EpochProgress | None) -> tuple[str | None, float | None]:
    """Return the metric of the running stage, or of the last stage that ended."""
    if epoch and epoch.metric:
        return epoch.metric, epoch.best
    for container in _newest_first(attempts):
        message = container.termination_message
        if message and message.metric is not None:
            return message.metric, message.value
    return None, None


def _model_uri(attempts: tuple[Attempt, ...]) -> str | None:
    messages = (container.termination_message for container in _newest_first(attempts))
    return next((message.model for message in messages if message and message.model), None)


def _validation_message(attempts: tuple[Attempt, ...]) -> TerminationMessage | None:
    """Return the message of the evaluation on the validation split, which ends a run that publishes nothing."""
    messages = (container.termination_message for container in _newest_first(attempts))
    return next((message for message in messages if message and message.metrics), None)


def _weights_from(attempts: tuple[Attempt, ...]) -> str | None:
    messages = (container.termination_message for container in _newest_first(attempts))
    return next((message.weights_from for message in messages if message and message.weights_from), None)


def _newest_first(attempts: tuple[Attempt, ...]) -> list[ContainerStatus]:
    return [container for attempt in reversed(attempts) for container in reversed(attempt.containers)]


def _end_time(job: KubernetesObject) -> datetime | None:
    status = job.get("status") or {}
    condition = find_condition(job, "Complete") or find_condition(job, "Failed") or {}
    return parse_time(status.get("completionTime") or condition.get("lastTransitionTime"))


def parse_epoch(line: str, previous: EpochProgress | None = None) -> EpochProgress | None:
    """Parse a log line of a container.

    Args:
        line: The line.
        previous: Progress at the previous epoch, whose best value may remain the best.

    Returns:
        The progress; None if the line is not an epoch event.
    """
    if '"epoch"' not in line:
        return None
    try:
        entry = json.loads(line)
        if entry["message"] != "epoch":
            return None
        metric = next((name for name in METRICS if _is_number(entry.get(name))), None)
        value = float(entry[metric]) if metric else None
        epoch = EpochProgress(str(entry["stage"]), int(entry["epoch"]), int(entry["epochs"]), metric, value, value)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return _with_best(epoch, previous)


def parse_last_epoch(lines: Iterable[str]) -> EpochProgress | None:
    """Return the progress at the last epoch of a log, with the best value of all epochs."""
    last = None
    for line in lines:
        last = parse_epoch(line, last) or last
    return last


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _with_best(epoch: EpochProgress, previous: EpochProgress | None) -> EpochProgress:
    if previous is None or (previous.stage, previous.metric) != (epoch.stage, epoch.metric):
        return epoch
    if previous.best is None or epoch.best is None or epoch.metric is None:
        return epoch
    better = min if epoch.metric.endswith("loss") else max
    return replace(epoch, best=better(previous.best, epoch.best))
