"""Assigns the tensors of a PyTorch state dict to the layers of a Keras model, layer by layer."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from topwork.errors import DataError

# Order of the tensors in `get_weights` of each layer, by their names in PyTorch.
_KERNEL = ("weight", "bias")
_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_MAX_SHOWN = 5


def assign_layers(model: keras.Model, state: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
    """Set the weights of every layer.

    Args:
        model: Model with its final variables.
        state: Name of each tensor to its values.
        names: Prefix in the state dict of each layer with weights, by the layer's name. Layers that the model does not
            have, such as the classifier of a model without its head, are not set, and their tensors are ignored.

    Raises:
        DataError: If a layer gets nothing, a shape differs, values are not finite, or a tensor is left over.

    Example:
        ```python
        model = build_efficientnet_lite0(include_top=False)
        assign_layers(model, read_state_dict(Path("efficientnet_lite0.pth")), layer_names())
        ```
    """
    left = {name for name in state if not name.endswith(".num_batches_tracked")}
    values = {}
    for layer in _layers_with_weights(model):
        if layer.name not in names:
            raise DataError(f"The layer {layer.name} of {model.name} has no counterpart in the state dict.")
        tensors = dict(_layer_values(layer, state, names[layer.name]))
        values[layer] = list(tensors.values())
        left -= set(tensors)
    absent = set(names) - {layer.name for layer in values}
    left -= {f"{names[name]}.{suffix}" for name in absent for suffix in _KERNEL}
    if left:
        shown = ", ".join(sorted(left)[:_MAX_SHOWN]) + (", …" if len(left) > _MAX_SHOWN else "")
        raise DataError(f"The state dict contains tensors that {model.name} does not have: {shown}.")
    # Set at the end: a rejected file changes nothing.
    for layer, arrays in values.items():
        layer.set_weights(arrays)


def _layers_with_weights(model: keras.Model) -> Iterator[Any]:
    return (layer for layer in model.layers if layer.weights)


def _layer_values(layer: Any, state: Mapping[str, np.ndarray], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    suffixes = _STATISTICS if isinstance(layer, keras.layers.BatchNormalization) else _KERNEL
    for suffix, variable in zip(suffixes, layer.weights, strict=False):
        name = f"{prefix}.{suffix}"
        if name not in state:
            raise DataError(f"The state dict does not contain {name}, which the layer {layer.name} requires.")
        array = _to_keras(layer, state[name])
        if array.shape != tuple(variable.shape):
            raise DataError(
                f"{name} has shape {state[name].shape}, as {array.shape} in Keras, but the layer {layer.name} requires "
                f"{tuple(variable.shape)}."
            )
        if not np.isfinite(array).all():
            raise DataError(f"{name} contains values that are NaN or infinite.")
        yield name, array


def _to_keras(layer: Any, tensor: np.ndarray) -> np.ndarray:
    """Transpose a kernel: (out, in, height, width) or (out, in) in PyTorch. Vectors are the same in both."""
    if isinstance(layer, keras.layers.DepthwiseConv2D) and tensor.ndim == 4:
        return tensor.transpose(2, 3, 0, 1)
    if isinstance(layer, keras.layers.Conv2D) and tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if isinstance(layer, keras.layers.Dense) and tensor.ndim == 2 else tensor
