"""Evaluates the folds of cross-validation, each on its own test split, and combines their metrics."""

import io
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.cross_validation import (
    SPLIT,
    CrossValidation,
    FoldResult,
    cross_validation_key,
    read_fold_result,
    write_cross_validation,
    write_fold_result,
)
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import Classifier
from topwork.report.evaluation import Evaluation, evaluate
from topwork.report.held_out_evaluation import evaluate_classifier, lineage
from topwork.report.predictions import Predictions
from topwork.report.results import Results
from topwork.spec import TransferJob
from topwork.stages.publish import apply_gates, show_evaluation, store_evaluation
from topwork.workspace import Workspace

NOT_PUBLISHED = "Nothing is published: spec.publish.fold: all trains and publishes a final model on all images."


def evaluate_fold(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> FoldResult:
    """Evaluate the classifier of a fold on the test split of the fold, unless that is done.

    Args:
        job: The job of the fold.
        classifier: Its result.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The metrics. Report and predictions are stored with the run of the fold.
    """
    with workspace.metrics.track_stage("publish"):
        key = stage_keys(job, dataset.metadata.fingerprint, workspace.storage).publish
        if result := read_fold_result(workspace.storage, job.run, key):
            return result
        folder = workspace.scratch / "evaluate"
        shutil.rmtree(folder, ignore_errors=True)  # leftovers of an earlier attempt
        folder.mkdir(parents=True)
        evaluated = evaluate_classifier(job, classifier, dataset, workspace, folder)
        shutil.rmtree(folder)
        results, storage = evaluated.results, workspace.storage
        show_evaluation(results, workspace)
        labels = evaluated.images.labels
        storage.write(_predictions_key(job.run), _pack_predictions(evaluated.predictions, labels))
        result = FoldResult(
            key=key,
            fold=job.spec.dataset.fold or 0,
            images=results.evaluation.images,
            metrics=results.evaluation.metrics,
            notes=results.notes,
            weights=classifier.kept,
            report_uri=f"{store_evaluation(results, storage)}/report.html",
            duplicates=results.duplicates,
        )
        write_fold_result(storage, job.run, result)
        return result


def combine_folds(
    job: TransferJob, folds: dict[str, FoldResult], dataset: StoredDataset, workspace: Workspace
) -> tuple[CrossValidation, Results]:
    """Combine the metrics of all folds, check the gates, and store the report.

    Args:
        job: The job.
        folds: Result of each fold, by the name of its run.
        dataset: The stored dataset.
        workspace: Storage and metrics.

    Returns:
        The metrics of cross-validation, and the results that describe a final model. Metrics are means over the folds;
        confusions, scores of classes and reliability are those of all test images together.

    Raises:
        GateError: If the mean of a metric does not meet a gate.
    """
    storage = workspace.storage
    report_uri = f"{storage.uri_of(f'runs/{job.run}')}/report.html"
    validation = CrossValidation(
        key=cross_validation_key(job, dataset.metadata.fingerprint, storage),
        name=job.model_name,
        requested=(*job.spec.evaluate.metrics, "loss"),
        folds=tuple(folds.values()),
        total=job.spec.dataset.folds,
        report_uri=report_uri,
        started=workspace.metrics.stage_start_time("publish"),
        finished=datetime.now(UTC),
    )
    results = Results(
        job=job,
        dataset=dataset.metadata,
        counts={"images": dataset.metadata.class_counts},
        history=(),
        evaluation=_combine_evaluations(list(folds), validation, dataset.metadata.class_names, workspace),
        gates=(),
        mistakes=(),
        lineage=lineage(job, dataset, workspace, None),
        notes=(*(() if job.spec.publishes else (NOT_PUBLISHED,)), *validation.notes),
        cross_validation=validation,
    )
    show_evaluation(results, workspace)
    if validation.duplicates is not None:
        workspace.metrics.set_leaked_images(validation.duplicates)
    results = apply_gates(results, workspace)
    write_cross_validation(storage, job.run, validation)
    return validation, replace(results, notes=validation.notes)


def _combine_evaluations(
    runs: list[str], validation: CrossValidation, class_names: tuple[str, ...], workspace: Workspace
) -> Evaluation:
    parts = [_unpack_predictions(workspace.storage.read(_predictions_key(run)) or b"") for run in runs]
    labels, predicted, confidence, own, rank = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    predictions = Predictions(predicted, confidence, own, rank, np.zeros((0, len(class_names)), np.float32))
    together = evaluate(predictions, labels, class_names, SPLIT, None)
    means = validation.means
    return together.model_copy(
        update={
            **{name: means.get(name) for name in ("top5", "auc")},
            **{name: means[name] for name in ("loss", "accuracy", "precision", "recall", "f1")},
            "calibration_error": means["calibrationError"],
        }
    )


_COLUMNS = ("predicted", "confidence", "own", "rank")


def _predictions_key(run: str) -> str:
    return f"runs/{run}/evaluate/predictions.npz"


def _pack_predictions(predictions: Predictions, labels: NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, labels=labels, **{name: getattr(predictions, name) for name in _COLUMNS})
    return file.getvalue()


def _unpack_predictions(data: bytes) -> tuple[NDArray[np.generic], ...]:
    """Return the labels and the columns of the predictions."""
    with np.load(io.BytesIO(data)) as file:
        return tuple(file[name] for name in ("labels", *_COLUMNS))
