"""Results of a training run: the content of model card, report, `metrics.json` and `history.csv`."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.images.image_validation import SEVERAL_FRAMES
from topwork.data.images.value_range import describe_value_range, resolve_value_range
from topwork.registry.cross_validation import CrossValidation, format_images
from topwork.registry.kept_weights import KeptWeights
from topwork.registry.stage_results import HistoryRow
from topwork.report.audit import IllustratedFindings
from topwork.report.calibration import Calibration
from topwork.report.evaluation import Evaluation
from topwork.report.export_check import ExportCheck
from topwork.report.gates import GateResult, LatestVersion
from topwork.spec import TransferJob
from topwork.spec.dataset import ImageFit

# First columns of `history.csv`; other values of an epoch follow.
LEADING_COLUMNS = ("stage", "epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate")

_RESIZING: dict[ImageFit, str] = {
    "stretch": "Images are resized to {size} without preserving their aspect ratio",
    "crop": "Images are cropped to the central part with the aspect ratio of the input, then resized to {size}",
    "pad": "Images are scaled to fit into {size} with their aspect ratio, and centered on black",
}


@dataclass(frozen=True)
class Misclassification:
    """A misclassified image.

    Attributes:
        name: Origin of the image.
        true_class: Its class.
        predicted_class: The predicted class.
        confidence: Probability of the predicted class.
        thumbnail_uri: The image as a data URI.
        heat_uri: The image under its heat map, as a data URI; empty if there is none.
    """

    name: str
    true_class: str
    predicted_class: str
    confidence: float
    thumbnail_uri: str
    heat_uri: str = ""


@dataclass(frozen=True)
class Results:
    """Results and provenance of a trained and evaluated classifier.

    Attributes:
        job: The job.
        dataset: Metadata of the stored dataset.
        counts: Number of images by split and class.
        history: One row per epoch, over all stages.
        evaluation: Metrics on the test split, or on the validation split if there is no test split.
        gates: Result of each gate.
        mistakes: Misclassified images, most confident first.
        lineage: Provenance of the model, as label and value.
        version: Published version; None if it is not published yet.
        formats: Exported formats.
        export_check: Differences between the exported formats and the evaluated model.
        notes: Caveats shown before the metrics.
        latest: The latest published version on the same images; None if no gate compares with it, or there is none.
        weights: Stage and epoch that the weights come from.
        cross_validation: Metrics of each fold, if `evaluation` is that of cross-validation.
        audit: Findings of the audit; None if it is off.
        heat_note: What the heat maps of the mistakes show, or why there are none.
        calibration: The temperature and what it changed; None if the job does not calibrate.
    """

    job: TransferJob
    dataset: DatasetMetadata
    counts: dict[str, dict[str, int]]
    history: Sequence[HistoryRow]
    evaluation: Evaluation
    gates: tuple[GateResult, ...]
    mistakes: tuple[Misclassification, ...]
    lineage: dict[str, str]
    version: int | None = None
    formats: tuple[str, ...] = ()
    export_check: ExportCheck | None = None
    notes: tuple[str, ...] = ()
    latest: LatestVersion | None = None
    weights: KeptWeights | None = None
    cross_validation: CrossValidation | None = None
    audit: IllustratedFindings | None = None
    heat_note: str = ""
    calibration: Calibration | None = None

    @property
    def title(self) -> str:
        """Name of the model, with its version if it is published."""
        return self.job.model_name if self.version is None else f"{self.job.model_name}/{self.version}"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics requested by the job, in the order of the spec, and the loss."""
        values = self.evaluation.metrics
        requested: dict[str, float] = {name: values[name] for name in self.job.spec.evaluate.metrics if name in values}
        return {**requested, "loss": values["loss"]}

    @property
    def resizing(self) -> str:
        """How images of any size become inputs of the model, in two sentences."""
        height, width = self.job.spec.dataset.image_size
        fit = self.job.spec.dataset.image_fit
        return (
            f"{_RESIZING[fit].format(size=f'{height}x{width} pixels (height x width)')} (imageFit: {fit}). "
            "The interpolation is bilinear with antialiasing, and values are rounded to integers."
        )

    @property
    def class_notes(self) -> tuple[str, ...]:
        """Which classes of the source were merged or left out."""
        selection = self.dataset.class_selection
        return selection.describe() if selection else ()

    @property
    def image_notes(self) -> tuple[str, ...]:
        """How the images are decoded, and for which source files the signature `encoded` has no decoder."""
        values, kinds = self.dataset.values, self.dataset.kinds
        value_range = resolve_value_range(self.job.spec.dataset.value_range, values)
        notes = list(describe_value_range(value_range, values)) if values else []
        rejected = {original.kind for original in self.dataset.originals if not original.is_servable}
        for kind in sorted(rejected):
            share = 100 * kinds[kind] / max(1, self.dataset.images)
            notes.append(
                f"{kinds[kind]} source files ({share:.1f} %) are {kind}: the signature encoded rejects such files. "
                "Convert them to PNG, or use topwork predict."
            )
        if frames := sum(count for kind, count in kinds.items() if kind.endswith(SEVERAL_FRAMES)):
            notes.append(f"{frames} source files contain several pages or frames: only the first one is used.")
        return tuple(notes)

    @property
    def duplicates(self) -> int | None:
        """Number of evaluated images with an exact or near duplicate in train; None if the audit did not search."""
        if self.cross_validation:
            return self.cross_validation.duplicates
        leak = self.audit.findings.leak if self.audit else None
        return leak.duplicates if leak else None

    @property
    def measured_on(self) -> str:
        """The images that the metrics were measured on, such as "400 images of the test split"."""
        return format_images(self.evaluation.images, self.evaluation.split)

    @property
    def main_metric(self) -> str:
        """The first requested metric that is defined."""
        return next(iter(self.metrics))

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of a typical training step, by stage; see the function `step_seconds`."""
        return step_seconds(self.job, self.history)


def batch_sizes(job: TransferJob) -> dict[str, int]:
    """Return the global batch size of each training stage of a job."""
    first, second = job.spec.transfer, job.spec.fine_tune
    return {"transfer": first.batch_size} | ({"fine-tune": second.batch_size or first.batch_size} if second else {})


def step_seconds(job: TransferJob, history: Sequence[HistoryRow]) -> dict[str, float]:
    """Return the duration of a typical training step of each stage.

    Args:
        job: The job.
        history: One row per epoch, with images_per_second.

    Returns:
        Seconds by stage: the low median of the mean step duration of each epoch. The low median ignores the first of
        two epochs, whose first step includes graph tracing.
    """
    images, seconds_by_stage = batch_sizes(job), dict[str, list[float]]()
    for row in history:
        stage = str(row["stage"])
        if stage in images and "images_per_second" in row:
            seconds_by_stage.setdefault(stage, []).append(images[stage] / float(row["images_per_second"]))
    return {stage: median_low(seconds) for stage, seconds in seconds_by_stage.items()}


def metrics_json(results: Results) -> bytes:
    """Render `metrics.json`: evaluation, gates and export check.

    Args:
        results: The results.

    Returns:
        JSON with camelCase keys; `metrics` contains the scalar metrics by their names in the job spec. `confusion` of
        `evaluation` is null for more than 100 classes; `confusions` lists the most frequent ones for any number.
    """
    content: dict[str, Any] = {
        "format": 1,
        "model": results.job.model_name,
        "version": results.version,
        "run": results.job.run,
        "mainMetric": results.main_metric,
        "metrics": results.evaluation.metrics,
        "weights": {"stage": results.weights.stage, "epoch": results.weights.epoch} if results.weights else None,
        "stepSeconds": results.step_seconds,
        "gates": [gate.model_dump(by_alias=True) for gate in results.gates],
        "imageFit": results.job.spec.dataset.image_fit,
        "valueRange": resolve_value_range(results.job.spec.dataset.value_range, results.dataset.values),
        "crossValidation": _cross_validation(results.cross_validation) if results.cross_validation else None,
        "latest": results.latest.model_dump(by_alias=True) if results.latest else None,
        "calibration": results.calibration.model_dump(by_alias=True) if results.calibration else None,
        "evaluation": results.evaluation.model_dump(mode="json", by_alias=True),
        "recheck": results.export_check.model_dump(by_alias=True) if results.export_check else None,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _cross_validation(validation: CrossValidation) -> dict[str, Any]:
    folds = [{"fold": fold.fold, "images": fold.images, "metrics": fold.metrics} for fold in validation.folds]
    return {"folds": folds, "mean": validation.means, "standardDeviation": validation.deviations}


def history_csv(history: Sequence[HistoryRow]) -> bytes:
    """Render `history.csv`: one row per epoch, over all stages. Missing values are empty.

    Args:
        history: One row per epoch.

    Returns:
        CSV with a header.
    """
    names = dict.fromkeys(name for row in history for name in row)
    columns = [name for name in LEADING_COLUMNS if name in names] + [
        name for name in names if name not in LEADING_COLUMNS
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or LEADING_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def summarize(content: Any) -> str:
    """Summarize a section of a spec in one line: `cnn filters 4 8, kernelSize 3`.

    Args:
        content: JSON data.

    Returns:
        One line, without empty values.
    """
    if isinstance(content, dict):
        return ", ".join(f"{name} {summarize(value)}" for name, value in content.items() if value not in ([], {}, None))
    if isinstance(content, list | tuple):
        return " ".join(summarize(value) for value in content)
    return str(content)
