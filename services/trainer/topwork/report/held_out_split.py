"""The split on which models are evaluated, and the evaluation of a model on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import Split
from topwork.model.device_memory import predict_in_parts
from topwork.model.probabilities import Batches, mean_auc
from topwork.report.evaluation import Evaluation, evaluate
from topwork.report.predictions import Predictions, collect_predictions
from topwork.workspace import Workspace

# Evaluation runs on one device, whereas the training batch size is for all replicas.
MAX_BATCH_SIZE = 256
# Probabilities of a split are kept in memory up to this size. The AUC of a larger split predicts it a second time.
MAX_KEPT_BYTES = 256 * 2**20

# Images float32 (batch, height, width, 3) in 0..255 to probabilities float32 (batch, classes).
Forward = Callable[[tf.Tensor], NDArray[np.float32]]


@dataclass(frozen=True)
class HeldOutSplit:
    """Images that no stage has trained on.

    Attributes:
        name: Name of the split: test or validation.
        images: The images.
        class_names: Name of each class, in label order.
        batch_size: Global batch size of training.
        workspace: Workspace that displays the progress.
    """

    name: str
    images: Split
    class_names: tuple[str, ...]
    batch_size: int
    workspace: Workspace

    def evaluate(
        self, forward: Forward, *, auc: bool, keep: NDArray[np.int64] | None = None, title: str = "publish: evaluation"
    ) -> tuple[Evaluation, Predictions]:
        """Evaluate a model.

        Args:
            forward: The model. Its classes have the order of `class_names`.
            auc: Whether to compute the AUC even if that takes a second prediction of all images.
            keep: int64 (n,), indices of images whose probabilities are kept, in ascending order.
            title: What the progress display shows.

        Returns:
            The metrics, and the results of each image.

        Raises:
            DataError: If the split is empty, or a probability is not finite.
        """

        def predict() -> Iterator[NDArray[np.float32]]:
            return self.predict(forward, title)

        batches: Batches = predict
        if self.images.size * len(self.class_names) * 4 <= MAX_KEPT_BYTES:
            kept, auc = list(predict()), True
            batches = lambda: kept  # noqa: E731 - a function with a name would say no more
        labels, classes = self.images.labels, len(self.class_names)
        predictions = collect_predictions(batches, labels, self.name, keep)
        area = mean_auc(batches, labels, predictions.own, classes) if auc else None
        return evaluate(predictions, labels, self.class_names, self.name, area), predictions

    def predict(self, forward: Forward, title: str) -> Iterator[NDArray[np.float32]]:
        """Predict every image once, in order.

        Args:
            forward: The model, or a part of it.
            title: What the progress display shows.

        Yields:
            Outputs of the images of a batch, float32 (images, ...).
        """
        batch_size = min(self.batch_size, MAX_BATCH_SIZE)
        with full_float32_precision(), self.workspace.track(title, self.images.size) as tracker:
            for images, _, weights in evaluation_batches(self.images, classes=1, batch_size=batch_size):
                is_image = weights.numpy() > 0  # the last batch is padded with images of weight 0
                yield forward(images)[is_image]
                tracker.advance(int(is_image.sum()))


def graph_of(model: keras.Model) -> Forward:
    """Compile the prediction of a Keras model. Batches that do not fit into memory are split."""
    graph = tf.function(lambda images: model(images, training=False), autograph=False)
    return predict_in_parts(lambda images: graph(images).numpy())


@contextmanager
def full_float32_precision() -> Iterator[None]:
    """Disable TF32, which keeps only 10 of the 23 mantissa bits of float32 on recent GPUs."""
    previous = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(previous)
