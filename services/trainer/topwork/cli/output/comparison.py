"""Several published models side by side: what `topwork run` ends with when it has run more than one job."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from topwork.cli.output.tables import format_table

if TYPE_CHECKING:
    from topwork.stages.publish import Published

GAP = 3
HEADER = ("MODEL", "METRIC", "STAGE", "TRAINABLE", "IMAGES A STEP", "SECONDS A STEP", "TO THE FASTEST")


def comparison(published: Sequence["Published"]) -> Iterator[str]:
    """Compare what the jobs of one command published: how good each is, and what a training step of it took.

    Args:
        published: The versions, in the order of the jobs.

    Yields:
        Lines of a table with one row for each training stage, after an empty line; none for one version alone. The
        last column is the time of an image in a step over the least one of the same stage.
    """
    if len(published) < 2:
        return
    yield ""
    yield from format_table(HEADER, list(_rows(published)), text_columns=len(HEADER), gap=GAP)


def _rows(published: Sequence["Published"]) -> Iterator[tuple[str, ...]]:
    fastest: dict[str, float] = {}
    for one in published:
        for stage, seconds in _image_seconds(one).items():
            fastest[stage] = min(seconds, fastest.get(stage, seconds))
    for one in published:
        name, value = next(iter(one.metrics.items()))
        by_image, words = _image_seconds(one), (f"{one.name}/{one.version}", f"{name} {value:.4f}")
        for stage, took in one.stages.items():
            shown = f"{took.step_seconds:.3g}" if took.step_seconds else ""
            ratio = f"{by_image[stage] / fastest[stage]:.2f}" if stage in by_image else ""
            yield *words, stage, f"{took.trainable:,}", f"{took.batch_size}", shown, ratio
        if not one.stages:
            yield *words, "", "", "", "", ""


def _image_seconds(published: "Published") -> dict[str, float]:
    """Seconds of an image in a step, by stage: steps of different sizes compare by it."""
    return {stage: took.step_seconds / took.batch_size for stage, took in published.stages.items() if took.step_seconds}
