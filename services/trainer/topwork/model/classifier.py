"""Builds the classifier: raw pixels -> input scaling -> base -> head -> logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.backbones import find_backbone, scale_inputs
from topwork.model.cloning import clone_layer
from topwork.model.input_scaling import check_input_scaling, scale_saved_base_inputs
from topwork.model.layer_tree import leaf_layers
from topwork.model.weights import copy_weights
from topwork.spec.model import Base, Cnn, Head, Model


def build_classifier(settings: Model, image_size: tuple[int, int], classes: int, file: Path | None) -> keras.Model:
    """Build the classifier in float32.

    Args:
        settings: Base and head.
        image_size: Height and width in pixels.
        classes: Number of classes.
        file: Weights of the application, or the saved model, if the spec names one.

    Returns:
        A model of built-in layers. Input "image": float32 (batch, height, width, 3), RGB in 0..255. Output "logits":
        float32 (batch, 1) for two classes, otherwise (batch, classes).

    Raises:
        SpecError: If the base cannot be built for this image size.
        DataError: If the file does not match the spec.
        UnavailableError: If ImageNet weights could not be downloaded.
    """
    base = build_base(settings.base, image_size, file)
    return keras.Model(base.image, build_head(base.output, settings.head, classes), name="classifier")


def with_precision(model: keras.Model, policy: str) -> keras.Model:
    """Copy a model to another dtype policy; its variables and logits stay float32.

    Args:
        model: Classifier.
        policy: Keras dtype policy: float32, mixed_float16 or mixed_bfloat16.

    Returns:
        The copy with the same weights, or the model itself if it already has that policy.
    """
    if all(layer.dtype_policy.name == policy for layer in model.layers if layer.name not in _ALWAYS_FLOAT32):
        return model

    def clone(layer: Any) -> Any:
        return clone_layer(layer, "float32" if layer.name in _ALWAYS_FLOAT32 else policy)

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy_weights(model, copy)
    return copy


def computes_in_float16(model: keras.Model) -> bool:
    """Return whether a layer computes in float16, whose small gradients underflow to 0 unless the loss is scaled."""
    return any(layer.compute_dtype == "float16" for layer in leaf_layers(model))


# In half precision, pixels up to 255 lose their last bits, and logits lose small differences.
_ALWAYS_FLOAT32 = frozenset({"image", "pixels", "input_scaling", "logits"})


@dataclass(frozen=True)
class BaseOutput:
    """Input and output tensors of a base, ready for a head.

    Attributes:
        image: KerasTensor of the input, float32 (batch, height, width, 3), RGB in 0..255, named "image".
        output: KerasTensor of the base's output.
    """

    image: Any
    output: Any


def build_base(settings: Base, image_size: tuple[int, int], file: Path | None) -> BaseOutput:
    """Build the input, the input scaling and the base.

    Args:
        settings: Kind of base.
        image_size: Height and width in pixels.
        file: Weights of the application, or the saved model, if the spec names one.

    Returns:
        Input and output tensors. The base is a nested model named "base".

    Raises:
        SpecError: If the base cannot be built for this image size.
        DataError: If the file does not match the spec.
        UnavailableError: If ImageNet weights could not be downloaded.
    """
    image = keras.Input((*image_size, 3), name="image")
    if settings.saved:
        from topwork.model.saved_base import load_saved_base

        if file is None:
            raise ValueError("a saved base needs its file")
        base = load_saved_base(file, settings.saved.cut_at, image_size)
        check_input_scaling(base, settings.saved, file.name)
        return BaseOutput(image, base(scale_saved_base_inputs(image, settings.saved.scaling)))
    if settings.cnn:
        return BaseOutput(image, _cnn(settings.cnn, image_size)(_scale_to_unit_range(image)))
    model = find_backbone(settings.application or "")
    base = model.build(image_size, file or ("imagenet" if settings.needs_imagenet else None))
    return BaseOutput(image, base(scale_inputs(image, model.find_scaling(file))))


def _scale_to_unit_range(image: Any) -> Any:
    return keras.layers.Rescaling(1 / 255, name="input_scaling")(image)


def _cnn(settings: Cnn, image_size: tuple[int, int]) -> keras.Model:
    """Build same-padded ReLU convolutions, each followed by 2x2 max pooling."""
    pixels = keras.Input((*image_size, 3), name="pixels")
    maps = pixels
    for index, filters in enumerate(settings.filters, start=1):
        maps = keras.layers.Conv2D(
            filters, settings.kernel_size, padding="same", activation="relu", name=f"convolution_{index}"
        )(maps)
        if min(maps.shape[1:3]) > 1:
            maps = keras.layers.MaxPooling2D(name=f"pooling_{index}")(maps)
    return keras.Model(pixels, maps, name="base")


def build_head(features: Any, settings: Head, classes: int) -> Any:
    """Build the head on the output of a base.

    Args:
        features: KerasTensor of the base's output, (batch, height, width, channels) or (batch, channels).
        settings: Pooling, hidden layers and dropout.
        classes: Number of classes.

    Returns:
        KerasTensor of logits, float32 (batch, 1) for two classes, otherwise (batch, classes).

    Raises:
        DataError: If the base outputs neither feature maps nor a vector.
    """
    if len(features.shape) == 4:
        features = _pool(features, settings.pooling)
    elif len(features.shape) != 2:
        raise DataError(
            f"The output of the base has shape {tuple(features.shape)}, but a head needs feature maps (batch, height, "
            "width, channels) or a vector (batch, channels). Cut the base at another layer with "
            "spec.model.base.saved.cutAt."
        )
    for index, units in enumerate(settings.hidden, start=1):
        features = keras.layers.Dense(units, activation="relu", name=f"hidden_{index}")(features)
    if settings.dropout:
        features = keras.layers.Dropout(settings.dropout, name="dropout")(features)
    # Always float32: a loss over half-precision logits loses small differences.
    return keras.layers.Dense(count_logits(classes), dtype="float32", name="logits")(features)


def count_logits(classes: int) -> int:
    """Return the number of logits: one for two classes, otherwise one per class."""
    return 1 if classes == 2 else classes


def _pool(maps: Any, pooling: str) -> Any:
    if pooling == "flatten":
        return keras.layers.Flatten(name="flatten")(maps)
    layer = keras.layers.GlobalAveragePooling2D if pooling == "avg" else keras.layers.GlobalMaxPooling2D
    return layer(name="pooling")(maps)
