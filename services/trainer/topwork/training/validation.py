"""Validation after each epoch: loss, accuracy and AUC over exactly the images of the validation split."""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.batches import Shard, evaluation_batches, merge_shards
from topwork.data.local_dataset import LocalDataset, Split
from topwork.model.probabilities import roc_auc, to_probabilities
from topwork.nodes.group import NodeGroup
from topwork.training.distribution.replicas import distribute_batches, local_rows
from topwork.training.divergence import diverged_error
from topwork.training.losses import loss_targets
from topwork.training.plan import TrainingPlan

Values = npt.NDArray[np.float32]

# Logits that are evaluated at once, in bytes: with many classes, those of all images do not fit into memory.
BLOCK_BYTES = 64 * 2**20


def create_validation(data: LocalDataset, plan: TrainingPlan, nodes: NodeGroup) -> "Validation | None":
    """Create the validation of a stage.

    Args:
        data: Images or cached features of the dataset.
        plan: Plan of the stage.
        nodes: The nodes that train the run.

    Returns:
        The validation; None without a validation split.
    """
    if data.validation is None or not data.validation.size:
        return None
    classes, auc = len(data.class_names), plan.monitor == "auc"
    return Validation(data.validation, classes=classes, batch_size=plan.batch_size, auc=auc, nodes=nodes)


class Validation:
    """Evaluates a model on the validation split.

    The logits of all batches are evaluated without the padding of the last batch: every image counts exactly once,
    regardless of the batch size and the number of replicas. With several nodes, each one computes the logits of its
    rows of every batch without waiting for the others. The chief evaluates them and shares the metrics.

    Attributes:
        evaluated_images: Number of images of the last evaluation whose logits this node computed, with the padding.
        seconds: Time that this took, without the communication between nodes.
    """

    def __init__(
        self, split: Split, *, classes: int, batch_size: int, auc: bool, nodes: NodeGroup | None = None
    ) -> None:
        """Prepare the batches.

        Args:
            split: Images and labels.
            classes: Number of classes.
            batch_size: Images per step over all replicas.
            auc: Whether to compute the area under the ROC curve, which needs the probabilities of all images at once.
            nodes: The nodes that evaluate together; None for this one only.
        """
        self._split, self._classes, self._auc = split, classes, auc
        self._batch_size, self._nodes = batch_size, nodes or NodeGroup()
        self.evaluated_images, self.seconds = 0, 0.0
        self._forward: Callable[[Any], Any] | None = None
        self._model: keras.Model | None = None
        batches = max(1, BLOCK_BYTES // (4 * classes * batch_size))
        shard = Shard(self._nodes.index, self._nodes.count)
        self._blocks = []
        for first in range(0, split.size, batches * batch_size):
            block = evaluation_batches(
                split, classes=classes, batch_size=batch_size, first=first // batch_size, count=batches, shard=shard
            )
            indices = np.arange(first, min(split.size, first + batches * batch_size))
            self._blocks.append((block.map(lambda images, *_: images), indices))

    def evaluate(self, model: keras.Model, loss: keras.losses.Loss) -> dict[str, float]:
        """Evaluate a model. All nodes must call this at the same time.

        Args:
            model: Maps images to logits.
            loss: Loss over logits.

        Returns:
            "loss" and "accuracy"; with `auc`, also "auc" if at least two classes occur. Accuracy and AUC are those of
            the probabilities, as in the evaluation of the published model. They are the same on all nodes.

        Raises:
            DataError: If the loss of an image is NaN or infinite.
        """
        self.evaluated_images, self.seconds = 0, 0.0
        losses, correct, kept = [], [], []
        for images, indices in self._blocks:
            rows = self._nodes.concatenate_on_chief(self._logits(model, images))
            if rows is None:
                continue
            logits = merge_shards(rows, self._batch_size, self._nodes.count)[: len(indices)]
            losses.append(self._losses(logits, indices, loss))
            with tf.device("CPU"):
                probabilities = to_probabilities(logits)
            correct.append(probabilities.argmax(axis=1) == self._split.labels[indices])
            kept += [probabilities] if self._auc else []
        self._require_finite(losses)
        metrics = {}
        if self._nodes.is_chief:
            metrics = {"loss": _mean(losses), "accuracy": _mean(correct)}
            if self._auc and (area := roc_auc(kept, self._split.labels)) is not None:
                metrics["auc"] = area
        return dict(self._nodes.broadcast(metrics))

    def _logits(self, model: keras.Model, batches: tf.data.Dataset) -> Values:
        """Compute the logits of the rows of this node in a block of batches."""
        if self._forward is None or self._model is not model:
            self._model, self._forward = model, _forward_function(model)
        start = time.perf_counter()
        strategy = model.distribute_strategy
        # Reading the logits waits for the device, so they are read at the end.
        outputs = [self._forward(images) for images in distribute_batches(batches, strategy)]
        logits = np.concatenate([local_rows(strategy, output) for output in outputs])
        self.evaluated_images += len(logits)
        self.seconds += time.perf_counter() - start
        return logits

    def _losses(self, logits: Values, indices: npt.NDArray[np.int64], loss: keras.losses.Loss) -> Values:
        with tf.device("CPU"):
            labels = loss_targets(tf.one_hot(self._split.labels[indices], self._classes))
            return np.asarray(loss.call(labels, tf.constant(logits)))

    def _require_finite(self, losses: list[Values]) -> None:
        """Fail on all nodes if a loss on the chief is NaN or infinite."""
        values = np.concatenate(losses) if losses else np.zeros(0, np.float32)
        non_finite = self._nodes.broadcast(np.flatnonzero(~np.isfinite(values)).tolist())
        if non_finite:
            value = self._nodes.broadcast(str(values[non_finite[0]]) if losses else None)
            names = [self._split.names[index] for index in non_finite]
            raise diverged_error(
                f"The loss is {value} on {len(non_finite)} of {self._split.size} validation images", names
            )


def _forward_function(model: keras.Model) -> Callable[[Any], Any]:
    """Create the function that computes logits on the replicas of this node. `predict` communicates between nodes."""
    strategy = model.distribute_strategy

    def run(images: Any) -> Any:
        return strategy.run(lambda rows: tf.cast(model(rows, training=False), tf.float32), (images,))

    forward: Callable[[Any], Any] = tf.function(
        run, jit_compile=model.jit_compile, reduce_retracing=True, autograph=False
    )
    return forward


def _mean(blocks: list[Any]) -> float:
    return float(np.concatenate(blocks).mean(dtype=np.float64))
