"""Formats a job description as text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from topwork.cli.output import tables

if TYPE_CHECKING:
    from topwork.description.job_description import (
        BaseDescription,
        DataDescription,
        JobDescription,
        PhaseDescription,
        PlanDescription,
        StageDescription,
    )

INDENT = "  "


def format_description(description: "JobDescription") -> Iterator[str]:
    """Format a job description.

    Args:
        description: The description.

    Yields:
        Lines.
    """
    yield f"{description.name} (run {description.run})"
    yield f"{INDENT}base  {_base(description.base)}"
    yield f"{INDENT}data  {_data(description.data)}"
    if description.plan:
        yield f"{INDENT}plan  {_plan(description.plan)}"
    for note in description.notes:
        yield f"{INDENT}note  {note}"
    for stage in description.stages:
        yield ""
        yield from _stage(stage)


def _plan(plan: "PlanDescription") -> str:
    if plan.unknown:
        return f"unknown: {plan.unknown}"
    parts = [
        f"reuses {', '.join(plan.reuses)}" if plan.reuses else "reuses nothing",
        f"runs {', '.join(plan.runs)}" if plan.runs else "runs nothing",
        *([f"source changed: {plan.changes}"] if plan.changes else []),
    ]
    return "; ".join(parts)


def _base(base: "BaseDescription") -> str:
    height, width = base.input_size
    count = "unknown" if base.parameters is None else f"{base.parameters:,}"
    return (
        f"{base.name}; {count} parameters, weights: {base.weights}; images of {height}x{width} pixels "
        f"({base.image_fit}), scaling: {base.scaling}"
    )


def _data(data: "DataDescription") -> str:
    images = ", ".join(f"{_count(count)} {name}" for name, count in data.images.items())
    location = f" ({data.dataset})" if data.dataset else ""
    return f"{_count(data.classes)} classes; images: {images}{location}"


def _stage(stage: "StageDescription") -> Iterator[str]:
    early = stage.early_stopping
    facts = [
        f"{stage.epochs} epochs of {_count(stage.steps_per_epoch)} steps, {_count(stage.steps)} in total",
        f"batch size {stage.batch_size}",
        f"loss {stage.loss}",
        *(["classes balanced"] if stage.balanced else []),
        *([f"ends after {early.patience} epochs without improvement of {early.monitor}"] if early else []),
    ]
    yield f"{stage.stage}: {'; '.join(facts)}"
    if stage.feature_cache:
        used = "used" if stage.feature_cache.used else "not used"
        yield f"{INDENT}feature cache {used}: {stage.feature_cache.reason}"
    for index, phase in enumerate(stage.phases, start=1):
        number = f"phase {index} of {len(stage.phases)}: " if len(stage.phases) > 1 else ""
        yield f"{INDENT}{number}{_phase(phase)}"
        yield from _layers(phase)


def _phase(phase: "PhaseDescription") -> str:
    facts = [f"trains {phase.trained}", f"{_optimizer(phase)}, learning rate {_rate(phase)}"]
    return "; ".join([*facts, f"{phase.epochs} epochs, {_count(phase.steps)} steps"])


def _optimizer(phase: "PhaseDescription") -> str:
    return _with_parameters(phase.optimizer, {"name", "learningRate", "schedule"})


def _rate(phase: "PhaseDescription") -> str:
    rate = phase.learning_rate
    if rate.schedule == "constant":
        return f"{rate.peak:g}"
    schedule = f"{rate.peak:g} {_with_parameters(phase.optimizer['schedule'], {'name'})}"
    return schedule if rate.first is None or rate.last is None else f"{schedule}: {rate.first:.3g} to {rate.last:.3g}"


def _with_parameters(settings: dict[str, Any], known: set[str]) -> str:
    """Format the name of an optimizer or schedule with its parameters."""
    parameters = [f"{key} {_value(value)}" for key, value in settings.items() if key not in known and value]
    return f"{settings['name']} ({', '.join(parameters)})" if parameters else str(settings["name"])


def _value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layers(phase: "PhaseDescription") -> Iterator[str]:
    if phase.trainable is None or phase.frozen is None:
        return
    rows = [(group.layers, f"{group.trainable:,}", f"{group.frozen:,}") for group in phase.layers]
    total = ("total", f"{phase.trainable:,}", f"{phase.frozen:,}")
    for line in tables.format_table(("layers", "trainable", "frozen"), [*rows, total]):
        yield f"{INDENT * 2}{line}"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
