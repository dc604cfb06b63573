"""Evaluates a trained classifier on held-out images and prepares the export check."""

from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import structlog
import tensorflow as tf
from numpy.typing import NDArray

from topwork import __version__
from topwork.audit.findings import AuditedImage, AuditFindings
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import LocalDataset, Split, fetch_dataset
from topwork.data.splits.inputs import EvaluatedImage
from topwork.errors import DataError
from topwork.model.input_scaling import describe_input_scaling
from topwork.registry.evaluated_images import identify_images
from topwork.registry.stage_results import Classifier
from topwork.report.audit import MAX_PICTURES, IllustratedFindings, read_findings
from topwork.report.calibration import Calibration
from topwork.report.evaluation import Evaluation
from topwork.report.export_check import MAX_BYTES, MAX_ENCODED, MAX_IMAGES, spread_indices, write_check_inputs
from topwork.report.held_out_split import HeldOutSplit, full_float32_precision, graph_of
from topwork.report.latest_version import evaluate_latest, images_to_keep
from topwork.report.mistakes import worst_mistakes
from topwork.report.pictures import thumbnail
from topwork.report.predictions import Predictions, array_batches, collect_predictions
from topwork.report.results import Results, summarize
from topwork.report.rounding import estimate_logit_tolerance
from topwork.report.source_files import write_source_files
from topwork.report.trained_model import load_trained
from topwork.spec import TransferJob
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

FINAL_MODEL = (
    "No image was kept to test this model. Its metrics are those of cross-validation: of other models with the same "
    "settings, each on images that it was not trained on."
)
NO_TEST_SPLIT = (
    "There is no test split. The metrics are measured on the validation split, which also selected the best epoch, so "
    "they are optimistic."
)


@dataclass(frozen=True)
class EvaluatedClassifier:
    """An evaluated classifier.

    Attributes:
        model: Images float32 (batch, height, width, 3) in 0..255 to probabilities float32 (batch, classes).
        results: Its results, without gates.
        predictions: What it predicted for the images on which it was evaluated; with the probabilities of `chosen`.
        images: Images for the export check.
        chosen: int64 (n,), which of them are checked.
        tested: The images on which it was evaluated; empty for the final model of cross-validation.
    """

    model: keras.Model
    results: Results
    predictions: Predictions
    images: Split
    chosen: NDArray[np.int64]
    tested: tuple[EvaluatedImage, ...] = ()


def evaluate_classifier(
    job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> EvaluatedClassifier:
    """Evaluate a classifier on the test split, or on the validation split if there is no test split.

    Args:
        job: The job.
        classifier: The classifier; its model is downloaded from storage.
        dataset: The stored dataset.
        workspace: Storage, progress and scratch.
        folder: Empty local directory for temporary files.

    Returns:
        The loaded model and its results.

    Raises:
        DataError: If there is neither a test nor a validation split, or a predicted probability is not finite.
    """
    local = fetch_dataset(dataset, job, workspace)
    held_out = _held_out_split(local, job, workspace)
    trained = load_trained(classifier, workspace, folder, job=job, validation=_validation_split(local, job, workspace))
    model = trained.probabilities
    chosen = _choose_check_images(held_out.images, len(local.class_names))
    findings = read_findings(job, dataset, workspace.storage)
    kept = images_to_keep(job, held_out)
    evaluation, predictions = held_out.evaluate(
        graph_of(model), auc="auc" in job.spec.evaluate.metrics, keep=chosen if kept is None else kept
    )
    calibration = trained.compare_with_uncalibrated(predictions, held_out)
    mistakes, heat_note = worst_mistakes(trained.logits, held_out, predictions)
    results = Results(
        job=job,
        dataset=dataset.metadata,
        counts=_count_images(local),
        history=classifier.history,
        evaluation=evaluation,
        gates=(),
        mistakes=mistakes,
        heat_note=heat_note,
        lineage=lineage(job, dataset, workspace, classifier, describe_input_scaling(model)),
        notes=(
            *(findings.warnings() if findings else ()),
            *_write_notes(job, evaluation, calibration),
            *local.notes,
            *filter(None, [classifier.kept.note]),
        ),
        weights=classifier.kept,
        calibration=calibration,
        latest=evaluate_latest(
            job,
            classifier.file.sha256,
            held_out,
            predictions,
            folder / "latest",
            temperature=calibration.temperature if calibration else None,
        ),
        audit=_illustrate(findings, local) if findings else None,
    )
    if kept is not None:
        predictions = replace(predictions, kept=predictions.kept[chosen])
    tested = identify_images(held_out.images, local.class_names)
    return EvaluatedClassifier(model, results, predictions, held_out.images, chosen, tested)


def describe_final_model(
    job: TransferJob,
    classifier: Classifier,
    dataset: StoredDataset,
    workspace: Workspace,
    folder: Path,
    validated: Results,
) -> EvaluatedClassifier:
    """Describe a classifier that was trained on all images by the results of cross-validation.

    Args:
        job: The job.
        classifier: The classifier; its model is downloaded from storage.
        dataset: The stored dataset.
        workspace: Storage, progress and scratch.
        folder: Empty local directory for temporary files.
        validated: Results of the folds.

    Returns:
        The loaded model and the results.
    """
    local = fetch_dataset(dataset, job, workspace)
    trained = load_trained(classifier, workspace, folder, job=job, validation=_validation_split(local, job, workspace))
    model, calibration = trained.probabilities, trained.calibration
    caveats = calibration.caveats(validated.evaluation) if calibration else ()
    _warn(caveats)
    results = replace(
        validated,
        counts=_count_images(local),
        history=classifier.history,
        lineage=lineage(job, dataset, workspace, classifier, describe_input_scaling(model)),
        notes=(FINAL_MODEL, *caveats, *validated.notes, *filter(None, [classifier.kept.note])),
        weights=classifier.kept,
        calibration=calibration,
    )
    images = local.validation or local.train
    chosen = _choose_check_images(images, len(local.class_names))
    forward, pixels = graph_of(model), tf.cast(images.load_images(chosen), tf.float32)
    with full_float32_precision():
        predictions = collect_predictions(
            array_batches(forward(pixels)), images.labels[chosen], keep=np.arange(len(chosen))
        )
    return EvaluatedClassifier(model, results, predictions, images, chosen)


def write_export_check(
    evaluated: EvaluatedClassifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> None:
    """Write the inputs of the export check, with the predictions of the evaluated model.

    Args:
        evaluated: The evaluated classifier.
        dataset: The stored dataset.
        workspace: Scratch with the files of the dataset.
        folder: Local directory for the inputs; see `topwork.report.export_check`.
    """
    model, images = evaluated.model, evaluated.images
    _write_check_inputs(model, images, evaluated.chosen, evaluated.predictions, folder)
    with full_float32_precision():
        write_source_files(
            folder,
            dataset,
            workspace.scratch / dataset.prefix,
            images.image_size,
            images.preprocessing,
            lambda batch: model(batch, training=False).numpy(),
        )


def _held_out_split(local: LocalDataset, job: TransferJob, workspace: Workspace) -> HeldOutSplit:
    name, images = ("test", local.test) if local.test is not None else ("validation", local.validation)
    if images is None:
        raise DataError(
            "The dataset has neither a test nor a validation split, so the model cannot be evaluated, and an "
            "unevaluated model is never published. Set spec.dataset.splits.test, for example to train[80%:]."
        )
    return _split(name, images, local, job, workspace)


def _validation_split(local: LocalDataset, job: TransferJob, workspace: Workspace) -> HeldOutSplit | None:
    return _split("validation", local.validation, local, job, workspace) if local.validation else None


def _split(name: str, images: Split, local: LocalDataset, job: TransferJob, workspace: Workspace) -> HeldOutSplit:
    return HeldOutSplit(name, images, tuple(local.class_names), job.spec.transfer.batch_size, workspace)


def _write_notes(job: TransferJob, evaluation: Evaluation, calibration: Calibration | None) -> tuple[str, ...]:
    """Write the caveats of the metrics, and log them."""
    calibrated = calibration.caveats(evaluation) if calibration else ()
    undefined = evaluation.undefined
    not_applicable = [
        f"{name} is not reported: {undefined[name]}." for name in job.spec.evaluate.metrics if name in undefined
    ]
    caveats = (*evaluation.notes, *not_applicable, *calibrated)
    _warn(caveats)
    return (*(() if evaluation.split == "test" else (NO_TEST_SPLIT,)), *caveats)


def _warn(caveats: tuple[str, ...]) -> None:
    for note in caveats:
        log.warning("evaluation caveat", note=note)


def _count_images(local: LocalDataset) -> dict[str, dict[str, int]]:
    splits = {"train": local.train, "validation": local.validation, "test": local.test}
    return {
        name: dict(
            zip(
                local.class_names,
                np.bincount(split.labels, minlength=len(local.class_names)).tolist(),
                strict=True,
            )
        )
        for name, split in splits.items()
        if split is not None
    }


def _illustrate(findings: AuditFindings, local: LocalDataset) -> IllustratedFindings:
    def picture(image: AuditedImage) -> str:
        return thumbnail(local.splits[image.split].load_images(np.array([image.index]))[0])

    return IllustratedFindings(
        findings,
        tuple((pair, picture(pair.first), picture(pair.second)) for pair in findings.pairs[:MAX_PICTURES]),
        tuple((issue, picture(issue.image)) for issue in findings.label_examples[:MAX_PICTURES]),
    )


def _choose_check_images(split: Split, classes: int) -> NDArray[np.int64]:
    """Choose evenly spaced images whose pixels and probabilities fit into memory."""
    height, width = split.image_size
    return spread_indices(split.size, min(MAX_IMAGES, MAX_BYTES // (height * width * 3 + classes * 4)))


def _write_check_inputs(
    model: keras.Model, split: Split, chosen: NDArray[np.int64], predictions: Predictions, folder: Path
) -> None:
    """Write the chosen images, and some of them also as files."""
    images = split.load_images(chosen)
    with full_float32_precision():
        tolerance = estimate_logit_tolerance(model, images)
    encoded = [
        (int(index), split.load_encoded(int(chosen[index]))) for index in spread_indices(len(chosen), MAX_ENCODED)
    ]
    write_check_inputs(folder, images, predictions.kept, split.labels[chosen], encoded, tolerance)


def lineage(
    job: TransferJob, dataset: StoredDataset, workspace: Workspace, classifier: Classifier | None, scaling: str = ""
) -> dict[str, str]:
    """Describe the provenance of a classifier, or of the folds of a job, as label and value.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage of the job.
        classifier: The classifier; None for all folds.
        scaling: Description of its input scaling.
    """
    weights = (
        {
            "Weights from": classifier.kept.description,
            "Weights": f"{workspace.storage.uri_of(classifier.key)} (sha256 {classifier.file.sha256})",
        }
        if classifier
        else {}
    )
    model = job.spec.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "Run": job.run,
        "Spec digest": job.digest,
        "Base": summarize(model["base"]),
        **({"Input scaling": scaling} if scaling else {}),
        "Head": summarize(model["head"]),
        "Stages": "transfer, fine-tune" if job.spec.fine_tune else "transfer",
        **weights,
        "Dataset": workspace.storage.uri_of(dataset.prefix),
        "Dataset fingerprint": dataset.metadata.fingerprint,
        "topwork": __version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
    }
