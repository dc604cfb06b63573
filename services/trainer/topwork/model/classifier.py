"""The classifier that is trained: raw pixels, input scaling, base and head, out come logits."""

from pathlib import Path
from typing import Any

import keras

from topwork.model.bases import features
from topwork.model.copying import with_dtype
from topwork.model.heads import logits
from topwork.model.weights import copy_weights
from topwork.spec.model import Model


def build(settings: Model, image_size: tuple[int, int], classes: int, file: Path | None) -> keras.Model:
    """Build the classifier, in float32.

    Args:
        settings: Base and head.
        image_size: Height and width in pixels.
        classes: Number of classes.
        file: Weights of the application, or the saved model, where the spec names one.

    Returns:
        A model of built-in layers from "image", float32 (batch, height, width, 3), RGB in 0..255, to "logits",
        float32 (batch, 1) for two classes, else (batch, classes).

    Raises:
        SpecError: If the base can't be built for this image size.
        DataError: If the file isn't what the spec says.
        UnavailableError: If ImageNet weights could not be downloaded.
    """
    below = features(settings.base, image_size, file)
    return keras.Model(below.image, logits(below.output, settings.head, classes), name="classifier")


def in_precision(model: keras.Model, policy: str) -> keras.Model:
    """Copy a model into another number format; its variables and its logits stay float32.

    Args:
        model: Classifier.
        policy: Keras dtype policy: float32, mixed_float16 or mixed_bfloat16.

    Returns:
        The copy with the same weights; the model itself where it has that policy already.
    """
    if all(layer.dtype_policy.name == policy for layer in model.layers if layer.name not in _ALWAYS_FLOAT32):
        return model

    def copied(layer: Any) -> Any:
        return with_dtype(layer, "float32" if layer.name in _ALWAYS_FLOAT32 else policy)

    copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
    copy_weights(model, copy)
    return copy


# Pixels up to 255 lose their last bits in half precision; so do small differences of logits.
_ALWAYS_FLOAT32 = frozenset({"image", "pixels", "input_scaling", "logits"})
