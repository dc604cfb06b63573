"""Printing the status of runs: as a table, in detail, and as JSON."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from topwork.cli.output.tables import format_table
from topwork.cluster.status.attempts import Attempt, ContainerStatus
from topwork.cluster.status.durations import format_duration
from topwork.cluster.status.nodes import current_attempts, find_first_failure
from topwork.cluster.status.objects import one_line
from topwork.cluster.status.run_status import RunStatus

MAX_STATUS_LENGTH = 100
COLUMN_GAP = 3
RUN_COLUMNS = ("NAME", "RUN", "STAGE", "EPOCH", "BEST", "AGE", "STATUS")
NODE_COLUMNS = ("INDEX", "POD", "MACHINE", "STATE", "STAGE", "DURATION")
STAGE_COLUMNS = ("STAGE", "STATE", "DURATION", "EPOCHS", "BEST")


def format_elapsed(start: datetime | None, end: datetime | None = None) -> str:
    """Format the time between two moments, or until now; empty without a start."""
    return format_duration(((end or datetime.now(UTC)) - start).total_seconds()) if start else ""


def format_metric(metric: str | None, value: float | None) -> str:
    """Format a metric with its value; empty if it is unknown."""
    return f"{metric} {value:.4f}" if metric is not None and value is not None else ""


def format_runs(statuses: Sequence[RunStatus], *, show_namespace: bool = False) -> Iterator[str]:
    """Format runs as a table, as `kubectl get` does.

    Args:
        statuses: The runs.
        show_namespace: Whether to add a column with the namespace.

    Yields:
        Lines.
    """
    columns: list[str] = ["NAMESPACE", *RUN_COLUMNS] if show_namespace else [*RUN_COLUMNS]
    rows = [[status.namespace, *_run_cells(status)] if show_namespace else _run_cells(status) for status in statuses]
    return format_table(columns, rows, text_columns=len(columns), gap=COLUMN_GAP)


def _run_cells(status: RunStatus) -> list[str]:
    return [
        status.job,
        status.run or "<none>",
        status.stage or "",
        _format_epoch(status),
        format_metric(status.metric, status.value),
        format_elapsed(status.created),
        _format_phase_and_reason(status),
    ]


def _format_phase_and_reason(status: RunStatus) -> str:
    reason = one_line("; ".join(filter(None, (status.error or status.reason, *status.notes))))
    code = f" ({status.exit_code})" if status.phase == "failed" else ""
    line = f"{status.phase}{code}: {reason}" if reason else f"{status.phase}{code}"
    return line if len(line) <= MAX_STATUS_LENGTH else line[: MAX_STATUS_LENGTH - 1].rstrip() + "…"


def format_details(status: RunStatus, other_runs: int = 0) -> Iterator[str]:
    """Format all details of a run, as `kubectl describe` does.

    Args:
        status: The run.
        other_runs: Number of other runs of the same job.

    Yields:
        Lines.
    """
    others = f", the newest of {other_runs + 1} runs (topwork list)" if other_runs else ""
    ended = f", ended {format_elapsed(status.ended)} ago" if status.ended else ""
    yield f"{status.name} in namespace {status.namespace}: {_format_phase(status)}"
    fields = {
        "job": status.job + others,
        "age": format_elapsed(status.created) + ended,
        "state": status.transfer_job.state if status.transfer_job else None,
        "queue": status.queue,
        "nodes": status.nodes if status.nodes > 1 else None,
        "node": status.node if status.nodes == 1 else None,
        "epoch": _format_epoch(status),
        "best": format_metric(status.metric, status.value),
        "eta": status.transfer_job.eta if status.transfer_job and not status.is_finished else None,
        "gpu time": _format_gpu_time(status),
        "attempts": _format_attempt_count(status),
        "reason": status.reason,
        "error": status.error,
        "model": status.model,
        "weights": status.weights_from,
    }
    for name, value in fields.items():
        if value:
            first, *more = str(value).splitlines()
            yield f"  {name:<8}  {first}"
            yield from (f"{'':<12}{line}" for line in more)
    for note in status.notes:
        yield from (
            f"{'  note      ' if number == 0 else '':<12}{line}" for number, line in enumerate(note.splitlines())
        )
    if status.last_attempt and status.last_attempt.containers:
        yield ""
        rows = list(_stage_rows(status.last_attempt, status))
        yield from format_table(STAGE_COLUMNS, rows, text_columns=len(STAGE_COLUMNS), gap=COLUMN_GAP)
    if status.nodes > 1:
        yield ""
        rows = list(_node_rows(status))
        yield from format_table(NODE_COLUMNS, rows, text_columns=len(NODE_COLUMNS), gap=COLUMN_GAP)
    earlier = _earlier_attempts(status)
    if earlier:
        yield ""
    for attempt in earlier:
        yield _format_earlier_attempt(attempt)


def _format_phase(status: RunStatus) -> str:
    if status.phase == "failed":
        return f"failed with exit code {status.exit_code}"
    if status.phase in {"running", "stopping"} and status.stage:
        return f"{status.phase}, {status.stage}"
    return status.phase


def _format_epoch(status: RunStatus) -> str:
    return f"{status.epoch.epoch}/{status.epoch.epochs}" if status.epoch else ""


def _format_gpu_time(status: RunStatus) -> str | None:
    seconds = status.transfer_job.gpu_seconds if status.transfer_job else None
    return f"{seconds / 3600:.2f} GPU-hours" if seconds else None


def _format_attempt_count(status: RunStatus) -> str | None:
    if status.attempt_count < 2 and not status.failures:
        return None
    evictions = sum(attempt.disk_eviction for attempt in status.attempts)
    evicted = f"; {evictions} evicted for lack of disk space" if evictions else ""
    retries = "" if status.retries is None else f" (retries: {status.retries})"
    return f"{status.attempt_count}, {status.failures} of them counted{retries}{evicted}"


def _node_rows(status: RunStatus) -> Iterator[list[str]]:
    current = current_attempts(status.attempts)
    for index in range(status.nodes):
        if (attempt := current.get(index)) is None:
            yield [str(index), "", "", "missing", "", ""]
            continue
        container = attempt.current_container
        duration = format_elapsed(container.started, container.ended) if container else ""
        stage = container.stage if container else ""
        yield [str(index), attempt.pod, attempt.node or "", attempt.state, stage, duration]


def _earlier_attempts(status: RunStatus) -> list[Attempt]:
    """Return the pods of earlier attempts; on several nodes, of each attempt the pod that failed first."""
    current = current_attempts(status.attempts)
    earlier = [attempt for attempt in status.attempts if attempt != current[attempt.index]]
    if status.nodes == 1:
        return earlier
    by_number: dict[int, list[Attempt]] = {}
    for attempt in earlier:
        by_number.setdefault(attempt.number, []).append(attempt)
    return [find_first_failure(attempts) or attempts[0] for attempts in by_number.values()]


def _stage_rows(attempt: Attempt, status: RunStatus) -> Iterator[list[str]]:
    for container in attempt.containers:
        message, epoch = container.termination_message, status.epoch
        epochs, metric = str(message.epochs or "") if message else "", format_metric(*_metric_of(container))
        if epoch and epoch.stage == container.stage and container.state == "running":
            epochs, metric = _format_epoch(status), format_metric(epoch.metric, epoch.best)
        duration = format_elapsed(container.started, container.ended)
        yield [container.stage, container.state, duration, epochs, metric]


def _metric_of(container: ContainerStatus) -> tuple[str | None, float | None]:
    message = container.termination_message
    return (message.metric, message.value) if message else (None, None)


def _format_earlier_attempt(attempt: Attempt) -> str:
    code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
    counted = "" if attempt.counted else " (not counted)"
    return f"earlier: {attempt.pod} {attempt.state}{code}{counted}: {attempt.error or 'no reason given'}"


def status_to_json(status: RunStatus) -> dict[str, Any]:
    """Convert a status to the object that `--json` prints; keys are never removed or renamed."""
    epoch = status.epoch
    content: dict[str, Any] = {
        "job": status.job,
        "run": status.run or None,
        "namespace": status.namespace,
        "phase": status.phase,
        "stage": status.stage,
        "epoch": epoch.epoch if epoch else None,
        "epochs": epoch.epochs if epoch else None,
        "metric": status.metric,
        "value": status.value,
        "model": status.model,
        "weightsFrom": status.weights_from,
        "exitCode": status.exit_code,
        "reason": status.reason,
        "error": status.error,
        "created": _format_time(status.created),
        "ended": _format_time(status.ended),
        "node": status.node,
        "queue": status.queue,
        "failures": status.failures,
        "retries": status.retries,
        "attempts": [_attempt_to_json(attempt) for attempt in status.attempts],
    }
    if status.nodes > 1:
        content["nodes"] = status.nodes
        for item, attempt in zip(content["attempts"], status.attempts, strict=True):
            item["index"] = attempt.index
    if status.transfer_job is not None:
        content["transferJob"] = status.transfer_job.model_dump(mode="json", by_alias=True)
    return content


def _attempt_to_json(attempt: Attempt) -> dict[str, Any]:
    return {
        "pod": attempt.pod,
        "node": attempt.node,
        "created": _format_time(attempt.created),
        "state": attempt.state,
        "exitCode": attempt.exit_code,
        "error": attempt.error,
        "counted": attempt.counted,
        "diskEviction": attempt.disk_eviction,
        "stages": [_container_to_json(container) for container in attempt.containers],
    }


def _container_to_json(container: ContainerStatus) -> dict[str, Any]:
    metric, value = _metric_of(container)
    return {
        "stage": container.stage,
        "state": container.state,
        "started": _format_time(container.started),
        "ended": _format_time(container.ended),
        "exitCode": container.exit_code,
        "epochs": container.termination_message.epochs if container.termination_message else None,
        "metric": metric,
        "value": value,
        "error": container.error,
    }


def _format_time(time: datetime | None) -> str | None:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ") if time else None
