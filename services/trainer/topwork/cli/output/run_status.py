"""How a run stands, as people and programs read it."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from topwork.cli.output.tables import lines
from topwork.cluster.status.attempts import Attempt, Container
from topwork.cluster.status.run_state import RunState

LONGEST_STATUS = 100
GAP = 3
STAGES = ("STAGE", "STATE", "DURATION", "EPOCHS", "BEST")


def duration(seconds: float) -> str:
    """Write a time span as kubectl does: 119s, 5m10s, 11m, 4h1m, 25h, 2d2h, 10d."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if minutes < 180:
        return _two(f"{minutes}m", whole % 60, "s") if minutes < 10 else f"{minutes}m"
    if hours < 48:
        return _two(f"{hours}h", minutes % 60, "m") if hours < 8 else f"{hours}h"
    return _two(f"{days}d", hours % 24, "h") if days < 8 else f"{days}d"


def _two(first: str, rest: int, unit: str) -> str:
    return f"{first}{rest}{unit}" if rest else first


def since(then: datetime | None, until: datetime | None = None) -> str:
    """Write the time since a moment, or between two."""
    return duration(((until or datetime.now(UTC)) - then).total_seconds()) if then else ""


def best(metric: str | None, value: float | None) -> str:
    """Write a metric."""
    return f"{metric} {value:.4f}" if metric is not None and value is not None else ""


def table(states: Sequence[RunState], *, namespaces: bool = False) -> Iterator[str]:
    """Write runs as a table, as kubectl does.

    Args:
        states: The runs.
        namespaces: Whether to name the namespace of each.

    Yields:
        Lines.
    """
    header = ["NAME", "RUN", "STAGE", "EPOCH", "BEST", "AGE", "STATUS"]
    rows = [
        [state.job, state.run, state.stage or "", _epoch(state), best(state.metric, state.value), since(state.created),
         status(state)]
        for state in states
    ]  # fmt: skip
    if namespaces:
        header = ["NAMESPACE", *header]
        rows = [[state.namespace, *row] for state, row in zip(states, rows, strict=True)]
    return lines(header, rows, words=len(header), gap=GAP)


def status(state: RunState) -> str:
    """Write the phase, and what is behind it in a few words."""
    told = state.error or state.reason or ""
    code = f" ({state.exit_code})" if state.phase == "failed" else ""
    line = f"{state.phase}{code}: {told}" if told else f"{state.phase}{code}"
    return line if len(line) <= LONGEST_STATUS else line[: LONGEST_STATUS - 1].rstrip() + "…"


def detail(state: RunState, others: int = 0) -> Iterator[str]:
    """Write all that is known of a run.

    Args:
        state: The run.
        others: How many other runs of the job there are.

    Yields:
        Lines.
    """
    older = f", the newest of {others + 1} runs (topwork list)" if others else ""
    yield f"{state.run} in namespace {state.namespace}: {_phase(state)}"
    facts = {
        "job": state.job + older,
        "age": since(state.created) + (f", ended {since(state.ended)} ago" if state.ended else ""),
        "queue": state.queue,
        "node": state.node,
        "epoch": _epoch(state),
        "best": best(state.metric, state.value),
        "attempts": _attempts(state),
        "reason": state.reason,
        "error": state.error,
        "model": state.model,
    }
    for name, fact in facts.items():
        if fact:
            yield f"  {name:<8}  {fact}"
    if state.attempts:
        yield ""
        yield from lines(STAGES, list(_stages(state)), words=len(STAGES), gap=GAP)
    for attempt in state.attempts[:-1]:
        yield from ("", *_earlier(attempt)) if attempt is state.attempts[0] else _earlier(attempt)


def _phase(state: RunState) -> str:
    if state.phase == "failed":
        return f"failed with exit code {state.exit_code}"
    if state.phase in {"running", "stopping"} and state.stage:
        return f"{state.phase}, {state.stage}"
    return state.phase


def _epoch(state: RunState) -> str:
    return f"{state.epoch.epoch}/{state.epoch.epochs}" if state.epoch else ""


def _attempts(state: RunState) -> str | None:
    if len(state.attempts) < 2 and not state.failures:
        return None
    return f"{len(state.attempts)}, {state.failures} of them counted (retries: {state.retries})"


def _stages(state: RunState) -> Iterator[list[str]]:
    for container in state.attempts[-1].containers:
        ending, epoch = container.ending, state.epoch
        epochs, metric = str(ending.epochs or "") if ending else "", best(*_metric(container))
        if epoch and epoch.stage == container.stage and container.state == "running":
            epochs, metric = _epoch(state), best(epoch.metric, epoch.best)
        yield [container.stage, container.state, since(container.started, container.ended), epochs, metric]


def _metric(container: Container) -> tuple[str | None, float | None]:
    return (container.ending.metric, container.ending.value) if container.ending else (None, None)


def _earlier(attempt: Attempt) -> Iterator[str]:
    code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
    counted = "" if attempt.counted else " (not counted)"
    yield f"before: {attempt.pod} {attempt.state}{code}{counted}: {attempt.error or 'no reason given'}"


def as_json(state: RunState) -> dict[str, Any]:
    """Turn a state into what `--json` prints; keys are only ever added."""
    epoch = state.epoch
    return {
        "job": state.job,
        "run": state.run,
        "namespace": state.namespace,
        "phase": state.phase,
        "stage": state.stage,
        "epoch": epoch.epoch if epoch else None,
        "epochs": epoch.epochs if epoch else None,
        "metric": state.metric,
        "value": state.value,
        "model": state.model,
        "exitCode": state.exit_code,
        "reason": state.reason,
        "error": state.error,
        "created": _time(state.created),
        "ended": _time(state.ended),
        "node": state.node,
        "queue": state.queue,
        "failures": state.failures,
        "retries": state.retries,
        "attempts": [_attempt(attempt) for attempt in state.attempts],
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "pod": attempt.pod,
        "node": attempt.node,
        "created": _time(attempt.created),
        "state": attempt.state,
        "exitCode": attempt.exit_code,
        "error": attempt.error,
        "counted": attempt.counted,
        "stages": [_stage(container) for container in attempt.containers],
    }


def _stage(container: Container) -> dict[str, Any]:
    metric, value = _metric(container)
    return {
        "stage": container.stage,
        "state": container.state,
        "started": _time(container.started),
        "ended": _time(container.ended),
        "exitCode": container.exit_code,
        "epochs": container.ending.epochs if container.ending else None,
        "metric": metric,
        "value": value,
        "error": container.error,
    }


def _time(moment: datetime | None) -> str | None:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None
