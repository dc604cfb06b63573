"""Loss and metrics on the validation split, over exactly its images."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import Split
from topwork.errors import DataError
from topwork.training.losses import correct, targets
from topwork.training.steps import lost


class Validation:
    """The validation split, ready to be measured after each epoch.

    The logits are gathered and measured as one: the padding of the last batch is cut off, so that no image counts
    twice or less than another, whatever the batch size and the number of replicas.
    """

    def __init__(self, split: Split, *, classes: int, batch_size: int, auc: bool) -> None:
        """Prepare the batches.

        Args:
            split: Images and labels.
            classes: Number of classes.
            batch_size: Images a step over all replicas.
            auc: Whether the area under the ROC curve is wanted.

        Raises:
            DataError: If the area is wanted and a class has no image.
        """
        self._labels = np.eye(classes, dtype=np.float32)[split.labels]
        batches = evaluation_batches(split, classes=classes, batch_size=batch_size)
        self._images = batches.map(lambda images, *_: images)
        self._split, self._auc = split, auc
        missing = np.flatnonzero(self._labels.sum(axis=0) == 0).tolist()
        if auc and missing:
            raise DataError(
                f"earlyStopping.monitor is auc, but classes {missing} have no image in the validation split. "
                "Use a larger one, or monitor: loss."
            )

    def measure(self, model: keras.Model, loss: keras.losses.Loss) -> dict[str, float]:
        """Measure the model as it is.

        Args:
            model: Gives logits.
            loss: Loss over logits.

        Returns:
            "loss", "accuracy" and, where wanted, "auc" (macro average of each class against the others).

        Raises:
            DataError: If the loss of an image is not finite.
        """
        logits = np.asarray(model.predict(self._images, verbose=0), np.float32)[: len(self._labels)]
        labels = targets(self._labels)
        with tf.device("CPU"):
            each = np.asarray(loss.call(tf.constant(labels), tf.constant(logits)))
            if len(odd := np.flatnonzero(~np.isfinite(each)).tolist()):
                names = [self._split.names[index] for index in odd]
                raise lost(f"The loss is {each[odd[0]]} on {len(odd)} of {len(each)} validation images", names)
            right = np.asarray(correct(tf.constant(labels), tf.constant(logits)))
        measured = {"loss": float(each.mean(dtype=np.float64)), "accuracy": float(right.mean(dtype=np.float64))}
        if self._auc:
            measured["auc"] = _area(self._labels, logits)
        return measured


def _area(labels: np.ndarray, logits: np.ndarray) -> float:
    scores: Any = logits[:, 0] if logits.shape[-1] == 1 else logits
    one_against_others = labels[:, 1] if logits.shape[-1] == 1 else labels
    return float(roc_auc_score(one_against_others, scores, average="macro"))
