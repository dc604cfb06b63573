"""EfficientNet-Lite0, which keras.applications does not have.

The architecture is that of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (Liu 2020):
EfficientNet-B0 (Tan and Le 2019) without squeeze-and-excitation, with ReLU6 instead of swish, and with the number of
filters in the stem and the top fixed. Layers are named as those of EfficientNetB0 in keras.applications.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

DEFAULT_SIDE = 224
_MIN_SIDE = 32
_STEM_FILTERS, _TOP_FILTERS = 32, 1280
_BATCH_NORM_EPSILON = 1e-3
# MEAN_RGB and STDDEV_RGB in efficientnet_lite_builder.py, for pixels in 0..255.
_MEAN, _DEVIATION = 127.0, 128.0
_DROPOUT = 0.2


@dataclass(frozen=True)
class Block:
    """An inverted residual block (MBConv).

    Attributes:
        name: Prefix of its layer names: `block2a`.
        kernel_size: Height and width of the depthwise kernels.
        stride: Stride of the depthwise convolution.
        expansion: Factor by which the first convolution expands the filters; 1 if there is none.
        filters_in: Number of input filters.
        filters: Number of output filters.
    """

    name: str
    kernel_size: int
    stride: int
    expansion: int
    filters_in: int
    filters: int


# Repeats, kernel size, stride of the first block, expansion, and output filters of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def blocks() -> Iterator[Block]:
    """Yield the blocks from input to output."""
    filters_in = _STEM_FILTERS
    for stage, (repeats, kernel_size, stride, expansion, filters) in enumerate(_STAGES, start=1):
        for index in range(repeats):
            name = f"block{stage}{'abcd'[index]}"
            yield Block(name, kernel_size, stride if index == 0 else 1, expansion, filters_in, filters)
            filters_in = filters


def build_efficientnet_lite0(
    include_top: bool = True,
    weights: None = None,  # noqa: ARG001 - as in keras.applications
    input_shape: tuple[int, int, int] | None = None,
) -> keras.Model:
    """Build EfficientNet-Lite0 with random weights, with the signature of the models in keras.applications.

    Args:
        include_top: Whether to add the classifier for the 1,000 classes of ImageNet.
        weights: None.
        input_shape: Height, width and channels of the images; (224, 224, 3) if None.

    Returns:
        The model. It expects RGB pixels in 0..255 and scales them itself. Its output is the feature map, float32
        (batch, height, width, 1280), or with the top the probabilities, float32 (batch, 1000).

    Raises:
        ValueError: If the images are smaller than 32x32.

    Example:
        >>> build_efficientnet_lite0(include_top=False, input_shape=(64, 64, 3)).output_shape
        (None, 2, 2, 1280)
    """
    input_shape = input_shape or (DEFAULT_SIDE, DEFAULT_SIDE, 3)
    if min(input_shape[:2]) < _MIN_SIDE:
        raise ValueError(f"Input size must be at least {_MIN_SIDE}x{_MIN_SIDE}, but input_shape is {input_shape}.")
    image = keras.Input(input_shape)
    x = keras.layers.Rescaling(1 / _DEVIATION, offset=-_MEAN / _DEVIATION, name="rescaling")(image)
    x = _convolution(x, "stem", _STEM_FILTERS, kernel_size=3, strides=2)
    for block in blocks():
        x = _apply_block(x, block)
    x = _convolution(x, "top", _TOP_FILTERS, kernel_size=1)
    if include_top:
        x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = keras.layers.Dropout(_DROPOUT, name="top_dropout")(x)
        x = keras.layers.Dense(1000, activation="softmax", name="predictions")(x)
    return keras.Model(image, x, name="efficientnetlite0")


def _convolution(x: Any, name: str, filters: int, **arguments: Any) -> Any:
    """Apply a convolution, batch normalization and ReLU6."""
    x = keras.layers.Conv2D(filters, padding="same", use_bias=False, name=f"{name}_conv", **arguments)(x)
    return _activate(x, f"{name}_bn", f"{name}_activation")


def _activate(x: Any, normalization: str, activation: str) -> Any:
    x = keras.layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=normalization)(x)
    return keras.layers.ReLU(6.0, name=activation)(x)


def _apply_block(x: Any, block: Block) -> Any:
    shortcut, name = x, block.name
    if block.expansion > 1:
        x = keras.layers.Conv2D(
            block.filters_in * block.expansion, 1, padding="same", use_bias=False, name=f"{name}_expand_conv"
        )(x)
        x = _activate(x, f"{name}_expand_bn", f"{name}_expand_activation")
    x = keras.layers.DepthwiseConv2D(
        block.kernel_size, block.stride, padding="same", use_bias=False, name=f"{name}_dwconv"
    )(x)
    x = _activate(x, f"{name}_bn", f"{name}_activation")
    x = keras.layers.Conv2D(block.filters, 1, padding="same", use_bias=False, name=f"{name}_project_conv")(x)
    x = keras.layers.BatchNormalization(epsilon=_BATCH_NORM_EPSILON, name=f"{name}_project_bn")(x)
    if block.stride == 1 and block.filters_in == block.filters:
        x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return x
