"""The attempts of a run in the status of its TransferJob: its pods, and the GPU time that they used."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import GPU_RESOURCE
from topwork.cluster.status.attempts import Attempt, read_attempt
from topwork.cluster.status.objects import find_condition, parse_quantity, parse_time, requested_amount
from topwork.cluster.transfer_job_status import MAX_ATTEMPTS, AttemptRecord, TransferJobStatus
from topwork.errors import shorten

MAX_ERROR_CHARACTERS = 250


class AttemptHistory(NamedTuple):
    """The attempts of a run.

    Attributes:
        records: The latest attempts, oldest first. While pods of an earlier run terminate, they are included.
        attempts: Number of attempts of the run.
        gpu_seconds: GPU-seconds of all attempts of all runs.
    """

    records: tuple[AttemptRecord, ...]
    attempts: int
    gpu_seconds: float


def update_history(
    previous: TransferJobStatus, run: str | None, pods: Sequence[KubernetesObject], now: datetime
) -> AttemptHistory:
    """Add pods to the history of a TransferJob. Each pod counts once, however often it is added.

    Args:
        previous: The last status.
        run: Name of the run.
        pods: The existing pods of its Jobs.
        now: Current time.

    Returns:
        The history.
    """
    known = {record.uid: record for record in previous.attempt_history}
    dropped_gpu_seconds = (previous.gpu_seconds or 0.0) - sum(record.gpu_seconds for record in known.values())
    own = [record for record in known.values() if _is_of_run(record, run)]
    dropped = (previous.attempts or 0) - len(own) if previous.run == run else 0
    oldest = own[0].created if own and dropped else None
    updated = {record.uid: record if record.ended else _ended(record, now) for record in known.values()}
    for pod in pods:
        record = _read_record(pod, known.get(pod["metadata"]["uid"]), now)
        if record.uid in known or not _was_dropped(record, previous, run, oldest):
            updated[record.uid] = record
    records = sorted(updated.values(), key=lambda record: (record.created or now, record.pod))
    of_run = [record for record in records if _is_of_run(record, run)]
    is_replaced = not any(record.ended is None for record in records if not _is_of_run(record, run))
    kept = of_run if is_replaced else records
    return AttemptHistory(
        tuple(kept[-MAX_ATTEMPTS:]),
        dropped + len(of_run),
        max(0.0, dropped_gpu_seconds) + sum(record.gpu_seconds for record in records),
    )


def _was_dropped(record: AttemptRecord, previous: TransferJobStatus, run: str | None, oldest: datetime | None) -> bool:
    """Return whether the record of a pod was in the history before, and its GPU time is in the total."""
    if not _is_of_run(record, run):
        return previous.run == run and record.ended is not None
    return oldest is not None and (record.created is None or record.created <= oldest)


def _is_of_run(record: AttemptRecord, run: str | None) -> bool:
    return run is not None and record.pod.startswith(f"{run}-")


def _ended(record: AttemptRecord, now: datetime) -> AttemptRecord:
    """Return the record of a pod that no longer exists."""
    return record.model_copy(update={"ended": now, "error": record.error or "the pod was deleted"})


def _read_record(pod: KubernetesObject, known: AttemptRecord | None, now: datetime) -> AttemptRecord:
    attempt = read_attempt(pod, {"spec": {}})
    current = attempt.current_container
    ends = [container.ended for container in attempt.containers if container.ended]
    ended = None
    if attempt.is_finished:
        ended = (known.ended if known else None) or max(ends, default=now)
    return AttemptRecord(
        pod=attempt.pod,
        uid=pod["metadata"]["uid"],
        node=attempt.node,
        created=attempt.created,
        stage=current.stage if current else None,
        started=min((container.started for container in attempt.containers if container.started), default=None),
        ended=ended,
        exit_code=attempt.exit_code,
        error=shorten(attempt.error, MAX_ERROR_CHARACTERS) if attempt.error else None,
        gpu_seconds=_gpu_seconds(pod, attempt, ended or now),
    )


def _gpu_seconds(pod: KubernetesObject, attempt: Attempt, end: datetime) -> float:
    """Return the number of GPUs times the seconds since the pod was scheduled."""
    scheduled = find_condition(pod, "PodScheduled") or {}
    start = parse_time(scheduled.get("lastTransitionTime")) or attempt.created
    gpus = int(parse_quantity(requested_amount(pod, GPU_RESOURCE) or "0"))
    if not attempt.node or start is None:
        return 0.0
    return float(round(gpus * max(0.0, (end - start).total_seconds())))
