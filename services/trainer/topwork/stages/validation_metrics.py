"""Evaluates the classifier of a run that publishes nothing on the validation split."""

import hashlib
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import Split, fetch_dataset
from topwork.errors import DataError
from topwork.model.export import add_probabilities
from topwork.model.freezing import hash_variables
from topwork.model.partition import partition_model
from topwork.registry.stage_results import Classifier
from topwork.report.evaluation import Evaluation
from topwork.report.held_out_split import MAX_KEPT_BYTES, HeldOutSplit, graph_of
from topwork.spec import TransferJob
from topwork.spec.digest import digest_of
from topwork.training.feature_cache.features import FeatureSplit
from topwork.workspace import Workspace

Features = NDArray[np.float32]


def evaluate_on_validation(
    job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> Evaluation:
    """Evaluate a classifier on the validation split in float32.

    The trials of a search that train only a head share its frozen base, whose output is computed once in a process.

    Args:
        job: The job.
        classifier: The classifier; its model is downloaded from storage unless this process has just trained it.
        dataset: The stored dataset.
        workspace: Storage, progress and scratch.
        folder: Empty local directory for temporary files.

    Returns:
        The metrics.

    Raises:
        DataError: If there is no validation split, or a predicted probability is not finite.
    """
    local = fetch_dataset(dataset, job, workspace)
    if local.validation is None:
        raise DataError(
            "The dataset has no validation split, and a run that publishes nothing is only evaluated on that split. "
            "Set spec.dataset.splits.validation, for example to train[60%:80%], or publish.enabled to true."
        )
    names = tuple(local.class_names)
    split = HeldOutSplit("validation", local.validation, names, job.spec.transfer.batch_size, workspace)
    auc = "auc" in job.spec.evaluate.metrics
    model = workspace.recent.find("classifier", classifier.key) or _load_model(classifier, workspace, folder)
    if trains_only_head(job) and (parts := _split_off_base(model, split)):
        features, model = parts
        images = FeatureSplit(features, local.validation)
        split = HeldOutSplit("validation", images, names, job.spec.transfer.batch_size, workspace)
    return split.evaluate(graph_of(add_probabilities(model, len(names))), auc=auc, title="validation")[0]


def _load_model(classifier: Classifier, workspace: Workspace, folder: Path) -> keras.Model:
    workspace.storage.download(classifier.key, folder / "model.keras", classifier.file)
    return keras.models.load_model(folder / "model.keras", compile=False)


def trains_only_head(job: TransferJob) -> bool:
    """Return whether all classifiers of a job with other settings of the training have the same base."""
    return job.spec.transfer.train == "head" and job.spec.fine_tune is None


def _split_off_base(model: keras.Model, split: HeldOutSplit) -> tuple[Features, keras.Model] | None:
    """Compute the output of the base for all images, unless this process has done so or it is too large.

    Returns:
        The features, and the head that continues from them.
    """
    model.get_layer("base").trainable = False
    partition = partition_model(model)
    if partition is None or 4 * split.images.size * np.prod(partition.feature_shape) > MAX_KEPT_BYTES:
        return None
    key = _features_key(partition.frozen_part, split.images)
    features = split.workspace.recent.find("validation features", key)
    if features is None:
        features = np.concatenate(list(split.predict(graph_of(partition.frozen_part), "features of validation")))
        split.workspace.recent.keep("validation features", key, features)
    return features, partition.trainable_part


def _features_key(model: keras.Model, images: Split) -> str:
    digests = hashlib.sha256(images.digests.tobytes()).hexdigest()
    pixels = [images.image_size, str(images.preprocessing), digests]
    return digest_of([hash_variables(model.variables), model.to_json(), pixels])
