"""Loss, accuracy and class weights of training, built from Keras' own classes."""

from typing import Any

import keras
import numpy as np

from topwork.errors import DataError
from topwork.spec.training import Loss


def make_loss(settings: Loss | str, classes: int) -> keras.losses.Loss:
    """Create the loss over logits and the labels that `loss_targets` returns.

    Two classes have one logit: the binary cross-entropy of z equals the categorical cross-entropy of (0, z).

    Args:
        settings: `spec.transfer.loss`: a name, or a name with parameters.
        classes: Number of classes.

    Returns:
        A Keras loss.

    Raises:
        DataError: If a binary loss is requested for more than two classes.

    Example:
        `make_loss("auto", 3)` returns `keras.losses.CategoricalCrossentropy(from_logits=True)`.
    """
    loss = Loss(name=settings) if isinstance(settings, str) else settings
    options = {"from_logits": True, "label_smoothing": loss.label_smoothing}
    if loss.name == "binaryCrossentropy" and classes != 2:
        raise DataError(
            f"spec.transfer.loss is binaryCrossentropy, which is for two classes, but the dataset has {classes}. "
            "Use auto or categoricalCrossentropy."
        )
    if loss.name == "focal":
        if classes == 2:
            return keras.losses.BinaryFocalCrossentropy(gamma=loss.gamma, **options)
        # Keras' default alpha of 0.25 would only scale the loss: spec.transfer.classWeights weights classes.
        return keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=loss.gamma, **options)
    if classes == 2:
        return keras.losses.BinaryCrossentropy(**options)
    return keras.losses.CategoricalCrossentropy(**options)


def loss_targets(one_hot: Any) -> Any:
    """Convert one-hot labels to the shape of the logits.

    Args:
        one_hot: float32 (batch, classes).

    Returns:
        float32 (batch, 1) for two classes, otherwise the argument.
    """
    return one_hot[:, 1:] if one_hot.shape[-1] == 2 else one_hot


def correct_predictions(labels: Any, logits: Any) -> Any:
    """Compare predicted classes with the labels.

    Args:
        labels: Labels as `loss_targets` returns them. If MixUp or CutMix mixed them, the largest share counts.
        logits: float32 (batch, 1) for two classes, otherwise (batch, classes).

    Returns:
        float32 (batch,): 1 for a correct prediction, otherwise 0.
    """
    ops = keras.ops
    if logits.shape[-1] == 1:
        correct = ops.equal(labels[:, 0] > 0.5, logits[:, 0] > 0.0)
    else:
        correct = ops.equal(ops.argmax(labels, axis=-1), ops.argmax(logits, axis=-1))
    return ops.cast(correct, "float32")


def make_accuracy() -> keras.metrics.Metric:
    """Create the accuracy metric that is averaged over an epoch."""
    return keras.metrics.MeanMetricWrapper(correct_predictions, name="accuracy")


def balanced_class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Compute class weights with which every class counts equally and the average weight of an image is 1.

    Args:
        labels: int64 (images,).
        classes: Number of classes.

    Returns:
        float32 (classes,): images / (classes * images of the class), as scikit-learn's "balanced".

    Raises:
        DataError: If a class has no training image.
    """
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        missing = np.flatnonzero(counts == 0).tolist()
        raise DataError(
            f"classWeights: balanced needs training images of every class, but classes {missing} have none in the "
            "training split."
        )
    return (len(labels) / (classes * counts)).astype(np.float32)
