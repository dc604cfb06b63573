"""Compares models on the same images: metrics with intervals, paired differences, and what changed between them."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from topwork.cluster.operations.diff import list_spec_diff
from topwork.data.local_dataset import Split
from topwork.errors import DataError
from topwork.registry.dataset_changes import describe_changes
from topwork.registry.datasets import read_entries
from topwork.registry.versions import Version
from topwork.report.comparison.candidates import Candidate, load_splits
from topwork.report.comparison.images import select_compared_images
from topwork.report.comparison.measurement import CONFIDENCE, Measurements, measure
from topwork.report.comparison.result import ChangedImage, ComparedModel, Comparison, Difference, TrainedStage
from topwork.report.loaded_version import NotComparableError, match_classes
from topwork.report.results import batch_sizes, step_seconds
from topwork.report.statistics.paired import count_differences
from topwork.report.statistics.shares import correct_p_values, mcnemar_p_value
from topwork.workspace import Workspace

# Changed images of each kind that are listed; their number is always exact.
MAX_IMAGES = 1000
# With fewer images, bootstrap intervals of averages over classes are somewhat too narrow.
MIN_CLASS_IMAGES = 30


def compare_models(candidates: Sequence[Candidate], workspace: Workspace) -> tuple[Comparison, Split]:
    """Compare models on the same images.

    Args:
        candidates: At least two models. The others are compared with the first one.
        workspace: Progress and scratch; its storage is not used.

    Returns:
        The comparison, and its images.

    Raises:
        DataError: If the models cannot be compared: other classes, no common images, or a model that does not load.
        UnavailableError: If storage cannot be reached.
    """
    _check_classes(candidates)
    splits = [load_splits(candidate, workspace) for candidate in candidates]
    images = select_compared_images(candidates, splits)
    measured = measure(candidates, splits, images, workspace)
    first, *others = (model.scored for model in measured.models)
    p_values = [mcnemar_p_value(*count_differences("accuracy", first, other)) for other in others]
    corrected = correct_p_values(p_values)
    comparison = Comparison(
        images=images.images.size,
        described=images.described,
        split=images.split,
        class_names=images.class_names,
        confidence=CONFIDENCE,
        notes=(*images.notes, *_write_notes(measured)),
        models=tuple(_describe_model(measured, index) for index in range(len(candidates))),
        differences=tuple(
            _describe_difference(measured, index, *values)
            for index, values in enumerate(zip(p_values, corrected, strict=True), start=1)
        ),
    )
    return comparison, images.images


def _check_classes(candidates: Sequence[Candidate]) -> None:
    """Refuse models of other classes before anything is downloaded."""
    first = candidates[0]
    for candidate in candidates[1:]:
        try:
            match_classes(candidate.dataset.metadata.class_names, first.dataset.metadata.class_names)
        except NotComparableError as error:
            raise DataError(f"{candidate.name} cannot be compared with {first.name}: {error}.") from None


def _describe_model(measured: Measurements, index: int) -> ComparedModel:
    candidate, local = measured.models[index].candidate, measured.models[index].local
    return ComparedModel(
        name=candidate.name,
        uri=candidate.uri,
        run=candidate.job.run,
        dataset=candidate.storage.uri_of(candidate.dataset.prefix),
        images={name: split.size for name, split in local.splits.items()},
        metrics={name: measured.estimate(name, index) for name in measured.metrics},
        stages=tuple(_stage_costs(candidate)),
        gpus=candidate.job.spec.compute.gpus * candidate.job.spec.compute.nodes,
        model_bytes=candidate.model_bytes,
    )


def _stage_costs(candidate: Candidate) -> Iterator[TrainedStage]:
    typical = step_seconds(candidate.job, candidate.history)
    for stage, size in batch_sizes(candidate.job).items():
        rows = [row for row in candidate.history if row["stage"] == stage]
        seconds = sum(float(row.get("seconds", 0.0)) for row in rows)
        if rows:
            yield TrainedStage(
                stage=stage, epochs=len(rows), seconds=seconds, step_seconds=typical.get(stage), batch_size=size
            )


def _describe_difference(measured: Measurements, index: int, p_value: float, corrected: float) -> Difference:
    first, other = measured.models[0], measured.models[index]
    gained, lost = _changed(measured, index)
    return Difference(
        name=other.candidate.name,
        metrics={name: measured.estimate_difference(name, index) for name in measured.metrics},
        newly_correct=len(gained),
        newly_misclassified=len(lost),
        p_value=p_value,
        corrected_p_value=corrected,
        correct_images=_list_images(measured, index, gained),
        misclassified_images=_list_images(measured, index, lost),
        spec=tuple(list_spec_diff(first.candidate.job, other.candidate.job)),
        dataset=_describe_dataset(first.candidate, other.candidate),
    )


def _changed(measured: Measurements, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the images that only the other model, and only the first model classifies correctly."""
    before, after = measured.models[0].scored.correct, measured.models[index].scored.correct
    return np.flatnonzero(after & ~before), np.flatnonzero(before & ~after)


def _list_images(measured: Measurements, index: int, changed: NDArray[np.int64]) -> tuple[ChangedImage, ...]:
    images, names = measured.images.images, measured.images.class_names
    before, after = (measured.models[number].scored.predictions for number in (0, index))
    listed = changed[np.argsort(-after.confidence[changed], kind="stable")][:MAX_IMAGES]
    return tuple(
        ChangedImage(
            name=images.names[position],
            true_class=names[images.labels[position]],
            before=names[before.predicted[position]],
            before_confidence=float(before.confidence[position]),
            after=names[after.predicted[position]],
            after_confidence=float(after.confidence[position]),
            index=position,
        )
        for position in listed.tolist()
    )


def _describe_dataset(first: Candidate, other: Candidate) -> str:
    prefixes = [candidate.storage.uri_of(candidate.dataset.prefix) for candidate in (first, other)]
    if prefixes[0] == prefixes[1]:
        return ""
    before, after = (read_entries(candidate.dataset, candidate.storage) for candidate in (first, other))
    return describe_changes(before, after) or "the same images, pulled with other settings"


def _write_notes(measured: Measurements) -> Iterator[str]:
    yield from measured.models[0].evaluation.notes
    for candidate in (model.candidate for model in measured.models):
        if isinstance(candidate.model, Version) and candidate.model.duplicates:
            yield (
                f"{candidate.model.duplicates} of the {candidate.model.images} images on which {candidate.name} was "
                "published have a near duplicate among its training images, so its metrics may be optimistic."
            )
        if measured.images.split == "test" or candidate.job.spec.evaluate.calibration == "none":
            continue
        if candidate.is_trial:
            yield f"{candidate.name} is a trial, so its probabilities are not calibrated."
        else:
            yield (
                f"The validation split fitted the temperature of {candidate.name}, so its loss and calibration error "
                "are optimistic."
            )
    images = np.bincount(measured.images.images.labels, minlength=len(measured.images.class_names))
    if rare := int(np.count_nonzero((images > 0) & (images < MIN_CLASS_IMAGES))):
        few = images.sum() < MIN_CLASS_IMAGES
        affected = "all metrics except accuracy and top5" if few else "precision, recall, F1 and AUC"
        yield (
            f"{rare} of {len(images)} classes have fewer than {MIN_CLASS_IMAGES} images: the intervals of {affected} "
            "may be too narrow."
        )
    if "auc" in measured.metrics and "auc" not in measured.resampled:
        yield "The AUC has no interval: there are too many images and classes to resample it."
