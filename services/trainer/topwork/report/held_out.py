"""How a trained classifier does on images it has not seen: what publish shows, and what the export must repeat."""

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
from topwork.report.evaluation import evaluation
from topwork.report.export_check import MOST_BYTES, MOST_ENCODED, MOST_IMAGES, spread, write_questions
from topwork.report.results import Mistake, Outcome, told
from topwork.spec import TransferJob
from topwork.workspace import Workspace

MOST_MISTAKES = 24
THUMBNAIL_PIXELS = 160
# Evaluation runs on one device, whatever the number of replicas that a training batch is for.
LARGEST_BATCH = 256
NO_TEST_SPLIT = (
    "There is no test split: the figures are those of the validation split, which chose the best epoch and so flatters "
    "them."
)


@dataclass(frozen=True)
class Assessed:
    """A classifier with its evaluation.

    Attributes:
        model: Images float32 (batch, height, width, 3) in 0..255 to probabilities float32 (batch, classes).
        outcome: What is told about it; without gates yet.
        questions: Folder of what its exports are asked; see `topwork.report.export_check`.
    """

    model: keras.Model
    outcome: Outcome
    questions: Path


def assess(
    job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> Assessed:
    """Evaluate a classifier on the test split, or on the validation split where there is none.

    Args:
        job: The job.
        classifier: The classifier; its model is fetched from storage.
        dataset: The stored dataset.
        workspace: Storage, progress and scratch.
        folder: Empty local folder for what is fetched and written.

    Returns:
        The loaded model, its outcome, and the questions for its exports.

    Raises:
        DataError: If there is neither a test nor a validation split, or the model's answers are not numbers.
    """
    local = fetch_dataset(dataset, job, workspace)
    name, split = _held_back(local)
    workspace.storage.download(classifier.key, folder / "model.keras", classifier.file)
    model = add_probabilities(keras.models.load_model(folder / "model.keras", compile=False), len(local.class_names))
    batch_size = min(job.spec.transfer.batch_size, LARGEST_BATCH)
    probabilities = _probabilities(model, split, len(local.class_names), batch_size, workspace)
    outcome = Outcome(
        job=job,
        facts=dataset.metadata,
        counts=_counts(local),
        history=classifier.history,
        evaluation=evaluation(probabilities, split.labels, tuple(local.class_names), name),
        gates=(),
        mistakes=_worst_mistakes(split, probabilities, local.class_names),
        lineage=_lineage(job, classifier, dataset, workspace),
        notes=() if name == "test" else (NO_TEST_SPLIT,),
    )
    _ask(split, probabilities, folder / "questions")
    return Assessed(model, outcome, folder / "questions")


def _held_back(local: LocalDataset) -> tuple[str, Split]:
    if local.test is not None:
        return "test", local.test
    if local.validation is not None:
        return "validation", local.validation
    raise DataError(
        "The dataset has neither a test nor a validation split, so the model can't be evaluated, and nothing is "
        "published that was not. Set spec.dataset.splits.test, such as train[80%:]."
    )


def _probabilities(
    model: keras.Model, split: Split, classes: int, batch_size: int, workspace: Workspace
) -> NDArray[np.float32]:
    """Answer every image of a split once, in order: float32 (size, classes)."""
    forward = tf.function(lambda images: model(images, training=False), autograph=False)
    parts = []
    with _exact(), workspace.track("publish: evaluation", split.size) as tracker:
        for images, _, weights in evaluation_batches(split, classes=classes, batch_size=batch_size):
            counts = weights.numpy() > 0  # the last batch is filled up with images of weight 0
            parts.append(forward(images).numpy()[counts])
            tracker.advance(int(counts.sum()))
    return np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)


@contextmanager
def _exact() -> Iterator[None]:
    """Compute in float32 proper, as a processor would: TF32 of newer GPUs keeps 10 of 23 bits."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _counts(local: LocalDataset) -> dict[str, dict[str, int]]:
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
) -> tuple[Mistake, ...]:
    answers, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(answers != split.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_MISTAKES]
    return tuple(
        Mistake(
            name=split.names[index],
            truth=class_names[split.labels[index]],
            answer=class_names[answers[index]],
            confidence=float(confidence[index]),
            picture=_thumbnail(split.load_images(np.array([index]))[0]),
        )
        for index in worst
    )


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _ask(split: Split, probabilities: NDArray[np.float32], folder: Path) -> None:
    """Write some images of the split, spread evenly over it, and some of these as files too."""
    height, width = split.image_size
    chosen = spread(split.size, min(MOST_IMAGES, MOST_BYTES // (height * width * 3)))
    places = spread(len(chosen), MOST_ENCODED)
    encoded = [(int(place), split.load_encoded(int(chosen[place]))) for place in places]
    write_questions(folder, split.load_images(chosen), probabilities[chosen], split.labels[chosen], encoded)


def _lineage(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> dict[str, str]:
    model = job.spec.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "Run": job.run,
        "Spec digest": job.digest,
        "Base": told(model["base"]),
        "Head": told(model["head"]),
        "Stages": "transfer, fine-tune" if job.spec.fine_tune else "transfer",
        "Weights": f"{workspace.storage.uri_of(classifier.key)} (sha256 {classifier.file.sha256})",
        "Dataset": workspace.storage.uri_of(dataset.prefix),
        "Dataset fingerprint": dataset.metadata.fingerprint,
        "topwork": __version__,
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
    }
