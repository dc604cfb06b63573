"""The classifier that is trained: raw pixels, input scaling, base and head, out come logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.backbones import backbone, scaled
from topwork.model.cloning import with_dtype
from topwork.model.weights import copy_weights
from topwork.spec.model import Base, Cnn, Head, Model


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


@dataclass(frozen=True)
class Features:
    """What a head is put on.

    Attributes:
        image: KerasTensor of the input, float32 (batch, height, width, 3), RGB in 0..255, named "image".
        output: KerasTensor of the base's output.
    """

    image: Any
    output: Any


def features(settings: Base, image_size: tuple[int, int], file: Path | None) -> Features:
    """Build input, input scaling and base.

    Args:
        settings: Kind of base.
        image_size: Height and width in pixels.
        file: Weights of the application, or the saved model, where the spec names one.

    Returns:
        Input and output of the base; the base is a nested model named "base".

    Raises:
        SpecError: If the base can't be built for this image size.
        DataError: If the file isn't what the spec says.
        UnavailableError: If ImageNet weights could not be downloaded.
    """
    image = keras.Input((*image_size, 3), name="image")
    if settings.saved:
        from topwork.model.saved_base import cut

        if file is None:
            raise ValueError("a saved base needs its file")
        base = cut(file, settings.saved.cut_at, image_size)
        return Features(image, base(image))
    if settings.cnn:
        return Features(image, _cnn(settings.cnn, image_size)(_unit(image)))
    model = backbone(settings.application or "")
    base = model.build(image_size, file or ("imagenet" if settings.needs_imagenet else None))
    return Features(image, base(scaled(image, model.scaling)))


def _unit(image: Any) -> Any:
    return keras.layers.Rescaling(1 / 255, name="input_scaling")(image)


def _cnn(settings: Cnn, image_size: tuple[int, int]) -> keras.Model:
    """Same-padded relu convolutions, each followed by pooling: every one halves the side."""
    pixels = keras.Input((*image_size, 3), name="pixels")
    maps = pixels
    for index, filters in enumerate(settings.filters, start=1):
        maps = keras.layers.Conv2D(
            filters, settings.kernel_size, padding="same", activation="relu", name=f"convolution_{index}"
        )(maps)
        if min(maps.shape[1:3]) > 1:
            maps = keras.layers.MaxPooling2D(name=f"pooling_{index}")(maps)
    return keras.Model(pixels, maps, name="base")


def logits(features: Any, settings: Head, classes: int) -> Any:
    """Put the head on the output of a base.

    Args:
        features: KerasTensor of the base's output, (batch, height, width, channels) or (batch, channels).
        settings: Pooling, hidden layers and dropout.
        classes: Number of classes.

    Returns:
        KerasTensor of logits, float32 (batch, 1) for two classes, else (batch, classes).

    Raises:
        DataError: If the base gives neither feature maps nor a vector.
    """
    if len(features.shape) == 4:
        features = _pooled(features, settings.pooling)
    elif len(features.shape) != 2:
        raise DataError(
            f"The base's output has the shape {tuple(features.shape)}: a head needs feature maps (batch, height, "
            "width, channels) or a vector (batch, channels). Cut the base at another layer with "
            "spec.model.base.saved.cutAt."
        )
    for index, units in enumerate(settings.hidden, start=1):
        features = keras.layers.Dense(units, activation="relu", name=f"hidden_{index}")(features)
    if settings.dropout:
        features = keras.layers.Dropout(settings.dropout, name="dropout")(features)
    # float32 whatever the precision: a loss over half-precision logits loses its small differences.
    return keras.layers.Dense(output_units(classes), dtype="float32", name="logits")(features)


def output_units(classes: int) -> int:
    """Say how many logits a classifier has: one for two classes, else one a class."""
    return 1 if classes == 2 else classes


def _pooled(maps: Any, pooling: str) -> Any:
    if pooling == "flatten":
        return keras.layers.Flatten(name="flatten")(maps)
    layer = keras.layers.GlobalAveragePooling2D if pooling == "avg" else keras.layers.GlobalMaxPooling2D
    return layer(name="pooling")(maps)
