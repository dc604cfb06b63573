"""Validation after each epoch: loss, accuracy and AUC over exactly the images of the validation split."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import LocalDataset, Split
from topwork.model.probabilities import roc_auc, to_probabilities
from topwork.training.divergence import diverged_error
from topwork.training.losses import loss_targets
from topwork.training.plan import TrainingPlan

Values = npt.NDArray[np.float32]

# Logits that are evaluated at once, in bytes: with many classes, those of all images do not fit into memory.
BLOCK_BYTES = 64 * 2**20


def create_validation(data: LocalDataset, plan: TrainingPlan) -> "Validation | None":
    """Create the validation of a stage.

    Args:
        data: Images or cached features of the dataset.
        plan: Plan of the stage.

    Returns:
        The validation; None without a validation split.
    """
    if data.validation is None or not data.validation.size:
        return None
    classes, auc = len(data.class_names), plan.monitor == "auc"
    return Validation(data.validation, classes=classes, batch_size=plan.batch_size, auc=auc)


class Validation:
    """Evaluates a model on the validation split.

    The logits of all batches are evaluated without the padding of the last batch: every image counts exactly once,
    regardless of the batch size and the number of replicas.
    """

    def __init__(self, split: Split, *, classes: int, batch_size: int, auc: bool) -> None:
        """Prepare the batches.

        Args:
            split: Images and labels.
            classes: Number of classes.
            batch_size: Images per step over all replicas.
            auc: Whether to compute the area under the ROC curve, which needs the probabilities of all images at once.
        """
        self._split, self._classes, self._auc = split, classes, auc
        batches = max(1, BLOCK_BYTES // (4 * classes * batch_size))
        self._blocks = []
        for first in range(0, split.size, batches * batch_size):
            block = evaluation_batches(
                split, classes=classes, batch_size=batch_size, first=first // batch_size, count=batches
            )
            indices = np.arange(first, min(split.size, first + batches * batch_size))
            self._blocks.append((block.map(lambda images, *_: images), indices))

    def evaluate(self, model: keras.Model, loss: keras.losses.Loss) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: Maps images to logits.
            loss: Loss over logits.

        Returns:
            "loss" and "accuracy"; with `auc`, also "auc" if at least two classes occur. Accuracy and AUC are those of
            the probabilities, as in the evaluation of the published model.

        Raises:
            DataError: If the loss of an image is NaN or infinite.
        """
        losses, correct, kept = [], [], []
        for images, indices in self._blocks:
            logits = np.asarray(model.predict(images, verbose=0), np.float32)[: len(indices)]
            losses.append(self._losses(logits, indices, loss))
            with tf.device("CPU"):
                probabilities = to_probabilities(logits)
            correct.append(probabilities.argmax(axis=1) == self._split.labels[indices])
            kept += [probabilities] if self._auc else []
        self._require_finite(np.concatenate(losses))
        metrics = {"loss": _mean(losses), "accuracy": _mean(correct)}
        if self._auc and (area := roc_auc(kept, self._split.labels)) is not None:
            metrics["auc"] = area
        return metrics

    def _losses(self, logits: Values, indices: npt.NDArray[np.int64], loss: keras.losses.Loss) -> Values:
        with tf.device("CPU"):
            labels = loss_targets(tf.one_hot(self._split.labels[indices], self._classes))
            return np.asarray(loss.call(labels, tf.constant(logits)))

    def _require_finite(self, losses: Values) -> None:
        if len(non_finite := np.flatnonzero(~np.isfinite(losses)).tolist()):
            names = [self._split.names[index] for index in non_finite]
            raise diverged_error(
                f"The loss is {losses[non_finite[0]]} on {len(non_finite)} of {len(losses)} validation images", names
            )


def _mean(blocks: list[Any]) -> float:
    return float(np.concatenate(blocks).mean(dtype=np.float64))
