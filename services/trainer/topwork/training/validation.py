"""Validation after each epoch: loss, accuracy and AUC over exactly the images of the validation split."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import Split
from topwork.errors import DataError
from topwork.training.divergence import diverged_error
from topwork.training.losses import correct_predictions, loss_targets


class Validation:
    """Evaluates a model on the validation split.

    The logits of all batches are collected and evaluated together, without the padding of the last batch: every image
    counts exactly once, regardless of the batch size and the number of replicas.
    """

    def __init__(self, split: Split, *, classes: int, batch_size: int, auc: bool) -> None:
        """Prepare the batches.

        Args:
            split: Images and labels.
            classes: Number of classes.
            batch_size: Images per step over all replicas.
            auc: Whether to compute the area under the ROC curve.

        Raises:
            DataError: If `auc` is set and a class has no image.
        """
        self._labels = np.eye(classes, dtype=np.float32)[split.labels]
        batches = evaluation_batches(split, classes=classes, batch_size=batch_size)
        self._images = batches.map(lambda images, *_: images)
        self._split, self._auc = split, auc
        missing = np.flatnonzero(self._labels.sum(axis=0) == 0).tolist()
        if auc and missing:
            raise DataError(
                f"earlyStopping.monitor is auc, but the validation split has no image of classes {missing}. "
                "Use a larger split, or monitor: loss."
            )

    def evaluate(self, model: keras.Model, loss: keras.losses.Loss) -> dict[str, float]:
        """Evaluate a model.

        Args:
            model: Maps images to logits.
            loss: Loss over logits.

        Returns:
            "loss", "accuracy" and, if requested, "auc" (macro average, one class against the rest).

        Raises:
            DataError: If the loss of an image is NaN or infinite.
        """
        logits = np.asarray(model.predict(self._images, verbose=0), np.float32)[: len(self._labels)]
        labels = loss_targets(self._labels)
        with tf.device("CPU"):
            losses = np.asarray(loss.call(tf.constant(labels), tf.constant(logits)))
            if len(non_finite := np.flatnonzero(~np.isfinite(losses)).tolist()):
                names = [self._split.names[index] for index in non_finite]
                raise diverged_error(
                    f"The loss is {losses[non_finite[0]]} on {len(non_finite)} of {len(losses)} validation images",
                    names,
                )
            correct = np.asarray(correct_predictions(tf.constant(labels), tf.constant(logits)))
        metrics = {"loss": float(losses.mean(dtype=np.float64)), "accuracy": float(correct.mean(dtype=np.float64))}
        if self._auc:
            metrics["auc"] = _macro_auc(self._labels, logits)
        return metrics


def _macro_auc(one_hot: np.ndarray, logits: np.ndarray) -> float:
    is_binary = logits.shape[-1] == 1
    scores: Any = logits[:, 0] if is_binary else logits
    return float(roc_auc_score(one_hot[:, 1] if is_binary else one_hot, scores, average="macro"))
