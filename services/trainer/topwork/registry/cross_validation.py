"""Cross-validation: the jobs of its folds, and what they and all of them together result in.

- `runs/<run>-fold-<number>/`: what a run stores, and `evaluate/done.json` and `evaluate/predictions.npz`
- `runs/<run>/cross-validation/done.json`: mean and standard deviation of the metrics of all folds
"""

from datetime import datetime
from statistics import fmean, stdev
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.registry.kept_weights import KeptWeights
from topwork.registry.stage_keys import stage_keys
from topwork.spec import TransferJob
from topwork.spec.digest import DIGEST_LENGTH, digest_of

SPLIT = "cross-validation"
"""Name of the split in results that were measured on the test splits of all folds."""

SHOWN_METRICS = 4
"""Number of metrics in the summary; the report contains all."""


Result = TypeVar("Result", "FoldResult", "CrossValidation")


def format_images(images: int, split: str) -> str:
    """Describe the images that metrics were measured on.

    Example:
        >>> format_images(400, "test")
        '400 images of the test split'
    """
    return f"{images} images in cross-validation" if split == SPLIT else f"{images} images of the {split} split"


def format_mean(mean: float, deviation: float | None) -> str:
    """Format a metric with its standard deviation between folds, if there is one, such as `0.9312 ± 0.0140`."""
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


class FoldResult(BaseModel):
    """The evaluated classifier of one fold, stored as `runs/<run of the fold>/evaluate/done.json`.

    Attributes:
        format: Version of this record.
        key: Key of training and evaluation.
        fold: Number of the fold, from 1.
        images: Number of images in its test split.
        metrics: All metrics that are defined on its test split.
        notes: Caveats of the metrics.
        weights: Stage and epoch that the weights come from.
        report_uri: URI of its report.
        duplicates: Number of its test images with an exact or near duplicate in train; None if not searched.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    key: str
    fold: int
    images: int
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    weights: KeptWeights
    report_uri: str
    duplicates: int | None = None


class CrossValidation(BaseModel):
    """The result of cross-validation, stored as `runs/<run>/cross-validation/done.json`.

    Attributes:
        format: Version of this record.
        key: Key of training and evaluation of all folds.
        name: Name of the model.
        requested: The metrics requested by the job, in the order of the spec, and the loss.
        folds: Results of the folds.
        total: Number of folds; more than there are results if the job selects one fold.
        report_uri: URI of the report.
        started: When the first fold was started.
        finished: When the last fold was evaluated.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    key: str
    name: str
    requested: tuple[str, ...]
    folds: tuple[FoldResult, ...]
    total: int
    report_uri: str
    started: datetime | None = None
    finished: datetime | None = None

    @property
    def images(self) -> int:
        """Number of images in the test splits of the folds."""
        return sum(fold.images for fold in self.folds)

    @property
    def duplicates(self) -> int | None:
        """Number of test images with an exact or near duplicate in the train split of their fold; None if unknown."""
        counts = [fold.duplicates for fold in self.folds if fold.duplicates is not None]
        return sum(counts) if len(counts) == len(self.folds) else None

    @property
    def means(self) -> dict[str, float]:
        """Mean of each metric that is defined in every fold."""
        return {name: fmean(values) for name, values in self._values().items()}

    @property
    def deviations(self) -> dict[str, float]:
        """Standard deviation of each metric between the folds, with n - 1 degrees of freedom; empty for one fold."""
        return {name: stdev(values) for name, values in self._values().items() if len(values) > 1}

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the requested metrics."""
        return {name: value for name in self.requested if (value := self.means.get(name)) is not None}

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats of the metrics of each fold."""
        return tuple(f"Fold {fold.fold}: {note}" for fold in self.folds for note in fold.notes)

    def restore_metrics(self, metrics: Metrics) -> None:
        """Set the Prometheus metrics of the evaluation, so that a resumed run exposes them too."""
        metrics.set_evaluation(SPLIT, self.metrics)
        metrics.set_failed_gates(0)
        if self.started and self.finished:
            metrics.restore_stage("publish", self.started, self.finished)

    def summary(self) -> list[str]:
        """Summarize the metrics in a few lines."""
        deviations = self.deviations
        shown = ", ".join(
            f"{name} {format_mean(value, deviations.get(name))}"
            for name, value in list(self.metrics.items())[:SHOWN_METRICS]
        )
        what = f"{self.total} folds" if len(self.folds) == self.total else f"fold {self.folds[0].fold} of {self.total}"
        return [
            f"Evaluated {self.name} with {what}: {shown} on {self.images} images; nothing is published",
            f"  report  {self.report_uri}",
            *(f"  note    {note}" for note in self.notes),
        ]

    def _values(self) -> dict[str, list[float]]:
        names = [name for name in self.folds[0].metrics if all(name in fold.metrics for fold in self.folds)]
        return {name: [fold.metrics[name] for fold in self.folds] for name in names}


def fold_jobs(job: TransferJob) -> list[TransferJob]:
    """Return the jobs of the folds that a job trains, each with a run of its own; empty without cross-validation."""
    settings = job.spec.dataset
    numbers = [settings.fold] if settings.fold else range(1, settings.folds + 1)
    return [job.with_fold(number).as_run(f"{job.run}-fold-{number}") for number in numbers]


def cross_validation_key(job: TransferJob, fingerprint: str, storage: Storage) -> str:
    """Return the key of training and evaluation of all folds of a job; see `topwork.registry.stage_keys`."""
    keys = [stage_keys(fold, fingerprint, storage).publish for fold in fold_jobs(job)]
    return digest_of(keys)[:DIGEST_LENGTH]


def read_fold_result(storage: Storage, run: str, key: str) -> FoldResult | None:
    """Read the result of a fold; None if it is not evaluated, or with other settings."""
    return _read(FoldResult, storage, f"runs/{run}/evaluate/done.json", key)


def read_cross_validation(storage: Storage, run: str, key: str) -> CrossValidation | None:
    """Read the result of cross-validation; None if it is not complete, or with other settings."""
    return _read(CrossValidation, storage, f"runs/{run}/cross-validation/done.json", key)


def write_fold_result(storage: Storage, run: str, result: FoldResult) -> None:
    """Write the result of a fold, after everything that it refers to."""
    _write(storage, f"runs/{run}/evaluate/done.json", result)


def write_cross_validation(storage: Storage, run: str, result: CrossValidation) -> None:
    """Write the result of cross-validation, after everything that it refers to."""
    _write(storage, f"runs/{run}/cross-validation/done.json", result)


def _read(model: type[Result], storage: Storage, name: str, key: str) -> Result | None:
    data = storage.read(name)
    if data is None:
        return None
    what = "a result of cross-validation"
    result = read_json_record(model, data, storage.uri_of(name), what, "start over with --restart")
    return result if result.key == key else None


def _write(storage: Storage, name: str, result: BaseModel) -> None:
    storage.write(name, result.model_dump_json().encode(), content_type="application/json")
