"""Measures models on the same images: the results of each image, the metrics, and their variation in resamples."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topwork.data.local_dataset import LocalDataset
from topwork.errors import DataError
from topwork.report.comparison.candidates import Candidate, load_classifier
from topwork.report.comparison.images import ComparedImages
from topwork.report.comparison.result import Estimate
from topwork.report.evaluation import Evaluation
from topwork.report.held_out_split import MAX_KEPT_BYTES, HeldOutSplit
from topwork.report.loaded_version import NotComparableError
from topwork.report.statistics.bootstrap import ScoredImages, Values, bootstrap_interval, resample
from topwork.report.statistics.paired import SHARES, count_differences
from topwork.report.statistics.shares import paired_difference_interval, share_interval
from topwork.workspace import Workspace

CONFIDENCE = 0.95
# Bounds of a metric; a difference may also be their negative.
LARGEST = {"loss": None}
# A calibration error of few images is too high, by an amount that resampling does not tell: an interval around it would
# often not contain the true value. Differences are affected less, because both errors are too high.
WITHOUT_INTERVAL = ("calibrationError",)


@dataclass(frozen=True)
class MeasuredModel:
    """A model with its results.

    Attributes:
        candidate: The model.
        local: Its splits.
        evaluation: Its metrics on the images of the comparison.
        scored: Its predictions for them.
    """

    candidate: Candidate
    local: LocalDataset
    evaluation: Evaluation
    scored: ScoredImages


@dataclass(frozen=True)
class Measurements:
    """Models measured on the same images.

    Attributes:
        images: The images.
        models: The models.
        metrics: Names of the metrics that all models have.
        resampled: Values of each model on the resamples, by metric; see `topwork.report.statistics.bootstrap.resample`.
    """

    images: ComparedImages
    models: Sequence[MeasuredModel]
    metrics: Sequence[str]
    resampled: dict[str, list[Values]]

    def estimate(self, metric: str, index: int) -> Estimate:
        """Return a metric of a model with its interval."""
        model = self.models[index]
        value = model.evaluation.metrics[metric]
        if metric in SHARES:
            right = model.scored.is_right(metric)
            low, high = share_interval(int(right.sum()), len(right), CONFIDENCE)
            return Estimate(value=value, low=low, high=high)
        rows = None if metric in WITHOUT_INTERVAL else self.resampled.get(metric)
        return _with_interval(value, rows[index] if rows else None, 0.0, LARGEST.get(metric, 1.0))

    def estimate_difference(self, metric: str, index: int) -> Estimate:
        """Return the difference of a metric from that of the first model, with its interval."""
        first, other = self.models[0], self.models[index]
        value = other.evaluation.metrics[metric] - first.evaluation.metrics[metric]
        if metric in SHARES:
            gained, lost = count_differences(metric, first.scored, other.scored)
            low, high = paired_difference_interval(gained, lost, len(first.scored.labels), CONFIDENCE)
            return Estimate(value=value, low=low, high=high)
        rows, largest = self.resampled.get(metric), LARGEST.get(metric, 1.0)
        smallest = None if largest is None else -largest
        return _with_interval(value, rows[index] - rows[0] if rows else None, smallest, largest)


def measure(
    candidates: Sequence[Candidate], splits: Sequence[LocalDataset], images: ComparedImages, workspace: Workspace
) -> Measurements:
    """Evaluate models on the same images.

    Args:
        candidates: The models.
        splits: The splits of each.
        images: The images.
        workspace: Progress and scratch.

    Returns:
        The measurements.

    Raises:
        DataError: If a model does not load, or predicts NaN.
    """
    batch_size = candidates[0].job.spec.transfer.batch_size
    held_out = HeldOutSplit(images.split, images.images, images.class_names, batch_size, workspace)
    models = [
        _evaluate(candidate, local, held_out, workspace) for candidate, local in zip(candidates, splits, strict=True)
    ]
    requested = dict.fromkeys(name for candidate in candidates for name in candidate.job.spec.evaluate.metrics)
    metrics = [name for name in (*requested, "loss") if all(name in model.evaluation.metrics for model in models)]
    resampled = resample([model.scored for model in models], [name for name in metrics if name not in SHARES])
    return Measurements(images, models, metrics, resampled)


def _evaluate(candidate: Candidate, local: LocalDataset, held_out: HeldOutSplit, workspace: Workspace) -> MeasuredModel:
    size, classes = held_out.images.size, len(held_out.class_names)
    fits = size * classes * 4 <= MAX_KEPT_BYTES
    try:
        evaluation, predictions = load_classifier(candidate, local, workspace).evaluate_on(
            held_out,
            auc="auc" in candidate.job.spec.evaluate.metrics,
            keep=np.arange(size) if fits else None,
            title=f"evaluation of {candidate.name}",
        )
    except NotComparableError as error:
        raise DataError(f"{candidate.name} cannot be compared: {error}.") from error
    finally:
        shutil.rmtree(workspace.scratch / "model", ignore_errors=True)
    return MeasuredModel(candidate, local, evaluation, ScoredImages(held_out.images.labels, predictions, classes))


def _with_interval(value: float, resampled: Values | None, smallest: float | None, largest: float | None) -> Estimate:
    interval = None if resampled is None else bootstrap_interval(value, resampled, CONFIDENCE)
    if interval is None:
        return Estimate(value=value)
    low, high = (float(np.clip(bound, smallest, largest)) for bound in interval)
    return Estimate(value=value, low=low, high=high)
