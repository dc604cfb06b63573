"""Table that compares the published models of several jobs, printed at the end of `topwork run`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from topwork.cli.output.tables import format_table

if TYPE_CHECKING:
    from topwork.registry.cross_validation import CrossValidation
    from topwork.stages.publish import Published
    from topwork.stages.validate import Validated

GAP = 3
AVERAGED_METRICS = frozenset({"precision", "recall", "f1", "auc"})
HEADER = ("MODEL", "METRIC", "STAGE", "TRAINABLE", "BATCH SIZE", "SECONDS PER STEP", "RELATIVE TO FASTEST")


def format_comparison(outcomes: Sequence["Published | Validated | CrossValidation"]) -> Iterator[str]:
    """Compare published versions by their main metric and training speed.

    Args:
        outcomes: Results of the jobs, in their order. Only versions are compared.

    Yields:
        An empty line and the lines of a table with one row per training stage, or nothing for a single version. The
        last column is the training time per image, relative to the fastest model in the same stage.
    """
    from topwork.stages.publish import Published

    published = [outcome for outcome in outcomes if isinstance(outcome, Published)]
    if len(published) < 2:
        return
    yield ""
    yield from format_table(HEADER, list(_rows(published)), text_columns=len(HEADER), gap=GAP)


def _rows(published: Sequence["Published"]) -> Iterator[tuple[str, ...]]:
    fastest: dict[str, float] = {}
    for version in published:
        for stage, seconds in _image_seconds(version).items():
            fastest[stage] = min(seconds, fastest.get(stage, seconds))
    for version in published:
        name, value = next(iter(version.metrics.items()))
        per_image, model = (
            _image_seconds(version),
            (f"{version.name}/{version.version}", f"{name} {value:.4f}{_caveat(version, name)}"),
        )
        for stage, cost in version.stages.items():
            step_seconds = f"{cost.step_seconds:.3g}" if cost.step_seconds else ""
            ratio = f"{per_image[stage] / fastest[stage]:.2f}" if stage in per_image else ""
            yield *model, stage, f"{cost.trainable:,}", f"{cost.batch_size}", step_seconds, ratio
        if not version.stages:
            yield *model, "", "", "", "", ""


def _caveat(published: "Published", metric: str) -> str:
    """Say how many classes an averaged metric leaves out: models with other test images are not comparable."""
    excluded = published.excluded_classes if metric in AVERAGED_METRICS else 0
    return f" (without {excluded} {'class' if excluded == 1 else 'classes'})" if excluded else ""


def _image_seconds(published: "Published") -> dict[str, float]:
    """Return the training time per image in seconds, by stage, which does not depend on the batch size."""
    return {stage: cost.step_seconds / cost.batch_size for stage, cost in published.stages.items() if cost.step_seconds}
