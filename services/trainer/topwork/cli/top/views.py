"""Formats the runs of `topwork top` as text and as JSON."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic.alias_generators import to_camel

from topwork.cli.output.tables import format_table
from topwork.cluster.status.durations import format_duration
from topwork.cluster.status.node_snapshots import mean_utilization
from topwork.cluster.status.snapshot import (
    BestMetric,
    GpuUsage,
    NodeSnapshot,
    RunSnapshot,
    StorageTraffic,
    TrainingSpeed,
)
from topwork.disk_space import format_bytes
from topwork.training.input_stalls import INPUT_BOUND_SHARE

BAR_WIDTH = 24
"""Width of the progress bar in characters."""
NO_PROGRESS_SECONDS = 120.0
"""A lack of progress is shown after this time."""
SLOW_NODE_RATIO = 1.2
"""A node is slow if it takes this many times as long to evaluate an image as the median; as in TopworkNodeSlow."""
COLUMNS = ("RUN", "STAGE", "EPOCH", "LOSS", "BEST", "IMAGES/S", "WAIT", "GPU", "LEFT", "STATE")
MAX_REASON_CHARACTERS = 160


def format_runs(runs: Sequence[RunSnapshot]) -> Iterator[str]:
    """Format runs as a table.

    Args:
        runs: The runs.

    Yields:
        The lines of the table.
    """
    columns, rows = list(COLUMNS), [_row(run) for run in runs]
    if len({run.namespace for run in runs if run.namespace}) > 1:
        columns = ["NAMESPACE", *columns]
        rows = [[run.namespace or "", *row] for run, row in zip(runs, rows, strict=True)]
    return format_table(columns, rows, text_columns=len(columns), gap=3)


def _row(run: RunSnapshot) -> list[str]:
    return [
        run.run,
        run.stage or "",
        _epoch(run),
        _main_value(run.loss),
        _best_metric(run.best),
        _rate(run.speed.images_per_second) if run.speed else "",
        f"{run.speed.input_wait:.0%}" if run.speed and run.speed.input_wait is not None else "",
        _mean_utilization(run.gpus),
        _duration(run.seconds_left),
        _state_and_reason(run),
    ]


def format_details(run: RunSnapshot) -> Iterator[str]:
    """Format all data of a run.

    Args:
        run: The run.

    Yields:
        The lines.
    """
    namespace = f" in namespace {run.namespace}" if run.namespace else ""
    stage = f", {run.stage}" if run.stage else ""
    elapsed = _duration(run.stage_seconds, " for {}") if run.state == "running" else ""
    yield f"{run.run}{namespace}: {run.state}{stage}{elapsed}"
    details = {
        "reason": _shorten(run.reason),
        "epoch": _progress(run),
        "loss": _values_by_split(run.loss),
        **_metrics(run.metrics),
        "best": f"{_best_metric(run.best)} in {run.best.stage}" if run.best else "",
        "learning rate": f"{run.learning_rate:.4g}" if run.learning_rate is not None else "",
        "speed": _speed(run),
        "input": _input_wait(run.speed),
        **({} if run.nodes else {f"GPU {gpu.index}": _gpu(gpu) for gpu in run.gpus}),
        **_nodes(run),
        "checkpoint": _duration(run.checkpoint_seconds_ago, "{} ago"),
        "storage": _storage(run),
        "images": _images(run),
        "gates": f"{run.gates_failed} not met" if run.gates_failed else "",
        "stages done": ", ".join(
            f"{stage} {format_duration(seconds)}" for stage, seconds in run.seconds_by_stage.items()
        ),
        "no progress": _time_without_progress(run),
        "exit code": "" if run.exit_code is None else str(run.exit_code),
        "source": run.source,
    }
    for name, detail in details.items():
        if detail:
            yield f"  {name:<13}  {detail}"


def _duration(seconds: float | None, template: str = "{}") -> str:
    return template.format(format_duration(seconds)) if seconds is not None else ""


def _epoch(run: RunSnapshot) -> str:
    if run.epoch is None:
        return ""
    return f"{run.epoch}/{run.epochs}" if run.epochs else str(run.epoch)


def _progress(run: RunSnapshot) -> str:
    if run.epoch is None or not run.epochs:
        return _epoch(run)
    done = min(BAR_WIDTH, round(BAR_WIDTH * run.epoch / run.epochs))
    return f"{_epoch(run)}  {'━' * done}{'╌' * (BAR_WIDTH - done)}{_duration(run.seconds_left, '  {} left')}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) < 1e4) else f"{value:.4g}"


def _main_value(values: Mapping[str, float]) -> str:
    """Format the value of the most informative split: validation or test, rather than train."""
    for split in ("validation", "test", "train", *values):
        if split in values:
            return _number(values[split])
    return ""


def _values_by_split(values: Mapping[str, float]) -> str:
    return "   ".join(f"{split} {_number(value)}" for split, value in values.items())


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Format one line per metric, with the values of all splits."""
    by_name: dict[str, dict[str, float]] = {}
    for split, values in metrics.items():
        for name, value in values.items():
            by_name.setdefault(name, {})[split] = value
    return {name: _values_by_split(values) for name, values in by_name.items()}


def _best_metric(best: BestMetric | None) -> str:
    if best is None:
        return ""
    return f"{'' if best.split == 'train' else best.split + '_'}{best.name} {_number(best.value)}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _speed(run: RunSnapshot) -> str:
    speed = run.speed
    if speed is None:
        return ""
    step = f"{speed.step_seconds:.2f} s" if speed.step_seconds >= 1 else f"{speed.step_seconds * 1000:.3g} ms"
    replicas = f" on {run.replicas} replicas" if run.replicas and run.replicas > 1 else ""
    mean = "" if speed.lately else " (mean since the process started)"
    return f"{_rate(speed.images_per_second)} images/s, {step} per step{replicas}{mean}"


def _input_wait(speed: TrainingSpeed | None) -> str:
    if speed is None or speed.input_wait is None:
        return ""
    warning = ": training is input-bound" if speed.input_wait > INPUT_BOUND_SHARE else ""
    return f"{speed.input_wait:.0%} of step time spent waiting{warning}"


def _mean_utilization(gpus: Sequence[GpuUsage]) -> str:
    mean = mean_utilization(gpus)
    return f"{mean:.0%} of {len(gpus)}" if mean is not None else ""


def _nodes(run: RunSnapshot) -> dict[str, str]:
    """Format one line per node, and one for those that were not read."""
    times = [1 / node.evaluated_per_second for node in run.nodes if node.evaluated_per_second]
    slow_seconds = SLOW_NODE_RATIO * statistics.median(times) if times else math.inf
    lines = {f"node {node.index}": _node(node, slow_seconds) for node in run.nodes}
    missing = sorted(set(range(run.node_count or 0)) - {node.index for node in run.nodes})
    return lines | ({"not read": f"node {', '.join(map(str, missing))}"} if missing else {})


def _node(node: NodeSnapshot, slow_seconds: float) -> str:
    parts = [f"{node.state}: {_shorten(node.reason)}" if node.reason else node.state]
    if node.input_wait is not None:
        parts.append(f"{node.input_wait:.0%} waiting")
    if node.evaluated_per_second:
        is_slow = 1 / node.evaluated_per_second > slow_seconds
        parts.append(f"evaluates {_rate(node.evaluated_per_second)} images/s{' (slow node)' if is_slow else ''}")
    if utilization := _mean_utilization(node.gpus):
        parts.append(f"GPUs {utilization} busy")
    return ", ".join([*parts, node.pod or node.source])


def _gpu(gpu: GpuUsage) -> str:
    parts = []
    if gpu.utilization is not None:
        parts.append(f"{gpu.utilization:.0%} busy")
    if gpu.memory_used_bytes is not None:
        total = f" of {format_bytes(gpu.memory_total_bytes)}" if gpu.memory_total_bytes else ""
        parts.append(f"{format_bytes(gpu.memory_used_bytes)}{total}")
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W")
    if gpu.temperature_celsius is not None:
        parts.append(f"{gpu.temperature_celsius:.0f} °C")
    return ", ".join(parts)


def _storage(run: RunSnapshot) -> str:
    parts = [f"{direction} {_traffic(traffic)}" for direction, traffic in sorted(run.traffic.items())]
    if run.retries:
        parts.append(f"{run.retries} {'retry' if run.retries == 1 else 'retries'}")
    return ", ".join(parts)


def _traffic(traffic: StorageTraffic) -> str:
    rate = f" ({format_bytes(traffic.bytes_per_second)}/s)" if traffic.bytes_per_second else ""
    return f"{format_bytes(traffic.bytes)}{rate}"


def _images(run: RunSnapshot) -> str:
    parts = [f"{run.images:,} in the dataset"] if run.images is not None else []
    return ", ".join([*parts, *([f"{run.rejected:,} rejected"] if run.rejected else [])])


def _time_without_progress(run: RunSnapshot) -> str:
    seconds = run.progress_seconds_ago
    return (
        f"for {format_duration(seconds)}"
        if run.state == "running" and seconds and seconds > NO_PROGRESS_SECONDS
        else ""
    )


def _state_and_reason(run: RunSnapshot) -> str:
    no_progress = _time_without_progress(run)
    reason = _shorten(run.reason) or (f"no progress {no_progress}" if no_progress else "")
    exit_code = f" ({run.exit_code})" if run.exit_code else ""
    return f"{run.state}{exit_code}: {reason}" if reason else f"{run.state}{exit_code}"


def _shorten(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= MAX_REASON_CHARACTERS else line[: MAX_REASON_CHARACTERS - 1].rstrip() + "…"


def snapshot_to_json(run: RunSnapshot) -> dict[str, Any]:
    """Convert a run to the output of `--json`. Keys are never removed or renamed."""
    return {to_camel(key.name): _json_value(getattr(run, key.name)) for key in fields(run)}


def _json_value(value: Any) -> Any:
    """Convert a value. NaN and infinity become strings, because JSON has no such numbers."""
    if isinstance(value, BestMetric | GpuUsage | NodeSnapshot | TrainingSpeed | StorageTraffic):
        return {to_camel(key.name): _json_value(getattr(value, key.name)) for key in fields(value)}
    if isinstance(value, Mapping):
        return {name: _json_value(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
