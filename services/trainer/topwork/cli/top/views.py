"""Figures of runs as lines of text, and as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic.alias_generators import to_camel

from topwork.cli.output.run_status import duration
from topwork.cli.output.tables import lines
from topwork.cli.top.snapshot import Best, Figures, Gpu, Speed, Traffic
from topwork.disk_space import shown_bytes
from topwork.training.input_stalls import MOST_SHARE

BAR = 24
"""Characters of a bar."""
LONG_SECONDS = 120.0
"""Without progress for so long, it is said."""
HEADER = ("RUN", "STAGE", "EPOCH", "LOSS", "BEST", "IMAGES/S", "WAIT", "GPU", "LEFT", "STATE")
LONGEST_REASON = 160


def table(found: Sequence[Figures]) -> Iterator[str]:
    """Write runs as a table.

    Args:
        found: The runs.

    Yields:
        Lines.
    """
    rows = [
        [
            one.run,
            one.stage or "",
            _epoch(one),
            _first(one.loss),
            _best(one.best),
            _speed_cell(one.speed),
            f"{one.speed.input_wait:.0%}" if one.speed and one.speed.input_wait is not None else "",
            _busy(one.gpus),
            duration(one.seconds_left) if one.seconds_left is not None else "",
            _state(one),
        ]
        for one in found
    ]
    header = list(HEADER)
    namespaces = {one.namespace for one in found if one.namespace}
    if len(namespaces) > 1:
        header, rows = (
            ["NAMESPACE", *header],
            [[one.namespace or "", *row] for one, row in zip(found, rows, strict=True)],
        )
    return lines(header, rows, words=len(header), gap=3)


def detail(one: Figures) -> Iterator[str]:
    """Write all figures of a run.

    Args:
        one: The run.

    Yields:
        Lines.
    """
    where = f" in namespace {one.namespace}" if one.namespace else ""
    stage = f", {one.stage}" if one.stage else ""
    since = f" for {duration(one.stage_seconds)}" if one.stage_seconds is not None and one.state == "running" else ""
    yield f"{one.run}{where}: {one.state}{stage}{since}"
    facts = {
        "reason": _short(one.reason),
        "epoch": _progress(one),
        "loss": _splits(one.loss),
        **_metrics(one.metrics),
        "best": f"{_best(one.best)} in {one.best.stage}" if one.best else "",
        "learning rate": f"{one.learning_rate:.4g}" if one.learning_rate is not None else "",
        "speed": _speed(one),
        "input": _input(one.speed),
        **{f"GPU {gpu.index}": _gpu(gpu) for gpu in one.gpus},
        "checkpoint": f"{duration(one.checkpoint_seconds_ago)} ago" if one.checkpoint_seconds_ago is not None else "",
        "storage": _storage(one),
        "images": _images(one),
        "gates": f"{one.gates_failed} not met" if one.gates_failed else "",
        "stages done": ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in one.seconds_by_stage.items()),
        "no progress": _stuck(one),
        "exit code": "" if one.exit_code is None else str(one.exit_code),
        "read from": one.source,
    }
    for name, fact in facts.items():
        if fact:
            yield f"  {name:<13}  {fact}"


def _epoch(one: Figures) -> str:
    if one.epoch is None:
        return ""
    return f"{one.epoch}/{one.epochs}" if one.epochs else str(one.epoch)


def _progress(one: Figures) -> str:
    if one.epoch is None or not one.epochs:
        return _epoch(one)
    done = min(BAR, round(BAR * one.epoch / one.epochs))
    left = f"  {duration(one.seconds_left)} left" if one.seconds_left is not None else ""
    return f"{_epoch(one)}  {'━' * done}{'╌' * (BAR - done)}{left}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) < 1e4) else f"{value:.4g}"


def _first(values: Mapping[str, float]) -> str:
    """The figure of a split that tells most: not the one that is trained on, if there is another."""
    for split in ("validation", "test", "train", *values):
        if split in values:
            return _number(values[split])
    return ""


def _splits(values: Mapping[str, float]) -> str:
    return "   ".join(f"{split} {_number(value)}" for split, value in values.items())


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """A line for each metric, its splits beside each other."""
    by_name: dict[str, dict[str, float]] = {}
    for split, values in metrics.items():
        for name, value in values.items():
            by_name.setdefault(name, {})[split] = value
    return {name: _splits(values) for name, values in by_name.items()}


def _best(best: Best | None) -> str:
    if best is None:
        return ""
    return f"{'' if best.split == 'train' else best.split + '_'}{best.name} {_number(best.value)}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _speed_cell(speed: Speed | None) -> str:
    return _rate(speed.images_per_second) if speed else ""


def _speed(one: Figures) -> str:
    speed = one.speed
    if speed is None:
        return ""
    step = f"{speed.step_seconds:.2f} s" if speed.step_seconds >= 1 else f"{speed.step_seconds * 1000:.3g} ms"
    on = f" on {one.replicas} replicas" if one.replicas and one.replicas > 1 else ""
    mean = "" if speed.lately else " (mean since the start)"
    return f"{_rate(speed.images_per_second)} images/s, {step} a step{on}{mean}"


def _input(speed: Speed | None) -> str:
    if speed is None or speed.input_wait is None:
        return ""
    much = ": more than a third, so input limits the speed" if speed.input_wait > MOST_SHARE else ""
    return f"{speed.input_wait:.0%} of the time waits for it{much}"


def _busy(gpus: Sequence[Gpu]) -> str:
    told = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    return f"{sum(told) / len(told):.0%} of {len(gpus)}" if told else ""


def _gpu(gpu: Gpu) -> str:
    parts = []
    if gpu.utilization is not None:
        parts.append(f"{gpu.utilization:.0%} busy")
    if gpu.memory_used_bytes is not None:
        total = f" of {shown_bytes(gpu.memory_total_bytes)}" if gpu.memory_total_bytes else ""
        parts.append(f"{shown_bytes(gpu.memory_used_bytes)}{total}")
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W")
    if gpu.temperature_celsius is not None:
        parts.append(f"{gpu.temperature_celsius:.0f} °C")
    return ", ".join(parts)


def _storage(one: Figures) -> str:
    parts = [f"{direction} {_moved(traffic)}" for direction, traffic in sorted(one.traffic.items())]
    if one.retries:
        parts.append(f"{one.retries} {'retry' if one.retries == 1 else 'retries'}")
    return ", ".join(parts)


def _moved(traffic: Traffic) -> str:
    rate = f" ({shown_bytes(traffic.bytes_per_second)}/s)" if traffic.bytes_per_second else ""
    return f"{shown_bytes(traffic.bytes)}{rate}"


def _images(one: Figures) -> str:
    parts = [f"{one.images:,} in the dataset"] if one.images is not None else []
    return ", ".join([*parts, *([f"{one.rejected:,} rejected"] if one.rejected else [])])


def _stuck(one: Figures) -> str:
    seconds = one.progress_seconds_ago
    return f"for {duration(seconds)}" if one.state == "running" and seconds and seconds > LONG_SECONDS else ""


def _state(one: Figures) -> str:
    stuck = f"no progress {_stuck(one)}" if _stuck(one) else ""
    told = _short(one.reason) or stuck
    code = f" ({one.exit_code})" if one.exit_code else ""
    return f"{one.state}{code}: {told}" if told else f"{one.state}{code}"


def _short(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1].rstrip() + "…"


def as_json(one: Figures) -> dict[str, Any]:
    """Turn figures into what `--json` prints; keys are only ever added."""
    return {to_camel(key.name): _value(getattr(one, key.name)) for key in fields(one)}


def _value(value: Any) -> Any:
    """What is nan or infinite as text, which JSON has no number for."""
    if isinstance(value, Best | Gpu | Speed | Traffic):
        return {to_camel(key.name): _value(getattr(value, key.name)) for key in fields(value)}
    if isinstance(value, Mapping):
        return {name: _value(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_value(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
