"""The loss over logits, and the accuracy beside it."""

from typing import Any

import keras
import numpy as np

from topwork.errors import DataError
from topwork.spec.training import Loss


def loss(settings: Loss | str, classes: int) -> keras.losses.Loss:
    """Make the loss over logits and one-hot labels as `targets` gives them.

    With two classes there's one logit: categorical cross-entropy over the logits (0, z) is binary cross-entropy of z.

    Args:
        settings: `spec.transfer.loss`, by name or with its parameters.
        classes: Number of classes.

    Returns:
        A loss of Keras.

    Raises:
        DataError: If the loss is for two classes and there are others.
    """
    named = Loss(name=settings) if isinstance(settings, str) else settings
    smoothing = {"from_logits": True, "label_smoothing": named.label_smoothing}
    if named.name == "binaryCrossentropy" and classes != 2:
        raise DataError(
            f"spec.transfer.loss is binaryCrossentropy, which is for two classes, but the dataset has {classes}. "
            "Use auto or categoricalCrossentropy."
        )
    if named.name == "focal":
        if classes == 2:
            return keras.losses.BinaryFocalCrossentropy(gamma=named.gamma, **smoothing)
        # Keras' default alpha of 0.25 would only scale the loss: classes are weighted by classWeights here.
        return keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=named.gamma, **smoothing)
    if classes == 2:
        return keras.losses.BinaryCrossentropy(**smoothing)
    return keras.losses.CategoricalCrossentropy(**smoothing)


def targets(one_hot: Any) -> Any:
    """Give the labels the shape of the logits: (batch, 1) with two classes, else as they are."""
    return one_hot[:, 1:] if one_hot.shape[-1] == 2 else one_hot


def correct(labels: Any, logits: Any) -> Any:
    """Say which images the logits put into the class with the largest share of the label.

    Args:
        labels: As from `targets`; may be mixed by MixUp or CutMix.
        logits: float32 (batch, 1) for two classes, else (batch, classes).

    Returns:
        float32 (batch,) of 0 and 1.
    """
    ops = keras.ops
    if logits.shape[-1] == 1:
        same = ops.equal(labels[:, 0] > 0.5, logits[:, 0] > 0.0)
    else:
        same = ops.equal(ops.argmax(labels, axis=-1), ops.argmax(logits, axis=-1))
    return ops.cast(same, "float32")


def accuracy() -> keras.metrics.Metric:
    """Make the accuracy that `fit` keeps over an epoch."""
    return keras.metrics.MeanMetricWrapper(correct, name="accuracy")


def balanced_class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weigh classes so that each counts alike, and an image counts 1 on average.

    Args:
        labels: int64 (images,).
        classes: Number of classes.

    Returns:
        float32 (classes,): images / (classes * images of the class).

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
