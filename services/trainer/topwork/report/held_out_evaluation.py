"""Evaluates a trained classifier on held-out images and prepares the export check."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image

from topwork import __version__
from topwork.data.batches import evaluation_batches
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import LocalDataset, Split, fetch_dataset
from topwork.errors import DataError
from topwork.model.export import add_probabilities
from topwork.registry.stage_results import Classifier
from topwork.report.evaluation import evaluate_predictions
from topwork.report.export_check import MAX_BYTES, MAX_ENCODED, MAX_IMAGES, spread_indices, write_check_inputs
from topwork.report.results import Misclassification, Results, summarize
from topwork.spec import TransferJob
from topwork.workspace import Workspace

MAX_MISTAKES = 24
THUMBNAIL_PIXELS = 160
# Evaluation runs on one device, whereas the training batch size is for all replicas.
MAX_BATCH_SIZE = 256
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
        check_inputs: Directory with the inputs of the export check; see `topwork.report.export_check`.
    """

    model: keras.Model
    results: Results
    check_inputs: Path


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
        The loaded model, its results, and the inputs of the export check.

    Raises:
        DataError: If there is neither a test nor a validation split, or a predicted probability is not finite.
    """
    local = fetch_dataset(dataset, job, workspace)
    name, split = _held_out_split(local)
    workspace.storage.download(classifier.key, folder / "model.keras", classifier.file)
    model = add_probabilities(keras.models.load_model(folder / "model.keras", compile=False), len(local.class_names))
    batch_size = min(job.spec.transfer.batch_size, MAX_BATCH_SIZE)
    probabilities = _probabilities(model, split, len(local.class_names), batch_size, workspace)
    results = Results(
        job=job,
        dataset=dataset.metadata,
        counts=_count_images(local),
        history=classifier.history,
        evaluation=evaluate_predictions(probabilities, split.labels, tuple(local.class_names), name),
        gates=(),
        mistakes=_worst_mistakes(split, probabilities, local.class_names),
        lineage=_lineage(job, classifier, dataset, workspace),
        notes=() if name == "test" else (NO_TEST_SPLIT,),
    )
    _write_check_inputs(split, probabilities, folder / "check_inputs")
    return EvaluatedClassifier(model, results, folder / "check_inputs")


def _held_out_split(local: LocalDataset) -> tuple[str, Split]:
    if local.test is not None:
        return "test", local.test
    if local.validation is not None:
        return "validation", local.validation
    raise DataError(
        "The dataset has neither a test nor a validation split, so the model cannot be evaluated, and an unevaluated "
        "model is never published. Set spec.dataset.splits.test, for example to train[80%:]."
    )


def _probabilities(
    model: keras.Model, split: Split, classes: int, batch_size: int, workspace: Workspace
) -> NDArray[np.float32]:
    """Predict every image of a split once, in order: float32 (size, classes)."""
    forward = tf.function(lambda images: model(images, training=False), autograph=False)
    parts = []
    with _full_float32_precision(), workspace.track("publish: evaluation", split.size) as tracker:
        for images, _, weights in evaluation_batches(split, classes=classes, batch_size=batch_size):
            is_image = weights.numpy() > 0  # the last batch is padded with images of weight 0
            parts.append(forward(images).numpy()[is_image])
            tracker.advance(int(is_image.sum()))
    return np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)


@contextmanager
def _full_float32_precision() -> Iterator[None]:
    """Disable TF32, which keeps only 10 of the 23 mantissa bits of float32 on recent GPUs."""
    previous = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(previous)


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


def _worst_mistakes(
    split: Split, probabilities: NDArray[np.float32], class_names: tuple[str, ...]
) -> tuple[Misclassification, ...]:
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != split.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES]
    return tuple(
        Misclassification(
            name=split.names[index],
            true_class=class_names[split.labels[index]],
            predicted_class=class_names[predicted[index]],
            confidence=float(confidence[index]),
            thumbnail_uri=_thumbnail(split.load_images(np.array([index]))[0]),
        )
        for index in worst
    )


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _write_check_inputs(split: Split, probabilities: NDArray[np.float32], folder: Path) -> None:
    """Write evenly spaced images of the split, and some of them also as files."""
    height, width = split.image_size
    chosen = spread_indices(split.size, min(MAX_IMAGES, MAX_BYTES // (height * width * 3)))
    encoded_indices = spread_indices(len(chosen), MAX_ENCODED)
    encoded = [(int(index), split.load_encoded(int(chosen[index]))) for index in encoded_indices]
    write_check_inputs(folder, split.load_images(chosen), probabilities[chosen], split.labels[chosen], encoded)


def _lineage(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> dict[str, str]:
    model = job.spec.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "Run": job.run,
        "Spec digest": job.digest,
        "Base": summarize(model["base"]),
        "Head": summarize(model["head"]),
        "Stages": "transfer, fine-tune" if job.spec.fine_tune else "transfer",
        "Weights": f"{workspace.storage.uri_of(classifier.key)} (sha256 {classifier.file.sha256})",
        "Dataset": workspace.storage.uri_of(dataset.prefix),
        "Dataset fingerprint": dataset.metadata.fingerprint,
        "topwork": __version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
    }
