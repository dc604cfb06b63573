"""Rebuilds a model of keras.applications as a variant that computes what converted weights were trained to compute."""

import re
from typing import Any

import keras

from topwork.model.cloning import clone_layer
from topwork.model.conversion.variant import Variant

_FIRST_1X1 = re.compile(r"conv[345]_block1_1_conv")
_NEXT_3X3 = re.compile(r"conv[345]_block1_2_conv")
FINAL_NORM = "final_norm"
"""Name of the last normalization of ConvNeXt, which has a generated name in keras.applications."""


def apply_variant(model: keras.Model, variant: Variant) -> keras.Model:
    """Rebuild a model as a variant. Its weights are not copied.

    Args:
        model: A model of keras.applications without its head.
        variant: What it has to compute.

    Returns:
        A model named "base" with layers of the same names and classes, and with additional padding layers. Only the
        last normalization of ConvNeXt becomes a depthwise convolution. If the variant has a normalization, the model
        expects normalized input.
    """
    rebuilder = _Rebuilder(model, variant)
    clone = keras.models.clone_model(model, call_function=rebuilder.call, clone_function=lambda layer: layer)
    return keras.Model(clone.inputs[0], clone.outputs[0], name="base")


class _Rebuilder:
    """Builds each layer of the variant from that of the application."""

    def __init__(self, model: keras.Model, variant: Variant) -> None:
        self._variant = variant
        self._last = model.outputs[0]._keras_history.operation

    def call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if self._variant.normalization and isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization):
            return args[0]
        if self._variant.norm_after_pooling and layer is self._last:
            return self._final_norm(layer, args[0])
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            return self._convolve(layer, args[0])
        if self._variant.padding == "symmetric" and isinstance(layer, keras.layers.ZeroPadding2D):
            return args[0]  # padding of a strided convolution, which now has its own
        if isinstance(layer, keras.layers.BatchNormalization) and self._variant.batch_norm_epsilon:
            config = {**layer.get_config(), "epsilon": self._variant.batch_norm_epsilon}
            return type(layer).from_config(config)(args[0])
        return clone_layer(layer, "float32")(*args, **kwargs)

    def _convolve(self, layer: Any, maps: Any) -> Any:
        config = layer.get_config()
        if self._variant.stride_in_3x3 and _FIRST_1X1.fullmatch(layer.name):
            config["strides"] = (1, 1)
        elif self._variant.stride_in_3x3 and _NEXT_3X3.fullmatch(layer.name):
            config |= {"strides": (2, 2), "padding": "valid"}
            maps = keras.layers.ZeroPadding2D(1, name=f"{layer.name}_pad")(maps)
        elif self._variant.padding == "symmetric" and max(layer.strides) > 1 and max(layer.kernel_size) > 1:
            config["padding"] = "valid"
            margin = tuple(side // 2 for side in layer.kernel_size)
            maps = keras.layers.ZeroPadding2D(margin, name=f"{layer.name}_symmetric_pad")(maps)
        return type(layer).from_config(config)(maps)

    def _final_norm(self, layer: Any, maps: Any) -> Any:
        # Normalizes each location with the mean and variance of the average over all locations. The average of the
        # result is the normalized average, as in the original model, and every other pooling has maps to work on.
        average = keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"{FINAL_NORM}_average")(maps)
        # As LayerNormalization does under mixed precision. The results below are float32 then.
        average = keras.ops.cast(average, "float32")
        mean = keras.ops.mean(average, axis=-1, keepdims=True)
        variance = keras.ops.mean(keras.ops.square(average - mean), axis=-1, keepdims=True)
        normalized = (maps - mean) * keras.ops.rsqrt(variance + layer.epsilon)
        # Scale and offset of each channel.
        return keras.layers.DepthwiseConv2D(1, name=FINAL_NORM)(normalized)
