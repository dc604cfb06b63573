"""Formats a comparison of models as text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from topwork.cli.output.tables import format_table
from topwork.data.sources.source import sanitize_name

if TYPE_CHECKING:
    from topwork.report.comparison.result import ChangedImage, Comparison, Difference

MAX_SHOWN = 10


def format_model_comparison(comparison: "Comparison") -> Iterator[str]:
    """Format a comparison.

    Args:
        comparison: The comparison.

    Yields:
        Lines.
    """
    yield f"Compared on {comparison.described}."
    for note in comparison.notes:
        yield f"Note: {sanitize_name(note)}"
    yield ""
    yield from _metrics(comparison)
    for difference in comparison.differences:
        yield ""
        yield from _difference(difference, comparison)
    yield ""
    yield from _cost(comparison)


def _metrics(comparison: "Comparison") -> Iterator[str]:
    from topwork.report.comparison.document import format_difference, format_estimate

    first, tests = comparison.models[0], len(comparison.differences)
    header = ["METRIC", *(model.name for model in comparison.models)]
    header += ["DIFFERENCE" if tests == 1 else f"{other.name} - {first.name}" for other in comparison.differences]
    rows = [
        (
            name,
            *(format_estimate(model.metrics[name]) for model in comparison.models),
            *(format_difference(other.metrics[name]) for other in comparison.differences),
        )
        for name in first.metrics
    ]
    yield from format_table(header, rows)
    yield (
        f"In brackets: intervals with a confidence of {100 * comparison.confidence:g} %. Without brackets: the images "
        "do not tell how much the value would vary on others."
    )


def _difference(difference: "Difference", comparison: "Comparison") -> Iterator[str]:
    first, tests = comparison.models[0].name, len(comparison.differences)
    corrected = f", corrected for {tests} tests" if tests > 1 else ""
    is_significant = difference.corrected_p_value <= 1 - comparison.confidence
    yield (
        f"{difference.name} against {first}: {difference.newly_correct} newly correct, "
        f"{difference.newly_misclassified} newly misclassified of {comparison.images} images"
    )
    yield (
        f"  McNemar's exact test: p = {difference.corrected_p_value:.2g}{corrected}; the accuracy "
        f"{'differs significantly' if is_significant else 'does not differ significantly'}"
    )
    for title, images, count in (
        ("newly misclassified", difference.misclassified_images, difference.newly_misclassified),
        ("newly correct", difference.correct_images, difference.newly_correct),
    ):
        yield from _images(title, images, count)
    yield f"  dataset: {difference.dataset or 'the same'}"
    yield from (f"  {sanitize_name(change)}" for change in difference.spec or ("spec: the same",))


def _images(title: str, images: "Sequence[ChangedImage]", count: int) -> Iterator[str]:
    if count:
        yield f"  {title}:"
    for image in images[:MAX_SHOWN]:
        before, after = (
            f"{sanitize_name(name)} {100 * confidence:.1f} %"
            for name, confidence in ((image.before, image.before_confidence), (image.after, image.after_confidence))
        )
        yield f"    {sanitize_name(image.name)} ({sanitize_name(image.true_class)}): {before} -> {after}"
    if count > MAX_SHOWN:
        yield f"    and {count - MAX_SHOWN} more (--json, --html)"


def _cost(comparison: "Comparison") -> Iterator[str]:
    rows = [
        (
            model.name,
            stage.stage,
            str(stage.epochs),
            f"{stage.seconds:.1f}",
            f"{stage.step_seconds:.3g}" if stage.step_seconds else "",
            str(stage.batch_size),
            str(model.gpus),
        )
        for model in comparison.models
        for stage in model.stages
    ]
    header = ("MODEL", "STAGE", "EPOCHS", "SECONDS", "SECONDS PER STEP", "BATCH SIZE", "GPUS IN SPEC")
    yield from format_table(header, rows, text_columns=2)
