"""Scales the input of saved bases, and finds out whether a base scales raw pixels itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import structlog

from topwork.errors import DataError
from topwork.model.backbones import scale_inputs
from topwork.model.cloning import as_functional, is_augmentation
from topwork.spec.model import InputScaling, SavedBase

log = structlog.get_logger(__name__)

KEY = "spec.model.base.saved.scaling"
_MODES: dict[str, Any] = {"minusOneToOne": "tf", "torch": "torch", "caffe": "caffe"}
_RESCALING = frozenset(
    {"Rescaling", "Normalization", "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Negative"}
)
# Layers that normalize any input, whatever its range.
_STANDARDIZING = frozenset({"LayerNormalization", "GroupNormalization", "UnitNormalization", "RMSNormalization"})
# Layers and operations that do not change the range of pixels.
_NEUTRAL = frozenset(
    {
        *{"Resizing", "CenterCrop", "RandomCrop", "Cropping2D", "ZeroPadding2D", "Pad", "Resize", "Flip", "GetItem"},
        *{"Identity", "Cast", "Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "Permute", "Reshape"},
    }
)
# Raw pixels span 255. Scaled ones span 1 or 2, or about 5 in units of their standard deviation; those of dark images
# more. A model that expects 0..1 and doubles it, as in 2x - 1, would turn raw pixels into a span of 510.
_MAX_SCALED_SPAN = 64.0
_MAX_EXACT_SPAN = 16.0
# Without a scale, only an offset of this size shows that the mean of raw pixels is subtracted.
_MIN_MEAN = 16.0


@dataclass(frozen=True)
class FoundScaling:
    """What the first layers of a model do to raw pixels.

    Attributes:
        layers: Names of the layers that scale the input.
        scales_pixels: Whether they turn pixels in 0..255 into the range that neural networks are trained on. Layers
            that expect 0..1 or -1..1 do not.
        is_certain: Whether they turn pixels into about -1..1, computed without statistics of the training data.
    """

    layers: tuple[str, ...]
    scales_pixels: bool
    is_certain: bool


def scale_saved_base_inputs(image: Any, scaling: InputScaling | None) -> Any:
    """Scale raw pixels as `spec.model.base.saved.scaling` says.

    Args:
        image: KerasTensor float32 (batch, height, width, 3), RGB in 0..255.
        scaling: The setting.

    Returns:
        KerasTensor of the same shape.
    """
    if scaling == "zeroToOne":
        return keras.layers.Rescaling(1 / 255, name="input_scaling")(image)
    return scale_inputs(image, _MODES[scaling]) if scaling in _MODES else image


def check_input_scaling(base: keras.Model, saved: SavedBase, name: str) -> None:
    """Warn if nothing scales the input of a saved base, and reject a setting that scales it a second time.

    Args:
        base: The base.
        saved: `spec.model.base.saved`.
        name: File name of the saved model.

    Raises:
        DataError: If the base scales raw pixels itself, and the spec scales them, too.
    """
    found = find_input_scaling(base)
    if saved.scaling is None:
        if not found.scales_pixels:
            log.warning(_missing_scaling(found, name), layers=list(found.layers), setting=KEY)
    elif saved.scaling != "none" and found.scales_pixels:
        layers = ", ".join(found.layers[:3])
        if found.is_certain:
            raise DataError(
                f"{KEY} is {saved.scaling}, but {name} already scales pixels in 0..255 ({layers}): its input would be "
                "scaled twice. Remove the key."
            )
        log.warning("the base may scale its input, too: check that it is not scaled twice", layers=layers, setting=KEY)


def _missing_scaling(found: FoundScaling, name: str) -> str:
    reason = (
        f"its first layers ({', '.join(found.layers[:3])}) do not scale pixels in 0..255"
        if found.layers
        else "it has no layer that scales its input"
    )
    return (
        f"{name} receives pixels in 0..255, because {reason}. If it was trained on scaled images, its features are "
        f"wrong: set {KEY} to zeroToOne, minusOneToOne, torch or caffe, as in its training, or to none if it was "
        "trained on 0..255"
    )


def find_input_scaling(model: keras.Model) -> FoundScaling:
    """Find out what the first layers of a model do to raw pixels, by applying them to a black and a white image.

    Args:
        model: Functional model with one input (batch, height, width, 3), of a known size.

    Returns:
        The layers that scale the input, and whether they expect raw pixels.
    """
    shape = (1, *model.inputs[0].shape[1:])
    images = (np.zeros(shape, np.float32), np.full(shape, 255, np.float32))
    layers, (black, white), _ = _follow(model, images)
    if not layers:
        return FoundScaling((), scales_pixels=False, is_certain=False)
    span = float(np.abs(white - black).max())
    centered = span < 256 and float(np.abs(black).max()) >= _MIN_MEAN
    standardizing = any(_ignores_range(layer) for layer in layers)
    exact = not any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    return FoundScaling(
        tuple(str(layer.name) for layer in layers),
        scales_pixels=standardizing or centered or span <= _MAX_SCALED_SPAN,
        is_certain=exact and not standardizing and span <= _MAX_EXACT_SPAN,
    )


def describe_input_scaling(model: keras.Model) -> str:
    """Describe how a classifier scales raw pixels, as its layer computes it.

    Args:
        model: Result of `build_classifier`, also with other layers around it.

    Returns:
        One factor and offset, or one for each channel.

    Example:
        >>> describe_input_scaling(classifier)
        'red * 0.0171248 - 2.1179, green * 0.017507 - 2.03571, blue * 0.0174292 - 1.80444'
    """
    layer = next((layer for layer in model.layers if layer.name == "input_scaling"), None)
    if layer is None:
        return "in the base"
    scales, offsets = (np.broadcast_to(np.asarray(value), 3) for value in (layer.scale, layer.offset))
    if len({*zip(scales, offsets, strict=True)}) == 1:
        return _describe_channel("pixel", scales[0], offsets[0])
    is_flipped = _kind(layer.input._keras_history.operation) in {"Flip", "Stack"}
    channels = ("blue", "green", "red") if is_flipped else ("red", "green", "blue")
    return ", ".join(map(_describe_channel, channels, scales, offsets))


def _describe_channel(name: str, scale: float, offset: float) -> str:
    shown = f"{name} * {scale:.6g}"
    return shown if offset == 0 else f"{shown} {'+' if offset > 0 else '-'} {abs(offset):.6g}"


_Pair = tuple[Any, Any]


def _follow(model: keras.Model, images: _Pair) -> tuple[list[Any], _Pair, bool]:
    """Apply the layers that process each pixel independently, up to the first other layer or branch.

    Returns:
        The scaling layers, the resulting images, and whether the output of the model was reached.
    """
    graph = as_functional(model)
    scaling: list[Any] = []
    tensor = keras.tree.flatten(graph.input)[0]
    while not any(tensor is output for output in keras.tree.flatten(graph.output)):
        calls = list(_calls_on(graph, tensor))
        if (reordered := _reordered_channels(graph, calls)) is not None:
            tensor = reordered
            continue
        if len(calls) != 1:
            return scaling, images, False
        layer, args, kwargs, result = calls[0]
        if isinstance(layer, keras.Model):
            inner, images, complete = _follow(layer, images)
            scaling += inner
            if not complete:
                return scaling, images, False
        elif _kind(layer) in _RESCALING | _STANDARDIZING or isinstance(layer, keras.layers.BatchNormalization):
            scaling.append(layer)
            images = _apply(layer, tensor, args, kwargs, images)
        elif _kind(layer) in _NEUTRAL or _is_linear(layer):
            images = _apply(layer, tensor, args, kwargs, images)
        elif not is_augmentation(layer):
            return scaling, images, False
        tensor = result
    return scaling, images, True


def _calls_on(graph: Any, tensor: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield the calls that take a tensor: layer or operation, arguments, keyword arguments, output."""
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            if any(argument is tensor for argument in node.arguments.keras_tensors):
                yield node.operation, node.arguments.args, node.arguments.kwargs, node.output_tensors[0]


def _reordered_channels(graph: Any, calls: list[tuple[Any, Any, Any, Any]]) -> Any:
    """Return the tensor of all channels if the calls only select channels that are then stacked, as for RGB to BGR."""
    if len(calls) < 2 or any(_kind(layer) != "GetItem" for layer, *_ in calls):
        return None
    uses = [use for *_, channel in calls for use in _calls_on(graph, channel)]
    is_stack = all(_kind(use[0]) in {"Stack", "Concatenate"} and use[3] is uses[0][3] for use in uses)
    return uses[0][3] if uses and is_stack else None


def _apply(layer: Any, tensor: Any, args: Any, kwargs: Any, images: _Pair) -> _Pair:
    def apply(image: Any) -> Any:
        def fill(value: Any) -> Any:
            return image if value is tensor else value

        # Dropout and noise are off, and batch normalization uses its statistics.
        options = {**keras.tree.map_structure(fill, kwargs), **({"training": False} if "training" in kwargs else {})}
        return keras.ops.convert_to_numpy(layer(*keras.tree.map_structure(fill, args), **options))

    return apply(images[0]), apply(images[1])


def _ignores_range(layer: Any) -> bool:
    """Return whether the layer normalizes any input, or is a batch normalization without statistics yet."""
    if isinstance(layer, keras.layers.BatchNormalization):
        mean, variance = (keras.ops.convert_to_numpy(value) for value in (layer.moving_mean, layer.moving_variance))
        return not mean.any() and bool((variance == 1).all())
    return _kind(layer) in _STANDARDIZING


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.linear


def _kind(layer: Any) -> str:
    return type(layer).__name__
