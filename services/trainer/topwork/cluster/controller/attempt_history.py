"""The attempts of a run in the status of its TransferJob: its pods, and the GPU time that they used."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import GPU_RESOURCE
from topwork.cluster.status.attempts import Attempt, read_attempt
from topwork.cluster.status.objects import (
    COMPLETION_INDEX_KEY,
    find_condition,
    get_annotation,
    parse_quantity,
    parse_time,
    requested_amount,
)
from topwork.cluster.transfer_job_status import MAX_ATTEMPTS, AttemptRecord, TransferJobStatus
from topwork.errors import shorten

MAX_ERROR_CHARACTERS = 250


class AttemptHistory(NamedTuple):
    """The attempts of a run.

    Attributes:
        records: The latest pods, oldest first. While pods of an earlier run terminate, they are included.
        attempts: Number of attempts of the run: that of the pods of the node that had most.
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
    dropped = (previous.attempts or 0) - len(own) if previous.run == run and not _has_nodes(own) else 0
    oldest = _find_oldest_kept(own, has_dropped=dropped > 0)
    updated = {record.uid: record if record.ended else _ended(record, now) for record in known.values()}
    for pod in pods:
        record = _read_record(pod, known.get(pod["metadata"]["uid"]), now)
        if record.uid in known or not _was_dropped(record, previous, run, oldest):
            updated[record.uid] = _with_attempt(record, [item for item in updated.values() if _is_of_run(item, run)])
    records = sorted(updated.values(), key=lambda record: (record.created or now, record.pod))
    of_run = [record for record in records if _is_of_run(record, run)]
    is_replaced = not any(record.ended is None for record in records if not _is_of_run(record, run))
    kept = of_run if is_replaced else records
    return AttemptHistory(
        _limit(kept),
        dropped + len(of_run) if not _has_nodes(of_run) else _count_attempts(of_run, previous, run),
        max(0.0, dropped_gpu_seconds) + sum(record.gpu_seconds for record in records),
    )


def _has_nodes(records: Iterable[AttemptRecord]) -> bool:
    """Return whether the run had several nodes at any time."""
    return any(record.index is not None for record in records)


def _with_attempt(record: AttemptRecord, of_run: Sequence[AttemptRecord]) -> AttemptRecord:
    """Number the attempt of a pod of a run on several nodes: one more than that of the last pod of its node."""
    if record.index is None or record.attempt is not None:
        return record
    earlier = [item.attempt for item in of_run if item.index == record.index and item.attempt]
    on_one_node = sum(item.index is None for item in of_run)
    return record.model_copy(update={"attempt": 1 + max(earlier, default=on_one_node)})


def _count_attempts(of_run: Sequence[AttemptRecord], previous: TransferJobStatus, run: str | None) -> int:
    """Count the attempts of a run that has, or had, several nodes."""
    last = max(index for index, record in enumerate(of_run) if record.index is not None)
    numbers = [record.attempt for record in of_run if record.attempt]
    before = (previous.attempts or 0) if previous.run == run else 0
    return max(before, max(numbers, default=0) + len(of_run[last + 1 :]))


def _max_records(records: Iterable[AttemptRecord]) -> int:
    """Return how many records are kept: on many nodes, those of the last two attempts."""
    nodes = 1 + max((record.index or 0 for record in records), default=0)
    return max(MAX_ATTEMPTS, 2 * nodes)


def _limit(records: Sequence[AttemptRecord]) -> tuple[AttemptRecord, ...]:
    """Drop the oldest records of pods that have ended; the GPU time of the others still grows."""
    excess = len(records) - _max_records(records)
    dropped = [record.uid for record in records if record.ended][: max(0, excess)]
    return tuple(record for record in records if record.uid not in dropped)


def _find_oldest_kept(own: Sequence[AttemptRecord], *, has_dropped: bool) -> datetime | None:
    """Return the time of creation up to which records of pods that have ended may have been dropped."""
    if has_dropped or (_has_nodes(own) and len(own) >= _max_records(own)):
        return next((record.created for record in own if record.ended), None)
    return None


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
    is_node = get_annotation(pod, COMPLETION_INDEX_KEY) is not None
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
        index=attempt.index if is_node else None,
        attempt=known.attempt if known else None,
    )


def _gpu_seconds(pod: KubernetesObject, attempt: Attempt, end: datetime) -> float:
    """Return the number of GPUs times the seconds since the pod was scheduled."""
    scheduled = find_condition(pod, "PodScheduled") or {}
    start = parse_time(scheduled.get("lastTransitionTime")) or attempt.created
    gpus = int(parse_quantity(requested_amount(pod, GPU_RESOURCE) or "0"))
    if not attempt.node or start is None:
        return 0.0
    return float(round(gpus * max(0.0, (end - start).total_seconds())))
